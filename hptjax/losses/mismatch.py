"""Importance weights between trainer and sampler over a whole update. On the host, in float64, before the split.

The same weights as `weights.py`, for methods that normalise them to mean 1: the mean is one of the whole update.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int

from hptjax import masked


def truncated_weights(
    log_ratio: Float[np.ndarray, " X"],
    lengths: Int[np.ndarray, " N"],
    *,
    cap: float = 2.0,
    whole_sequence: bool = False,
) -> Float[np.ndarray, " X"]:
    """`min(rho, cap)` per token, or of each sequence's product on all its tokens.

    Args
      log_ratio: rollout_logprobs - sampler_logprobs of the live tokens, sample after sample; nats.
      lengths: live tokens of each sample.
    Raises cap <= 0 -> ValueError.
    """
    if not cap > 0:
        raise ValueError(f"cap: expected a number > 0, got {cap}")
    log_weights = np.asarray(log_ratio, np.float64)
    if whole_sequence:
        sums = np.zeros(lengths.size)
        np.add.at(sums, np.repeat(np.arange(lengths.size), lengths), log_weights)
        log_weights = np.repeat(sums, lengths)
    return np.exp(np.minimum(log_weights, math.log(cap)))


def scale_to_mean_one(weights: Float[np.ndarray, " X"]) -> float:
    """`1 / mean(weights)` over the update: the `scale` of `weights.token_tis`; 0 for an update without tokens."""
    return masked.inverse_count(float(masked.mean(weights))) if weights.size else 0.0
