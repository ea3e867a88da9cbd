"""What the optimizer sees: learning rates by optimizer step (T21), fp32 sums of bf16 gradients (T24), k = 1 (T31)."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hptjax.train.step as step_module
from hptjax.train.accumulate import Status, Sums
from hptjax.train.optimizer import make_optimizer, make_schedule
from hptjax.train.state import init_state
from hptjax.train.step import make_micro_step
from hptjax.types import SumCount
from tests import toys
from tests.test_accumulate import cuts_of

WARMUP, DECAY, RATE, END = 3, 8, 0.5, 0.1
GOOD, POISONED, EMPTY = "good", "poisoned", "empty"
WINDOWS = [GOOD, GOOD, POISONED, GOOD, EMPTY, GOOD, GOOD, GOOD, POISONED, GOOD, GOOD, GOOD, GOOD]


def rate_of(kind, step):
    """The learning rate at an optimizer step by the textbook: linear warm-up, then the curve over the rest."""
    if step < WARMUP:
        return RATE * (step + 1) / WARMUP
    done = min(step - WARMUP, DECAY - WARMUP) / (DECAY - WARMUP)
    return {
        "constant": RATE,
        "linear": RATE * (1 - done * (1 - END)),
        "cosine": RATE * (END + (1 - END) * (1 + math.cos(math.pi * done)) / 2),
    }[kind]


@functools.cache
def adamw(kind):
    """micro_step and state with the product's optimizer: clip, weight decay and schedule."""
    schedule = make_schedule(kind, RATE, warmup_steps=WARMUP, decay_steps=DECAY, end_fraction=END)
    optimizer = make_optimizer(schedule, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1, clip_norm=1.0)
    return toys.sgd_setup(toys.linear_losses, toys.linear_params(), optimizer=optimizer)


def trajectory(step, state, sizes):
    """(status, parameters, optimizer state) after every window, each cut into micro-batches of these sizes."""
    rng = np.random.default_rng(0)
    points = []
    for what in WINDOWS:
        tokens, mask = toys.rows_of(rng, 12)
        mask[:, 0] = True
        weights = rng.integers(0, 2, mask.shape).astype(np.float32)
        if what == POISONED:
            weights[5, 0] = np.nan
        if what == EMPTY:
            mask[:] = False
        state = toys.run_window(step, state, toys.window(tokens, mask, weights, cuts_of(sizes), pad_rows=12))
        points.append((int(state.report.status), state.params, state.chains["policy"].optimizer))
    return points


SPLITS = ([6, 6], [4, 4, 4], [3, 3, 3, 3], [2] * 6, [5, 1, 4, 1, 1], [1] * 12)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_t21_every_k_follows_the_k_1_run_bitwise_through_warmup_decay_and_skipped_windows(kind):
    """Integer gradients: parameters, moments and schedule counts of every split are those of one micro-batch."""
    step, state = adamw(kind)
    right = trajectory(step, state, [12])
    expected = {GOOD: Status.UPDATED, POISONED: Status.NONFINITE, EMPTY: Status.EMPTY}
    assert [status for status, _, _ in right] == [expected[what] for what in WINDOWS]
    for sizes in SPLITS:
        for at, (mine, ones) in enumerate(zip(trajectory(step, state, sizes), right, strict=True)):
            assert all(map(np.array_equal, jax.tree.leaves(mine), jax.tree.leaves(ones))), (sizes, at)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_t21_the_rate_at_an_optimizer_step_is_the_textbooks_for_every_k(kind):
    """A summed gradient of 1 per window: SGD moves by the learning rate. A window that moves nothing takes no step."""

    def losses(params, batch):
        loss = jnp.sum(batch.planes["toy"].weights) * params["policy"]["theta"][0]
        return {"toy": loss}, {"loss/toy": SumCount(total=loss, count=jnp.ones((), jnp.float32))}

    schedule = make_schedule(kind, RATE, warmup_steps=WARMUP, decay_steps=DECAY, end_fraction=END)
    step, fresh = toys.sgd_setup(losses, {"policy": {"theta": jnp.zeros(1)}}, optimizer=optax.sgd(schedule))
    tokens = np.zeros((16, 1), np.int32)
    for k in (1, 2, 3, 7, 16):
        state, taken, last = fresh, 0, 0.0
        for what in WINDOWS:
            mask, weights = np.full((16, 1), what != EMPTY), np.zeros((16, 1))
            weights[k - 1] = np.nan if what == POISONED else 1.0
            sizes = [1] * (k - 1) + [17 - k]
            state = toys.run_window(step, state, toys.window(tokens, mask, weights, cuts_of(sizes), pad_rows=16))
            now = float(state.params["policy"]["theta"][0])
            np.testing.assert_allclose(last - now, rate_of(kind, taken) if what == GOOD else 0.0, rtol=2e-5)
            taken, last = taken + (what == GOOD), now
        assert taken == int(state.totals.optimizer_steps) > DECAY


# bf16 parameters


TENTH = jnp.asarray([0.1, -0.3, 1.7], jnp.bfloat16)  # 8 significant bits, so a thousand of each add up exactly in fp32
MANY = 1000


def bf16_losses(params, batch):
    """Per micro-batch the same gradient: the three bf16 numbers, exactly."""
    parts = params["policy"]["theta"].astype(jnp.float32) * TENTH.astype(jnp.float32)
    loss = jnp.sum(parts) * jnp.sum(batch.planes["toy"].weights)
    return {"toy": loss}, {"loss/toy": SumCount(total=loss, count=jnp.ones((), jnp.float32))}


