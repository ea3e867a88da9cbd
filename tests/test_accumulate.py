"""The proofs of accumulation that this issue ships, by the names of the accumulation spec (T1 ... T30).

Window sizes always include k >= 3: a first-plus-last bug is invisible at k = 2.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hptjax.train.accumulate import Status
from hptjax.train.step import make_micro_step, make_named_gradients
from hptjax.types import SumCount
from tests import toys

UNIT_ROUNDOFF = 2.0**-24


def integer_gradient(tokens, mask, weights):
    """The right answer in int64, by a slow loop that shares no code with the product."""
    total = np.zeros(toys.FEATURES, np.int64)
    for row, position in zip(*np.nonzero(mask), strict=True):
        total += int(weights[row, position]) * toys.FEATURE_TABLE[tokens[row, position]].astype(np.int64)
    return total


def compositions(total):
    """All ways to write `total` as an ordered sum of positive parts."""
    if total == 0:
        yield ()
    for first in range(1, total + 1):
        for rest in compositions(total - first):
            yield (first, *rest)


def cuts_of(sizes):
    """Row indices 0, 1, ... cut into runs of these sizes."""
    bounds = np.cumsum((0, *sizes))
    return [list(range(a, b)) for a, b in itertools.pairwise(bounds)]


@pytest.fixture(scope="module")
def linear():
    return toys.sgd_setup(toys.linear_losses, toys.linear_params())


@pytest.fixture(scope="module")
def tanh():
    return toys.sgd_setup(toys.tanh_losses, toys.tanh_params())


def bound(micro_gradients, tokens):
    """Accumulation spec 3.6: 16 (k + sqrt(T)) u sum of the parts' norms, per leaf."""
    norms = jax.tree.map(lambda *parts: sum(np.linalg.norm(part) for part in parts), *micro_gradients)
    factor = 16 * (len(micro_gradients) + np.sqrt(tokens)) * UNIT_ROUNDOFF
    return jax.tree.map(lambda norm: factor * norm, norms)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6, 8, 12])
def test_t1_even_splits_give_the_full_batch_gradient(tanh, k):
    step, state = tanh
    rng = np.random.default_rng(k)
    tokens, mask = toys.rows_of(rng, 24)
    weights = rng.uniform(0.1, 1.0, mask.shape)
    cuts = cuts_of([24 // k] * k)
    split = toys.run_window(step, state, toys.window(tokens, mask, weights, cuts, pad_rows=24))
    full = toys.run_window(step, state, toys.window(tokens, mask, weights, [range(24)], pad_rows=24))
    parts = [
        toys.summed_gradient(
            state.params,
            toys.run_window(step, state, toys.window(tokens, mask, weights, [cut], pad_rows=24)).params,
        )
        for cut in cuts
    ]
    limit = bound(parts, 24 * 5)
    for name in ("w1", "w2"):
        difference = np.linalg.norm(split.params["policy"][name] - full.params["policy"][name])
        # the parameters themselves are rounded once when the update is applied
        assert difference <= limit["policy"][name] + 4 * UNIT_ROUNDOFF * np.linalg.norm(full.params["policy"][name])
        weakest = min(np.linalg.norm(part["policy"][name]) for part in parts) if k > 2 else np.inf
        assert weakest > 100 * limit["policy"][name] or weakest == 0.0


def test_t2_t3_every_ragged_composition_is_bitwise_the_integer_gradient(linear):
    step, state = linear
    rng = np.random.default_rng(0)
    tokens, mask = toys.rows_of(rng, 8)
    weights = rng.integers(0, 2, mask.shape)
    expected = integer_gradient(tokens, mask, weights)
    assert np.any(expected)
    for sizes in compositions(8):
        after = toys.run_window(step, state, toys.window(tokens, mask, weights, cuts_of(sizes), pad_rows=8))
        got = np.asarray(state.params["policy"]["theta"]) - np.asarray(after.params["policy"]["theta"])
        assert np.array_equal(got, expected.astype(np.float32)), sizes
        assert int(after.report.micro_batches) == len(sizes)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::3])
