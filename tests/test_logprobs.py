"""Chunked log-probs and entropy against a float64 loop, and their memory against an analytic bound."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hptjax.losses.logprobs import token_logprobs
from hptjax.sharding.mesh import make_mesh
from hptjax.sharding.rules import make_rules, partition_spec

B, T, D, V = 3, 7, 5, 11


def problem(dtype=np.float32, seed=0):
    """Hidden states, unembedding, targets, temperatures and cotangents of both results."""
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    unembedding = jnp.asarray(rng.normal(size=(D, V)), dtype)
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    temperature = jnp.asarray(rng.uniform(0.5, 2, (B, T)), jnp.float32)
    weights = rng.normal(size=(2, B, T)).astype(np.float32)
    return hidden, unembedding, targets, temperature, weights


def slow(hidden, unembedding, targets, temperature, weights):
    """Token by token in float64: log-probs, entropy, and the gradients of their weighted sums."""
    hidden, unembedding, temperature = (np.asarray(x, np.float64) for x in (hidden, unembedding, temperature))
    logprobs, entropy = np.zeros((B, T)), np.zeros((B, T))
    d_hidden, d_unembedding = np.zeros(hidden.shape), np.zeros(unembedding.shape)
    for b in range(B):
        for t in range(T):
            z = hidden[b, t] @ unembedding / temperature[b, t]
            logp = z - np.log(np.exp(z).sum())
            p = np.exp(logp)
            logprobs[b, t] = logp[targets[b, t]]
            entropy[b, t] = -(p * logp).sum()
            d_z = weights[0, b, t] * (np.eye(V)[targets[b, t]] - p) - weights[1, b, t] * p * (logp + entropy[b, t])
            d_hidden[b, t] = unembedding @ (d_z / temperature[b, t])
            d_unembedding += np.outer(hidden[b, t], d_z / temperature[b, t])
    return logprobs, entropy, d_hidden, d_unembedding


def fast(hidden, unembedding, targets, temperature, weights, chunk_tokens, live=None):
    def loss(hidden, unembedding):
        stats = token_logprobs(
            hidden, unembedding, targets, temperature, chunk_tokens=chunk_tokens, want_entropy=True, live=live
        )
        return jnp.sum(weights[0] * stats.logprobs + weights[1] * stats.entropy), stats

    (_, stats), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden, unembedding)
    return stats.logprobs, stats.entropy, *grads


@pytest.mark.parametrize("chunk_tokens", [1, 9, 21, 1000])
def test_token_logprobs_equal_a_float64_loop(chunk_tokens):
    # chunks of 1 position and of 3 (7 positions padded to 9); no chunks where all 21 tokens fit
    inputs = problem()
    for got, want in zip(fast(*inputs, chunk_tokens), slow(*inputs), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("chunk_tokens", [6, 1000])
def test_token_logprobs_bf16_operands_give_fp32_results(chunk_tokens):
    inputs = problem(jnp.bfloat16)
    got, want = fast(*inputs, chunk_tokens), slow(*inputs)  # the loop reads the same rounded operands
    assert [x.dtype for x in got] == [np.float32, np.float32, jnp.bfloat16, jnp.bfloat16]
    for x, y in zip(got[:2], want[:2], strict=True):  # products of bf16 are exact in fp32: no rounding of logits
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)
    for x, y in zip(got[2:], want[2:], strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=0, atol=2e-2 * np.abs(y).max())


@pytest.mark.parametrize(("dtype", "rounding"), [(np.float32, 1e-4), (jnp.bfloat16, 2.0**-8)])
def test_token_logprobs_adds_the_unembedding_gradient_in_fp32(dtype, rounding):
    # 1024 chunks of one position, each adding 129/128 * (171/256, -1/3, -1/3), where 171/256 is 2/3 in bf16. A sum in
    # bf16 would stop at 256; each product rounded to bf16 would be 0.2 % off, all the same way
    positions, hidden = 1024, 129 / 128
    grads = jax.jit(
        jax.grad(
            lambda w: token_logprobs(
                jnp.full((1, positions, 1), hidden, jnp.bfloat16),
                w,
                jnp.zeros((1, positions), jnp.int32),
                jnp.ones((1, positions)),
                chunk_tokens=1,
                want_entropy=False,
            ).logprobs.sum()
        )
    )(jnp.zeros((1, 3), dtype))
    assert grads.dtype == dtype
    others = float(jnp.asarray(-1 / 3, jnp.bfloat16))
    want = positions * hidden * np.array([[171 / 256, others, others]])
    np.testing.assert_allclose(np.asarray(grads, np.float64), want, rtol=rounding)


def test_token_logprobs_entropy_is_optional_and_exact_at_the_extremes():
    hidden, targets, one = jnp.ones((1, 2, 1)), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2))
    flat = token_logprobs(hidden, jnp.zeros((1, 8)), targets, one, chunk_tokens=1, want_entropy=True)
    np.testing.assert_allclose(flat.entropy, np.log(8), rtol=1e-6)
    np.testing.assert_allclose(flat.logprobs, -np.log(8), rtol=1e-6)
    sharp = jnp.asarray([[1e4, 0.0, -1e4]])
    stats = token_logprobs(hidden, sharp, targets, one, chunk_tokens=1, want_entropy=True)
    np.testing.assert_array_equal(stats.entropy, 0)
    np.testing.assert_array_equal(stats.logprobs, 0)
    assert token_logprobs(hidden, sharp, targets, one, chunk_tokens=1, want_entropy=False).entropy is None


def test_token_logprobs_refuses_empty_chunks():
    hidden, unembedding, targets, temperature, _ = problem()
    with pytest.raises(ValueError, match="chunk_tokens"):
        token_logprobs(hidden, unembedding, targets, temperature, chunk_tokens=0, want_entropy=False)


@pytest.mark.parametrize("chunk_tokens", [6, 1000])
def test_token_logprobs_garbage_where_not_live_changes_nothing_property_25(chunk_tokens):
    hidden, unembedding, targets, temperature, weights = problem()
    live = np.arange(T)[None, :] < np.array([7, 3, 5])[:, None]
    clean = fast(hidden, unembedding, targets, temperature, weights, chunk_tokens, live)
    spoilt_hidden = jnp.where(live[:, :, None], hidden, np.nan)
    dirty = fast(
        spoilt_hidden,
        unembedding,
        jnp.where(live, targets, -1),
        jnp.where(live, temperature, 0),
        weights,
        chunk_tokens,
        live,
    )
    for x, y in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(x, y)
    for x in clean[:3]:
        np.testing.assert_array_equal(np.asarray(x)[~live], 0)
    want = slow(hidden, unembedding, targets, temperature, weights * live)
    np.testing.assert_allclose(clean[3], want[3], rtol=0, atol=2e-5)


ROWS, POSITIONS, WIDTH, VOCAB = 4, 512, 16, 32768


def temporary_bytes(chunk_tokens, dtype, want_entropy=True):
    """Scratch memory of the compiled loss and gradient, as the compiler states it."""

    def loss(hidden, unembedding, targets):
        stats = token_logprobs(
            hidden,
            unembedding,
            targets,
            jnp.ones((ROWS, POSITIONS)),
            chunk_tokens=chunk_tokens,
            want_entropy=want_entropy,
        )
        return stats.logprobs.sum() + (stats.entropy.sum() if want_entropy else 0)

    arguments = (
        jax.ShapeDtypeStruct((ROWS, POSITIONS, WIDTH), dtype),
        jax.ShapeDtypeStruct((WIDTH, VOCAB), dtype),
        jax.ShapeDtypeStruct((ROWS, POSITIONS), jnp.int32),
    )
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("dtype", "want_entropy"), [(np.float32, True), (jnp.bfloat16, True), (np.float32, False)])
def test_token_logprobs_never_hold_all_logits(dtype, want_entropy):
    chunk_tokens = 32
    whole = ROWS * POSITIONS * VOCAB * 4  # 268 MB
    # at most five fp32 copies of a chunk's logits, four of the unembedding, four of the hidden states
    bound = 5 * chunk_tokens * VOCAB * 4 + 4 * WIDTH * VOCAB * 4 + 4 * ROWS * POSITIONS * WIDTH * 4
    assert bound < whole / 8
    assert temporary_bytes(chunk_tokens, dtype, want_entropy) < bound


def test_token_logprobs_memory_test_can_fail():
    # with one chunk for everything the same reading finds [B T V]
    assert temporary_bytes(ROWS * POSITIONS, np.float32) >= ROWS * POSITIONS * VOCAB * 4


def test_token_logprobs_keep_rows_on_their_devices(eight_devices):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=eight_devices)
    by_row = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(8, 6, D)).astype(np.float32)
    unembedding = rng.normal(size=(D, V)).astype(np.float32)
    targets = rng.integers(0, V, (8, 6)).astype(np.int32)

    def loss(hidden, unembedding, targets):
        stats = token_logprobs(hidden, unembedding, targets, jnp.ones((8, 6)), chunk_tokens=16, want_entropy=True)
        return stats.logprobs.sum() + stats.entropy.sum(), stats.logprobs

    step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    sharded = jax.jit(step, in_shardings=(by_row, everywhere, by_row)).lower(hidden, unembedding, targets).compile()
    text = sharded.as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert "collective-permute" not in text
    arguments = (
        jax.device_put(hidden, by_row),
        jax.device_put(unembedding, everywhere),
        jax.device_put(targets, by_row),
    )
    (value, logprobs), grads = sharded(*arguments)
    assert logprobs.sharding.is_equivalent_to(by_row, 2)
    (want_value, want_logprobs), want_grads = step(hidden, unembedding, targets)
    np.testing.assert_allclose(value, want_value, rtol=1e-6)
    np.testing.assert_allclose(logprobs, want_logprobs, rtol=0, atol=1e-6)
    for x, y in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


LOSS_MESHES = {
    "one_device": {},
    "tensor4": {"tensor": 4},
    "sequence2_tensor2": {"sequence": 2, "tensor": 2},
    "fsdp2_tensor2": {"fsdp": 2, "tensor": 2},
}


def compiled_loss(sizes, shape, vocabulary, dtype, devices, chunk_tokens, *, tied=False):
    """The loss's gradient compiled for a mesh by the training table; the unembedding is a float32 parameter."""
    mesh = make_mesh(**sizes, devices=devices[: math.prod(sizes.values())])
    rules = make_rules("fsdp")

    def shaped(dtype, *axes_and_sizes):
        axes, sizes = zip(*axes_and_sizes, strict=True)
        place = jax.sharding.NamedSharding(mesh, partition_spec(mesh, axes, sizes, rules))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    rows, positions, width = shape
    hidden = shaped(dtype, ("batch", rows), ("time", positions), ("features", width))
    targets = shaped(jnp.int32, ("batch", rows), ("time", positions))
    sides = (("vocab", vocabulary), ("embed", width))
    unembedding = shaped(jnp.float32, *(sides if tied else sides[::-1]))

    def loss(hidden, unembedding, targets):
        stats = token_logprobs(
            hidden,
            (unembedding.T if tied else unembedding).astype(dtype),
            targets,
            jnp.ones((rows, positions)),
            chunk_tokens=chunk_tokens,
            want_entropy=True,
            time_parts=sizes.get("sequence", 1),
        )
        return stats.logprobs.sum() + stats.entropy.sum()

    places = (hidden.sharding, unembedding.sharding)
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), out_shardings=(None, places))
    return step.lower(hidden, unembedding, targets).compile(), (*places, targets.sharding)


