"""The layers of proof as functions: each raises where its property does not hold, and names what was wrong.

The kill matrix runs every layer on every mutant; `test_kill_matrix.py` shows that all of them pass on the right code.
The ids are those of docs/proofs.md. A layer that could pass by looking at nothing proves nothing: windows have 7, 3, 1
and 5 micro-batches with uneven numbers of live tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hptjax.audit.certificate import CertificateError, certify
from hptjax.hpt import terms
from hptjax.hpt.route import Routed
from hptjax.losses import reducers
from hptjax.masked import ratio
from hptjax.records import Objective
from hptjax.sharding.host import to_host
from hptjax.train import checkpoint, ledger, phases
from hptjax.train.accumulate import Status
from tests import toys
from tests.proofs import pipeline
from tests.proofs.pipeline import Broken, expect

Layer = Callable[[], None]


def structure() -> None:
    """P1, T29: the traced step adds each micro-batch once, without condition, to every leaf."""
    step, state = pipeline.start("tanh", optimizer=optax.adam(0.1))
    try:
        certify(step, state, pipeline.plans("token_mean")[0].micro_batches[0])
    except CertificateError as error:
        raise Broken(str(error)) from error


def influence() -> None:
    """P2, T7: with all weight on one token, the update is that token's gradient (and the auxiliary loss's).

    For four tokens or so of each of five micro-batches; tests/proofs/test_influence.py has every token.
    """
    step, state = pipeline.start("integer")
    update = pipeline.plans("sum")[3]
    for index, holder in enumerate(update.micro_batches):
        live = np.argwhere(np.asarray(holder.completion_mask))
        for row, column in live[:: max(len(live) // 4, 1)]:
            batches = [_with_weights(batch, None) for batch in update.micro_batches]
            batches[index] = _with_weights(holder, (row, column))
            after = pipeline.run_window(step, state, batches)
            change = pipeline.applied(state, [after])[0]
            features = toys.FEATURE_TABLE[holder.target_tokens[row, column]]
            expect(
                bool(np.array_equal(change["theta"], features + 1.0)) and change["bias"][0] == 2.0,
                f"token {row}, {column} of micro-batch {index} has weight {change['bias'][0] / 2:g} instead of 1",
            )


def _with_weights(batch, place):
    weights = np.zeros(batch.planes["toy"].weights.shape, np.float32)
    if place is not None:
        weights[tuple(place)] = 1.0
    return batch.replace(planes={"toy": batch.planes["toy"].replace(weights=weights)})


def integers_on_two_devices() -> None:
    """P3, T14: the integers again, with the rows of every micro-batch on two devices."""
    with pipeline.spread_over(2):
        integers()


def integers() -> None:
    """P3, T1-T4, T10: four windows in a row, bitwise the int64 sums."""
    step, state = pipeline.start("integer")
    states = pipeline.run(step, state, pipeline.plans("sum"))
    for window, (samples, change) in enumerate(zip(pipeline.CASES, pipeline.applied(state, states), strict=True)):
        for name, answer in pipeline.integer_answer(samples).items():
            expect(
                bool(np.array_equal(change[name], answer)),
                f"window {window}, leaf {name}: expected {answer.tolist()}, got {change[name].tolist()}",
            )


def run_time() -> None:
    """P6, T16: what the step says of itself on real windows, and what the ledger's row says of the step."""
    step, state = pipeline.start("tanh")
    updates = pipeline.plans("token_mean")
    for place, (update, after) in enumerate(zip(updates, pipeline.run(step, state, updates), strict=True)):
        report = to_host(after.report)
        row = ledger.ledger_row(
            report,
            update,
            step=place + 1,
            place=0,
            window=place + 1,
            learning_rate=1.0,
            schedule_step=place,
            clip_norm=None,
        )
        try:
            ledger.check(row, nonfinite="raise")
        except ledger.AccumulationError as error:
            raise Broken(f"{Status(int(report.status)).name.lower()}: {error}") from error


def reference() -> None:
    """P7, T25: the tanh model under the token mean, within 16 (k + sqrt(T)) u sum of norms of a float64 loop."""
    step, state = pipeline.start("tanh")
    for window, gap in enumerate(pipeline.gaps(state, pipeline.run(step, state, pipeline.plans("token_mean")))):
        expect(gap.largest <= 1.0, f"window {window}: {gap.largest:.3g} times the bound")


