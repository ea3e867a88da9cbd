"""Small problems whose gradients are known exactly, for the accumulation tests."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hptjax.hpt.digest import digest, sample_hashes
from hptjax.records import SampleId
from hptjax.train.state import TrainState, init_state
from hptjax.train.step import make_micro_step
from hptjax.types import MicroBatch, SumCount, TermPlane

VOCAB, FEATURES, MAX_MICRO = 11, 3, 16
FEATURE_TABLE = np.random.default_rng(7).integers(-8, 9, (VOCAB, FEATURES)).astype(np.float32)


def rows_of(rng: np.random.Generator, rows: int, width: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Random target tokens [rows width] and a ragged mask; row i has a random number of live tokens, 0 included."""
    tokens = rng.integers(0, VOCAB, (rows, width)).astype(np.int32)
    lengths = rng.integers(0, width + 1, rows)
    lengths[0] = max(lengths[0], 1)
    return tokens, np.arange(width)[None, :] < lengths[:, None]


def micro_batch(
    tokens: np.ndarray,
    mask: np.ndarray,
    weights: np.ndarray,
    index: int,
    planned: np.ndarray,
    *,
    hashes: np.ndarray | None = None,
    planned_digest: np.ndarray | None = None,
) -> MicroBatch:
    """One micro-batch with a single plane `toy` and one segment per row; without hashes all samples look alike."""
    rows, width = tokens.shape
    zeros = np.zeros((rows, width), np.float32)
    return MicroBatch(
        input_tokens=tokens,
        target_tokens=tokens,
        positions=np.tile(np.arange(width, dtype=np.int32), (rows, 1)),
        segment_ids=mask.astype(np.int32),
        completion_mask=mask,
        planes={"toy": TermPlane(weights=np.where(mask, weights, 0).astype(np.float32), advantages=zeros)},
        sampler_logprobs=zeros,
        rollout_logprobs=zeros,
        reference_logprobs=zeros,
        temperature=np.ones((rows, 1), np.float32),
        sample_index=np.zeros((rows, 1), np.int32),
        sample_hash=np.zeros((rows, 1, 2), np.uint32) if hashes is None else hashes[:, None, :],
        source=np.zeros((rows, 1), np.int32),
        micro_index=np.asarray(index, np.int32),
        planned_tokens=planned,
        planned_digest=np.zeros((len(planned), 2), np.uint32) if planned_digest is None else planned_digest,
    )


def window(
    tokens: np.ndarray, mask: np.ndarray, weights: np.ndarray, cuts: Sequence[Sequence[int]], *, pad_rows: int
) -> list[MicroBatch]:
    """Micro-batches holding the given row indices each, padded with empty rows to one static shape."""
    planned, planned_digest = np.zeros(MAX_MICRO, np.int32), np.zeros((MAX_MICRO, 2), np.uint32)
    hashes = sample_hashes([SampleId(row, 0, 0) for row in range(len(tokens))])
    for index, rows in enumerate(cuts):
        planned[index] = mask[list(rows)].sum()
        planned_digest[index] = digest(hashes[[row for row in rows if mask[row].any()]])
    batches = []
    for index, rows in enumerate(cuts):
        take = np.full(pad_rows, -1)
        take[: len(rows)] = rows
        live = take >= 0
        batches.append(
            micro_batch(
                np.where(live[:, None], tokens[take], 0).astype(np.int32),
                mask[take] & live[:, None],
                np.where(live[:, None], weights[take], 0).astype(np.float32),
                index,
                planned,
                hashes=np.where(live[:, None], hashes[take], 0).astype(np.uint32),
                planned_digest=planned_digest,
            )
        )
    return batches


def linear_losses(params, batch):
    """sum of weights * (x . theta), x integer: the gradient is an integer vector wherever the weights are integers."""
    features = jnp.asarray(FEATURE_TABLE)[batch.target_tokens]  # [B T F]
    scores = jnp.einsum("btf,f->bt", features, params["policy"]["theta"], precision="highest")
    loss = jnp.sum(scores * batch.planes["toy"].weights)
    return {"toy": loss}, {"loss/toy": SumCount(total=loss, count=jnp.ones((), jnp.float32))}


def tanh_losses(params, batch):
    """A two-layer net per token: no exactness, real rounding."""
    features = jnp.asarray(FEATURE_TABLE)[batch.target_tokens]
    hidden = jnp.tanh(jnp.einsum("btf,fh->bth", features, params["policy"]["w1"]) / 8.0)
    scores = jnp.einsum("bth,h->bt", hidden, params["policy"]["w2"]) ** 2
    loss = jnp.sum(scores * batch.planes["toy"].weights)
    return {"toy": loss}, {"loss/toy": SumCount(total=loss, count=jnp.ones((), jnp.float32))}


def linear_params():
    return {"policy": {"theta": jnp.asarray([1.0, -2.0, 3.0])}}


def tanh_params():
    rng = np.random.default_rng(3)
    return {
        "policy": {
            "w1": jnp.asarray(rng.normal(size=(FEATURES, 6)), jnp.float32),
            "w2": jnp.asarray(rng.normal(size=6), jnp.float32),
        }
    }


def run_window(step, state: TrainState, batches: Sequence[MicroBatch]) -> TrainState:
    """All micro-batches of one window, in order."""
    for index, batch in enumerate(batches):
        state = step(state, batch, jnp.asarray(index == len(batches) - 1))
    return state


def sgd_setup(losses, params, *, optimizer=None, **options):
    """A jitted micro_step and a fresh state; SGD with rate 1, so that the update is minus the summed gradient."""
    optimizers = {name: optimizer or optax.sgd(1.0) for name in params}
    batch = micro_batch(
        np.zeros((1, 5), np.int32), np.ones((1, 5), bool), np.ones((1, 5)), 0, np.zeros(MAX_MICRO, np.int32)
    )
    stats = jax.eval_shape(losses, params, batch)[1]
    step = jax.jit(make_micro_step(losses, optimizers, **options))
    return step, init_state(params, optimizers, stats, MAX_MICRO)


def summed_gradient(before, after):
    """What SGD with rate 1 subtracted."""
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), before, after)