QWEN_VOCAB = 152_064  # Qwen2.5's, of the 7B


@pytest.mark.parametrize(("dtype", "tied"), [(jnp.float32, False), (jnp.bfloat16, True)], ids=["fp32", "bf16_tied"])
@pytest.mark.parametrize("case", LOSS_MESHES)
def test_token_logprobs_memory_on_a_mesh_does_not_grow_with_vocabulary_times_tokens(case, dtype, tied, eight_devices):
    sizes, width, chunk_tokens = LOSS_MESHES[case], 64, 256
    short, long = (
        compiled_loss(sizes, (2, positions, width), QWEN_VOCAB, dtype, eight_devices, chunk_tokens, tied=tied)[0]
        .memory_analysis()
        .temp_size_in_bytes
        for positions in (1024, 2048)
    )
    added = 2 * 1024  # tokens
    assert long - short < 8 * added * width * 4  # hidden states and what is read off per token
    assert long - short < added * QWEN_VOCAB * 4 / 100
    chunk, weights = (
        chunk_tokens * QWEN_VOCAB * 4 / math.prod(sizes.values()),
        QWEN_VOCAB * width * 4 / sizes.get("tensor", 1),
    )
    assert long < 4 * chunk + 4 * weights + 8 * 2 * 2048 * width * 4  # each device has its part of a chunk's logits


