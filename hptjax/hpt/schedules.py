"""Coefficients that change over a run, as functions of the rollout batches done so far."""

from __future__ import annotations

import math
from collections.abc import Callable

from hptjax.losses.words import said
from hptjax.masked import ratio

Schedule = Callable[[int], float]
"""Steps done in the stage, from 0 -> a factor."""


def constant(value: float) -> Schedule:
    """`value`, always."""
    return said(f"{value:g}")(lambda step: value)


def linear(start: float, end: float, steps: int) -> Schedule:
    """From `start` to `end` over `steps`, then `end`. KDRL anneals its teacher this way."""
    words = said(f"{start:g} to {end:g} in {steps} steps")
    return words(lambda step: end if step >= steps else start + (end - start) * ratio(float(step), float(steps)))


def rise_and_fall(peak: float, valley: float, rise_steps: int, fall_steps: int) -> Schedule:
    """Linear from 0 to `peak` over `rise_steps`, half a cosine down to `valley` over `fall_steps`, then `valley`.

    Source CHORD's mu: arXiv 2508.11408, as `spec/methods.md` 4.4 reads its code.
    """

    @said(f"mu, 0 to {peak:g} in {rise_steps}, to {valley:g} in {fall_steps} steps")
    def value(step: int) -> float:
        if step < rise_steps:
            return peak * ratio(float(step), float(rise_steps))
        if step >= rise_steps + fall_steps:
            return valley
        share = ratio(float(step - rise_steps), float(fall_steps))
        return valley + (peak - valley) * (1.0 + math.cos(math.pi * share)) / 2.0

    return value
