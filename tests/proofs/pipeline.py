"""From samples to updates by the product's own functions, on models whose right answer is known by other means.

Every function of the product is looked up on its module when it is called, so that a mutant can break one of them and
all that stands on it is broken, and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hptjax.hpt import assemble as assembling
from hptjax.hpt import terms
from hptjax.losses import reducers
from hptjax.losses.advantages import ones
from hptjax.records import Sample, SampleId, Source
from hptjax.sharding.mesh import make_mesh, put_micro_batch
from hptjax.train import step as stepping
from hptjax.train.accumulate import Status
from hptjax.types import MicroBatch, SumCount
from tests import toys

UNIT_ROUNDOFF = 2.0**-24
LIMITS = {"rows": 2, "row_tokens": 16, "max_segments": 3, "max_micro_batches": toys.MAX_MICRO}
SPREAD = [1]  # devices of the run under way: mutants of the data-parallel reduction read it


class Broken(AssertionError):
    """The property does not hold; the message says what was seen."""


def expect(holds: bool, message: str) -> None:
    if not holds:
        raise Broken(message)


def demonstrations(lengths: Sequence[int], *, visit: int) -> list[Sample]:
    """One sample per length, each of a question of its own, with prompts of 1 to 3 tokens."""
    rng = np.random.default_rng([11, visit])
    return [
        Sample(
            sample_id=SampleId(question, visit, -1),
            group_id=question,
            source=Source.DEMONSTRATION,
            prompt_tokens=rng.integers(0, toys.VOCAB, 1 + question % 3).astype(np.int32),
            completion_tokens=rng.integers(0, toys.VOCAB, length).astype(np.int32),
            sampler_logprobs=np.zeros(length, np.float32),
        )
        for question, length in enumerate(lengths)
    ]


# windows of 7, 3, 1 and 5 micro-batches, uneven on purpose
CASES = tuple(
    demonstrations(lengths, visit=visit)
    for visit, lengths in enumerate(
        (
            [13, 1, 2, 9, 12, 11, 3, 13, 13, 8, 10, 13, 4, 12, 13, 2, 1, 13, 12],
            [12, 5, 13, 1, 9, 11, 13],
            [4, 1, 7],
            [13, 13, 2, 10, 9, 12, 8, 11, 3, 13, 12],
        )
    )
)


def plan(samples: Sequence[Sample], reducer: reducers.Reducer) -> assembling.Update:
    """One update of these samples, with a single term `toy`."""
    term = terms.Term("toy", frozenset({Source.DEMONSTRATION}), 1.0, reducer, ones)
    return assembling.assemble(samples, [term], **LIMITS)


def plans(reducer_name: str) -> list[assembling.Update]:
    """The updates of all cases: "token_mean", or "sum", where every live token weighs 1."""
    reducer = reducers.constant(1) if reducer_name == "sum" else reducers.token_mean
    return [plan(samples, reducer) for samples in CASES]


def integer_losses(params, batch):
    """Two leaves whose gradients are integers wherever the weights are: theta (features) and bias (a count)."""
    features = jnp.asarray(toys.FEATURE_TABLE)[batch.target_tokens]  # [B T F]
    scores = jnp.einsum("btf,f->bt", features, params["policy"]["theta"], precision="highest")
    scores = scores + params["policy"]["bias"][0]
    loss = jnp.sum(scores * batch.planes["toy"].weights)
    return {"toy": loss, "aux": auxiliary(params, batch)}, statistics(batch)


def tanh_losses(params, batch):
    """`toys.tanh_losses` with an auxiliary loss and the same statistics."""
    return toys.tanh_losses(params, batch)[0] | {"aux": auxiliary(params, batch)}, statistics(batch)


def auxiliary(params, batch):
    """The sum of all parameters, as a loss per window: each micro-batch takes part by its weights."""
    return auxiliary_share(batch) * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params["policy"]))


def auxiliary_share(batch):
    return jnp.sum(batch.planes["toy"].weights)


def statistics(batch):
    """The mean target token of the window, as sum and count."""
    live = batch.completion_mask
    total = jnp.sum(jnp.where(live, batch.target_tokens, 0)).astype(jnp.float32)
    return {"target": SumCount(total=total, count=jnp.sum(live, dtype=jnp.float32))}


def model(name: str):
    """(losses, parameters) of the integer or the tanh model."""
    if name == "integer":
        return integer_losses, {"policy": {"theta": jnp.zeros(toys.FEATURES), "bias": jnp.zeros(1)}}
    return tanh_losses, toys.tanh_params()


@contextlib.contextmanager
def spread_over(devices: int) -> Iterator[None]:
    """Runs of this block cut the rows of every micro-batch over so many devices."""
    before = SPREAD[0]
    SPREAD[0] = devices
    try:
        yield
    finally:
        SPREAD[0] = before


@contextlib.contextmanager
def without_evidence() -> Iterator[None]:
    """Steps of this block take every window's witness, digest and checksums for right."""
    forget()
    fine = jnp.ones((), bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepping, "witness_agrees", lambda *_: fine)
        for name in ("_digest_evidence", "_checksum_evidence"):
            patch.setattr(stepping, name, lambda *_: stepping.Evidence(Status.DIGEST_MISMATCH, fine, jnp.int32(-1)))
        yield
    forget()


def last_flags(sizes: Sequence[int]) -> list[bool]:
    """For every micro-batch of a stream of windows, whether it ends its window."""
    return [place == size - 1 for size in sizes for place in range(size)]


