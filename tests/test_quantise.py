"""What rollouts hold as int8: the numbers, what is read of them, who says how far off they are, and what they take.

Oracle: NumPy's own quantising, float64 loops over what it leaves, and the slow decoder of `tests/test_models.py`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hptjax.build.adapters import as_used
from hptjax.build.policy import build_functions, build_policy
from hptjax.build.sampler import decode_shape
from hptjax.config import MeshConfig
from hptjax.models import decoder
from hptjax.models.attention_cache import attention_step, attention_step_in_blocks, attention_step_in_pages
from hptjax.models.cache import cache_shapes
from hptjax.models.layers import product
from hptjax.models.quantise import MATRICES, quantised, quantised_matrices, with_scales
from hptjax.records import Request, SampleId
from hptjax.rollout.engine import make_engine
from hptjax.train import telemetry
from hptjax.train.jsonl import read_rows
from tests import recorded, tiny
from tests.test_attention import cache_case
from tests.test_models import FAMILIES, random_params, slow_decoder
from tests.test_rollout import (
    KEY,
    PARAMS,
    SIZES,
    assert_same_bits,
    make_policy,
    mixed_requests,
    next_scaled_logits,
)


def by_numpy(x, axes):
    """(whole numbers, scales that keep their axes), in float64."""
    scale = np.abs(np.asarray(x, np.float64)).max(axis=axes, keepdims=True) / 127
    return np.rint(x / np.where(scale > 0, scale, 1)), scale


def read_back(x, axes):
    whole, scale = by_numpy(x, axes)
    return whole * scale


# numbers


def test_quantised_by_hand():
    """Two columns: the largest of the first is 254, so its scale is 2; of the second 12.7, so 0.1. Ties go to even."""
    x = jnp.asarray([[254.0, -12.7], [-3.0, 0.26], [-5.0, 0.0]], jnp.float32)
    whole, scale = quantised(x, (0,))
    assert whole.dtype == jnp.int8
    assert whole.tolist() == [[127, -127], [-2, 3], [-2, 0]]  # -1.5 and -2.5 both go to -2
    np.testing.assert_allclose(scale, [2.0, 0.1], rtol=1e-6)


def test_quantised_is_numpys_and_within_half_a_step():
    x = np.random.default_rng(0).normal(0, 3, (2, 40, 3, 8)).astype(np.float32)
    for axes in ((1,), (1, 2), (3,)):
        whole, scale = map(np.asarray, quantised(x, axes))
        expected, step = by_numpy(x, axes)
        assert np.mean(whole != expected) < 1e-3  # only what lies at a half to the last bit
        np.testing.assert_allclose(scale, step.squeeze(axes), rtol=1e-6)
        assert (np.abs(x - whole * step) <= 0.5001 * step).all()
        assert np.abs(whole).max() == 127


def test_quantised_zeros_are_zero_and_what_is_not_finite_stays_so():
    whole, scale = quantised(jnp.asarray([[0.0, 0.0], [1.0, np.nan], [-np.inf, 2.0]]), (1,))
    with np.errstate(invalid="ignore"):
        read = np.asarray(whole, np.float32) * np.asarray(scale)[:, None]
    assert read[0].tolist() == [0.0, 0.0]
    assert not np.isfinite(read[1:]).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_product_of_int8_equals_a_float64_loop(dtype):
    params = random_params(FAMILIES["qwen2"])["layers"]
    kept = quantised_matrices(params)
    x = np.random.default_rng(1).normal(size=(2, 3, 12)).astype(dtype)
    for name in ("query", "gate"):
        got = product(jnp.asarray(x), {key: leaf[0] for key, leaf in kept.items()}, name)
        read = read_back(params[name], (1,))[0].reshape(12, -1)
        expected = np.array([[[row.astype(np.float64) @ column for column in read.T] for row in rows] for rows in x])
        assert got.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(got, np.float64), expected, rtol=2e-2 if dtype != np.float32 else 0, atol=2e-6
        )


def test_scales_have_the_output_axes_of_their_matrices():
    config = FAMILIES["qwen3"]
    kept = quantised_matrices(random_params(config)["layers"])
    shapes, axes = with_scales(decoder.param_shapes(config)), with_scales(decoder.logical_axes(config))
    assert {name: leaf.shape for name, leaf in kept.items()} == {name: shapes["layers"][name] for name in kept}
    assert axes["layers"]["query_scale"] == ("layers", "heads", "head_dim")
    assert axes["layers"]["output_scale"] == axes["layers"]["down_scale"] == ("layers", "embed")
    assert axes["layers"]["gate_scale"] == ("layers", "mlp")
    assert len(kept) == 2 * len(MATRICES) == 14


# attention over an int8 cache


def slow_attention(query, key, value, keys, values, lengths):
    """One new position of each row over the first `lengths` cached ones and itself: a float64 loop."""
    heads, kv_heads, size = query.shape[2], key.shape[2], query.shape[3]
    mixed = np.zeros(query.shape)
    for row, length in enumerate(lengths):
        for head in range(heads):
            kv = head * kv_heads // heads
            seen = np.concatenate([keys[row, :length, kv], key[row, :, kv]]).astype(np.float64)
            of = np.concatenate([values[row, :length, kv], value[row, :, kv]]).astype(np.float64)
            scores = np.array([query[row, 0, head].astype(np.float64) @ one for one in seen]) / np.sqrt(size)
            weights = np.exp(scores - scores.max())
            mixed[row, 0, head] = (weights / weights.sum()) @ of
    return mixed


def in_pages(cached, size):
    """[L B C ...] as pages [L B M, size ...] in another order, and the table [B M] of two shares of rows."""
    layers, rows, capacity = cached.shape[:3]
    blocks = -(-capacity // size)
    room = [(0, 0), (0, 0), (0, blocks * size - capacity), *[(0, 0)] * (cached.ndim - 3)]
    pages = np.pad(cached, room, constant_values=7).reshape(layers, rows, blocks, size, *cached.shape[3:])
    pages = pages[:, :, ::-1].reshape(layers, rows * blocks, size, *cached.shape[3:])
    within = np.arange(blocks)[::-1] + blocks * (np.arange(rows) % (rows // 2))[:, None]
    return pages, within.astype(np.int32)


def test_attention_steps_over_int8_equal_a_float64_loop():
    query, key, value, keys, values = cache_case()
    lengths = np.array([0, 5, 36, 37], np.int32)
    expected = slow_attention(query, key, value, read_back(keys, (4,))[1], read_back(values, (4,))[1], lengths)
    (kept_keys, key_scales), (kept_values, value_scales) = (map(np.asarray, quantised(x, (4,))) for x in (keys, values))
    mask = np.arange(37)[None, :] < lengths[:, None]
    scales = (key_scales, value_scales)
    found = [attention_step(query, key, value, kept_keys[1], kept_values[1], mask, tuple(one[1] for one in scales))]
    cached = (query, key, value, kept_keys, kept_values, jnp.asarray(1), lengths)
    found += [attention_step_in_blocks(*cached, block=block, scales=scales) for block in (8, 37)]
    paged = [in_pages(one, 8) for one in (kept_keys, kept_values, *scales)]
    (pool_keys, table), (pool_values, _), *pool_scales = paged
    cached = (query, key, value, pool_keys, pool_values, jnp.asarray(1), lengths, table)
    found.append(attention_step_in_pages(*cached, parts=2, scales=tuple(pool for pool, _ in pool_scales)))
    for got in found:
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)
    plain = slow_attention(query, key, value, keys[1], values[1], lengths)
    assert 1e-3 < np.abs(plain - expected).max() < 2e-2  # int8 is seen, and is small


@pytest.mark.parametrize(("family", "cache_block"), [("llama", None), ("qwen2", 5), ("qwen3", None)])
def test_decoding_with_int8_equals_the_slow_decoder(family, cache_block):
    """Matrices that NumPy quantised; from the last token of the prompt on, earlier positions are seen as int8."""
    config, prompt, length = FAMILIES[family], 4, 9
    params = random_params(config)
    tokens = np.random.default_rng(3).integers(0, 23, length).astype(np.int32)

    def seen(position, earlier, head):
        return head if position < prompt - 1 or earlier == position else read_back(head, (0,))

    layers = {name: read_back(params["layers"][name], tuple(range(1, 1 + axes))) for name, axes in MATRICES.items()}
    expected = slow_decoder({**params, "layers": {**params["layers"], **layers}}, tokens, config, seen)
    kept = {**params, "layers": {**params["layers"], **quantised_matrices(params["layers"])}}
    bound = {"config": config, "compute_dtype": jnp.float32}
    rows = np.zeros((1, 6), np.int32)
    rows[0, :prompt] = tokens[:prompt]
    _, cache = decoder.prefill(kept, rows, np.array([prompt], np.int32), capacity=12, int8_cache=True, **bound)
    assert {leaf.dtype for leaf in cache} == {jnp.dtype(jnp.int8), jnp.dtype(jnp.float32)}
    assert jax.tree.map(lambda leaf: leaf.shape, cache) == cache_shapes(config, 1, 12, int8=True)
    step = jax.jit(functools.partial(decoder.decode_step, cache_block=cache_block, **bound))
    for position in range(prompt - 1, length):
        hidden, cache = step(kept, cache, tokens[[position]], np.array([position], np.int32))
        np.testing.assert_allclose(hidden[0], expected[position], rtol=0, atol=1e-4)
    assert np.abs(expected - slow_decoder(params, tokens, config)).max() > 1e-3


# samples


@functools.cache
def int8_engine(**sizes):
    policy = make_policy()
    policy["prefill"] = functools.partial(policy["prefill"], int8_cache=True)
    return make_engine(**policy, **SIZES, **sizes, precision="weights=int8 cache=int8")


INT8_PARAMS = {**PARAMS, "layers": {**PARAMS["layers"], **quantised_matrices(PARAMS["layers"])}}


@pytest.mark.parametrize("sizes", [{}, {"cache_positions": 48, "cache_page": 4}])
def test_replay_with_int8_ignores_neighbours_and_log_probs_are_near_the_trainers(sizes):
    sample, asked = int8_engine(**sizes), mixed_requests()
    samples = sample(INT8_PARAMS, asked, KEY)
    gaps = []
    for place in (0, 5, 10, 14):
        (alone,) = sample(INT8_PARAMS, [asked[place]], KEY)
        assert_same_bits(samples[place], alone)
        assert alone.decode_shape.endswith(" weights=int8 cache=int8")
        for at in range(alone.prefix_len, len(alone.completion_tokens)):
            scaled = next_scaled_logits(asked[place], alone.completion_tokens[:at]).astype(np.float64)
            exact = scaled[alone.completion_tokens[at]] - np.log(np.exp(scaled).sum())
            gaps.append(abs(exact - alone.sampler_logprobs[at]))
    assert 1e-4 < np.mean(gaps) < 0.02
    assert max(gaps) < 0.1


def test_a_diverged_policy_is_told_of_through_int8():
    broken = jax.tree.map(np.array, PARAMS)
    broken["layers"]["down"][1, 3, 4] = np.nan
    kept = {**broken, "layers": {**broken["layers"], **quantised_matrices(broken["layers"])}}
    with pytest.raises(FloatingPointError, match="expected finite sampler log-probs"):
        int8_engine()(kept, mixed_requests()[:2], KEY)


def int8_config(folder, **changes):
    config = tiny.tiny_config(folder, **changes)
    return dataclasses.replace(
        config, rollout=dataclasses.replace(config.rollout, weights_dtype="int8", cache_dtype="int8")
    )


@pytest.mark.slow
def test_rollouts_with_int8_on_eight_devices_are_the_one_device_rollouts(tmp_path, eight_devices):
    """A rounding that differs between meshes may turn a whole number into its neighbour, hence the wider bound."""
    requests = [
        Request(SampleId(question.question_id, 0, index), question.prompt_tokens, 20, frozenset({2}))
        for question in recorded.questions()[:4]
        for index in range(3)
    ]
    config, found = int8_config(tmp_path), []
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, prefill_rows=8))
    for mesh in (MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)):
        model = dataclasses.replace(config.model, shape=dataclasses.replace(config.model.shape, num_kv_heads=2))
        rows = dataclasses.replace(config.batch, rows=8)
        policy = build_policy(dataclasses.replace(config, mesh=mesh, model=model, batch=rows))
        found.append(policy.sample(policy.params, requests, jax.random.key(0)))
    for one, many in zip(*found, strict=True):
        assert np.array_equal(one.completion_tokens, many.completion_tokens)
        np.testing.assert_allclose(many.sampler_logprobs, one.sampler_logprobs, rtol=0, atol=2e-3)


@pytest.mark.slow
def test_rollouts_of_adapters_hold_the_merged_matrices_as_int8(tmp_path):
    """Fresh adapters change nothing, so their samples are those of the model as it is held, in bf16."""
    config = int8_config(tmp_path)
    config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=2))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype="bfloat16"))
    policy = build_policy(config)
    asked = [
        Request(SampleId(0, 0, index), recorded.questions()[0].prompt_tokens, 9, frozenset()) for index in range(3)
    ]
    model = build_functions(config, policy.config, policy.mesh)
    whole = make_engine(
        **model.sampler,
        **vars(decode_shape(config, policy.config.vocab_size, 1)),
        pad_id=0,
    )
    base = as_used(policy.frozen.trees["base"], dtype=jnp.bfloat16)
    kept = {**base, "layers": {**base["layers"], **quantised_matrices(base["layers"])}}
    for got, expected in zip(policy.sample(policy.params, asked, KEY), whole(kept, asked, KEY), strict=True):
        assert_same_bits(got, expected)


# what is said


def test_telemetry_says_once_how_far_off_the_sampler_is():
    rows, said = [], []
    write = telemetry.say_sampler_gap(lambda step, metrics: rows.append(step), said.append, "int8 cache")
    for step, gap in enumerate([None, 2e-3, 5e-3]):
        write(step, {} if gap is None else {"rollout/logp_diff_mean": gap, "rollout/logp_diff_max": 10 * gap})
    assert rows == [0, 1, 2]
    assert len(said) == 1
    assert "step 1: the sampler (int8 cache) and the trainer differ by 2.0e-03 nats" in said[0]
    assert "by 2.0e-02 at most" in said[0]


def test_a_run_with_int8_rollouts_says_so_and_measures_it(tmp_path, capsys):
    config = int8_config(tmp_path)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
    tiny.train(config)
    said = capsys.readouterr().err
    assert (
        said.count(
            "rollouts and evaluations hold weights and cache as int8 (rollout.weights_dtype, rollout.cache_dtype)"
        )
        == 1
    )
    assert "hpt.sampler_correction is 'none', so nothing corrects for it" in said
    assert said.count("the sampler (int8 weights and cache) and the trainer differ by") == 1
    assert "alarm" not in said
    gaps = [
        row["rollout/logp_diff_max"]
        for row in read_rows(tmp_path / "runs/tiny/metrics.jsonl")
        if "rollout/logp_diff_max" in row
    ]
    assert all(1e-5 < gap < 0.1 for gap in gaps)
    assert gaps
