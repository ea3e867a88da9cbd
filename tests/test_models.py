"""The decoder against a slow float64 second route, its cache, its packing, and the checkpoint folder."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from hptjax.models import llama, qwen
from hptjax.models.cache import cache_axes
from hptjax.models.decoder import (
    decode_step,
    forward,
    init_params,
    logical_axes,
    param_shapes,
    prefill,
    unembedding,
)
from hptjax.models.layers import matmul
from hptjax.models.rope import frequencies
from hptjax.models.shape import DecoderConfig, Llama3RopeScaling

SIZES = {
    "vocab_size": 23,
    "hidden_size": 12,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "mlp_size": 20,
    "max_positions": 64,
}
FAMILIES = {
    "llama": DecoderConfig(
        **SIZES, rope_theta=50.0, rope_scaling=Llama3RopeScaling(4.0, 1.0, 4.0, 16), rms_norm_eps=1e-5
    ),
    "qwen2": DecoderConfig(**SIZES, attention_bias=True, tie_embeddings=True),
    "qwen3": DecoderConfig(**SIZES, rope_theta=1e6, qk_norm=True),
}
SEGMENT_LENGTHS = ((5, 3, 7, 1), (2, 9, 4), (16,))  # packed rows of 18: three or more unequal segments, and padding
ROW_TOKENS = 18


def random_params(config: DecoderConfig, seed: int = 0):
    """Host parameters with norms and biases away from 1 and 0, so that each of them matters."""
    rng = np.random.default_rng(seed)
    centre = {"norm": 1.0, "bias": 0.0}
    return traverse_util.unflatten_dict(
        {
            path: (centre.get(path[-1].split("_")[-1], 0.0) + rng.normal(0, 0.3, shape)).astype(np.float32)
            for path, shape in traverse_util.flatten_dict(param_shapes(config)).items()
        }
    )


def packed_rows(lengths=SEGMENT_LENGTHS, row_tokens=ROW_TOKENS, seed=1):
    """Tokens, positions and segment ids of packed rows; garbage tokens in the padding."""
    shape = (len(lengths), row_tokens)
    tokens = np.random.default_rng(seed).integers(0, SIZES["vocab_size"], shape).astype(np.int32)
    positions, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, row_lengths in enumerate(lengths):
        start = 0
        for number, length in enumerate(row_lengths, start=1):
            positions[row, start : start + length] = np.arange(length)
            segments[row, start : start + length] = number
            start += length
    return tokens, positions, segments


@functools.cache
def jitted(config: DecoderConfig, compute_dtype=jnp.float32):
    """Forward, prefill and decode of one shape, compiled once for the whole file."""
    keywords = {"config": config, "compute_dtype": compute_dtype}
    return (
        jax.jit(functools.partial(forward, **keywords)),
        jax.jit(functools.partial(prefill, **keywords), static_argnames="capacity"),
        jax.jit(functools.partial(decode_step, **keywords)),
    )


# ---- the second route: one sequence, one token, one head at a time, float64 ----


def slow_norm(x, scale, eps):
    return x / math.sqrt(sum(v * v for v in x) / len(x) + eps) * scale


def slow_frequency(pair: int, config: DecoderConfig) -> float:
    """Radians per position of one rotary pair, in the wavelength form of the Llama 3.1 release."""
    plain = 1.0 / config.rope_theta ** (2 * pair / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    wavelength = 2 * math.pi / plain
    if wavelength < scaling.original_max_positions / scaling.high_freq_factor:
        return plain
    if wavelength > scaling.original_max_positions / scaling.low_freq_factor:
        return plain / scaling.factor
    smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * plain / scaling.factor + smooth * plain


def slow_rotate(head, position, config):
    half = config.head_dim // 2
    turned = [complex(head[e], head[e + half]) * np.exp(1j * position * slow_frequency(e, config)) for e in range(half)]
    return np.array([z.real for z in turned] + [z.imag for z in turned])


def slow_decoder(params, tokens, config, seen=lambda position, earlier, head: head):
    """Hidden states [T D] of one unpacked sequence whose positions count from 0.

    Args
      seen: what a query at `position` sees of the key or value of a head at the position `earlier`.
    """
    weights = jax.tree.map(lambda value: np.asarray(value, np.float64), params)
    eps, repeat = config.rms_norm_eps, config.num_heads // config.num_kv_heads
    hidden = [weights["embedding"][token].copy() for token in tokens]
    for number in range(config.num_layers):
        w = {name: value[number] for name, value in weights["layers"].items()}
        queries, keys, values = [], [], []
        for position, x in enumerate(hidden):
            x = slow_norm(x, w["attention_norm"], eps)
            rows = {}
            for name, heads in (
                ("query", config.num_heads),
                ("key", config.num_kv_heads),
                ("value", config.num_kv_heads),
            ):
                rows[name] = [x @ w[name][:, head, :] for head in range(heads)]
                if config.attention_bias:
                    rows[name] = [row + w[f"{name}_bias"][head] for head, row in enumerate(rows[name])]
                if config.qk_norm and name != "value":
                    rows[name] = [slow_norm(row, w[f"{name}_norm"], eps) for row in rows[name]]
                if name != "value":
                    rows[name] = [slow_rotate(row, position, config) for row in rows[name]]
            queries.append(rows["query"]), keys.append(rows["key"]), values.append(rows["value"])
        for position in range(len(hidden)):
            for head in range(config.num_heads):
                kv = head // repeat
                scores = [
                    queries[position][head] @ seen(position, s, keys[s][kv]) / math.sqrt(config.head_dim)
                    for s in range(position + 1)
                ]
                weight = np.exp(np.array(scores) - max(scores))
                weight /= weight.sum()
                mixed = sum(weight[s] * seen(position, s, values[s][kv]) for s in range(position + 1))
                hidden[position] = hidden[position] + mixed @ w["output"][head]
            x = slow_norm(hidden[position], w["mlp_norm"], eps)
            gate = x @ w["gate"]
            hidden[position] = hidden[position] + (gate / (1 + np.exp(-gate)) * (x @ w["up"])) @ w["down"]
    return np.array([slow_norm(x, weights["final_norm"], eps) for x in hidden])


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_equals_the_slow_decoder_on_packed_rows(family):
    config = FAMILIES[family]
    params = random_params(config)
    tokens, positions, segments = packed_rows()
    hidden = np.asarray(jitted(config)[0](params, tokens, positions, segments))
    assert hidden.dtype == np.float32
    for row, lengths in enumerate(SEGMENT_LENGTHS):
        start = 0
        for length in lengths:
            slow = slow_decoder(params, tokens[row, start : start + length], config)
            np.testing.assert_allclose(hidden[row, start : start + length], slow, rtol=0, atol=2e-5)
            start += length


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_then_decode_equals_forward(family):
    config = FAMILIES[family]
    params = random_params(config)
    run_forward, run_prefill, run_decode = jitted(config)
    tokens, positions, segments = packed_rows(((18,), (18,), (18,)))
    whole = np.asarray(run_forward(params, tokens, positions, segments))
    lengths = np.array([4, 7, 1], np.int32)
    hidden, cache = run_prefill(params, tokens[:, :8], lengths, capacity=18)
    assert cache.keys.shape == (2, 3, 18, 2, 6)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(hidden[row, :length], whole[row, :length], rtol=0, atol=1e-5)
    rows = np.arange(3)
    for _ in range(11):  # the second row reaches the capacity
        hidden, cache = run_decode(params, cache, tokens[rows, lengths], lengths)
        np.testing.assert_allclose(hidden, whole[rows, lengths], rtol=0, atol=1e-5)
        lengths = lengths + 1


def test_decode_past_the_capacity_writes_nothing():
    config = FAMILIES["qwen3"]
    params = random_params(config)
    _, run_prefill, run_decode = jitted(config)
    tokens = packed_rows()[0]
    _, cache = run_prefill(params, tokens[:, :8], np.array([4, 7, 1], np.int32), capacity=18)
    _, after = run_decode(params, cache, tokens[:, 0], np.array([18, 30, 3], np.int32))
    for before, then in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
        assert np.array_equal(before[:, :2], then[:, :2])
    changed = np.any(np.asarray(after.keys[:, 2] != cache.keys[:, 2]), axis=(0, 2, 3))
    assert changed.tolist() == [position == 3 for position in range(18)]


@pytest.mark.parametrize("perturbed", [1, 2, 3])
def test_segments_do_not_see_each_other_bitwise(perturbed):
    config = FAMILIES["qwen2"]
    params = random_params(config)
    run_forward = jitted(config)[0]
    tokens, positions, segments = packed_rows()
    before = np.asarray(run_forward(params, tokens, positions, segments))
    touched = segments == perturbed
    after = np.asarray(run_forward(params, np.where(touched, (tokens + 5) % 23, tokens), positions, segments))
    assert np.array_equal(before[~touched], after[~touched])
    assert not np.any(np.all(before[touched] == after[touched], axis=-1))


def test_later_tokens_and_padding_change_nothing_before_them_bitwise():
    config = FAMILIES["llama"]
    params = random_params(config)
    run_forward, run_prefill, _ = jitted(config)
    tokens, positions, segments = packed_rows(((18,), (18,), (11,)))
    before = np.asarray(run_forward(params, tokens, positions, segments))
    later = np.where((np.arange(18)[None, :] >= 9) | (segments == 0), (tokens + 3) % 23, tokens)
    after = np.asarray(run_forward(params, later, positions, segments))
    assert np.array_equal(before[:, :9], after[:, :9])
    lengths = np.array([4, 7, 1], np.int32)
    garbage = np.where(np.arange(8)[None, :] < lengths[:, None], tokens[:, :8], (tokens[:, :8] + 7) % 23)
    clean, dirty = (run_prefill(params, t, lengths, capacity=18) for t in (tokens[:, :8], garbage))
    for row, length in enumerate(lengths):
        assert np.array_equal(clean[0][row, :length], dirty[0][row, :length])
        assert np.array_equal(clean[1].keys[:, row, :length], dirty[1].keys[:, row, :length])


def test_a_row_of_padding_is_finite_forward_and_backward():
    config = FAMILIES["qwen2"]
    inputs = packed_rows(((5, 3), (), (16,)))
    live = (inputs[2] > 0)[:, :, None] * np.ones(12)
    gradient, hidden = gradient_program()(random_params(config), *inputs, live.astype(np.float32))
    assert np.isfinite(hidden).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_decode_rows_do_not_see_each_other_bitwise():
    """Ten steps of one request: beside others, alone among garbage, and in another slot."""
    config = FAMILIES["qwen3"]
    params = random_params(config)
    _, run_prefill, run_decode = jitted(config)
    rng = np.random.default_rng(3)
    slots, steps, prompt = 6, 8, rng.integers(0, 23, 8).astype(np.int32)

    def trace(slot: int, seed: int):
        other = np.random.default_rng(seed)
        prompts = other.integers(0, 23, (slots, 8)).astype(np.int32)
        lengths = other.integers(1, 8, slots).astype(np.int32)
        prompts[slot], lengths[slot] = prompt, 5
        hidden, cache = run_prefill(params, prompts, lengths, capacity=18)
        # what stands past a row's length, in its own cache too, may be anything finite
        stale = np.arange(18)[None, None, :, None, None] >= lengths[None, :, None, None, None]
        cache = jax.tree.map(lambda leaf: np.where(stale, np.float32(100 * other.normal()), np.asarray(leaf)), cache)
        seen, token = [np.asarray(hidden[slot, :5])], 1
        for step in range(steps):
            tokens = other.integers(0, 23, slots).astype(np.int32)
            tokens[slot] = token
            hidden, cache = run_decode(params, cache, tokens, lengths + step)
            seen.append(np.asarray(hidden[slot])[None])
            token = (3 * token + step) % 23
        return np.concatenate(seen), np.asarray(cache.keys[:, slot, : 5 + steps])

    first = trace(slot=0, seed=0)
    for slot, seed in ((0, 1), (3, 2), (5, 0)):
        again = trace(slot, seed)
        assert np.array_equal(first[0], again[0]), f"slot {slot}"
        assert np.array_equal(first[1], again[1]), f"slot {slot}"


@functools.cache
def gradient_program(**keywords):
    """(params, tokens, positions, segment ids, mixing [B T D]) -> gradient of sum(hidden x mixing), and hidden."""

    def loss(params, tokens, positions, segments, mixing):
        run = functools.partial(forward, config=FAMILIES["qwen2"], compute_dtype=jnp.float32, **keywords)
        hidden = run(params, tokens, positions, segments)
        return jnp.sum(hidden * mixing), hidden

    return jax.jit(jax.grad(loss, has_aux=True))


def test_remat_and_unroll_leave_the_gradient_as_it_was():
    mixing = np.random.default_rng(4).normal(size=(3, ROW_TOKENS, 12)).astype(np.float32)
    inputs = (random_params(FAMILIES["qwen2"]), *packed_rows(), mixing)
    plain, other = gradient_program()(*inputs)[0], gradient_program(remat="full", unroll=2)(*inputs)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, other)


def test_gradient_of_forward_equals_central_differences():
    """Along one random direction per parameter, against differences of the slow float64 decoder on one segment."""
    config = FAMILIES["qwen2"]
    params, (tokens, positions, segments) = random_params(config), packed_rows()
    segment = tokens[0, 5:8]  # the second of row 0
    mixing = np.zeros((3, ROW_TOKENS, 12), np.float32)
    rng = np.random.default_rng(5)
    mixing[0, 5:8] = rng.normal(size=(3, 12))
    gradients, _ = gradient_program()(params, tokens, positions, segments, mixing)
    for path, gradient in traverse_util.flatten_dict(gradients).items():
        direction = rng.normal(size=gradient.shape)
        sides = []
        for sign in (1, -1):
            flat = traverse_util.flatten_dict(params)
            flat[path] = flat[path].astype(np.float64) + sign * 1e-5 * direction
            sides.append(np.sum(slow_decoder(traverse_util.unflatten_dict(flat), segment, config) * mixing[0, 5:8]))
        expected = (sides[0] - sides[1]) / 2e-5
        np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-3, atol=1e-3, err_msg=str(path))


def test_matmul_gradient_equals_einsum_gradient():
    rng = np.random.default_rng(6)
    x, kernel, mixing = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 4), (4, 5), (2, 3, 5)))
    ours, plain = (
        jax.grad(lambda x, k, f=f: jnp.sum(f(x, k) * mixing), argnums=(0, 1))(x, kernel)
        for f in (matmul, lambda x, k: jnp.einsum("btd,df->btf", x, k))
    )
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_bfloat16_compute_is_near_float32():
    config = FAMILIES["qwen3"]
    params = random_params(config)
    tokens, positions, segments = packed_rows()
    low = jitted(config, jnp.bfloat16)[0](params, tokens, positions, segments)
    high = np.asarray(jitted(config)[0](params, tokens, positions, segments))
    assert low.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(low, np.float32) - high) / np.linalg.norm(high)
    assert 1e-4 < error < 3e-2


@pytest.mark.parametrize("config", [llama.LLAMA_3_1_8B, llama.LLAMA_3_2_1B, FAMILIES["llama"], qwen.QWEN3_0_6B])
def test_rope_frequencies_equal_the_wavelength_form(config):
    expected = [slow_frequency(pair, config) for pair in range(config.head_dim // 2)]
    np.testing.assert_allclose(frequencies(config), expected, rtol=1e-6)


def test_llama3_scaling_keeps_blends_and_stretches():
    """By hand: theta 10000, E 4 gives 1 and 0.01 rad per position, wavelengths 6.28 and 628."""
    sizes = SIZES | {"head_dim": 4}
    stretch = Llama3RopeScaling(8.0, 1.0, 4.0, 100)  # keeps below 25, stretches in full above 100
    np.testing.assert_allclose(frequencies(DecoderConfig(**sizes, rope_scaling=stretch)), [1.0, 0.01 / 8], rtol=1e-6)
    blend = Llama3RopeScaling(8.0, 1.0, 4.0, 1257)  # 1257 / 628.3 = 2.0006 turns: a third of the way from 1 to 4
    keep = (1257 * 0.01 / (2 * math.pi) - 1) / 3
    expected = keep * 0.01 + (1 - keep) * 0.01 / 8
    np.testing.assert_allclose(frequencies(DecoderConfig(**sizes, rope_scaling=blend))[1], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        (llama.LLAMA_3_1_8B, 8_030_261_248),
        (llama.LLAMA_3_2_1B, 1_235_814_400),
        (qwen.QWEN2_5_0_5B, 494_032_768),
        (qwen.QWEN2_5_MATH_1_5B, 1_543_714_304),
        (qwen.QWEN2_5_MATH_7B, 7_615_616_512),
        (qwen.QWEN3_0_6B, 596_049_920),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, count):
    """The counts are the published sizes of the checkpoints."""
    assert sum(math.prod(shape) for shape in traverse_util.flatten_dict(param_shapes(preset)).values()) == count


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_axes_and_shapes_are_one_tree(family):
    config = FAMILIES[family]
    params, shapes, axes = (
        traverse_util.flatten_dict(tree)
        for tree in (
            jax.eval_shape(functools.partial(init_params, config=config), jax.random.key(0)),
            param_shapes(config),
            logical_axes(config),
        )
    )
    assert params.keys() == shapes.keys() == axes.keys()
    assert all(params[path].shape == shapes[path] and len(axes[path]) == len(shapes[path]) for path in params)
    assert all(value.dtype == jnp.float32 for value in params.values())
    assert ("unembedding",) not in params or not config.tie_embeddings
    assert len(cache_axes().keys) == 5


def test_fresh_parameters_have_the_stated_spread():
    """fan in 64 or 256; output and down divided by sqrt(2 L) = 2 besides."""
    config = DecoderConfig(**(SIZES | {"hidden_size": 64, "head_dim": 16, "mlp_size": 256, "vocab_size": 500}))
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), config)
    spread = {name: float(np.std(value)) for name, value in params["layers"].items()}
    for name, expected in {"query": 1 / 8, "value": 1 / 8, "up": 1 / 8, "output": 1 / 16, "down": 1 / 32}.items():
        assert spread[name] == pytest.approx(expected, rel=0.05), name
    assert float(np.std(params["embedding"])) == pytest.approx(0.02, rel=0.05)
    assert np.all(params["final_norm"] == 1)


def test_unembedding_is_the_embedding_where_tied():
    tied, free = FAMILIES["qwen2"], FAMILIES["qwen3"]
    params = random_params(tied)
    assert np.array_equal(unembedding(params, tied), params["embedding"].T)
    assert unembedding(random_params(free), free).shape == (12, 23)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "num_heads must be a multiple of num_kv_heads"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"rope_theta": 0.0}, "rope_theta must be positive"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be positive"),
    ],
)
def test_config_refuses_impossible_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**(SIZES | change))


@pytest.mark.parametrize("arguments", [(0.5, 1.0, 4.0, 16), (8.0, 4.0, 4.0, 16), (8.0, 1.0, 4.0, 0)])
def test_rope_scaling_refuses_impossible_factors(arguments):
    with pytest.raises(ValueError, match="rope_scaling"):
        Llama3RopeScaling(*arguments)


def test_prefill_refuses_a_cache_smaller_than_the_prompt():
    config = FAMILIES["qwen3"]
    with pytest.raises(ValueError, match="capacity of at least 8"):
        prefill(
            random_params(config),
            np.zeros((1, 8), np.int32),
            np.ones(1, np.int32),
            config=config,
            capacity=7,
            compute_dtype=jnp.float32,
        )