def bf16_setup():
    params = {"policy": {"theta": jnp.asarray([1.0, -2.0, 3.0], jnp.bfloat16)}}
    chain = make_optimizer(
        make_schedule("constant", 0.05, warmup_steps=0, decay_steps=1),
        b1=0.9,
        b2=0.99,
        eps=1e-8,
        weight_decay=0.1,
        clip_norm=None,
    )
    stats = {"loss/toy": SumCount(total=jnp.zeros(()), count=jnp.zeros(()))}
    step = jax.jit(make_micro_step(bf16_losses, {"policy": chain}))
    return step, init_state(params, {"policy": chain}, stats, MANY)


def bf16_window(step, state, count):
    """`count` equal micro-batches; the state before the flush's call and after it."""
    planned = np.zeros(MANY, np.int32)
    planned[:count] = 1
    one = np.ones((1, 1))
    batch = toys.micro_batch(np.zeros((1, 1), np.int32), one > 0, one, 0, planned)
    for index in range(count):
        before = state
        state = step(state, batch.replace(micro_index=np.asarray(index, np.int32)), jnp.asarray(index == count - 1))
    return before, state


def test_t24_bf16_gradients_sum_in_fp32_and_adam_equals_a_float64_reference():
    step, state = bf16_setup()
    gradients = jax.grad(lambda theta: jnp.sum(theta.astype(jnp.float32) * TENTH.astype(jnp.float32)))(
        state.params["policy"]["theta"]
    )
    assert gradients.dtype == jnp.bfloat16
    theta = np.asarray(state.params["policy"]["theta"], np.float64)
    each = np.asarray(TENTH, np.float64)
    first, second = np.zeros(3), np.zeros(3)
    for window, count in enumerate((MANY, 3, 7), start=1):
        before, state = bf16_window(step, state, count)
        sums = before.chains["policy"].sums.gradients["theta"]
        assert sums.dtype == jnp.float32
        assert np.array_equal(np.asarray(sums, np.float64), (count - 1) * each)
        assert int(state.report.status) == Status.UPDATED
        assert float(state.report.grad_norm["policy"]) == pytest.approx(count * np.linalg.norm(each), rel=1e-6)
        first, second = 0.9 * first + 0.1 * count * each, 0.99 * second + 0.01 * (count * each) ** 2
        moments = optax.tree.get(state.chains["policy"].optimizer, "ScaleByAdamState")
        assert moments.mu["theta"].dtype == moments.nu["theta"].dtype == jnp.float32
        np.testing.assert_allclose(moments.mu["theta"], first, rtol=1e-6)
        np.testing.assert_allclose(moments.nu["theta"], second, rtol=1e-6)
        adam = (first / (1 - 0.9**window)) / (np.sqrt(second / (1 - 0.99**window)) + 1e-8)
        theta = theta - 0.05 * (adam + 0.1 * theta)
        got = state.params["policy"]["theta"]
        assert got.dtype == jnp.bfloat16
        theta = np.asarray(jnp.asarray(theta, jnp.float32).astype(jnp.bfloat16), np.float64)
        assert np.array_equal(np.asarray(got, np.float64), theta)


def test_t24_a_bf16_accumulator_stagnates_and_the_checksum_refuses_it(monkeypatch):
    def narrow(sums, gradients, witness):
        kept = jax.tree.map(lambda s, g: (s.astype(jnp.bfloat16) + g).astype(jnp.float32), sums.gradients, gradients)
        return Sums(kept, sums.witness + witness)

    monkeypatch.setattr(step_module, "add", narrow)
    step, state = bf16_setup()
    before, after = bf16_window(step, state, MANY)
    got = np.asarray(before.chains["policy"].sums.gradients["theta"], np.float64)
    assert np.all(np.abs(got) < 0.5 * MANY * np.abs(np.asarray(TENTH, np.float64)))
    assert int(after.report.status) == Status.CHECKSUM_MISMATCH
    assert 0 < int(after.report.bad_micro_batch) < MANY
    assert np.array_equal(after.params["policy"]["theta"], state.params["policy"]["theta"])


# k = 1


def test_t31_one_micro_batch_is_bitwise_an_independent_optax_step():
    """No accumulator at all: value, gradient, update, apply in one jitted function of three lines."""
    optimizer = make_optimizer(
        make_schedule("cosine", 0.1, warmup_steps=2, decay_steps=9),
        b1=0.9,
        b2=0.99,
        eps=1e-8,
        weight_decay=0.1,
        clip_norm=1.0,
    )
    step, state = toys.sgd_setup(toys.tanh_losses, toys.tanh_params(), optimizer=optimizer)

    @jax.jit
    def one_shot(params, optimizer_state, batch):
        gradient = jax.grad(lambda tree: toys.tanh_losses({"policy": tree}, batch)[0]["toy"])(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
            return optax.apply_updates(params, updates), optimizer_state

    params = toys.tanh_params()["policy"]
    optimizer_state = optimizer.init(params)
    rng = np.random.default_rng(31)
    for _ in range(6):
        tokens, mask = toys.rows_of(rng, 8)
        (batch,) = toys.window(tokens, mask, rng.uniform(0.1, 1.0, mask.shape), [range(8)], pad_rows=8)
        params, optimizer_state = one_shot(params, optimizer_state, batch)
        state = toys.run_window(step, state, [batch])
        assert int(state.report.status) == Status.UPDATED
        mine, theirs = (state.params["policy"], state.chains["policy"].optimizer), (params, optimizer_state)
        assert all(map(np.array_equal, jax.tree.leaves(mine), jax.tree.leaves(theirs)))
