"""What happens in one micro-batch: forward, one fused backward, add, and at the window's end the update.

    micro_step(state, micro_batch, is_last) -> state

One compilation serves every number of micro-batches. The update is emitted by `lax.cond`, never by a multiply, so a
NaN in a window can neither leak into parameters nor survive into the next window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float, Int, UInt32

from hptjax.train.accumulate import (
    EXACT_FLOAT32_INTEGERS,
    Status,
    add,
    all_finite,
    earliest,
    first_disagreement,
    square_sums,
    witness_agrees,
    witness_loss,
    zero_sums,
)
from hptjax.train.checksum import NOT_CHECKED, LeafChecks, first_wrong, holds, observe
from hptjax.train.state import LIMB, Chain, Report, Totals, TrainState, Window, empty_window, wide
from hptjax.types import Array, MicroBatch, Params, Peak, Stat, SumCount

NOTHING: Mapping[str, Params] = MappingProxyType({})
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
    checksum_every: int = 1,
) -> Callable[..., TrainState]:
    """The step function of a run, to be jitted with its state donated.

    Args
      losses: one fused backward differentiates the sum of its values with respect to every named tree.
      optimizers: per tree, an optax chain that is called once per window with the summed gradient (clip first).
      skip_norm: a window whose largest chain norm, before clipping, is above it changes nothing and is counted.
      checksum_every: the sums of window 0, n, 2n, ... are checked leaf by leaf; 0: of window 0 only.

    Returns `micro_step(state, micro_batch, is_last, frozen={})`. Within a window the micro-batches carry `micro_index`
    0, 1, ... and the same plan (`planned_tokens`, `planned_digest`). After `is_last` the outcome is in `state.report`;
    the schedule, the moments and the parameters move only if its status is `UPDATED`. The losses see the `frozen` trees
    beside those of the state; nothing is differentiated, added up or updated for them.
    """

    def fused_loss(
        params: Mapping[str, Params],
        probe: Float[Array, " M"],
        micro_batch: MicroBatch,
        live_tokens: Int[Array, ""],
        frozen: Mapping[str, Params],
    ) -> tuple[Array, dict[str, Stat]]:
        named, stats = losses({**frozen, **params}, micro_batch)
        total = witness_loss(probe, micro_batch.micro_index, live_tokens)
        for name in sorted(named):
            total = total + named[name].astype(jnp.float32)
        return total, stats

    def flush(state: TrainState, micro_batch: MicroBatch) -> TrainState:
        planned_tokens, window = micro_batch.planned_tokens, state.window
        norms = {name: optax.tree.norm(chain.sums.gradients) for name, chain in state.chains.items()}
        chain_sums = [chain.sums for chain in state.chains.values()]
        evidence = [
            Evidence(
                Status.WITNESS_MISMATCH,
                jnp.all(jnp.stack([witness_agrees(sums, planned_tokens) for sums in chain_sums])),
                earliest([first_disagreement(sums, planned_tokens) for sums in chain_sums]),
            ),
            _digest_evidence(window.digest, micro_batch.planned_digest),
            Evidence(Status.NONFINITE, window.first_nonfinite < 0, window.first_nonfinite),
            _checksum_evidence(window),
        ]
        status, bad_micro_batch = _status(evidence, jnp.sum(planned_tokens), norms, skip_norm)
        updated = status == Status.UPDATED
        chosen = {} if micro_batch.optimizer is None else {"optimizer": micro_batch.optimizer}

        def advance(params: dict[str, Params], chains: dict[str, Chain]) -> tuple[dict[str, Params], dict[str, Any]]:
            new_params, new_optimizers = {}, {}
            for name, chain in chains.items():
                with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
                    updates, new_optimizers[name] = optax.with_extra_args_support(optimizers[name]).update(
                        chain.sums.gradients, chain.optimizer, wide(params[name]), **chosen
                    )
                    new_params[name] = optax.apply_updates(params[name], updates)
            return new_params, new_optimizers

        def stay(params: dict[str, Params], chains: dict[str, Chain]) -> tuple[dict[str, Params], dict[str, Any]]:
            return params, {name: chain.optimizer for name, chain in chains.items()}

        params, optimizer_states = jax.lax.cond(updated, advance, stay, state.params, state.chains)
        totals = _advance_totals(state.totals, window, updated)
        report = Report(
            status=status,
            bad_micro_batch=bad_micro_batch,
            micro_batches=window.micro_batches,
            empty_micro_batches=window.empty_micro_batches,
            tokens=window.tokens,
            digest=jnp.sum(window.digest, axis=0, dtype=jnp.uint32),
            leaf_residual={
                name: jax.tree.map(lambda residual: jnp.where(window.checked, residual, NOT_CHECKED), checks.residual)
                for name, checks in window.checks.items()
            },
            windows=totals.windows,
            optimizer_steps=totals.optimizer_steps,
            grad_norm=norms,
            witness=chain_sums[0].witness,
            stats=window.stats,
        )
        due = totals.windows % checksum_every == 0 if checksum_every else jnp.zeros((), bool)
        return TrainState(
            params=params,
            chains={
                name: Chain(sums=zero_sums(params[name], planned_tokens.shape[0]), optimizer=optimizer_states[name])
                for name in state.chains
            },
            window=empty_window(params, window.stats, planned_tokens.shape[0], checked=due | window.check_next),
            totals=totals,
            report=report,
        )

    def micro_step(
        state: TrainState,
        micro_batch: MicroBatch,
        is_last: Bool[Array, ""],
        frozen: Mapping[str, Params] = NOTHING,
    ) -> TrainState:
        if micro_batch.completion_mask.size >= EXACT_FLOAT32_INTEGERS:
            raise ValueError(
                f"expected batch.rows x batch.row_tokens below {EXACT_FLOAT32_INTEGERS}, so that the witness is exact "
                f"in float32, got {micro_batch.completion_mask.size}; change batch.rows or batch.row_tokens"
            )
        live_tokens = jnp.sum(micro_batch.completion_mask, dtype=jnp.int32)
        probe = jnp.zeros(micro_batch.planned_tokens.shape, jnp.float32)
        (gradients, witness), stats = jax.grad(fused_loss, argnums=(0, 1), has_aux=True)(
            state.params, probe, micro_batch, live_tokens, frozen
        )
        chains = {
            name: dataclasses.replace(chain, sums=add(chain.sums, gradients[name], witness))
            for name, chain in state.chains.items()
        }
        window, index, squares = state.window, micro_batch.micro_index, square_sums(gradients)
        added = window.micro_batches + 1

        def observed(checks: dict[str, LeafChecks]) -> dict[str, LeafChecks]:
            return {
                name: observe(
                    before,
                    gradients[name],
                    squares[name],
                    chains[name].sums.gradients,
                    window=state.totals.windows,
                    added=added,
                    micro_index=index,
                )
                for name, before in checks.items()
            }

        bad = (window.first_nonfinite < 0) & ~all_finite(gradients, squares)
        seen = dataclasses.replace(
            window,
            micro_batches=added,
            empty_micro_batches=window.empty_micro_batches + (live_tokens == 0).astype(jnp.int32),
            tokens=window.tokens + live_tokens,
            first_nonfinite=jnp.where(bad, index, window.first_nonfinite).astype(jnp.int32),
            digest=window.digest.at[index].add(_digest_of(micro_batch)),
            checks=jax.lax.cond(window.checked, observed, lambda checks: checks, window.checks),
            stats={name: merge_stat(window.stats[name], stats[name]) for name in window.stats},
        )
        state = dataclasses.replace(state, chains=chains, window=seen)
        return jax.lax.cond(is_last, flush, lambda state, _: state, state, micro_batch)

    return micro_step


def make_named_gradients(losses: Losses) -> Callable[..., dict[str, dict[str, Params]]]:
    """A probe, (params, micro_batch, frozen={}): objective name -> parameter tree name -> gradient of that one alone.

    One backward per objective; the gradients of a window's micro-batches add, as in `micro_step`.
    """

    def one_loss(
        name: str, params: Mapping[str, Params], micro_batch: MicroBatch, frozen: Mapping[str, Params]
    ) -> Array:
        return losses({**frozen, **params}, micro_batch)[0][name]

    def named_gradients(
        params: Mapping[str, Params], micro_batch: MicroBatch, frozen: Mapping[str, Params] = NOTHING
    ) -> dict[str, dict[str, Params]]:
        names = jax.eval_shape(losses, {**frozen, **params}, micro_batch)[0]
        return {name: jax.grad(one_loss, argnums=1)(name, dict(params), micro_batch, frozen) for name in sorted(names)}

    return named_gradients


def _digest_of(micro_batch: MicroBatch) -> UInt32[Array, " 2"]:
    """The sum of the hashes of the samples whose segments stand in the rows, each word modulo 2^32."""
    slots = jnp.arange(1, micro_batch.sample_hash.shape[1] + 1, dtype=jnp.int32)
    present = jnp.any(micro_batch.segment_ids[:, :, None] == slots[None, None, :], axis=1)  # [B S]
    hashes = jnp.where(present[:, :, None], micro_batch.sample_hash, jnp.zeros((), jnp.uint32))
    return jnp.sum(hashes, axis=(0, 1), dtype=jnp.uint32)


class Evidence(NamedTuple):
    """Whether a window passes one examination, what it is if it does not, and the micro-batch to blame, or -1."""

    failure: Status
    holds: Bool[Array, ""]
    micro_batch: Int[Array, ""]


def _digest_evidence(seen: UInt32[Array, "M 2"], planned: UInt32[Array, "M 2"]) -> Evidence:
    wrong = jnp.any(seen != planned, axis=1)  # [M]
    first = jnp.where(jnp.any(wrong), jnp.argmax(wrong), -1).astype(jnp.int32)
    return Evidence(Status.DIGEST_MISMATCH, ~jnp.any(wrong), first)


def _checksum_evidence(window: Window) -> Evidence:
    checks = list(window.checks.values())
    right = jnp.all(jnp.stack([holds(chain) for chain in checks]))
    return Evidence(
        Status.CHECKSUM_MISMATCH, right | ~window.checked, earliest([first_wrong(chain) for chain in checks])
    )


def _status(
    evidence: Sequence[Evidence], planned_total: Int[Array, ""], norms: Mapping[str, Array], skip_norm: float | None
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The first reason, in order of gravity, not to update, else UPDATED; and the micro-batch to blame, or -1."""
    nobody = jnp.full((), -1, jnp.int32)
    largest = jnp.max(jnp.stack(list(norms.values())))
    above = jnp.zeros((), bool) if skip_norm is None else largest > skip_norm
    reasons = [
        *evidence,
        Evidence(Status.NONFINITE, jnp.isfinite(largest), nobody),
        Evidence(Status.EMPTY, planned_total > 0, nobody),
        Evidence(Status.NORM_SKIPPED, ~above, nobody),
    ]
    status, blamed = jnp.full((), int(Status.UPDATED), jnp.int32), nobody
    for reason in reversed(reasons):
        status = jnp.where(reason.holds, status, jnp.full((), int(reason.failure), jnp.int32))
        blamed = jnp.where(reason.holds, blamed, reason.micro_batch)
    return status, blamed


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
