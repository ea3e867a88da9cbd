"""Decoding with the layers written out and a cache for each, against the loop over layers and the training forward.

The engine's own promises (replay, shape identity) hold with it as well.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hptjax.models import decoder, decoder_apart
from hptjax.models.attention import attention, reference_attention
from hptjax.models.cache import Cache
from hptjax.models.decoder_apart import POSITION_AXIS, decode_step_apart, layers_apart, prefill_apart
from hptjax.models.rope import frequencies, rotation, rotation_table
from hptjax.rollout.engine import RolloutShardings, make_engine
from hptjax.rollout.programs import make_programs
from tests.test_continuous import most_exchanged
from tests.test_models import FAMILIES, jitted, packed_rows, random_params
from tests.test_rollout import (
    CONFIG,
    KEY,
    PARAMS,
    SHAPE,
    SIZES,
    assert_same_bits,
    assert_same_up_to_near_ties,
    mixed_requests,
    mixed_samples,
)


def written_out(config):
    """Prefill and decode of a family, compiled."""
    bound = {"config": config, "compute_dtype": jnp.float32}
    step = functools.partial(decode_step_apart, **bound)
    prefill = jax.jit(functools.partial(prefill_apart, **bound), static_argnames="capacity")
    return prefill, jax.jit(step)


def policy():
    """What the engine asks for, with the layers apart."""
    bound = {"config": CONFIG, "compute_dtype": jnp.float32}
    return {
        "prefill": functools.partial(prefill_apart, **bound),
        "decode_step": functools.partial(decode_step_apart, **bound),
        "unembedding": functools.partial(decoder.unembedding, config=CONFIG),
        "prepare": layers_apart,
        "position_axis": POSITION_AXIS,
    }


@pytest.mark.parametrize("turned_from", [1, 1 << 19], ids=["outputs first", ""])
@pytest.mark.parametrize("family", FAMILIES)
def test_apart_prefill_then_decode_equals_forward(family, turned_from, monkeypatch):
    monkeypatch.setattr(decoder_apart, "TURNED_FROM", turned_from)
    config = FAMILIES[family]
    params = random_params(config)
    tokens, positions, segments = packed_rows(((18,), (18,), (18,)))
    whole = np.asarray(jitted(config)[0](params, tokens, positions, segments))
    run_prefill, run_decode = written_out(config)
    lengths, rows = np.array([4, 7, 1], np.int32), np.arange(3)
    _, cache = run_prefill(params, tokens[:, :8], lengths, capacity=18)
    assert [leaf.shape for leaf in jax.tree.leaves(cache)] == 2 * config.num_layers * [(1, 3, 2, 18, 6)]
    for _ in range(11):  # the second row reaches the capacity
        hidden, cache = run_decode(layers_apart(params), cache, tokens[rows, lengths], lengths)
        np.testing.assert_allclose(hidden, whole[rows, lengths], rtol=0, atol=1e-5)
        lengths = lengths + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_apart_angles_are_those_of_the_loop(family):
    """Cosine and sine looked up by position, against those computed of it and against float64."""
    config, positions = FAMILIES[family], np.arange(20_000, dtype=np.int32)
    angles = np.float64(np.float32(positions)[:, None] * frequencies(config)[None, :])
    computed = jax.jit(functools.partial(rotation, config=config))(positions)
    for table, beside, exact in zip(
        rotation_table(20_000, config), computed, (np.cos(angles), np.sin(angles)), strict=True
    ):
        assert table.dtype == np.float32
        np.testing.assert_allclose(table, exact, rtol=0, atol=1.2e-7)
        np.testing.assert_allclose(table, beside, rtol=0, atol=2.4e-7)


def test_apart_decode_writes_one_position_of_each_row_and_nothing_past_the_capacity():
    config = FAMILIES["qwen3"]
    params = random_params(config)
    run_prefill, run_decode = written_out(config)
    tokens = packed_rows()[0]
    _, cache = run_prefill(params, tokens[:, :8], np.array([4, 7, 1], np.int32), capacity=18)
    _, after = run_decode(layers_apart(params), cache, tokens[:, 0], np.array([18, 30, 3], np.int32))
    for before, then in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
        assert np.array_equal(before[:, :2], then[:, :2])
        changed = np.any(np.asarray(then[:, 2] != before[:, 2]), axis=(0, 1, 3))
        assert changed.tolist() == [position == 3 for position in range(18)]


def test_apart_decode_does_not_read_what_stands_past_a_row_or_in_another_bitwise():
    config = FAMILIES["qwen2"]
    params = random_params(config)
    run_prefill, run_decode = written_out(config)
    tokens, lengths = packed_rows()[0], np.array([4, 7, 1], np.int32)
    _, cache = run_prefill(params, tokens[:, :8], lengths, capacity=18)
    clean = np.asarray(run_decode(layers_apart(params), cache, tokens[:, 0], lengths)[0])
    stale = np.arange(18)[None, None, None, :, None] >= lengths[None, :, None, None, None]
    stale |= (np.arange(3) == 1)[None, :, None, None, None]
    dirty = jax.tree.map(lambda leaf: np.where(stale, np.float32(77), leaf), cache)
    got = np.asarray(run_decode(layers_apart(params), dirty, tokens[:, 0], lengths)[0])
    assert np.array_equal(got[[0, 2]], clean[[0, 2]])
    assert not np.array_equal(got[1], clean[1])


def test_apart_samples_are_those_of_the_loop_over_layers_and_replay_alone():
    sample = make_engine(**policy(), **SIZES)
    crowd = sample(PARAMS, mixed_requests(), KEY)
    for asked, got, expected in zip(mixed_requests(), crowd, mixed_samples(), strict=True):
        assert_same_up_to_near_ties(asked, got, expected)
    for place in (0, 6, 10, 12):
        assert_same_bits(sample(PARAMS, [mixed_requests()[place]], KEY)[0], crowd[place])


def test_apart_cache_is_changed_where_it_lies():
    """No array as large as a layer's cache is copied inside the loop over tokens, which is what this form is for."""
    programs = make_programs(SHAPE, **policy(), shardings=None)
    text = programs.decode.lower(PARAMS, KEY, *programs.empty(PARAMS), None, truncated=False).compile().as_text()
    sizes = ",".join(map(str, (1, SHAPE.slots, CONFIG.num_kv_heads, SHAPE.cache_capacity, CONFIG.head_dim)))
    assert re.search(rf"f32\[{sizes}\]\S* ", text)
    assert not re.findall(rf"= f32\[{sizes}\]\S* copy\(", text)