def nan_windows() -> None:
    """T9: a NaN skips its window bit for bit, and the windows after it are those of a run without it."""
    step, state = pipeline.start("integer", optimizer=optax.adam(0.5))
    good = pipeline.plans("sum")[3]
    poisoned = list(good.micro_batches)
    weights = np.array(poisoned[2].planes["toy"].weights)
    weights[weights > 0] = np.nan
    poisoned[2] = poisoned[2].replace(planes={"toy": poisoned[2].planes["toy"].replace(weights=weights)})
    skipped = toys.run_window(step, state, poisoned)
    expect(int(skipped.report.status) == Status.NONFINITE, f"status {Status(int(skipped.report.status)).name}")
    for kept, before in ((skipped.params, state.params), (_optimizer(skipped), _optimizer(state))):
        same = all(map(np.array_equal, jax.tree.leaves(kept), jax.tree.leaves(before)))
        expect(same, "a skipped window changed parameters or moments")
    after, fresh = (toys.run_window(step, begin, good.micro_batches) for begin in (skipped, state))
    same = all(map(np.array_equal, jax.tree.leaves(after.params), jax.tree.leaves(fresh.params)))
    expect(same, "the window after a skipped one is not what it is without it")


def _optimizer(state):
    return state.chains["policy"].optimizer


def resumed_windows() -> None:
    """T17: saved after 3 of 7 micro-batches, restored, and finished from where the host stood: the same bits."""
    step, state = pipeline.start("integer")
    batches = pipeline.plans("sum")[0].micro_batches
    whole = toys.run_window(step, state, batches)
    part = state
    for batch in batches[:3]:
        part = step(part, batch, jnp.asarray(False))
    with (
        tempfile.TemporaryDirectory() as folder,
        checkpoint.open_checkpoints(folder, keep_last=1, keep_best=0, fingerprint={}) as saved,
    ):
        saved.save(0, part, {"micro_index": 3}, metric=None, wait=True)
        restored = saved.restore_latest(state)
    after = restored.state
    for index in range(restored.host["micro_index"], len(batches)):
        after = step(after, batches[index], jnp.asarray(index == len(batches) - 1))
    expect(int(after.report.status) == Status.UPDATED, f"status {Status(int(after.report.status)).name}")
    same = all(map(np.array_equal, jax.tree.leaves(after.params), jax.tree.leaves(whole.params)))
    expect(same, "a resumed window is not the window")


def last_window() -> None:
    """T19: seven questions in updates of three, three and one: the short one is trained on, too."""
    samples = pipeline.CASES[1]
    gated = phases.Gated(np.zeros(len(samples), np.int64), Routed([Objective.SFT] * len(samples), list(samples)))
    updates = phases.assemble_updates(
        gated,
        updates=3,
        mask_overlong=False,
        assemble=lambda part, *_: pipeline.plan(part, reducers.token_mean),
    )
    trained = sum(len(update.samples) for update in updates)
    expect(trained == len(samples), f"expected {len(samples)} samples in the updates, got {trained}")
    for update in updates:
        mass = sum(float(np.sum(batch.planes["toy"].weights)) for batch in update.micro_batches)
        expect(abs(mass - 1.0) < 1e-5, f"the weights of an update add up to {mass:.4g}, not to 1")


def schedule() -> None:
    """T21: update s takes rate s, whatever the number of micro-batches before it; rates 1, 1/2, 1/4, 1/8 are exact."""
    step, state = pipeline.start("integer", optimizer=optax.sgd(lambda count: 0.5**count))
    states = pipeline.run(step, state, pipeline.plans("sum"))
    for place, (samples, change) in enumerate(zip(pipeline.CASES, pipeline.applied(state, states), strict=True)):
        answer = pipeline.integer_answer(samples)["bias"] * 0.5**place
        expect(bool(change["bias"] == answer), f"update {place}: expected rate {0.5**place}, got another")


def clip() -> None:
    """T22: three gradients (3, 0), (-3, 0.1), (0, 0.1) sum to (0, 0.2), which a clip at 1 leaves alone."""
    table = np.asarray([[3.0, 0.0], [-3.0, 0.1], [0.0, 0.1]], np.float32)

    def losses(params, batch):
        return {"toy": jnp.sum(jnp.asarray(table)[batch.target_tokens[:, 0]] @ params["policy"]["theta"])}, {}

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    step, state = toys.sgd_setup(losses, {"policy": {"theta": jnp.zeros(2)}}, optimizer=optimizer)
    tokens, mask = np.asarray([[0], [1], [2]], np.int32), np.ones((3, 1), bool)
    batches = toys.window(tokens, mask, np.ones((3, 1)), [[0], [1], [2]], pad_rows=1)
    after = toys.run_window(step, state, batches)
    change = -np.asarray(after.params["policy"]["theta"])
    expect(bool(np.allclose(change, [0.0, 0.2], atol=1e-6)), f"expected (0, 0.2), got {change.tolist()}")