def test_t4_any_order_is_bitwise_the_same(linear, order):
    step, state = linear
    tokens, mask = toys.rows_of(np.random.default_rng(1), 8)
    cuts = cuts_of([3, 1, 2, 2])
    shuffled = [cuts[index] for index in order]
    weights = np.ones(mask.shape)
    after = toys.run_window(step, state, toys.window(tokens, mask, weights, shuffled, pad_rows=8))
    assert np.array_equal(
        np.asarray(state.params["policy"]["theta"]) - np.asarray(after.params["policy"]["theta"]),
        integer_gradient(tokens, mask, weights).astype(np.float32),
    )


def test_t5_powers_of_two_name_the_consumed_micro_batches():
    def losses(params, batch):
        loss = jnp.sum(batch.planes["toy"].weights) * params["policy"]["theta"][0]
        return {"toy": loss}, {"loss/toy": SumCount(total=loss, count=jnp.ones((), jnp.float32))}

    step, state = toys.sgd_setup(losses, {"policy": {"theta": jnp.zeros(1)}})
    tokens, mask = np.zeros((12, 1), np.int32), np.ones((12, 1), bool)
    weights = 2.0 ** np.arange(12)[:, None]
    after = toys.run_window(step, state, toys.window(tokens, mask, weights, cuts_of([1] * 12), pad_rows=1))
    assert f"{int(-after.params['policy']['theta'][0]):b}" == "1" * 12


@pytest.mark.parametrize("poisoned", [0, 2, 4])
def test_t9_a_nan_skips_the_window_and_the_next_one_is_right(poisoned):
    step, state = toys.sgd_setup(toys.linear_losses, toys.linear_params(), optimizer=optax.adam(0.1))
    tokens, mask = toys.rows_of(np.random.default_rng(2), 5)
    weights = np.ones(mask.shape)
    mask[poisoned, 0] = True
    bad = weights.copy()
    bad[poisoned, 0] = np.nan
    cuts = cuts_of([1] * 5)
    skipped = toys.run_window(step, state, toys.window(tokens, mask, bad, cuts, pad_rows=1))
    assert int(skipped.report.status) == Status.NONFINITE
    assert int(skipped.report.bad_micro_batch) == poisoned
    before = (state.params, state.chains["policy"].optimizer)
    after = (skipped.params, skipped.chains["policy"].optimizer)
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(after)))
    assert int(skipped.totals.skipped_windows) == 1
    good = toys.window(tokens, mask, weights, cuts, pad_rows=1)
    recovered, fresh = toys.run_window(step, skipped, good), toys.run_window(step, state, good)
    assert int(recovered.report.status) == Status.UPDATED
    assert all(map(np.array_equal, jax.tree.leaves(recovered.params), jax.tree.leaves(fresh.params)))


def test_t10_three_windows_in_a_row_leak_nothing(linear):
    step, state = linear
    rng = np.random.default_rng(4)
    expected = np.zeros(toys.FEATURES, np.int64)
    after = state
    for sizes in ([1, 1, 2], [4], [2, 1, 1]):
        tokens, mask = toys.rows_of(rng, 4)
        weights = np.ones(mask.shape)
        expected += integer_gradient(tokens, mask, weights)
        after = toys.run_window(step, after, toys.window(tokens, mask, weights, cuts_of(sizes), pad_rows=4))
        assert not np.any(np.asarray(after.chains["policy"].sums.gradients["theta"]))
    assert np.array_equal(
        np.asarray(state.params["policy"]["theta"]) - np.asarray(after.params["policy"]["theta"]),
        expected.astype(np.float32),
    )
    assert int(after.totals.windows) == int(after.totals.optimizer_steps) == 3


