"""A plain JAX accumulation loop under audit: one jitted gradient, fp32 sums, one division per window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hptjax.audit.job import Batch, Job, LinearBatch, Unsupported


def token_losses(theta: Any, batch: Any) -> Any:
    """Sum of features . theta over the live tokens."""
    features, mask = batch
    scores = jnp.einsum("btf,f->bt", features, theta.astype(jnp.float32), precision="highest")
    return jnp.sum(jnp.where(mask, scores, 0.0))


def linear_arrays(window: Sequence[Batch]) -> list[tuple[Any, Any]]:
    """(features, mask) of every micro-batch."""
    return [
        (jnp.asarray(batch.features), jnp.asarray(batch.mask)) for batch in window if isinstance(batch, LinearBatch)
    ]


@jax.jit
def accumulate(theta: Any, total: Any, batch: Any) -> Any:
    """The sum with one more micro-batch."""
    return total + jax.grad(token_losses)(theta, batch).astype(jnp.float32)


def target(job: Job) -> list[np.ndarray]:
    """Parameters after every update."""
    if job.model != "linear" or job.ranks > 1:
        raise Unsupported("the plain loop runs the linear model on one device")
    theta, after = jnp.asarray(job.parameters).astype(job.parameter_dtype), []
    clip = optax.identity() if job.clip_norm is None else optax.clip_by_global_norm(job.clip_norm)
    for window, rate in zip(job.windows, job.learning_rates, strict=False):
        total = jnp.zeros(theta.shape, jnp.float32)
        tokens = 0
        for features, mask in linear_arrays(window):
            total = accumulate(theta, total, (features, mask))
            tokens += int(mask.sum())
        gradient, _ = clip.update(total / np.float32(tokens), clip.init(theta))
        theta = (theta.astype(jnp.float32) - np.float32(rate) * gradient).astype(theta.dtype)
        after.append(np.asarray(theta))
    return after
