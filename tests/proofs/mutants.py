"""Broken versions of the product, one fault each: the bugs of accumulation spec 1 and 4.5, and who must notice.

A mutant breaks functions of the product (or of the two loops that tests drive it with) for as long as a
`pytest.MonkeyPatch` context lasts. Nothing of this is reachable from the package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hptjax.hpt import assemble as assembling
from hptjax.hpt import terms
from hptjax.losses import reducers
from hptjax.train import accumulate, checkpoint, phases
from hptjax.train import step as stepping
from tests import toys
from tests.proofs import pipeline

Kind = Literal["sum", "rounding", "state", "window", "metric"]
KINDS = {
    "sum": "another mathematical sum",
    "rounding": "the right sum, rounded more than once",
    "state": "what is carried between micro-batches, windows and runs",
    "window": "which micro-batches make an update",
    "metric": "what is logged",
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One fault.

    Args
      name, source: as in the table. killed_by: the layer that must see it.
      devices: on which the layers run it and its margin is taken. margin: whether the plain windows show its fault.
    """

    name: str
    source: str
    kind: Kind
    killed_by: str
    breaks: Callable[[pytest.MonkeyPatch], None]
    devices: int = 1
    margin: bool = True


@contextmanager
def broken(mutant: Mutant) -> Iterator[None]:
    """The product with this fault, within the block."""
    pipeline.forget()
    with pytest.MonkeyPatch.context() as patch:
        mutant.breaks(patch)
        try:
            yield
        finally:
            pipeline.forget()


# How to break things


def accumulate_by(rule: Callable[[Any, Any, SimpleNamespace], Any], *, leaves: Sequence[str] = ("",)) -> Callable:
    """Every leaf's add becomes rule(total, part, now), or that of the named ones only; `now` is the call's context.

    now.first, now.last: of its window; now.index, now.window: which; now.k: micro-batches planned; now.live: tokens.
    """

    def breaks(patch: pytest.MonkeyPatch) -> None:
        now = SimpleNamespace()

        def wrapped(micro_step):
            def step(state, batch, is_last):
                now.index, now.last, now.window = batch.micro_index, is_last, state.totals.windows
                now.first = state.window.micro_batches == 0
                now.k = jnp.sum(batch.planned_tokens > 0).astype(jnp.float32)
                now.live = jnp.sum(batch.completion_mask).astype(jnp.float32)
                now.added = (state.window.micro_batches + 1).astype(jnp.float32)
                return micro_step(state, batch, is_last)

            return step

        def add(sums, gradients, witness):
            def one(path, total, part):
                part = part.astype(jnp.float32)
                return (
                    rule(total, part, now)
                    if any(name in jax.tree_util.keystr(path) for name in leaves)
                    else total + part
                )

            return jax.tree_util.tree_map_with_path(one, sums, accumulate.Sums(gradients, witness))

        wrap_step(patch, wrapped)
        patch.setattr(stepping, "add", add)

    return breaks


def wrap_step(patch: pytest.MonkeyPatch, wrapper: Callable) -> None:
    """Every micro_step made from here on is wrapper(micro_step)."""
    make = toys.make_micro_step
    patch.setattr(toys, "make_micro_step", lambda *args, **options: wrapper(make(*args, **options)))


def after_step(change: Callable[[Any, Any, Any, Any], Any]) -> Callable:
    """The state after every micro-batch becomes change(state before, state after, micro-batch, is_last)."""

    def breaks(patch: pytest.MonkeyPatch) -> None:
        def wrapped(micro_step):
            return lambda state, batch, is_last: change(state, micro_step(state, batch, is_last), batch, is_last)

        wrap_step(patch, wrapped)

    return breaks


def keep_sums(patch: pytest.MonkeyPatch, choose: Callable[[Any, Any, Any, Any], Any]) -> None:
    """After a flush each leaf of the sums becomes choose(zero, what was flushed, state after, is_last)."""
    flushed = []
    right = stepping.add

    def add(sums, gradients, witness):
        flushed[:] = [right(sums, gradients, witness)]
        return flushed[0]

    def change(before, after, batch, is_last):
        chain = after.chains["policy"]
        sums = jax.tree.map(lambda zero, old: choose(zero, old, after, is_last), chain.sums, flushed[0])
        return after.replace(chains={"policy": chain.replace(sums=sums)})

    patch.setattr(stepping, "add", add)
    after_step(change)(patch)