def test_t11_the_token_mean_is_not_a_mean_of_means():
    """Two micro-batches with 1 and 3 tokens, gradients 0 and 4 in sum: 4 / 4 = 1, where a mean of means gives 2."""

    def losses(params, batch):
        per_token = jnp.where(batch.target_tokens == 1, 4.0 / 3.0, 0.0)
        loss = jnp.sum(per_token * batch.planes["toy"].weights) * params["policy"]["theta"][0]
        return {"toy": loss}, {"loss/toy": SumCount(total=loss, count=jnp.ones((), jnp.float32))}

    step, state = toys.sgd_setup(losses, {"policy": {"theta": jnp.zeros(1)}})
    tokens = np.asarray([[0, 0, 0], [1, 1, 1]], np.int32)
    mask = np.asarray([[True, False, False], [True, True, True]])
    weights = np.full(mask.shape, 1 / mask.sum())
    after = toys.run_window(step, state, toys.window(tokens, mask, weights, [[0], [1]], pad_rows=1))
    np.testing.assert_allclose(-after.params["policy"]["theta"], [1.0], rtol=1e-6)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("layout", ["uneven", "all on one device"])
def test_t14_device_counts_are_bitwise_equal(eight_devices, devices, layout):
    from hptjax.sharding.mesh import make_mesh, put_micro_batch

    mesh = make_mesh(devices, 1, devices=eight_devices[:devices])
    tokens, mask = toys.rows_of(np.random.default_rng(5), 24)
    if layout == "all on one device":
        mask[1:] = False
        mask[0] = True
    weights = np.ones(mask.shape)
    step, state = toys.sgd_setup(toys.linear_losses, toys.linear_params())
    state = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    batches = toys.window(tokens, mask, weights, cuts_of([8, 5, 8, 3]), pad_rows=8)
    after = toys.run_window(step, state, [put_micro_batch(mesh, batch) for batch in batches])
    assert np.array_equal(
        np.asarray(state.params["policy"]["theta"]) - np.asarray(after.params["policy"]["theta"]),
        integer_gradient(tokens, mask, weights).astype(np.float32),
    )
    assert int(after.report.status) == Status.UPDATED


def broken(kind):
    """A micro_step whose add is wrong in a named way; the witness must see it."""
    import hptjax.train.step as module
    from hptjax.train.accumulate import Sums
    from hptjax.train.accumulate import add as right_add

    def add(sums, gradients, witness):
        if kind == "extra 1/k":
            return right_add(sums, jax.tree.map(lambda g: g / 4.0, gradients), witness / 4.0)
        if kind == "last only":
            return Sums(jax.tree.map(lambda g: g.astype(jnp.float32), gradients), witness)
        if kind == "duplicate":
            return right_add(right_add(sums, gradients, witness), gradients, witness)
        first = jnp.any(
            sums.witness != 0
        )  # DeepSpeed: the buffer is written at the first micro-step, added at the last
        kept = jax.tree.map(lambda s, g: jnp.where(first, s, g), sums.gradients, gradients)
        return Sums(kept, jnp.where(first, sums.witness, witness))

    return module, add


@pytest.mark.parametrize("kind", ["extra 1/k", "last only", "duplicate", "first only"])
def test_t16_witness_refuses_every_broken_sum(kind, monkeypatch):
    module, add = broken(kind)
    monkeypatch.setattr(module, "add", add)
    step, state = toys.sgd_setup(toys.linear_losses, toys.linear_params())
    tokens, mask = toys.rows_of(np.random.default_rng(6), 4)
    mask[:, 0] = True
    after = toys.run_window(step, state, toys.window(tokens, mask, np.ones(mask.shape), cuts_of([1] * 4), pad_rows=1))
    assert int(after.report.status) == Status.WITNESS_MISMATCH
    assert int(after.report.bad_micro_batch) >= 0
    assert np.array_equal(after.params["policy"]["theta"], state.params["policy"]["theta"])


def test_t16_witness_equals_the_token_counts_bitwise_under_jit_donation_and_remat(linear):
    _, state = linear
    tokens, mask = toys.rows_of(np.random.default_rng(8), 6)
    optimizers = {"policy": optax.sgd(1.0)}

    def remat_losses(params, batch):
        return jax.checkpoint(toys.linear_losses)(params, batch)

    for losses in (toys.linear_losses, remat_losses):
        step = jax.jit(make_micro_step(losses, optimizers), donate_argnums=0)
        batches = toys.window(tokens, mask, np.ones(mask.shape), cuts_of([1, 2, 3]), pad_rows=3)
        after = toys.run_window(step, jax.tree.map(jnp.copy, state), batches)
        assert np.array_equal(
            np.asarray(after.report.witness, np.int64)[:3], [mask[:1].sum(), mask[1:3].sum(), mask[3:].sum()]
        )
        assert int(after.report.tokens) == mask.sum()


