"""Which judged rollouts of a step come back into an update, and how often: Shuffle-R1's two resamplers, on the host.

Both bias the estimator on purpose and carry no importance correction (`spec/methods.md` 10, 7). Draws are keyed by
seed, round and the ids of the samples, never by position. No method of the table uses them yet.

Source Shuffle-R1: arXiv 2508.05612, its code as `spec/methods.md` 5.1 reads it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from hptjax.hpt.digest import sample_hashes
from hptjax.records import SampleId


def opposed_pairs(
    advantages: Float[np.ndarray, " N"], group_ids: Int[np.ndarray, " N"], *, keep: float = 0.5
) -> Int[np.ndarray, "M 2"]:
    """Pairs of a group's best with its worst, second best with second worst, ...: the first `keep` of them.

    Pairwise trajectory sampling. Ties are taken in the order of the samples; the middle one of an odd group is in no
    pair.

    Args
      keep: share of a group's pairs that stay, rounded down; 0..1; at 1 an even group stays whole.
    Returns [M 2], (better, worse) places; groups in the order of their ids.
    Raises keep outside 0..1 -> ValueError.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep: expected a share in 0..1, got {keep}")
    pairs: list[tuple[int, int]] = []
    for group in np.unique(group_ids):
        members = np.flatnonzero(group_ids == group)
        order = members[np.argsort(-advantages[members], kind="stable")].tolist()
        kept = math.floor(keep * (len(order) // 2))
        pairs += [(order[place], order[-1 - place]) for place in range(kept)]
    return np.asarray(pairs, np.int64).reshape(-1, 2)


def draw_by_weight(
    weights: Float[np.ndarray, " M"],
    sample_ids: Sequence[SampleId],
    *,
    count: int,
    rounds: int,
    seed: int,
    power: float = 1.0,
) -> Int[np.ndarray, " R"]:
    """`rounds` draws of `count` places without replacement, each with chances proportional to weight^power.

    Advantage-based batch shuffle: weights |A| + |A'| of the pairs, 8 rounds; a pair may come in several rounds, and
    once in each. With equal weights a round is a uniform subsample. A weight of 0 is never drawn, so a round may fall
    short.

    Args
      weights: >= 0. sample_ids: of each pair's better sample, say; what the draw is keyed by.
    Raises a negative weight, or lengths that differ -> ValueError.
    """
    if len(sample_ids) != len(weights) or (weights < 0).any():
        raise ValueError(
            f"expected {len(sample_ids)} weights >= 0, got {len(weights)}, least {min(weights, default=0)}"
        )
    words = sample_hashes(list(sample_ids)).astype(np.uint64)
    keys = (words[:, 0] << np.uint64(32)) | words[:, 1]
    drawn = []
    for number in range(rounds):
        # exponential races: the first `count` arrivals at these rates are a draw without replacement
        uniform = np.array([np.random.default_rng([seed, number, int(key)]).random() for key in keys])
        rates = np.asarray(weights, np.float64) ** power
        arrival = np.where(weights > 0, -np.log1p(-uniform) / np.where(weights > 0, rates, 1.0), np.inf)
        order = np.argsort(arrival, kind="stable")[:count]
        drawn.append(order[np.isfinite(arrival[order])])
    return np.concatenate(drawn) if drawn else np.zeros(0, np.int64)