def weigh_by(rule: Callable[[np.ndarray, Any, Any, int], np.ndarray]) -> Callable:
    """The token weights of micro-batch i become rule(weights, batch, all batches, i): a wrong normaliser."""

    def breaks(patch: pytest.MonkeyPatch) -> None:
        right = assembling.micro_batch_arrays

        def arrays(*args, **options):
            batches = right(*args, **options)
            return tuple(
                batch.replace(
                    planes={
                        name: plane.replace(weights=np.asarray(rule(plane.weights, batch, batches, i), np.float32))
                        for name, plane in batch.planes.items()
                    }
                )
                for i, batch in enumerate(batches)
            )

        patch.setattr(assembling, "micro_batch_arrays", arrays)

    return breaks


def live(batch: Any) -> float:
    return float(np.sum(batch.completion_mask))


def rows_in_use(batch: Any) -> float:
    return float(np.sum(np.asarray(batch.sample_index) >= 0))


def total(of: Callable[[Any], float], batches: Any) -> float:
    return sum(map(of, batches))


# The faults


def mean_of_means(weights, batch, batches, i):
    return weights * total(live, batches) / (len(batches) * live(batch))


def sample_share(weights, batch, batches, i):
    share = rows_in_use(batch) / total(rows_in_use, batches)
    return weights * total(live, batches) * share / live(batch)


def stale_normaliser(patch: pytest.MonkeyPatch) -> None:
    """Each window is divided by the count of the window before it."""
    counts: list[float] = []
    right = reducers.token_mean

    def token_mean(population):
        counts.append(float(population.token_counts.sum()))
        return right(population) * counts[-1] / counts[max(len(counts) - 2, 0)]

    patch.setattr(reducers, "token_mean", token_mean)


def generation_normaliser(patch: pytest.MonkeyPatch) -> None:
    """Every window is divided by the count of all windows of the rollout batch (TRL#5619)."""
    everything = float(sum(len(sample.completion_tokens) for samples in pipeline.CASES for sample in samples))
    right = reducers.token_mean
    patch.setattr(
        reducers, "token_mean", lambda population: right(population) * population.token_counts.sum() / everything
    )


def padded_normaliser(patch: pytest.MonkeyPatch) -> None:
    """Z counts every sample as long as the longest."""
    right = reducers.token_mean

    def token_mean(population):
        counts = population.token_counts
        return right(population) * counts.sum() / (counts.max() * len(counts))

    patch.setattr(reducers, "token_mean", token_mean)


def mask_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """The first answer token is never trained on (OpenRLHF#973)."""
    right = assembling.term_values

    def term_values(term, *args, **options):
        def late(sample):
            first, stop = term.span(sample)
            return min(first + 1, stop), stop

        return right(dataclasses.replace(term, span=late), *args, **options)

    patch.setattr(assembling, "term_values", term_values)


def rank_local_last(patch: pytest.MonkeyPatch) -> None:
    """The last micro-batch is added after the all-reduce: rank 0 gets its own rows of it only (DeepSpeed#7985).

    The result of that bug, not its mechanism: the other ranks' rows weigh nothing in the last micro-batch.
    """

    def wrapped(micro_step):
        def step(state, batch, is_last):
            plane = batch.planes["toy"]
            own = jnp.arange(plane.weights.shape[0], dtype=jnp.int32) < plane.weights.shape[0] // pipeline.SPREAD[0]
            weights = jnp.where(own[:, None] | ~is_last, plane.weights, 0.0)
            return micro_step(state, batch.replace(planes={"toy": plane.replace(weights=weights)}), is_last)

        return step

    wrap_step(patch, wrapped)


def lost_sample(patch: pytest.MonkeyPatch) -> None:
    """One sample of every update is taken for one without live tokens; all that follows agrees on its absence."""
    right = assembling._packed_samples
    patch.setattr(assembling, "_packed_samples", lambda *args: right(*args)[:-1])


def repeated_sample(patch: pytest.MonkeyPatch) -> None:
    """Two samples change places with one: the arrays hold the first one twice, and the plan says so."""
    right = assembling.micro_batch_arrays

    def arrays(samples, layout, values, **options):
        order = np.arange(len(samples))
        lengths = [terms.target_length(sample) for sample in samples]
        order[int(np.argmax(lengths))] = int(np.argmin(lengths))
        taken = {name: assembling._take(value, order) for name, value in values.items()}
        return right([samples[i] for i in order], layout, taken, **options)

    patch.setattr(assembling, "micro_batch_arrays", arrays)