def test_witness_refuses_a_lost_micro_batch(linear):
    step, state = linear
    tokens, mask = toys.rows_of(np.random.default_rng(9), 5)
    mask[:, 0] = True
    batches = toys.window(tokens, mask, np.ones(mask.shape), cuts_of([1] * 5), pad_rows=1)
    after = toys.run_window(step, state, batches[:2] + batches[3:])
    assert int(after.report.status) == Status.WITNESS_MISMATCH
    assert int(after.report.bad_micro_batch) == 2


def test_t22_clip_acts_on_the_sum_and_the_norm_is_logged_before_it():
    """Three gradients (3, 0), (-3, 0.1), (0, 0.1) sum to (0, 0.2): below the clip of 1, so the update is the sum."""
    table = np.asarray([[3.0, 0.0], [-3.0, 0.1], [0.0, 0.1]], np.float32)

    def losses(params, batch):
        loss = jnp.sum(jnp.asarray(table)[batch.target_tokens[:, 0]] @ params["policy"]["theta"])
        return {"toy": loss}, {"loss/toy": SumCount(total=loss, count=jnp.ones((), jnp.float32))}

    step, state = toys.sgd_setup(
        losses,
        {"policy": {"theta": jnp.zeros(2)}},
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)),
    )
    tokens, mask = np.asarray([[0], [1], [2]], np.int32), np.ones((3, 1), bool)
    after = toys.run_window(step, state, toys.window(tokens, mask, np.ones((3, 1)), [[0], [1], [2]], pad_rows=1))
    np.testing.assert_allclose(after.params["policy"]["theta"], [0.0, -0.2], atol=1e-6)
    np.testing.assert_allclose(after.report.grad_norm["policy"], 0.2, rtol=1e-5)


def test_t23_moments_decay_and_schedule_move_once_per_window():
    schedule = optax.linear_schedule(0.1, 0.2, 10)
    optimizer = optax.adamw(schedule, b1=0.9, b2=0.99, weight_decay=0.1)
    step, state = toys.sgd_setup(toys.linear_losses, toys.linear_params(), optimizer=optimizer)
    tokens, mask = toys.rows_of(np.random.default_rng(10), 6)
    weights = np.ones(mask.shape)
    theta = np.asarray(state.params["policy"]["theta"], np.float64)
    first, second = np.zeros(3), np.zeros(3)
    gradient = integer_gradient(tokens, mask, weights).astype(np.float64)
    after = state
    for count, sizes in enumerate([[1, 2, 3], [6], [2, 2, 2]], start=1):
        after = toys.run_window(step, after, toys.window(tokens, mask, weights, cuts_of(sizes), pad_rows=6))
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
        rate = 0.1 + 0.1 * (count - 1) / 10
        adam = (first / (1 - 0.9**count)) / (np.sqrt(second / (1 - 0.99**count)) + 1e-8)
        theta = theta - rate * (adam + 0.1 * theta)
    np.testing.assert_allclose(after.params["policy"]["theta"], theta, rtol=1e-5)
    assert int(optax.tree.get(after.chains["policy"].optimizer, "ScaleByAdamState").count) == 3


def test_t30_a_window_without_live_tokens_moves_nothing():
    step, state = toys.sgd_setup(toys.linear_losses, toys.linear_params(), optimizer=optax.adam(0.1))
    tokens, mask = toys.rows_of(np.random.default_rng(11), 3)
    empty = np.zeros_like(mask)
    after = toys.run_window(
        step, state, toys.window(tokens, empty, np.ones(mask.shape), cuts_of([1, 1, 1]), pad_rows=1)
    )
    assert int(after.report.status) == Status.EMPTY
    before = (state.params, state.chains["policy"].optimizer)
    assert all(
        map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves((after.params, after.chains["policy"].optimizer)))
    )


