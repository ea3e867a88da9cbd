"""Advantages: what a completion's reward is worth beside its group's. On the host, in float64, before the split.

An advantage is a function `(rewards [N], group_ids [N]) -> advantages [N]`; each value goes to every token of its
sample. Groups are found by id, never by row order, and must be whole: statistics come before any sample is dropped.
A group of one has mean 0 and standard deviation 1, so its advantage is its reward (verl's and LUFFY's convention,
which `spec/methods.md` 10 asks for).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from hptjax import masked

AdvantageFn = Callable[[np.ndarray, np.ndarray], np.ndarray]


def ones(rewards: Float[np.ndarray, " N"], group_ids: Int[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """1 for every sample, whatever its reward: the sample is a demonstration. SFT."""
    return np.ones(rewards.shape, np.float64)


def raw_reward(rewards: Float[np.ndarray, " N"], group_ids: Int[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """The reward itself: what GAE with gamma = lambda = 1 and a value of 0 gives when the reward comes at the end.

    Source Schulman et al. 2015, arXiv 1506.02438, Eq. 16 at these settings. A critic is not part of this stack yet.
    """
    return _checked(rewards)


def signed(rewards: Float[np.ndarray, " N"], group_ids: Int[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """+1 where the reward is positive, else -1. REINFORCE of the UPGE table (arXiv 2509.04419 v2, Tab. 1)."""
    return np.where(_checked(rewards) > 0, 1.0, -1.0)


def centred(rewards: Float[np.ndarray, " N"], group_ids: Int[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """`R - mean(group)`; sums to 0 over a group of two or more; a group of one gives R.

    Source Dr.GRPO: Liu et al. 2025, arXiv 2503.20783; the advantage of the published HPT script (`spec/hpt.md` 2.2).
    """
    rewards = _checked(rewards)
    advantages = np.empty_like(rewards)
    for members in _groups(group_ids):
        advantages[members] = rewards[members] - _group_mean(rewards[members])
    return advantages


def standardised(
    rewards: Float[np.ndarray, " N"], group_ids: Int[np.ndarray, " N"], *, eps: float = 1e-6, ddof: int = 1
) -> Float[np.ndarray, " N"]:
    """`(R - mean(group)) / (std(group) + eps)`; a group of equal rewards gives 0; a group of one gives R / (1 + eps).

    Args
      eps: added to the standard deviation; reward units; 1e-6 as verl does (TRL adds 1e-4).
      ddof: 1 divides the squares by G - 1, as torch, verl and TRL do; 0 by G.
    Source GRPO: Shao et al. 2024, arXiv 2402.03300, 4.1.2; conventions: `spec/methods.md` 1.
    """
    rewards = _checked(rewards)
    advantages = np.empty_like(rewards)
    for members in _groups(group_ids):
        centred_rewards = rewards[members] - _group_mean(rewards[members])
        advantages[members] = centred_rewards / (_group_std(rewards[members], ddof) + eps)
    return advantages


def _groups(group_ids: np.ndarray) -> list[np.ndarray]:
    """Indices of the members of each group, groups in the order of their ids."""
    _, group_of, sizes = np.unique(group_ids, return_inverse=True, return_counts=True)
    return np.split(np.argsort(group_of, kind="stable"), np.cumsum(sizes)[:-1]) if sizes.size else []


def _group_mean(rewards: np.ndarray) -> float:
    # fsum is exact before its one rounding, so that a permutation of the rows cannot move the last bit
    return masked.ratio(math.fsum(rewards), float(rewards.size)) if rewards.size > 1 else 0.0


def _group_std(rewards: np.ndarray, ddof: int) -> float:
    if rewards.size == 1:
        return 1.0
    squares = (rewards - _group_mean(rewards)) ** 2
    return math.sqrt(masked.ratio(math.fsum(squares), float(rewards.size - ddof)))


def _checked(rewards: np.ndarray) -> np.ndarray:
    if not np.isfinite(rewards).all():
        raise ValueError(
            f"rewards: expected finite numbers, got {rewards[~np.isfinite(rewards)][:4]}; a verifier that fails gives"
            " reward 0, and samples without a reward do not belong to this term"
        )
    return rewards.astype(np.float64)