def shifted_boundary(by: int) -> Callable:
    def breaks(patch: pytest.MonkeyPatch) -> None:
        right = pipeline.last_flags
        if by > 0:
            patch.setattr(pipeline, "last_flags", lambda sizes: [*[False] * by, *right(sizes)[:-by]])
        else:
            patch.setattr(pipeline, "last_flags", lambda sizes: [*right(sizes)[-by:], *[False] * -by])

    return breaks


def update_every_micro_batch(patch: pytest.MonkeyPatch) -> None:
    """The optimizer moves on every micro-batch, with a plan that calls each one a window."""

    def wrapped(micro_step):
        def step(state, batch, is_last):
            alone = jnp.arange(batch.planned_tokens.shape[0], dtype=jnp.int32) == batch.micro_index
            planned = jnp.where(alone, batch.planned_tokens, 0)
            digest = jnp.where(alone[:, None], batch.planned_digest, jnp.zeros((), jnp.uint32))
            batch = batch.replace(planned_tokens=planned, planned_digest=digest)
            return micro_step(state, batch, jnp.ones((), bool))

        return step

    wrap_step(patch, wrapped)


def schedule_per_micro_batch(before, after, batch, is_last):
    chain = after.chains["policy"]
    moved = jax.tree.map(
        lambda leaf: leaf + jnp.where(is_last, 0, 1).astype(leaf.dtype) if leaf.dtype == jnp.int32 else leaf,
        chain.optimizer,
    )
    return after.replace(chains={"policy": chain.replace(optimizer=moved)})


def decay_per_micro_batch(before, after, batch, is_last):
    return after.replace(
        params=jax.tree.map(lambda leaf: jnp.where(is_last, leaf, leaf * (1.0 - 0.0125)), after.params)
    )


def zero_filled_nan(patch: pytest.MonkeyPatch) -> None:
    """A micro-batch with a NaN adds zeros, and its tokens still count."""
    accumulate_by(lambda total, part, now: total + jnp.nan_to_num(part))(patch)
    patch.setattr(stepping, "all_finite", lambda *_: jnp.ones((), bool))
    patch.setattr(
        stepping, "_checksum_evidence", lambda window: stepping.Evidence(0, jnp.ones((), bool), jnp.int32(-1))
    )


def restored_without(change: Callable[[Any], Any]) -> Callable:
    def breaks(patch: pytest.MonkeyPatch) -> None:
        right = checkpoint.Checkpoints.restore_latest
        patch.setattr(checkpoint.Checkpoints, "restore_latest", lambda self, template: change(right(self, template)))

    return breaks


def no_sums(restored):
    chain = restored.state.chains["policy"]
    sums = jax.tree.map(jnp.zeros_like, chain.sums)
    return restored._replace(state=restored.state.replace(chains={"policy": chain.replace(sums=sums)}))


def no_count(restored):
    return restored._replace(host={**restored.host, "micro_index": 0})


def last_update_dropped(patch: pytest.MonkeyPatch) -> None:
    right = phases.assemble_updates
    patch.setattr(phases, "assemble_updates", lambda *args, **options: right(*args, **options)[:-1])


def unscaled_aux(patch: pytest.MonkeyPatch) -> None:
    """The auxiliary loss is added whole in every micro-batch instead of once per update."""
    patch.setattr(pipeline, "auxiliary_share", lambda batch: jnp.ones((), jnp.float32))


def exchanged_samples(patch: pytest.MonkeyPatch) -> None:
    """Two samples of equal length change micro-batches after the plan was made: no sum and no count is wrong."""
    right = assembling.micro_batch_arrays

    def arrays(samples, layout, values, *, sample_hashes, **options):
        order = np.arange(len(samples))
        home = {place: m for m, group in enumerate(layout) for row in group for place in row}
        sizes = [(len(sample.prompt_tokens), len(sample.completion_tokens)) for sample in samples]
        pairs = [(i, j) for i in order for j in order if i < j and sizes[i] == sizes[j] and home[i] != home[j]]
        for i, j in pairs[:1]:
            order[[i, j]] = order[[j, i]]
        return right([samples[i] for i in order], layout, values, sample_hashes=sample_hashes[order], **options)

    patch.setattr(assembling, "micro_batch_arrays", arrays)


