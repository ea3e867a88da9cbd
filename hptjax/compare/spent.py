"""What a run had spent after each of its steps, and where it stood within a budget."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from hptjax.build.evaluation import read_counts
from hptjax.diagnostics.passk import pass_at_k
from hptjax.masked import ratio
from hptjax.train.jsonl import read_rows

AXES = ("updates", "tokens", "flops")


@dataclasses.dataclass(frozen=True)
class Spent:
    """What a run had spent after each of its steps, from its metrics; index 0 is before the first."""

    updates: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray

    def on(self, axis: str) -> np.ndarray:
        """The one that `axis` names."""
        return {"updates": self.updates, "tokens": self.tokens, "flops": self.flops}[axis]

    def total(self) -> dict[str, float]:
        """What the whole run spent, by axis."""
        return {axis: float(self.on(axis)[-1]) for axis in AXES}


def read_spent(folder: Path) -> Spent:
    """Cumulative updates, tokens and FLOPs of a run after each step."""
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "witness/ok" in row]
    parameters = json.loads((folder / "data.json").read_text(encoding="utf-8"))["parameters"]

    def cumulative(values: Sequence[float]) -> np.ndarray:
        return np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])

    return Spent(
        updates=cumulative([row["train/updates"] for row in rows]),
        tokens=cumulative([row["perf/generated_tokens"] + row["perf/trained_tokens"] for row in rows]),
        flops=cumulative(
            [
                2.0 * parameters * (row["perf/generated_tokens"] + row["perf/prefilled_tokens"])
                + 6.0 * parameters * row["perf/packed_tokens"]
                for row in rows
            ]
        ),
    )


def step_within(folder: Path, budget: float, axis: str) -> float:
    """The step, with its fraction, at which a run had spent the budget; its end if it never had.

    Between two steps the spending is taken as even.
    """
    spent = read_spent(folder).on(axis)
    return float(np.interp(budget, spent, np.arange(spent.size)))


def ended_before(folder: Path, budget: float, axis: str) -> bool:
    """Whether a run ended with less than the budget spent; it is then read at its end."""
    return bool(read_spent(folder).on(axis)[-1] < budget * (1 - 1e-9))


def evaluated_steps(folder: Path, split: str = "test") -> list[int]:
    """The steps after which a run measured the questions of a split."""
    return sorted(int(path.stem.split("_")[1]) for path in (folder / "evaluations").glob(f"{split}_*.json"))


def values_at(folder: Path, step: float, k: int, split: str = "test") -> Float[np.ndarray, " Q"]:
    """pass@k per question at a step between two evaluations, on the straight line between them."""
    evaluated = evaluated_steps(folder, split)
    after = next((other for other in evaluated if other >= step), evaluated[-1])
    before = max((other for other in evaluated if other <= step), default=after)
    share = ratio(step - before, after - before) if after > before else 0.0
    left, right = (pass_at_k(*read_counts(folder, split, other), k) for other in (before, after))
    return left + share * (right - left)


def nearest_evaluation(folder: Path, step: float) -> int:
    """The evaluated step of the test questions that lies nearest; the earlier of two."""
    return min(evaluated_steps(folder), key=lambda other: (abs(other - step), other))