def test_norm_above_the_skip_threshold_changes_neither_parameters_nor_moments():
    """HPT property 29: norm 100 with threshold 80 is skipped; norm 50 is clipped to 1 and applied."""

    def losses(params, batch):
        loss = jnp.sum(batch.planes["toy"].weights) * params["policy"]["theta"][0]
        return {"toy": loss}, {"loss/toy": SumCount(total=loss, count=jnp.ones((), jnp.float32))}

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0, momentum=0.9))
    step, state = toys.sgd_setup(losses, {"policy": {"theta": jnp.zeros(1)}}, optimizer=optimizer, skip_norm=80.0)
    tokens, mask = np.zeros((4, 1), np.int32), np.ones((4, 1), bool)
    cuts = cuts_of([1, 1, 2])
    skipped = toys.run_window(step, state, toys.window(tokens, mask, np.full((4, 1), 25.0), cuts, pad_rows=2))
    assert int(skipped.report.status) == Status.NORM_SKIPPED
    assert float(skipped.report.grad_norm["policy"]) == 100.0
    assert all(map(np.array_equal, jax.tree.leaves(state.chains), jax.tree.leaves(skipped.chains)))
    applied = toys.run_window(step, skipped, toys.window(tokens, mask, np.full((4, 1), 12.5), cuts, pad_rows=2))
    assert int(applied.report.status) == Status.UPDATED
    np.testing.assert_allclose(applied.params["policy"]["theta"], [-1.0], rtol=1e-6)


def test_second_parameter_tree_and_objective_probe_need_no_edit_of_train():
    """A dummy `critic` tree with its own chain, and the gradients of two objectives apart."""

    def losses(params, batch):
        named, stats = toys.linear_losses(params, batch)
        named["critic"] = 2.0 * jnp.sum(batch.planes["toy"].weights) * params["critic"]["v"][0]
        return named, stats

    params = {**toys.linear_params(), "critic": {"v": jnp.ones(2)}}
    step, state = toys.sgd_setup(losses, params)
    tokens, mask = toys.rows_of(np.random.default_rng(12), 6)
    weights = np.ones(mask.shape)
    batches = toys.window(tokens, mask, weights, cuts_of([1, 2, 3]), pad_rows=3)
    after = toys.run_window(step, state, batches)
    assert int(after.report.status) == Status.UPDATED
    np.testing.assert_array_equal(after.params["critic"]["v"], [1.0 - 2.0 * mask.sum(), 1.0])
    named_gradients = jax.jit(make_named_gradients(losses))
    parts = [named_gradients(state.params, batch) for batch in batches]
    total = jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *parts)
    assert set(total) == {"toy", "critic"}
    assert not np.any(total["toy"]["critic"]["v"])
    assert not np.any(total["critic"]["policy"]["theta"])
    np.testing.assert_array_equal(total["toy"]["policy"]["theta"], integer_gradient(tokens, mask, weights))


def test_t15_lifetime_token_total_carries_into_its_second_limb():
    from hptjax.train.step import _advance_totals

    step, state = toys.sgd_setup(toys.linear_losses, toys.linear_params())
    del step
    totals, expected = state.totals, 0
    for tokens in (2**31 - 5, 3, 10, 2**30, 2**30, 2**31 - 1):
        window = state.window.replace(tokens=jnp.asarray(tokens, jnp.int32))
        totals = _advance_totals(totals, window, jnp.asarray(True))
        expected += tokens
        assert int(totals.tokens_high) * 2**31 + int(totals.tokens_low) == expected


def test_one_compilation_serves_every_window_size(linear):
    step, state = linear
    before = step._cache_size()
    tokens, mask = toys.rows_of(np.random.default_rng(13), 8)
    for sizes in ([1] * 8, [1, 1], [1, 1, 1], [1]):
        rows = sum(sizes)
        toys.run_window(
            step, state, toys.window(tokens[:rows], mask[:rows], np.ones((rows, 5)), cuts_of(sizes), pad_rows=8)
        )
    assert step._cache_size() - before <= 1
