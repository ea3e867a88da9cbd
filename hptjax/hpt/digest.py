"""Hashes of sample ids, and digests that see a lost or a repeated sample in any order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt32

from hptjax.records import SampleId

UNDRAWN_INDEX = -2  # rollouts count from 0, and a demonstration has -1


def sample_hashes(sample_ids: Sequence[SampleId]) -> UInt32[np.ndarray, "N 2"]:
    """64 mixed bits of each id, as two words: splitmix64's finaliser over the three numbers of the id."""
    state = np.zeros(len(sample_ids), np.uint64)
    if len(sample_ids):
        for column in np.asarray(sample_ids, np.int64).astype(np.uint64).T:
            state = _mix(state + column + np.uint64(0x9E3779B97F4A7C15))
    return np.stack([state >> np.uint64(32), state & np.uint64(0xFFFFFFFF)], axis=1).astype(np.uint32)


def draw(question: int, visit: int, seed: int) -> float:
    """A number in [0, 1), as good as random: the mixed bits of the id of a sample nobody makes."""
    high, low = sample_hashes([SampleId(question, visit, UNDRAWN_INDEX - seed)])[0].tolist()
    return ((high << 32 | low) >> 11) * 2.0**-53


def digest(hashes: UInt32[np.ndarray, "N 2"]) -> UInt32[np.ndarray, " 2"]:
    """The sum of the hashes, each word modulo 2^32: equal for equal multisets of ids, in any order.

    A sum sees a repeated id, where the xor of a pair cancels; and devices can add across a mesh, but not xor.
    """
    return hashes.sum(axis=0, dtype=np.uint32)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014), elementwise on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