COMPILED: dict[str, tuple] = {}  # of the program as it stands; `forget` it when something is broken or mended


def forget() -> None:
    COMPILED.clear()


def start(name: str, *, optimizer=None):
    """(jitted step, fresh state) of a model; SGD with rate 1 unless told otherwise."""
    losses, params = model(name)
    if optimizer is not None:
        return toys.sgd_setup(losses, params, optimizer=optimizer)
    if name not in COMPILED or SPREAD[0] > 1:
        COMPILED[name] = toys.sgd_setup(losses, params)
    return COMPILED[name]


def run(step, state, updates: Sequence[assembling.Update]) -> list:
    """The states after each flush of the stream of these updates."""
    state = placed(state)
    stream = [micro_batch for update in updates for micro_batch in update.micro_batches]
    flags = last_flags([len(update.micro_batches) for update in updates])
    after = []
    for micro_batch, is_last in zip(stream, flags, strict=True):
        state = step(state, placed(micro_batch), jnp.asarray(is_last))
        if is_last:
            after.append(state)
    expect(len(after) == len(updates), f"expected {len(updates)} updates, saw {len(after)}")
    return after


def run_window(step, state, micro_batches) -> Any:
    """`toys.run_window` on the devices of the block."""
    return toys.run_window(step, placed(state), [placed(micro_batch) for micro_batch in micro_batches])


def placed(tree: Any) -> Any:
    """A state (whole everywhere) or a micro-batch (rows cut) on the devices of the block."""
    if SPREAD[0] == 1:
        return tree
    mesh = make_mesh(SPREAD[0], 1, devices=jax.devices()[: SPREAD[0]])
    if isinstance(tree, MicroBatch):
        return put_micro_batch(mesh, tree)
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def applied(before, states) -> list[dict[str, np.ndarray]]:
    """What each flush subtracted from the parameters (SGD with rate 1)."""
    trail = [before, *states]
    return [
        {
            name: np.asarray(old.params["policy"][name], np.float64)
            - np.asarray(new.params["policy"][name], np.float64)
            for name in old.params["policy"]
        }
        for old, new in itertools.pairwise(trail)
    ]


# The right answers, in float64 and int64, from the samples alone.


def integer_answer(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Over all completion tokens, the sum of their features, and their number; plus the auxiliary loss's gradient."""
    theta = np.zeros(toys.FEATURES, np.int64)
    count = 0
    for sample in samples:
        for token in sample.completion_tokens.tolist():
            theta += toys.FEATURE_TABLE[token].astype(np.int64)
            count += 1
    return {"theta": theta.astype(np.float64) + count, "bias": np.asarray([2 * count], np.float64)}


def tanh_answer(params: dict[str, np.ndarray], samples: Sequence[Sample], weight: float) -> dict[str, np.ndarray]:
    """Gradient of weight * sum of (w2 . tanh(x w1 / 8))^2 + all parameters, by the chain rule, token by token."""
    w1, w2 = (np.asarray(params[name], np.float64) for name in ("w1", "w2"))
    first, second = np.zeros_like(w1), np.zeros_like(w2)
    for sample in samples:
        for token in sample.completion_tokens.tolist():
            x = toys.FEATURE_TABLE[token].astype(np.float64) / 8.0
            hidden = np.tanh(x @ w1)
            outer = 2.0 * (hidden @ w2) * weight
            second += outer * hidden + weight
            first += np.outer(x, outer * w2 * (1.0 - hidden**2)) + weight
    return {"w1": first, "w2": second}


@dataclasses.dataclass(frozen=True)
class Gap:
    """How far an applied gradient is from the answer: per leaf, as a multiple of the bound of spec 3.6."""

    by_leaf: dict[str, float]

    @property
    def largest(self) -> float:
        return max(self.by_leaf.values())


def gaps(before, states) -> list[Gap]:
    """Per window of CASES, the gap of the tanh model under the token mean: 16 (k + sqrt(T)) u sum of norms is 1."""
    found = []
    begins = [before, *states[:-1]]
    for samples, size, old, change in zip(CASES, SIZES, begins, applied(before, states), strict=True):
        params = {name: np.asarray(leaf) for name, leaf in old.params["policy"].items()}
        tokens = sum(len(sample.completion_tokens) for sample in samples)
        answer = tanh_answer(params, samples, 1.0 / tokens)
        parts = [tanh_answer(params, part, 1.0 / tokens) for part in _split(samples, PARTS[len(found)])]
        factor = 16 * (size + np.sqrt(tokens)) * UNIT_ROUNDOFF
        found.append(
            Gap(
                {
                    name: float(
                        np.linalg.norm(change[name] - answer[name])
                        / (factor * sum(np.linalg.norm(part[name]) for part in parts))
                    )
                    for name in answer
                }
            )
        )
    return found


def _split(samples: Sequence[Sample], parts: Sequence[Sequence[int]]) -> list[list[Sample]]:
    return [[samples[place] for place in part] for part in parts]


def _parts(update: assembling.Update) -> list[list[int]]:
    """Per micro-batch, the places of its samples."""
    return [[int(place) for place in batch.sample_index.ravel() if place >= 0] for batch in update.micro_batches]


# Fixed while nothing is broken: how the right program cuts the cases.
PARTS = [_parts(update) for update in plans("sum")]
SIZES = [len(parts) for parts in PARTS]
assert SIZES == [7, 3, 1, 5], SIZES
