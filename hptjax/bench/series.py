"""What the suite measures: the series, how the settings of a point follow from it, and what is expected. No jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hptjax.bench import fit
from hptjax.bench.sizes import Sizes, mixed_settings, step_settings, update_settings

MEMORY = "memory"
"""The name by which a fit asks for the peak memory of a point, in MiB, in place of one of its times."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """One number about a series, with what it is expected to be.

    Args
      what: in words; `{first}` and `{last}` are the points that it is about.
      how: (xs, ys) -> the number. of: which figure of the points: a name of `Series.figures`, or MEMORY.
      first: place of the first point that counts; those after it count too.
      low, high: between which the number is expected. scale: what it is multiplied by.
    """

    what: str
    how: Callable[[Sequence[float], Sequence[float]], float]
    of: str
    low: float
    high: float
    first: int = 0
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Series:
    """One way in which the work grows.

    Args
      axis: what grows, as a table's heading. counted: the name of the count that is the x of a point; None: the point
        itself. figures: what is measured, name -> heading; the first one is also given per unit of x, if `per` says
        what that is called.
      settings: (sizes, point) -> values of a config.
      expected: in words, what is expected of it and why.
    """

    name: str
    title: str
    axis: str
    figures: Mapping[str, str]
    settings: Callable[[Sizes, int], dict[str, Any]]
    expected: str
    fits: tuple[Fit, ...]
    counted: str | None = None
    per: str | None = None


STEP = {"step": "step, s", "rollout": "its rollouts, s", "update": "its update, s"}
FLAT = (0.9, 1.1)
NO_MORE_THAN_LINEAR = (0.5, 1.1)

SERIES: tuple[Series, ...] = (
    Series(
        name="micro_batches",
        title="Micro-batches in an update",
        axis="micro-batches",
        figures={"step": "step of SFT, s"},
        per="s per micro-batch",
        settings=update_settings,
        expected="time in proportion, because each is one pass through one compiled program; memory flat, because a "
        "gradient is added to one sum as soon as it is there.",
        fits=(
            Fit("seconds per micro-batch, {last} over {first}", fit.per_unit, "step", *FLAT, first=2),
            Fit("exponent of the time, from {first} to {last}", fit.exponent, "step", 0.9, 1.1, first=2),
            Fit("memory, {last} over {first}", fit.growth, MEMORY, *FLAT),
        ),
    ),
    Series(
        name="response_length",
        title="Tokens of a response",
        axis="response tokens",
        figures=STEP,
        per="s per token",
        settings=lambda sizes, point: step_settings(sizes, response=point),
        expected="time between the first power (weights) and the second (attention); the micro-batch keeps its tokens "
        "and has fewer rows, so its memory grows with attention's scores alone, and that of rollouts with the cache.",
        fits=(
            Fit("exponent of the rollouts' time, from {first} to {last}", fit.exponent, "rollout", 0.8, 2.0),
            Fit("exponent of the update's time, from {first} to {last}", fit.exponent, "update", 0.8, 2.0),
            Fit("memory, {last} over {first}", fit.growth, MEMORY, 0.9, 2.0),
        ),
    ),
    Series(
        name="group_size",
        title="Rollouts per question",
        axis="rollouts per question",
        figures=STEP,
        per="s per rollout of each question",
        settings=lambda sizes, point: step_settings(sizes, group=point),
        expected="time in proportion once a group fills its slots, less than that before; memory flat, because slots "
        "and micro-batches keep their sizes.",
        fits=(
            Fit(
                "seconds per rollout of each question, {last} over {first}",
                fit.per_unit,
                "step",
                *NO_MORE_THAN_LINEAR,
                first=1,
            ),
            Fit("memory, {last} over {first}", fit.growth, MEMORY, *FLAT),
        ),
    ),
    Series(
        name="model_size",
        title="Parameters of the model",
        axis="parameters",
        counted="parameters",
        figures=STEP,
        settings=lambda sizes, point: step_settings(sizes, hidden=point),
        expected="time at most in proportion, and less while a model is so small that fixed costs count; 16 bytes of "
        "memory per parameter that stay (weights, the gradient's sum, two moments), and up to four copies more while "
        "an update is made.",
        fits=(
            Fit("exponent of the time, from {first} to {last}", fit.exponent, "step", 0.3, 1.1, first=1),
            Fit("bytes per parameter, between {first} and {last}", fit.slope, MEMORY, 16.0, 32.0, scale=2.0**20),
        ),
    ),
    Series(
        name="questions",
        title="Questions in a step",
        axis="questions",
        figures=STEP,
        per="s per question",
        settings=lambda sizes, point: step_settings(sizes, questions=point),
        expected="time in proportion, or a little less; memory flat, because slots and micro-batches keep their sizes.",
        fits=(
            Fit("seconds per question, {last} over {first}", fit.per_unit, "step", *NO_MORE_THAN_LINEAR),
            Fit("memory, {last} over {first}", fit.growth, MEMORY, *FLAT),
        ),
    ),
    Series(
        name="mixed_lengths",
        title="Rollouts of mixed lengths",
        axis="requests",
        counted="requests",
        figures={
            "continuous": "slots that are filled again, s",
            "static": "a batch at a time, s",
            "ratio": "static / continuous",
        },
        settings=mixed_settings,
        expected="lengths are geometric with a mean of about a quarter of the limit; a static batch of the same engine "
        "waits for its longest row, so twice the time is asked for.",
        fits=(Fit("static over continuous, at {last}", fit.last, "ratio", 2.0, math.inf),),
    ),
)
BY_NAME: Mapping[str, Series] = {series.name: series for series in SERIES}


def chosen(only: str | None) -> list[Series]:
    """The series that are named, separated by commas, in the suite's own order; all of them for None.

    Raises no name, one that is unknown, one twice -> ValueError.
    """
    if only is None:
        return list(SERIES)
    names = [name.strip() for name in only.split(",") if name.strip()]
    if not names or len(set(names)) != len(names) or not set(names) <= set(BY_NAME):
        raise ValueError(f"expected distinct series among {', '.join(BY_NAME)}, got '{only}'; change --only.")
    return [series for series in SERIES if series.name in names]
