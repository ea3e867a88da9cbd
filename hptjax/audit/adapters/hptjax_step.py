"""hptjax's own step under audit: the `make_micro_step` that every run uses, on the linear model."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hptjax.audit.job import Job, LinearBatch, Unsupported
from hptjax.hpt.digest import digest, sample_hashes
from hptjax.records import SampleId
from hptjax.sharding.mesh import make_mesh, put_micro_batch, put_rows
from hptjax.train.accumulate import Status
from hptjax.train.state import TrainState, init_state
from hptjax.train.step import make_micro_step
from hptjax.types import MicroBatch, Stat, SumCount, TermPlane

MAX_MICRO_BATCHES = 16
DEVICES = 2  # CPU devices asked for where nothing else was said, so that two workers can be tried
CHANGES_NOTHING = (Status.EMPTY, Status.NONFINITE, Status.NORM_SKIPPED)


def target(job: Job) -> list[np.ndarray]:
    """Parameters after every update.

    Raises RuntimeError where the step's own evidence says that a micro-batch was lost, repeated or scaled.
    """
    if job.model != "linear":
        raise Unsupported("the hptjax adapter runs the linear model")
    _ask_for_devices()
    if jax.device_count() < job.ranks:
        raise Unsupported(f"{job.ranks} devices are needed, this machine shows {jax.device_count()}")
    step = _compiled(job.learning_rates, job.clip_norm)
    mesh = make_mesh(job.ranks, 1, devices=jax.devices()[: job.ranks])
    theta = jnp.asarray(job.parameters).astype(job.parameter_dtype)
    stats = {"loss/linear": SumCount(total=jnp.zeros(()), count=jnp.zeros(()))}
    state = init_state(
        {"policy": {"theta": theta}}, {"policy": _sgd(job.learning_rates, job.clip_norm)}, stats, MAX_MICRO_BATCHES
    )
    state = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    after = []
    for window in job.windows:
        linear = [batch for batch in window if isinstance(batch, LinearBatch)]
        for batch, micro_batch in zip(linear, micro_batches(linear), strict=True):
            features = put_rows(mesh, batch.features)
            state = step(features, state, put_micro_batch(mesh, micro_batch), jnp.asarray(batch.is_last))
        status = Status(int(state.report.status))
        if status != Status.UPDATED and status not in CHANGES_NOTHING:
            bad = int(state.report.bad_micro_batch)
            raise RuntimeError(f"the step refused the window: {status.name.lower()}, micro-batch {bad}")
        after.append(np.asarray(state.params["policy"]["theta"]))
    return after


def micro_batches(window: list[LinearBatch]) -> list[MicroBatch]:
    """The window as hptjax packs it: one segment per row, weights mask / N decided on the whole window."""
    rows, width = window[0].mask.shape
    tokens = sum(int(batch.mask.sum()) for batch in window)
    planned = np.zeros(MAX_MICRO_BATCHES, np.int32)
    planned_digest = np.zeros((MAX_MICRO_BATCHES, 2), np.uint32)
    hashes = [sample_hashes([SampleId(batch.index, row, 0) for row in range(rows)]) for batch in window]
    for batch in window:
        planned[batch.index] = batch.mask.sum()
        planned_digest[batch.index] = digest(hashes[batch.index])
    zeros, ids = np.zeros((rows, width), np.float32), np.zeros((rows, width), np.int32)
    return [
        MicroBatch(
            input_tokens=ids,
            target_tokens=ids,
            positions=np.tile(np.arange(width, dtype=np.int32), (rows, 1)),
            segment_ids=np.ones((rows, width), np.int32),
            completion_mask=batch.mask,
            planes={"linear": TermPlane(weights=batch.mask.astype(np.float32) / np.float32(tokens), advantages=zeros)},
            sampler_logprobs=zeros,
            rollout_logprobs=zeros,
            reference_logprobs=zeros,
            temperature=np.ones((rows, 1), np.float32),
            sample_index=np.arange(rows, dtype=np.int32)[:, None] + np.int32(batch.index * rows),
            sample_hash=hashes[batch.index][:, None, :],
            source=np.zeros((rows, 1), np.int32),
            micro_index=np.asarray(batch.index, np.int32),
            planned_tokens=planned,
            planned_digest=planned_digest,
        )
        for batch in window
    ]


def _sgd(learning_rates: tuple[float, ...], clip_norm: float | None) -> optax.GradientTransformation:
    rates = np.asarray(learning_rates, np.float32)
    sgd = optax.sgd(lambda count: jnp.asarray(rates)[count])
    return sgd if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), sgd)


@functools.lru_cache
def _compiled(
    learning_rates: tuple[float, ...], clip_norm: float | None
) -> Callable[[Any, TrainState, MicroBatch, Any], TrainState]:
    """(features [B T F], state, micro-batch, is last) -> state; a `MicroBatch` has no room for the features."""

    def step(features: Any, state: TrainState, micro_batch: MicroBatch, is_last: Any) -> TrainState:
        def losses(params: Any, batch: MicroBatch) -> tuple[dict[str, Any], dict[str, Stat]]:
            theta = params["policy"]["theta"].astype(jnp.float32)
            scores = jnp.einsum("btf,f->bt", features, theta, precision="highest")
            loss = jnp.sum(scores * batch.planes["linear"].weights)
            return {"linear": loss}, {"loss/linear": SumCount(total=loss, count=jnp.ones(()))}

        return make_micro_step(losses, {"policy": _sgd(learning_rates, clip_norm)})(state, micro_batch, is_last)

    return jax.jit(step)


def _ask_for_devices() -> None:
    """More than one CPU device, unless jax has started already or the user has said how many."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    try:
        jax.config.update("jax_num_cpu_devices", DEVICES)
    except RuntimeError:  # too late: jax has started
        return