@pytest.mark.parametrize("case", LOSS_MESHES)
def test_token_logprobs_on_a_mesh_equal_the_naive_form(case, eight_devices):
    rows, positions, width, vocabulary = 2, 24, 8, 40
    step, places = compiled_loss(LOSS_MESHES[case], (rows, positions, width), vocabulary, np.float32, eight_devices, 8)
    moved = re.findall(r"= \S+ (all-gather|all-to-all|collective-permute)(?:-start)?\(", step.as_text())
    assert set(moved) <= ({"all-gather"} if "fsdp" in case else set())  # the weights alone, where they are cut
    rng = np.random.default_rng(2)
    hidden, unembedding = (
        rng.normal(size=s).astype(np.float32) for s in ((rows, positions, width), (width, vocabulary))
    )
    targets = rng.integers(0, vocabulary, (rows, positions)).astype(np.int32)

    def naive(hidden, unembedding):
        logprobs = jax.nn.log_softmax(hidden @ unembedding)  # [B T V]
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        return jnp.take_along_axis(logprobs, targets[:, :, None], axis=-1).sum() + entropy.sum()

    want = jax.value_and_grad(naive, argnums=(0, 1))(hidden, unembedding)
    got = step(*jax.device_put((hidden, unembedding, targets), places))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)
