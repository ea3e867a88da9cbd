"""P6: what a step says of itself on every real update, and that the run believes it: T16, and the ledger's checks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hptjax.train.loop as loop
from hptjax.hpt.digest import digest, sample_hashes
from hptjax.sharding.host import to_host
from hptjax.train.accumulate import Status, all_finite, square_sums
from hptjax.train.checksum import observe, zero_checks
from hptjax.train.ledger import AccumulationError, check, check_totals, ledger_row
from hptjax.train.state import check_after_resume, init_state
from hptjax.train.step import make_micro_step
from tests import tiny, toys
from tests.proofs import pipeline

FAULTY_STEP, FAULTY_LEAF = 7, "embedding"


@pytest.fixture(scope="module")
def tanh():
    return pipeline.start("tanh")


def reported(tanh, update):
    step, state = tanh
    return to_host(toys.run_window(step, state, update.micro_batches).report)


def row_of(report, update, **changes):
    settings = {
        "step": 1,
        "place": 0,
        "window": int(report.windows),
        "learning_rate": 1.0,
        "schedule_step": 0,
        "clip_norm": 0.25,
    } | changes
    return ledger_row(report, update, **settings)


# the checksum


def random_tree(rng, scale=1.0):
    shapes = {"matrix": (7, 33), "stacked": (3, 5, 2, 9), "vector": (65,), "scalar": ()}
    return {name: jnp.asarray(rng.normal(size=shape) * scale, jnp.float32) for name, shape in shapes.items()}


def observed(parts, *, fault=lambda index, sums: sums):
    """The checks after adding these gradients; `fault` may change the sums after each add."""
    checks, sums = zero_checks(parts[0]), jax.tree.map(jnp.zeros_like, parts[0])
    for index, part in enumerate(parts):
        sums = fault(index, jax.tree.map(jnp.add, sums, part))
        place = jnp.asarray(index, jnp.int32)
        checks = observe(
            checks, part, square_sums(part), sums, window=jnp.asarray(3, jnp.int32), added=place + 1, micro_index=place
        )
    return checks


def test_t16_checksum_of_a_right_sum_is_far_below_its_bound():
    rng = np.random.default_rng(0)
    checks = observed([random_tree(rng, scale=10.0**power) for power in (-3, 0, 2, 0, -1, 1, 0)])
    residuals = {name: float(residual) for name, residual in checks.residual.items()}
    assert all(0.0 <= residual < 0.1 for residual in residuals.values()), residuals
    assert all(int(place) == -1 for place in checks.micro_batch.values())


@pytest.mark.parametrize("power", [-40, -30, -25, -21, -20, -19, -18, 0, 15, 18])
def test_t16_checksum_of_a_right_sum_passes_where_squares_underflow(power):
    rng = np.random.default_rng(power + 50)
    checks = observed([random_tree(rng, scale=10.0**power) for _ in range(12)])
    assert all(float(residual) <= 1.0 for residual in checks.residual.values())


@pytest.mark.parametrize("leaf", ["matrix", "stacked", "vector", "scalar"])
def test_t16_checksum_names_the_leaf_and_the_micro_batch_of_a_fault(leaf):
    """One entry of one leaf off by a thousandth of the norm after the add of micro-batch 4."""

    def fault(index, sums):
        if index != 4:
            return sums
        flat = jnp.ravel(sums[leaf])
        size = 1e-3 * float(jnp.linalg.norm(flat))
        return sums | {leaf: flat.at[flat.size // 2].add(size).reshape(sums[leaf].shape)}

    rng = np.random.default_rng(1)
    checks = observed([random_tree(rng) for _ in range(7)], fault=fault)
    for name, place in checks.micro_batch.items():
        assert int(place) == (4 if name == leaf else -1)
        assert (float(checks.residual[name]) > 1.0) == (name == leaf)


def test_t16_checksum_takes_no_gradient_and_no_finite_sum_on_trust():
    nothing = [jax.tree.map(jnp.zeros_like, random_tree(np.random.default_rng(2)))] * 3
    assert all(float(residual) == 0.0 for residual in observed(nothing).residual.values())
    spoilt = observed(nothing, fault=lambda index, sums: sums | {"vector": sums["vector"].at[0].set(jnp.nan)})
    assert not float(spoilt.residual["vector"]) <= 1.0
    assert int(spoilt.micro_batch["vector"]) == 0
    appeared = observed(nothing, fault=lambda index, sums: sums | {"vector": sums["vector"].at[0].set(1e-20)})
    assert not float(appeared.residual["vector"]) <= 1.0  # where nothing was added there is nothing to round


def test_finiteness_is_right_where_squares_overflow_or_vanish():
    for value, finite in (
        (3e38, True),
        (1e30, True),
        (1e-40, True),
        (np.inf, False),
        (-np.inf, False),
        (np.nan, False),
    ):
        tree = {"a": jnp.ones(3), "b": jnp.asarray([0.0, value, 1.0], jnp.float32)}
        assert bool(all_finite(tree, square_sums(tree))) == finite


@pytest.mark.parametrize("every", [0, 1, 3])
def test_t16_checksum_runs_when_it_is_due_and_after_a_resume(every):
    losses, params = pipeline.model("integer")
    optimizers = {"policy": optax.sgd(1.0)}
    update = pipeline.plans("sum")[1]
    stats = jax.eval_shape(losses, params, update.micro_batches[0])[1]
    step = jax.jit(make_micro_step(losses, optimizers, checksum_every=every))
    state = init_state(params, optimizers, stats, toys.MAX_MICRO)

    def checked(state):
        state = toys.run_window(step, state, update.micro_batches)
        return state, max(float(leaf) for leaf in jax.tree.leaves(state.report.leaf_residual)) >= 0.0

    seen = []
    for _ in range(7):
        state, was = checked(state)
        seen.append(was)
    assert seen == [window == 0 or (every > 0 and window % every == 0) for window in range(7)]
    expected = [True, every == 1]
    at_start = check_after_resume(state)
    at_start, first = checked(at_start)
    assert [first, checked(at_start)[1]] == expected
    inside = step(state, update.micro_batches[0], jnp.asarray(False))  # resumed inside a window that is not checked
    inside = check_after_resume(inside)
    for index, batch in enumerate(update.micro_batches[1:], start=1):
        inside = step(inside, batch, jnp.asarray(index == len(update.micro_batches) - 1))
    assert (float(jax.tree.leaves(inside.report.leaf_residual)[0]) >= 0.0) == (every == 1)
    assert checked(inside)[1]


# digest, and what the host compares


def test_digest_names_a_micro_batch_whose_samples_were_exchanged(tanh):
    """Two samples of equal length change places: every token count is right, and the samples are elsewhere."""
    step, state = tanh
    update = pipeline.plans("token_mean")[0]
    batches = list(update.micro_batches)
    places = {}
    for index, batch in enumerate(batches):
        for row, seat in np.argwhere(batch.sample_index >= 0):
            length = len(update.samples[batch.sample_index[row, seat]].completion_tokens)
            places.setdefault(length, []).append((index, row, seat))
    (first, second) = next(found[:2] for found in places.values() if len({place[0] for place in found[:2]}) == 2)
    hashes = [np.array(batch.sample_hash) for batch in batches]
    (i, *a), (j, *b) = first, second
    hashes[i][tuple(a)], hashes[j][tuple(b)] = hashes[j][tuple(b)].copy(), hashes[i][tuple(a)].copy()
    batches = [batch.replace(sample_hash=words) for batch, words in zip(batches, hashes, strict=True)]
    after = toys.run_window(step, state, batches)
    assert int(after.report.status) == Status.DIGEST_MISMATCH
    assert int(after.report.bad_micro_batch) == min(i, j)
    assert all(map(np.array_equal, jax.tree.leaves(after.params), jax.tree.leaves(state.params)))
    with pytest.raises(AccumulationError, match=rf"digest of micro-batch {min(i, j)} is not that of its samples"):
        check(row_of(to_host(after.report), update), nonfinite="raise")


def test_ledger_row_says_what_was_planned_and_what_was_seen(tanh):
    update = pipeline.plans("token_mean")[0]
    row = row_of(reported(tanh, update), update)
    tokens = sum(len(sample.completion_tokens) for sample in pipeline.CASES[0])
    assert row["tokens"] == row["tokens_planned"] == row["tokens_by_term"]["toy"] == tokens
    assert row["normaliser_by_term"]["toy"] == pytest.approx(tokens)
    assert row["micro_batches"] == row["micro_batches_planned"] == 7
    assert row["empty_micro_batches"] == 0
    assert row["sequences"] == len(pipeline.CASES[0])
    ids = [sample.sample_id for sample in pipeline.CASES[0]]
    assert row["digest"] == row["digest_planned"] == digest(sample_hashes(ids)).tolist()
    assert row["witness_ok"]
    assert 0.0 <= row["checksum"] < 0.1
    assert row["bad_leaves"] == []
    assert row["clip_factor"] == pytest.approx(min(1.0, 0.25 / row["grad_norm"]["policy"]))
    json.dumps(row)
    check(row, nonfinite="raise")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batches": 6}, "expected micro-batches 7 as planned from the samples, got 6"),
        ({"tokens": 3}, "expected live tokens"),
        ({"window": 3}, "expected the device to have closed window 1, got 3"),
        ({"digest": [1, 2]}, "expected the sample digest"),
        ({"status": "witness_mismatch", "bad_micro_batch": 2}, "the witness of micro-batch 2 is wrong"),
        (
            {"status": "checksum_mismatch", "bad_micro_batch": 3, "bad_leaves": ["policy.w1"], "checksum": 40.0},
            "gradient sum of policy.w1 .* after the add of micro-batch 3",
        ),
        ({"status": "nonfinite", "bad_micro_batch": 5}, "gradient of micro-batch 5 is not finite"),
    ],
)
def test_ledger_stops_the_run_and_says_where(tanh, change, message):
    update = pipeline.plans("token_mean")[0]
    row = row_of(reported(tanh, update), update, step=12, place=1) | change
    with pytest.raises(AccumulationError, match=f"step 12, update 1: .*{message}"):
        check(row, nonfinite="raise")
    if change.get("status") == "nonfinite":
        check(row, nonfinite="skip_window")


def test_ledger_rows_add_up_to_the_lifetime_totals(tanh):
    step, state = tanh
    updates = pipeline.plans("token_mean")
    rows, after = [], state
    for update in updates:
        after = toys.run_window(step, after, update.micro_batches)
        rows.append(row_of(to_host(after.report), update))
    check_totals(rows, to_host(after.totals))
    for wrong in (rows[:-1], [*rows, rows[0]], [rows[0] | {"tokens": 1}, *rows[1:]]):
        with pytest.raises(AccumulationError, match=r"expected ledger\.jsonl to add up"):
            check_totals(wrong, to_host(after.totals))


# a whole run


def faulty(micro_step, step_now):
    """A micro_step whose sums of one leaf are damaged in step 7, between the first and the second micro-batch."""
    calls = [0]

    def step(state, batch, is_last):
        if step_now() == FAULTY_STEP:
            calls[0] += 1
            if calls[0] == 2:
                chain = state.chains["policy"]
                gradients = dict(chain.sums.gradients)
                leaf = gradients[FAULTY_LEAF]
                gradients[FAULTY_LEAF] = jax.device_put(leaf.at[5, 3].add(0.01), leaf.sharding)
                sums = chain.sums.replace(gradients=gradients)
                state = state.replace(chains={"policy": chain.replace(sums=sums)})
        return micro_step(state, batch, is_last)

    return step


def test_fault_in_one_leaf_at_step_7_stops_the_run_there_and_names_the_leaf(tmp_path, monkeypatch):
    """The witness, the counts and the digest are right in this run; only the checksum can see it."""
    config = tiny.tiny_config(tmp_path)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=8, eval_every=0))
    original = loop.run

    def faulty_run(stages, state, progress, world, cadence):
        stages = [
            dataclasses.replace(stage, micro_step=faulty(stage.micro_step, lambda: progress.step + 1))
            for stage in stages
        ]
        return original(stages, state, progress, world, cadence)

    with monkeypatch.context() as patch:
        patch.setattr("hptjax.build.run.run", faulty_run)
        with pytest.raises(
            AccumulationError, match=r"step 7, update 0: the gradient sum of policy\.embedding .*of micro"
        ):
            tiny.train(config)
    folder = Path(config.runs_dir) / "tiny"
    rows = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert rows[-1]["status"] == "checksum_mismatch"
    assert rows[-1]["bad_leaves"] == ["policy.embedding"]
    assert rows[-1]["bad_micro_batch"] == 1
    assert rows[-1]["witness_ok"]
    assert tiny.train(config)["steps"] == 8  # the checkpoint of step 6 is whole, and without the fault the run ends
    rows = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert [(row["step"], row["status"]) for row in rows] == [(step, "updated") for step in range(1, 9)]
