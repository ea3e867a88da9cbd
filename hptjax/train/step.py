"""What happens in one micro-batch: forward, one fused backward, add, and at the window's end the update.

    micro_step(state, micro_batch, is_last) -> state

One compilation serves every number of micro-batches. The update is emitted by `lax.cond`, never by a multiply, so a
NaN in a window can neither leak into parameters nor survive into the next window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float, Int

from hptjax.train.accumulate import (
    EXACT_FLOAT32_INTEGERS,
    Status,
    add,
    all_finite,
    first_disagreement,
    witness_agrees,
    witness_loss,
    zero_sums,
)
from hptjax.train.state import LIMB, Chain, Report, Totals, TrainState, Window, empty_window
from hptjax.types import Array, MicroBatch, Params, Peak, Stat, SumCount

Losses = Callable[[Mapping[str, Params], MicroBatch], tuple[dict[str, Any], dict[str, Stat]]]
"""Named parameter trees and a micro-batch -> named scalar losses (sums, never means) and named statistics."""


def merge_stat(left: Stat, right: Stat) -> Stat:
    """Sums and counts add, peaks take the larger."""
    if isinstance(left, SumCount) and isinstance(right, SumCount):
        return SumCount(total=left.total + right.total, count=left.count + right.count)
    if isinstance(left, Peak) and isinstance(right, Peak):
        return Peak(value=jnp.maximum(left.value, right.value))
    raise ValueError(f"expected two statistics of one kind, got {type(left).__name__} and {type(right).__name__}")


def make_micro_step(
    losses: Losses,
    optimizers: Mapping[str, optax.GradientTransformation],
    *,
    skip_norm: float | None = None,
) -> Callable[[TrainState, MicroBatch, Bool[Array, ""]], TrainState]:
    """The step function of a run, to be jitted with its state donated.

    Args
      losses: one fused backward differentiates the sum of its values with respect to every named tree.
      optimizers: per tree, an optax chain that is called once per window with the summed gradient (clip first).
      skip_norm: a window whose largest chain norm, before clipping, is above it changes nothing and is counted.

    Returns `micro_step(state, micro_batch, is_last)`. Within a window the micro-batches carry `micro_index` 0, 1, ...
    and the same `planned_tokens`. After `is_last` the outcome is in `state.report`; the schedule, the moments and the
    parameters move only if its status is `UPDATED`.
    """

    def fused_loss(
        params: Mapping[str, Params], probe: Float[Array, " M"], micro_batch: MicroBatch, live_tokens: Int[Array, ""]
    ) -> tuple[Array, dict[str, Stat]]:
        named, stats = losses(params, micro_batch)
        total = witness_loss(probe, micro_batch.micro_index, live_tokens)
        for name in sorted(named):
            total = total + named[name].astype(jnp.float32)
        return total, stats

    def flush(state: TrainState, planned_tokens: Int[Array, " M"]) -> TrainState:
        norms = {name: optax.tree.norm(chain.sums.gradients) for name, chain in state.chains.items()}
        agrees = jnp.all(jnp.stack([witness_agrees(chain.sums, planned_tokens) for chain in state.chains.values()]))
        disagreement = jnp.max(
            jnp.stack([first_disagreement(chain.sums, planned_tokens) for chain in state.chains.values()])
        )
        status = _status(state.window, jnp.sum(planned_tokens), agrees, norms, skip_norm)
        updated = status == Status.UPDATED

        def advance(params: dict[str, Params], chains: dict[str, Chain]) -> tuple[dict[str, Params], dict[str, Any]]:
            new_params, new_optimizers = {}, {}
            for name, chain in chains.items():
                with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
                    updates, new_optimizers[name] = optimizers[name].update(
                        chain.sums.gradients, chain.optimizer, params[name]
                    )
                new_params[name] = optax.apply_updates(params[name], updates)
            return new_params, new_optimizers

        def stay(params: dict[str, Params], chains: dict[str, Chain]) -> tuple[dict[str, Params], dict[str, Any]]:
            return params, {name: chain.optimizer for name, chain in chains.items()}

        params, optimizer_states = jax.lax.cond(updated, advance, stay, state.params, state.chains)
        totals = _advance_totals(state.totals, state.window, updated)
        report = Report(
            status=status,
            bad_micro_batch=jnp.where(
                status == Status.NONFINITE,
                state.window.first_nonfinite,
                jnp.where(status == Status.WITNESS_MISMATCH, disagreement, -1),
            ),
            micro_batches=state.window.micro_batches,
            tokens=state.window.tokens,
            windows=totals.windows,
            optimizer_steps=totals.optimizer_steps,
            grad_norm=norms,
            witness=next(iter(state.chains.values())).sums.witness,
            stats=state.window.stats,
        )
        return TrainState(
            params=params,
            chains={
                name: Chain(sums=zero_sums(params[name], planned_tokens.shape[0]), optimizer=optimizer_states[name])
                for name in state.chains
            },
            window=empty_window(state.window.stats),
            totals=totals,
            report=report,
        )

    def micro_step(state: TrainState, micro_batch: MicroBatch, is_last: Bool[Array, ""]) -> TrainState:
        if micro_batch.completion_mask.size >= EXACT_FLOAT32_INTEGERS:
            raise ValueError(
                f"expected batch.rows x batch.row_tokens below {EXACT_FLOAT32_INTEGERS}, so that the witness is exact "
                f"in float32, got {micro_batch.completion_mask.size}; change batch.rows or batch.row_tokens"
            )
        live_tokens = jnp.sum(micro_batch.completion_mask, dtype=jnp.int32)
        probe = jnp.zeros(micro_batch.planned_tokens.shape, jnp.float32)
        (gradients, witness), stats = jax.grad(fused_loss, argnums=(0, 1), has_aux=True)(
            state.params, probe, micro_batch, live_tokens
        )
        window = state.window
        bad = (window.first_nonfinite < 0) & ~all_finite(gradients)
        added = dataclasses.replace(
            state,
            chains={
                name: dataclasses.replace(chain, sums=add(chain.sums, gradients[name], witness))
                for name, chain in state.chains.items()
            },
            window=Window(
                micro_batches=window.micro_batches + 1,
                tokens=window.tokens + live_tokens,
                first_nonfinite=jnp.where(bad, micro_batch.micro_index, window.first_nonfinite).astype(jnp.int32),
                stats={name: merge_stat(window.stats[name], stats[name]) for name in window.stats},
            ),
        )
        return jax.lax.cond(is_last, flush, lambda state, _: state, added, micro_batch.planned_tokens)

    return micro_step


def make_named_gradients(losses: Losses) -> Callable[[Mapping[str, Params], MicroBatch], dict[str, dict[str, Params]]]:
    """A probe: objective name -> parameter tree name -> gradient of that objective alone, for one micro-batch.

    One backward per objective; the gradients of a window's micro-batches add, as in `micro_step`.
    """

    def one_loss(name: str, params: Mapping[str, Params], micro_batch: MicroBatch) -> Array:
        return losses(params, micro_batch)[0][name]

    def named_gradients(params: Mapping[str, Params], micro_batch: MicroBatch) -> dict[str, dict[str, Params]]:
        names = jax.eval_shape(losses, params, micro_batch)[0]
        return {name: jax.grad(one_loss, argnums=1)(name, dict(params), micro_batch) for name in sorted(names)}

    return named_gradients


def _status(
    window: Window,
    planned_total: Int[Array, ""],
    agrees: Bool[Array, ""],
    norms: Mapping[str, Array],
    skip_norm: float | None,
) -> Int[Array, ""]:
    """The first reason, in order of gravity, not to update; else UPDATED."""
    largest = jnp.max(jnp.stack(list(norms.values())))
    above = jnp.zeros((), bool) if skip_norm is None else largest > skip_norm
    reasons = [
        (~agrees, Status.WITNESS_MISMATCH),
        ((window.first_nonfinite >= 0) | ~jnp.isfinite(largest), Status.NONFINITE),
        (planned_total == 0, Status.EMPTY),
        (above, Status.NORM_SKIPPED),
    ]
    status = jnp.full((), int(Status.UPDATED), jnp.int32)
    for condition, reason in reversed(reasons):
        status = jnp.where(condition, jnp.full((), int(reason), jnp.int32), status)
    return status


def _advance_totals(totals: Totals, window: Window, updated: Bool[Array, ""]) -> Totals:
    """Lifetime counts after this window; the token total carries into a second limb instead of overflowing."""
    room = (LIMB - 1) - totals.tokens_low
    carries = window.tokens > room
    low = jnp.where(carries, window.tokens - room - 1, totals.tokens_low + window.tokens)
    return Totals(
        windows=totals.windows + 1,
        optimizer_steps=totals.optimizer_steps + updated.astype(jnp.int32),
        skipped_windows=totals.skipped_windows + (~updated).astype(jnp.int32),
        micro_batches=totals.micro_batches + window.micro_batches,
        tokens_low=low.astype(jnp.int32),
        tokens_high=totals.tokens_high + carries.astype(jnp.int32),
    )