def mean_of_logged_means(patch: pytest.MonkeyPatch) -> None:
    def merge(left, right):
        def mean(stat):
            return stat.total / jnp.maximum(stat.count, 1.0)

        empty = left.count == 0.0
        value = jnp.where(empty, mean(right), 0.5 * (mean(left) + mean(right)))
        return type(left)(total=value, count=jnp.ones((), jnp.float32))

    patch.setattr(stepping, "merge_stat", merge)


def low_precision(total, part, now):
    return (total.astype(jnp.bfloat16) + part.astype(jnp.bfloat16)).astype(jnp.float32)


def running_mean(total, part, now):
    mean = total + (part - total) / now.added
    return jnp.where(now.last, mean * now.added, mean)


def divide_first(total, part, now):
    summed = total + part / now.k
    return jnp.where(now.last, summed * now.k, summed)


def clipped_part(total, part, now):
    return total + part * jnp.minimum(1.0, 0.05 / jnp.maximum(jnp.linalg.norm(jnp.ravel(part)), 1e-30))


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "first + last",
        "DeepSpeed 0.15.2 to 0.18.9, ZeRO-2 offload",
        "sum",
        "P7 reference",
        accumulate_by(lambda total, part, now: jnp.where(now.first | now.last, total + part, total)),
    ),
    Mutant(
        "first only",
        "the same bug as its fix describes it; Primus#1046",
        "sum",
        "P7 reference",
        accumulate_by(lambda total, part, now: jnp.where(now.first, total + part, total)),
    ),
    Mutant(
        "last only",
        "DeepSpeed#7981, open-instruct#1498, torchtitan#3575",
        "sum",
        "P7 reference",
        accumulate_by(lambda total, part, now: part),
    ),
    Mutant(
        "last only, on one leaf",
        "Fast-LLM#550",
        "sum",
        "P6 run time",
        accumulate_by(lambda total, part, now: part, leaves=("w1", "theta")),
    ),
    Mutant(
        "copy instead of add from the second window on, one leaf",
        "Fast-LLM#550",
        "sum",
        "P6 run time",
        accumulate_by(lambda total, part, now: jnp.where(now.window > 0, part, total + part), leaves=("w2", "bias")),
    ),
    Mutant(
        "no reset between windows",
        "DeepSpeed#7839",
        "sum",
        "P7 reference",
        lambda patch: keep_sums(patch, lambda zero, old, after, last: jnp.where(last, old, zero)),
    ),
    Mutant(
        "reset by multiply",
        "optax.MultiSteps",
        "state",
        "T9 NaN",
        lambda patch: keep_sums(patch, lambda zero, old, after, last: jnp.where(last, old * 0.0, zero)),
        margin=False,
    ),
    Mutant(
        "no reset after a skipped window",
        "ESPnet#3283",
        "state",
        "T9 NaN",
        lambda patch: keep_sums(
            patch,
            lambda zero, old, after, last: jnp.where(
                last & (after.report.status == accumulate.Status.NONFINITE), old, zero
            ),
        ),
        margin=False,
    ),
    Mutant(
        "micro-batch 1 twice",
        "-",
        "sum",
        "P7 reference",
        accumulate_by(lambda total, part, now: total + jnp.where(now.index == 1, 2.0, 1.0) * part),
    ),
    Mutant(
        "last micro-batch added after the all-reduce",
        "DeepSpeed#7985",
        "sum",
        "P3 two devices",
        rank_local_last,
        devices=2,
    ),
    Mutant(
        "pmean for psum",
        "prime-rl#1957, transformers#34373",
        "sum",
        "P3 two devices",
        accumulate_by(lambda total, part, now: total + part / pipeline.SPREAD[0]),
        devices=2,
    ),
    Mutant("mean of means", "OpenRLHF 0.9.10, transformers#34191", "sum", "P7 reference", weigh_by(mean_of_means)),
    Mutant("sample share x token mean", "verl#5625", "sum", "P7 reference", weigh_by(sample_share)),
    Mutant(
        "extra 1/k",
        "ms-swift#10117",
        "sum",
        "P7 reference",
        accumulate_by(lambda total, part, now: total + part / now.k),
    ),
    Mutant(
        "missing 1/k", "LlamaFactory#7443", "sum", "P7 reference", weigh_by(lambda w, b, batches, i: w * len(batches))
    ),
    Mutant("extra D (of 4)", "transformers#40799", "sum", "P7 reference", weigh_by(lambda w, b, batches, i: w * 4)),
    Mutant("missing D (of 4)", "verl#5366", "sum", "P7 reference", weigh_by(lambda w, b, batches, i: w / 4)),
    Mutant("normaliser of the window before", "OpenRLHF#1337", "sum", "P7 reference", stale_normaliser),
    Mutant("normaliser of the generation batch", "TRL#5619", "sum", "P7 reference", generation_normaliser),
    Mutant("padding counted in Z", "Levanter#842", "sum", "P7 reference", padded_normaliser),
    Mutant("mask off by one", "OpenRLHF#973", "sum", "T12 masks", mask_off_by_one),
    Mutant("a sample lost in packing", "-", "sum", "P6 run time", lost_sample),
    Mutant("a sample packed twice, another lost", "-", "sum", "P6 run time", repeated_sample),
    Mutant("two samples exchanged between micro-batches", "-", "window", "P6 run time", exchanged_samples),
    Mutant("bf16 accumulator", "MaxText, optax up to 0.2.7", "rounding", "P3 integers", accumulate_by(low_precision)),
    Mutant("running mean", "optax.MultiSteps", "rounding", "P3 integers", accumulate_by(running_mean)),
    Mutant("divide first", "-", "rounding", "P3 integers", accumulate_by(divide_first)),
    Mutant(
        "clip before the sum",
        "clip outside the accumulator",
        "sum",
        "P7 reference",
        accumulate_by(clipped_part, leaves=("gradients",)),
    ),
    Mutant("decay per micro-batch", "-", "state", "T23 moments", after_step(decay_per_micro_batch)),
    Mutant("schedule per micro-batch", "burn#5695", "state", "T21 schedule", after_step(schedule_per_micro_batch)),
    Mutant("Adam per micro-batch", "optax.apply_every", "state", "T23 moments", update_every_micro_batch),
    Mutant("last window dropped", "burn#5695", "window", "T19 last window", last_update_dropped, margin=False),
    Mutant("boundary one late", "transformers#22098", "window", "P6 run time", shifted_boundary(1)),
    Mutant("boundary one early", "-", "window", "P6 run time", shifted_boundary(-1)),
    Mutant(
        "sums lost on resume",
        "transformers#22143, mflux#447",
        "state",
        "T17 resume",
        restored_without(no_sums),
        margin=False,
    ),
    Mutant("micro-batch count lost on resume", "-", "state", "T17 resume", restored_without(no_count), margin=False),
    Mutant("NaN filled with zeros, tokens counted", "-", "state", "T9 NaN", zero_filled_nan, margin=False),
    Mutant("aux loss per micro-batch, unscaled", "-", "sum", "P7 reference", unscaled_aux),
    Mutant("mean of means in the log", "Megatron-LM#7207", "metric", "T32 logged", mean_of_logged_means, margin=False),
)