def moments() -> None:
    """T23: AdamW's moments, decay and count move once per window, as a float64 AdamW does."""
    rate, b1, b2, decay = 0.125, 0.9, 0.99, 0.1
    step, state = pipeline.start("integer", optimizer=optax.adamw(rate, b1=b1, b2=b2, weight_decay=decay))
    states = pipeline.run(step, state, pipeline.plans("sum"))
    theta, first, second = (np.zeros(toys.FEATURES) for _ in range(3))
    for count, (samples, after) in enumerate(zip(pipeline.CASES, states, strict=True), start=1):
        gradient = pipeline.integer_answer(samples)["theta"]
        first, second = b1 * first + (1 - b1) * gradient, b2 * second + (1 - b2) * gradient**2
        adam = (first / (1 - b1**count)) / (np.sqrt(second / (1 - b2**count)) + 1e-8)
        theta = theta - rate * (adam + decay * theta)
        moved = int(optax.tree.get(_optimizer(after), "ScaleByAdamState").count)
        expect(moved == count, f"after {count} updates the moments have moved {moved} times")
        got = np.asarray(after.params["policy"]["theta"])
        expect(bool(np.allclose(got, theta, rtol=1e-4)), f"update {count}: expected {theta}, got {got}")


def logged_means() -> None:
    """T32: what a window logs is the sum over its sum of counts, not a mean of its micro-batches' means."""
    step, state = pipeline.start("integer")
    for samples, after in zip(pipeline.CASES, pipeline.run(step, state, pipeline.plans("sum")), strict=True):
        stat = to_host(after.report.stats["target"])
        tokens = np.concatenate([sample.completion_tokens for sample in samples])
        expect(
            abs(ratio(float(stat.total), float(stat.count)) - tokens.sum() / len(tokens)) < 1e-6,
            f"expected {tokens.sum() / len(tokens):.6g}, got {ratio(float(stat.total), float(stat.count)):.6g}",
        )


def masks() -> None:
    """T12: a term covers exactly the completion's positions of each sample, wherever its segment lies."""
    for update in pipeline.plans("token_mean"):
        for batch in update.micro_batches:
            for row, seat in np.argwhere(np.asarray(batch.sample_index) >= 0):
                sample = update.samples[int(batch.sample_index[row, seat])]
                inside = np.asarray(batch.segment_ids[row]) == seat + 1
                weights = np.asarray(batch.planes["toy"].weights[row])[inside]
                expected = np.arange(terms.target_length(sample)) >= len(sample.prompt_tokens) - 1
                expect(bool(np.array_equal(weights > 0, expected)), f"sample {sample.sample_id}: {weights.tolist()}")


STRUCTURE, RUN_TIME = "P1 structure", "P6 run time"
WITH_EVIDENCE = (STRUCTURE, RUN_TIME)

LAYERS: dict[str, Layer] = {
    STRUCTURE: structure,
    "P2 influence": influence,
    "P3 integers": integers,
    "P3 two devices": integers_on_two_devices,
    RUN_TIME: run_time,
    "P7 reference": reference,
    "T9 NaN": nan_windows,
    "T12 masks": masks,
    "T17 resume": resumed_windows,
    "T19 last window": last_window,
    "T21 schedule": schedule,
    "T22 clip": clip,
    "T23 moments": moments,
    "T32 logged": logged_means,
}


def verdicts(names: Iterable[str], *, devices: int = 1) -> dict[str, str | None]:
    """What each of these layers sees wrong in the product as it stands, or None; steps run on so many devices.

    "P1 structure" and "P6 run time" look at the step as it is; for the others its own evidence is silenced, because a
    refused update would look like a wrong one: they must see the fault by themselves.
    """
    with pipeline.spread_over(devices):
        found = {name: seen_by(name) for name in names if name in WITH_EVIDENCE}
        with pipeline.without_evidence():
            return found | {name: seen_by(name) for name in names if name not in WITH_EVIDENCE}


def seen_by(name: str) -> str | None:
    """What one layer sees wrong, or None."""
    try:
        LAYERS[name]()
    except Broken as error:
        return str(error)
    return None
