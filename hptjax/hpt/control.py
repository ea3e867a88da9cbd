"""Coefficients that follow what is measured: pure functions of a saved number and a score pass.

A controller is `(numbers so far, scored updates of the step) -> (numbers for this step, numbers to keep)`. The first
reach the terms' coefficients, and so the planes' weights, and nothing recompiles; the second are saved with the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from hptjax import masked
from hptjax.hpt.refine import ScoredUpdate
from hptjax.losses.entropy import entropy_coefficient_in_use, next_entropy_coefficient

Controls = Mapping[str, float]

Control = Callable[[Controls, Sequence[ScoredUpdate]], tuple[Controls, Controls]]


def entropy_control(*, start: float, target: float, delta: float) -> Control:
    """The coefficient of the entropy bonus, towards a target entropy of the rollouts' tokens at sampling weights.

        in use: alpha where H <= target, else 0        kept: max(alpha + delta if H <= target else alpha - delta, 0)

    H is the mean over the tokens of all updates of a step. A step without rollouts has no H: alpha waits, unused.

    Args
      start: alpha of the first step. target: nats per token. delta: > 0.
    Source Skywork-OR1 as in TRL's index (`spec/methods.md` 2.13).
    """

    def control(controls: Controls, updates: Sequence[ScoredUpdate]) -> tuple[Controls, Controls]:
        alpha = controls.get("entropy", start)
        entropies = np.concatenate([np.zeros(0), *(update.flat("rl", "entropy") for update in updates)])
        if not entropies.size:
            return {"entropy": 0.0}, {"entropy": alpha}
        mean = float(masked.mean(entropies))
        in_use = entropy_coefficient_in_use(alpha, mean, target=target)
        return {"entropy": in_use}, {"entropy": next_entropy_coefficient(alpha, mean, target=target, step=delta)}

    return control