def first_and_last_by_size(sizes: Sequence[int]) -> dict[int, float]:
    """Window size k -> relative error of the sum under the DeepSpeed fault, on integers: 0 is bitwise right."""
    (mutant,) = (mutant for mutant in MUTANTS if mutant.name == "first + last")
    rows = max(sizes)
    tokens, mask = toys.rows_of(np.random.default_rng(0), rows)
    mask[:, 0] = True
    answer = np.sum(toys.FEATURE_TABLE[tokens[mask]].astype(np.int64), axis=0)
    errors = {}
    with pipeline.without_evidence(), broken(mutant):
        step, state = toys.sgd_setup(toys.linear_losses, {"policy": {"theta": jnp.zeros(toys.FEATURES)}})
        for k in sizes:
            cuts = [part.tolist() for part in np.array_split(np.arange(rows), k)]
            after = toys.run_window(step, state, toys.window(tokens, mask, np.ones(mask.shape), cuts, pad_rows=rows))
            change = -np.asarray(after.params["policy"]["theta"], np.float64)
            errors[k] = float(np.linalg.norm(change - answer) / np.linalg.norm(answer))
    return errors


def margin(mutant: Mutant) -> float | None:
    """The largest gap to the float64 answer over windows and leaves, in multiples of the right code's bound.

    None where the fault does not touch the windows' sums, or leaves no update to look at.
    """
    if mutant.kind not in ("sum", "rounding") or not mutant.margin:
        return None
    with pipeline.without_evidence(), pipeline.spread_over(mutant.devices):
        step, state = pipeline.start("tanh")
        states = pipeline.run(step, state, pipeline.plans("token_mean"))
    return max(gap.largest for gap in pipeline.gaps(state, states))
