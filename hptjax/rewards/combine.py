"""Several reward functions to one reward: a weighted sum, with the first function as the judge of solved or not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from hptjax.records import Verdict

FAILURES = ("timeout", "crashed", "raised")


@dataclasses.dataclass(frozen=True, eq=False)
class Rewards:
    """What an update needs of the verdicts on N completions by K functions.

    Args
      total: sum over k of weight_k x reward_k.
      solved, reasons: the first function's word, which the gate counts.
      by_function: each function's own rewards, for the metrics.
      failures: completions x functions that timed out, crashed or raised; each of them has reward 0.
    """

    total: Float[np.ndarray, " N"]
    solved: Bool[np.ndarray, " N"]
    reasons: list[str]
    by_function: Float[np.ndarray, "N K"]
    failures: dict[str, int]


def combine(verdicts: Sequence[Sequence[Verdict]], weights: Sequence[float]) -> Rewards:
    """The rewards of completions from their verdicts [completion][function].

    Args
      weights: one finite number per function; 1.0 alone for a single function. Not normalised.
    Raises
      a weight missing, left over or not finite -> ValueError.
    """
    if not weights or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"expected a finite weight for each of reward.functions, got {list(weights)}")
    for row in verdicts:
        if len(row) != len(weights):
            raise ValueError(f"expected a weight for each of {len(row)} reward.functions, got {len(weights)} weights")
    by_function = np.asarray([[verdict.reward for verdict in row] for row in verdicts], np.float64)
    by_function = by_function.reshape(len(verdicts), len(weights))
    reasons = [verdict.reason for row in verdicts for verdict in row]
    return Rewards(
        total=by_function @ np.asarray(weights, np.float64),
        solved=np.asarray([row[0].solved for row in verdicts], bool),
        reasons=[row[0].reason for row in verdicts],
        by_function=by_function,
        failures={name: sum(reason.partition(":")[0] == name for reason in reasons) for name in FAILURES},
    )
