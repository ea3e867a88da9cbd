"""Advantages: what a completion's reward is worth beside its group's. On the host, in float64, before the split.

An advantage is a function `(rewards [N], group_ids [N]) -> advantages [N]`; each value goes to every token of its
sample. Groups are found by id, never by row order, and must be whole: statistics come before any sample is dropped.
A group of one has mean 0 and standard deviation 1, so its advantage is its reward (verl's and LUFFY's convention,
which `spec/methods.md` 10 asks for).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from hptjax import masked
from hptjax.losses.words import said

AdvantageFn = Callable[[np.ndarray, np.ndarray], np.ndarray]


@said("1")
def ones(rewards: Float[np.ndarray, " N"], group_ids: Int[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """1 for every sample, whatever its reward: the sample is a demonstration. SFT."""
    return np.ones(rewards.shape, np.float64)


@said("R")
def raw_reward(rewards: Float[np.ndarray, " N"], group_ids: Int[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """The reward itself: what GAE with gamma = lambda = 1 and a value of 0 gives when the reward comes at the end.

    Source Schulman et al. 2015, arXiv 1506.02438, Eq. 16 at these settings.
    """
    return finite_rewards(rewards)


@said("+1 or -1")
def signed(rewards: Float[np.ndarray, " N"], group_ids: Int[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """+1 where the reward is positive, else -1. REINFORCE of the UPGE table (arXiv 2509.04419 v2, Tab. 1)."""
    return np.where(finite_rewards(rewards) > 0, 1.0, -1.0)


@said("R - mean")
def centred(
    rewards: Float[np.ndarray, " N"],
    group_ids: Int[np.ndarray, " N"],
    *,
    in_baseline: Bool[np.ndarray, " N"] | None = None,
) -> Float[np.ndarray, " N"]:
    """`R - mean(group)`; sums to 0 over a group of two or more; a group of one gives R.

    Args
      in_baseline: whose rewards make the mean; None: all of the group. LUFFY and SRFT take the union of rollouts and
        demonstration; True on the rollouts alone keeps the demonstration out of the baseline it is judged by.
    Source Dr.GRPO: Liu et al. 2025, arXiv 2503.20783; the advantage of the published HPT script (`spec/hpt.md` 2.2).
    """
    rewards = finite_rewards(rewards)
    advantages = np.empty_like(rewards)
    for members in _groups(group_ids):
        advantages[members] = rewards[members] - _group_mean(rewards[_counted(members, in_baseline)])
    return advantages


@said("(R - mean) / std")
def standardised(
    rewards: Float[np.ndarray, " N"],
    group_ids: Int[np.ndarray, " N"],
    *,
    eps: float = 1e-6,
    ddof: int = 1,
    in_baseline: Bool[np.ndarray, " N"] | None = None,
) -> Float[np.ndarray, " N"]:
    """`(R - mean(group)) / (std(group) + eps)`; a group of equal rewards gives 0; a group of one gives R / (1 + eps).

    Args
      eps: added to the standard deviation; reward units; 1e-6 as verl does (TRL adds 1e-4).
      ddof: 1 divides the squares by G - 1, as torch, verl and TRL do; 0 by G.
      in_baseline: as in `centred`, for mean and standard deviation.
    Source GRPO: Shao et al. 2024, arXiv 2402.03300, 4.1.2; conventions: `spec/methods.md` 1.
    """
    rewards = finite_rewards(rewards)
    advantages = np.empty_like(rewards)
    for members in _groups(group_ids):
        counted = rewards[_counted(members, in_baseline)]
        advantages[members] = (rewards[members] - _group_mean(counted)) / (_group_std(counted, ddof) + eps)
    return advantages


@said("R - mean of the others")
def leave_one_out(rewards: Float[np.ndarray, " N"], group_ids: Int[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """`R - mean of the others in the group` = G / (G - 1) times `centred`; a group of one gives R.

    Source RLOO: Ahmadian et al. 2024, arXiv 2402.14740.
    """
    rewards = finite_rewards(rewards)
    advantages = np.empty_like(rewards)
    for members in _groups(group_ids):
        others = max(members.size - 1, 1)
        centre = _group_mean(rewards[members])
        advantages[members] = (rewards[members] - centre) * masked.ratio(members.size, others)
    return advantages


@said("(R - mean) / std of the update")
def batch_standardised(
    rewards: Float[np.ndarray, " N"], group_ids: Int[np.ndarray, " N"], *, eps: float = 1e-6, ddof: int = 1
) -> Float[np.ndarray, " N"]:
    """`(R - mean(group)) / (std of all centred rewards of the update + eps)`: one scale for easy and hard questions.

    Args
      eps, ddof: as in `standardised`.
    Source the group-centred variant of REINFORCE++, arXiv 2501.03262 (not verified beyond `spec/methods.md` 9).
    """
    advantages = centred(rewards, group_ids)
    return advantages / (_group_std(advantages, ddof) + eps) if advantages.size else advantages


class PrefixAdvantages(NamedTuple):
    """What the tokens of a sample are worth: those the policy wrote, and those of the forced prefix (0 if none)."""

    continuation: Float[np.ndarray, " N"]
    prefix: Float[np.ndarray, " N"]


def prefix_hierarchy(
    rewards: Float[np.ndarray, " N"], group_ids: Int[np.ndarray, " N"], prefix_ids: Int[np.ndarray, " N"]
) -> PrefixAdvantages:
    """Baselines by question and prefix: a continuation against its own prefix's others, a prefix against free rollouts.

        continuation = (R - mean(question, prefix)) / (std(question, prefix) + 1e-6), R / (1 + 1e-6) if it is alone
        prefix       = (R - mean(free rollouts of the question)) / rollouts with that prefix

    Args
      prefix_ids: 0 is a free rollout; rollouts of a question with the same forced prefix share a number > 0.
    Returns a question without free rollouts has a baseline of 0 for its prefixes.
    Source Prefix-RFT: arXiv 2507.01679, as `spec/methods.md` 4.6 reads its code.
    """
    rewards = finite_rewards(rewards)
    _, subgroup_of = np.unique(np.stack([group_ids, prefix_ids]), axis=1, return_inverse=True)
    subgroup_of = subgroup_of.reshape(-1)
    continuation = standardised(rewards, subgroup_of)
    prefix = np.zeros_like(rewards)
    for members in _groups(group_ids):
        free = members[prefix_ids[members] == 0]
        baseline = masked.mean(rewards[free]) if free.size else 0.0
        forced = members[prefix_ids[members] != 0]
        sizes = np.asarray([float((subgroup_of == subgroup_of[i]).sum()) for i in forced])
        prefix[forced] = (rewards[forced] - baseline) * masked.inverse_counts(sizes)
    return PrefixAdvantages(continuation, prefix)


def overlong_penalty(lengths: Int[np.ndarray, " N"], max_tokens: int, cushion_tokens: int) -> Float[np.ndarray, " N"]:
    """What a completion's length takes from its reward: 0, then down a slope to -1; reward units.

        0 up to max - cushion        (max - cushion - length) / cushion up to max        -1 beyond

    Args
      lengths: completion tokens. cushion_tokens: 1..max_tokens; DAPO 4096 of 20480.
    Raises cushion_tokens outside 1..max_tokens -> ValueError.
    Source DAPO: arXiv 2503.14476. verl scales it by a factor.
    """
    if not 1 <= cushion_tokens <= max_tokens:
        raise ValueError(f"cushion_tokens: expected 1..{max_tokens}, got {cushion_tokens}")
    over = lengths.astype(np.float64) - (max_tokens - cushion_tokens)
    return -np.clip(over * masked.inverse_count(cushion_tokens), 0.0, 1.0)


def _groups(group_ids: np.ndarray) -> list[np.ndarray]:
    """Indices of the members of each group, groups in the order of their ids."""
    _, group_of, sizes = np.unique(group_ids, return_inverse=True, return_counts=True)
    return np.split(np.argsort(group_of, kind="stable"), np.cumsum(sizes)[:-1]) if sizes.size else []


def _counted(members: np.ndarray, in_baseline: np.ndarray | None) -> np.ndarray:
    return members if in_baseline is None else members[in_baseline[members]]


def _group_mean(rewards: np.ndarray) -> float:
    # fsum is exact before its one rounding, so that a permutation of the rows cannot move the last bit
    return masked.ratio(math.fsum(rewards), float(rewards.size)) if rewards.size > 1 else 0.0


def _group_std(rewards: np.ndarray, ddof: int) -> float:
    if rewards.size <= 1:
        return 1.0
    squares = (rewards - _group_mean(rewards)) ** 2
    return math.sqrt(masked.ratio(math.fsum(squares), float(rewards.size - ddof)))


def finite_rewards(rewards: np.ndarray) -> np.ndarray:
    """The rewards in float64. Raises ValueError for one that is missing, NaN or infinite."""
    if not np.isfinite(rewards).all():
        raise ValueError(
            f"rewards: expected finite numbers, got {rewards[~np.isfinite(rewards)][:4]}; a verifier that fails gives"
            " reward 0, and samples without a reward do not belong to this term"
        )
    return rewards.astype(np.float64)
