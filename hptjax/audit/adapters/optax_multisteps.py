"""`optax.MultiSteps` under audit, in both its modes, around clipping and SGD with a schedule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hptjax.audit.adapters.jax_loop import linear_arrays, token_losses
from hptjax.audit.job import Gradients, Job, Unsupported


def mean_target(job: Job) -> list[np.ndarray] | Gradients:
    """The default mode: a running mean of micro-batch gradients, each of the mean loss of its micro-batch."""
    return run(job, use_grad_mean=True)


def sum_target(job: Job) -> list[np.ndarray] | Gradients:
    """`use_grad_mean=False`: a sum of micro-batch gradients, each divided by the window's token count beforehand."""
    return run(job, use_grad_mean=False)


def run(job: Job, *, use_grad_mean: bool) -> list[np.ndarray] | Gradients:
    """Parameters after every update.

    Where a NaN came up, the gradients that were emitted instead, which parameters no longer show, and what was emitted
    before the windows were complete.
    """
    if job.model != "linear" or job.ranks > 1:
        raise Unsupported("MultiSteps is run on the linear model and one device")
    lengths = tuple(len(window) for window in job.windows)
    optimizer, step = _compiled(lengths, job.learning_rates, job.clip_norm, use_grad_mean)
    theta = jnp.asarray(job.parameters).astype(job.parameter_dtype)
    state = optimizer.init(theta)
    after, emitted, between = [], [], []
    for s, window in enumerate(job.windows):
        arrays = linear_arrays(window)
        tokens = sum(int(mask.sum()) for _, mask in arrays)
        early = jnp.zeros(theta.shape, jnp.float32)
        for index, (features, mask) in enumerate(arrays):
            divisor = max(int(mask.sum()), 1) if use_grad_mean else tokens
            theta, state, update = step(theta, state, (features, mask), np.float32(divisor))
            if index < len(arrays) - 1:
                early = early + update
        after.append(np.asarray(theta))
        emitted.append(np.asarray(-update / np.float32(job.learning_rates[s])))
        between.append(np.asarray(early))
    if all(np.all(np.isfinite(parameters)) for parameters in after):
        return after
    return Gradients(applied=emitted, between=between)


@functools.lru_cache
def _compiled(
    lengths: tuple[int, ...], learning_rates: tuple[float, ...], clip_norm: float | None, use_grad_mean: bool
) -> tuple[optax.MultiSteps, Callable[[Any, Any, Any, Any], tuple[Any, Any, Any]]]:
    """The optimizer, and (parameters, state, micro-batch, divisor of its gradient) -> (parameters, state, update)."""
    rates = np.asarray(learning_rates, np.float32)
    inner = optax.sgd(lambda count: jnp.asarray(rates)[count])
    if clip_norm is not None:
        inner = optax.chain(optax.clip_by_global_norm(clip_norm), inner)
    optimizer = optax.MultiSteps(
        inner,
        every_k_schedule=lambda step: jnp.take(jnp.asarray(lengths), step, mode="clip"),
        use_grad_mean=use_grad_mean,
    )

    def step(theta: Any, state: Any, batch: Any, divisor: Any) -> tuple[Any, Any, Any]:
        gradient = jax.grad(token_losses)(theta, batch) / divisor.astype(theta.dtype)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes the dtypes of its sums and its parameters
            update, state = optimizer.update(gradient, state, theta)
            theta = optax.apply_updates(theta, update)
        return theta, state, update.astype(jnp.float32)

    return optimizer, jax.jit(step)