def test_apart_keys_and_values_stay_on_their_device(eight_devices):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=eight_devices[:2])
    placed = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    cache = (Cache(placed(None, "data"), placed(None, "data")),) * CONFIG.num_layers
    shardings = RolloutShardings(rows=placed("data"), cache=cache, replicated=placed())
    params, key = jax.device_put(PARAMS, placed()), jax.device_put(KEY, placed())
    samples = make_engine(**policy(), **SIZES, shardings=shardings)(params, mixed_requests()[:6], key)
    for asked, got, expected in zip(mixed_requests(), samples, mixed_samples(), strict=False):
        assert_same_up_to_near_ties(asked, got, expected)
    programs = make_programs(SHAPE, **policy(), shardings=shardings)
    decode = programs.decode.lower(params, key, *programs.empty(params), None, truncated=False).compile()
    assert most_exchanged(decode.as_text()) <= SHAPE.slots * (2 * SHAPE.tokens_per_call + 2)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 65, 130, 160])
def test_plain_attention_in_blocks_of_queries_is_the_softmax_over_what_they_may_see(length):
    rng = np.random.default_rng(length)
    query, key, value = (rng.normal(size=(2, length, heads, 4)).astype(np.float32) for heads in (4, 2, 2))
    segments = np.sort(rng.integers(0, 4, (2, length)).astype(np.int32), axis=1)
    got = np.asarray(jax.jit(lambda *x: reference_attention(jnp.asarray(segments))(*x))(query, key, value))
    at = np.arange(length)
    seen = (at[:, None] >= at[None, :]) & (segments[:, :, None] == segments[:, None, :])
    whole = np.asarray(jax.jit(attention)(query, key, value, seen))
    expected = np.zeros(query.shape)
    for row, position, head in np.ndindex(*query.shape[:3]):
        keys = np.flatnonzero(seen[row, position])
        scores = key[row, keys, head // 2].astype(np.float64) @ query[row, position, head].astype(np.float64) / 2
        weights = np.exp(scores - scores.max())
        expected[row, position, head] = (weights / weights.sum()) @ value[row, keys, head // 2]
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-6)
    np.testing.assert_allclose(whole, expected, rtol=0, atol=3e-6)
