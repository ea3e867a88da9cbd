"""Advantages per token: return-to-go, whitening, GAE. On the host, in float64, over the tokens of a whole update.

Tokens are flat: the completion tokens of sample 0, then those of sample 1, ...; `lengths [N]` cuts them, X is their
number. Nothing crosses from one sample to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from hptjax import masked
from hptjax.losses.advantages import finite_rewards
from hptjax.losses.words import said

TokenAdvantageFn = Callable[[Any, Any, Any], Any]
"""(rewards [N], group_ids [N], lengths [N]) -> advantages [X], for methods whose advantage differs between tokens."""


def reward_at_end(rewards: Float[np.ndarray, " N"], lengths: Int[np.ndarray, " N"]) -> Float[np.ndarray, " X"]:
    """Token rewards: each sample's reward on its last token, 0 before. A sample of length 0 has none."""
    token_rewards = np.zeros(int(lengths.sum()), np.float64)
    written = lengths > 0
    token_rewards[np.cumsum(lengths)[written] - 1] = rewards[written]
    return token_rewards


def return_to_go(
    token_rewards: Float[np.ndarray, " X"], lengths: Int[np.ndarray, " N"], *, gamma: float = 1.0
) -> Float[np.ndarray, " X"]:
    """`G_t = r_t + gamma * G_{t+1}` within each sample; reward units.

    Args
      gamma: 0 < gamma <= 1.
    """
    returns = np.array(token_rewards, np.float64)
    for start, stop in _spans(returns, lengths):
        for t in range(stop - 2, start - 1, -1):
            returns[t] += gamma * returns[t + 1]
    return returns


def whitened(
    values: Float[np.ndarray, " X"], valid: Bool[np.ndarray, " X"] | None = None, *, eps: float = 1e-8
) -> Float[np.ndarray, " X"]:
    """`(value - mean) / sqrt(variance + eps)` over the valid tokens of the whole update, ddof 1; 0 elsewhere.

    A single valid token has no variance and gives 0.
    Args
      eps: on the variance; 1e-8 as in verl's masked_whiten (from memory, not verified).
    """
    values = np.asarray(values, np.float64)
    chosen = np.ones(values.shape, bool) if valid is None else valid
    count = int(chosen.sum())
    out = np.zeros(values.shape, np.float64)
    if count > 1:
        centred = values[chosen] - masked.mean(values[chosen])
        variance = masked.ratio(float(np.square(centred).sum()), count - 1)
        out[chosen] = centred * masked.inverse_count(float(np.sqrt(variance + eps)))
    return out


@said("whitened return-to-go")
def reinforce_pp_advantages(
    rewards: Float[np.ndarray, " N"],
    group_ids: Int[np.ndarray, " N"],
    lengths: Int[np.ndarray, " N"],
    *,
    gamma: float = 1.0,
) -> Float[np.ndarray, " X"]:
    """Return-to-go of the reward at the end, whitened over the tokens of the update. No group has a say.

    Source REINFORCE++: arXiv 2501.03262; as in verl.
    """
    return whitened(return_to_go(reward_at_end(finite_rewards(rewards), lengths), lengths, gamma=gamma))


class Gae(NamedTuple):
    """Advantages, and the returns that the critic is fitted to; flat, 0 on tokens that are not valid."""

    advantages: Float[np.ndarray, " X"]
    returns: Float[np.ndarray, " X"]


def gae(
    token_rewards: Float[np.ndarray, " X"],
    values: Float[np.ndarray, " X"],
    lengths: Int[np.ndarray, " N"],
    *,
    gamma: float = 1.0,
    smoothing: float = 0.95,
    valid: Bool[np.ndarray, " X"] | None = None,
) -> Gae:
    """Generalised advantages: `A_t = delta_t + gamma * smoothing * A_{t+1}`, `delta_t = r_t + gamma V_{t+1} - V_t`.

    Args
      values: the critic's, at sampling weights. After a sample's last token the value is 0.
      smoothing: the papers' lambda; 0.95. gamma: 1 for language models.
      valid: False on tokens that the policy did not write (a tool's answer): V_{t+1} and A_{t+1} pass through them
        unchanged, and their reward is not looked at.
    Source Schulman et al. 2015, arXiv 1506.02438, Eq. 16; masking as in verl.
    """
    rewards = np.asarray(token_rewards, np.float64)
    advantages, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
    chosen = np.ones(rewards.shape, bool) if valid is None else valid
    for start, stop in _spans(rewards, lengths):
        next_value = next_advantage = 0.0
        for t in range(stop - 1, start - 1, -1):
            if not chosen[t]:
                continue
            delta = rewards[t] + gamma * next_value - values[t]
            next_advantage = advantages[t] = delta + gamma * smoothing * next_advantage
            next_value = float(values[t])
            returns[t] = advantages[t] + values[t]
    return Gae(advantages, returns)


def explained_variance(values: Float[np.ndarray, " X"], returns: Float[np.ndarray, " X"]) -> float:
    """`1 - variance(return - value) / variance(return)`: 1 for a perfect critic, 0 for a constant one.

    Returns that are all equal leave nothing to explain and give 0.
    """
    spread = float(np.var(np.asarray(returns, np.float64)))
    left = float(np.var(np.asarray(returns, np.float64) - values))
    return 1.0 - masked.ratio(left, spread) if spread > 0.0 else 0.0


def _spans(tokens: np.ndarray, lengths: np.ndarray) -> list[tuple[int, int]]:
    stops = np.cumsum(lengths)
    if (lengths < 0).any() or int(lengths.sum()) != tokens.size:
        raise ValueError(
            f"lengths: expected counts >= 0 that add up to {tokens.size} tokens, got {lengths.tolist()[:8]}"
        )
    return list(zip((stops - lengths).tolist(), stops.tolist(), strict=True))
