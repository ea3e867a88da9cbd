"""The choice of one token: keys, noise, truncation and log-probs against textbook NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from hptjax.rollout import sampling
from hptjax.rollout.threefry import random_bits

sample_keys = jax.jit(sampling.sample_keys)
token_noise = jax.jit(sampling.token_noise, static_argnames="vocab_size")
choose_truncated = jax.jit(sampling.choose_truncated)


def as_uint32(ids):
    return np.array(ids, np.int32).view(np.uint32)


def textbook_allowed(scaled, top_k, top_p):
    """Token ids that top-k, then top-p leave, in float64 and one at a time."""
    by_rank = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    if top_k:
        by_rank = by_rank[:top_k]
    weights = [np.exp(np.float64(scaled[token]) - np.float64(max(scaled))) for token in by_rank]
    mass, allowed = 0.0, []
    for token, weight in zip(by_rank, weights, strict=True):
        if allowed and mass >= top_p and top_p < 1.0:
            break
        allowed.append(token)
        mass += weight / sum(weights)
    return allowed


def test_sampling_takes_the_first_of_the_largest():
    """Beside NumPy, where many are equal, infinite or the row is one long; a row with NaN still gets a token."""
    rng = np.random.default_rng(0)
    for size in (1, 2, 37, 4096):
        values = rng.integers(-3, 3, (16, size)).astype(np.float32)
        values[rng.random(values.shape) < 0.1] = -np.inf
        values[3] = -np.inf
        np.testing.assert_array_equal(jax.jit(sampling.first_largest)(values), values.argmax(1))
        values[5] = np.nan
        assert 0 <= sampling.first_largest(values)[5] < size


def test_sampling_keys_are_the_nested_folds_of_the_id():
    key = jax.random.key(3)
    ids = [(7, 0, 2), (7, -1, 2), (-5, 2**31 - 1, 0), (7, 2, 0)]
    got = jax.random.key_data(sample_keys(key, as_uint32(ids)))
    for row, (question, visit, index) in enumerate(ids):
        expected = key
        for part in (question, visit, index):
            expected = jax.random.fold_in(expected, np.uint32(part % 2**32))
        np.testing.assert_array_equal(got[row], jax.random.key_data(expected))
    assert len({tuple(np.asarray(data)) for data in got}) == len(ids)


def test_sampling_keys_work_for_raw_keys_too():
    ids = as_uint32([(1, 2, 3), (4, 5, 6)])
    raw = sample_keys(jax.random.key_data(jax.random.key(3)), ids)
    np.testing.assert_array_equal(raw, jax.random.key_data(sample_keys(jax.random.key(3), ids)))


def test_sampling_noise_depends_on_the_sample_and_its_position_only():
    key, ids = jax.random.key(0), [(1, 0, 0), (1, 0, 1), (2, -3, 0)]
    positions = np.array([0, 5, 9], np.int32)
    keys = sample_keys(key, as_uint32(ids))
    noise = np.asarray(token_noise(keys, positions, 11))
    for row, position in enumerate(positions):
        alone = jax.random.gumbel(jax.random.fold_in(keys[row], position), (11,), jnp.float32, mode="low")
        np.testing.assert_array_equal(noise[row], alone)
    swapped = token_noise(keys[::-1], positions[::-1].copy(), 11)
    np.testing.assert_array_equal(noise[::-1], swapped)


def test_sampling_noise_is_what_jax_draws():
    """Bit for bit; so a run replays with any version of jax that draws so."""
    keys, positions = sample_keys(jax.random.key(7), as_uint32([(1, 0, 0), (-1, 2, 3)])), np.array([0, 2**31 - 1])
    for size in (1, 2, 151_936):
        alone = [
            jax.random.gumbel(jax.random.fold_in(*each), (size,), jnp.float32, mode="low")
            for each in zip(keys, positions, strict=True)
        ]
        np.testing.assert_array_equal(token_noise(keys, positions.astype(np.int32), size), alone)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_sampling_keeps_a_samples_noise_where_the_generator_would_not(impl):
    """jax's other generators draw differently for a row that lies elsewhere in a batch: samples are Threefry's."""
    key, ids, positions = jax.random.key(7, impl=impl), [(1, 0, 0), (2, 0, 3), (5, 1, 1)], np.arange(3, dtype=np.int32)
    both = [key, jax.random.key_data(key)]
    together = [np.asarray(token_noise(sample_keys(each, as_uint32(ids)), positions, 9)) for each in both]
    np.testing.assert_array_equal(*together)
    for row in range(3):
        alone = token_noise(sample_keys(key, as_uint32(ids[row : row + 1])), positions[row : row + 1], 9)
        np.testing.assert_array_equal(together[0][row], alone[0])
    assert len({row.tobytes() for row in together[0]}) == 3
    assert (together[0] != token_noise(sample_keys(jax.random.key(8, impl=impl), as_uint32(ids)), positions, 9)).any()


def test_random_bits_are_those_of_jax_whatever_its_flag():
    words = np.random.default_rng(0).integers(0, 2**32, (500, 2), dtype=np.uint32)
    words[:2] = [[0, 0], [2**32 - 1, 2**32 - 1]]
    with jax.threefry_partitionable(True):
        expected = jax.vmap(lambda key: jax.random.bits(key, (37,)))(
            jax.random.wrap_key_data(words, impl="threefry2x32")
        )
    for flag in (True, False):
        with jax.threefry_partitionable(flag):
            np.testing.assert_array_equal(jax.jit(random_bits, static_argnums=1)(words, 37), expected)


def test_random_bits_hold_the_published_answer():
    """Threefry-2x32-20 of a key and a count of zeros: the two words of the authors' known answer."""
    assert int(random_bits(np.zeros((1, 2), np.uint32), 1)[0, 0]) == 0x6B200159 ^ 0x99BA4EFE


def test_sampling_draws_follow_the_softmax():
    draws, logits = 20_000, np.array([2.0, 1.0, 0.5, 0.0, -1.0, -2.0], np.float32)
    keys = sample_keys(jax.random.key(1), as_uint32([(q, 0, 0) for q in range(draws)]))
    noise = token_noise(keys, np.zeros(draws, np.int32), 6)
    tokens = sampling.choose(jnp.broadcast_to(logits[None, :], (draws, 6)), noise)
    expected = draws * np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    assert scipy.stats.chisquare(np.bincount(tokens, minlength=6), expected, sum_check=False).pvalue > 1e-3


def test_sampling_truncated_draws_follow_the_renormalised_softmax():
    draws, logits = 20_000, np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2]))
    keys = sample_keys(jax.random.key(2), as_uint32([(q, 0, 0) for q in range(draws)]))
    noise = token_noise(keys, np.zeros(draws, np.int32), 5)
    scaled = jnp.broadcast_to(logits.astype(np.float32)[None, :], (draws, 5))
    # top-4 leaves .4 .25 .2 .1 (of .95); before the fourth lies .85 / .95 = .895 of the mass, so 0.88 drops it
    tokens = choose_truncated(scaled, noise, np.full(draws, 4, np.int32), np.full(draws, 0.88, np.float32))
    counts = np.bincount(tokens, minlength=5)
    assert counts[0] == counts[2] == 0
    expected = draws * np.array([0.4, 0.25, 0.2]) / 0.85
    assert scipy.stats.chisquare(counts[[1, 3, 4]], expected).pvalue > 1e-3


def test_sampling_truncation_equals_the_textbook():
    rng = np.random.default_rng(0)
    settings = [(k, p) for k in (0, 1, 2, 5, 12, 99) for p in (1e-6, 0.3, 0.75, 0.999, 1.0) for _ in range(20)]
    rows, vocab = len(settings), 12
    scaled = rng.normal(scale=2.0, size=(rows, vocab)).astype(np.float32)
    scaled[::3] = np.round(scaled[::3])  # equal logits: the lower token id ranks first
    noise = (4 * rng.gumbel(size=(rows, vocab))).astype(np.float32)
    top_k, top_p = np.array(settings).T
    got = choose_truncated(scaled, noise, top_k.astype(np.int32), top_p.astype(np.float32))
    for row, (k, p) in enumerate(settings):
        allowed = textbook_allowed(scaled[row], k, p)
        assert got[row] == max(allowed, key=lambda token, row=row: scaled[row, token] + noise[row, token])


def test_sampling_truncation_switched_off_is_the_plain_choice():
    rng = np.random.default_rng(0)
    scaled = rng.normal(scale=5.0, size=(300, 50)).astype(np.float32)
    noise = rng.gumbel(size=(300, 50)).astype(np.float32)
    off = choose_truncated(scaled, noise, np.zeros(300, np.int32), np.ones(300, np.float32))
    np.testing.assert_array_equal(off, sampling.choose(scaled, noise))
    np.testing.assert_array_equal(off, (scaled + noise).argmax(1))


def test_sampling_top_k_one_is_greedy_whatever_the_noise():
    rng = np.random.default_rng(1)
    scaled = rng.normal(size=(50, 9)).astype(np.float32)
    noise = (100 * rng.gumbel(size=(50, 9))).astype(np.float32)
    got = choose_truncated(scaled, noise, np.ones(50, np.int32), np.ones(50, np.float32))
    np.testing.assert_array_equal(got, scaled.argmax(1))


def test_sampling_logprobs_are_the_tempered_log_softmax():
    rng = np.random.default_rng(2)
    hidden, head = rng.normal(size=(6, 4)).astype(np.float32), rng.normal(size=(4, 9)).astype(np.float32)
    temperature, tokens = np.linspace(0.5, 2.0, 6).astype(np.float32), rng.integers(0, 9, 6).astype(np.int32)
    got = sampling.chosen_logprobs(sampling.scaled_logits(hidden, head, temperature), tokens)
    for row in range(6):
        z = hidden[row].astype(np.float64) @ head.astype(np.float64) / temperature[row]
        np.testing.assert_allclose(got[row], z[tokens[row]] - np.log(np.exp(z).sum()), atol=1e-5)


def test_sampling_logits_of_bfloat16_states_are_float32():
    scaled = sampling.scaled_logits(
        jnp.ones((2, 4), jnp.bfloat16), jnp.full((4, 3), 1.0 / 3.0, jnp.float32), np.ones(2, np.float32)
    )
    assert scaled.dtype == jnp.float32
    np.testing.assert_allclose(scaled, 4 * float(jnp.bfloat16(1.0 / 3.0)), rtol=1e-6)


def test_sampling_stop_sets_are_per_row_and_padding_never_matches():
    stop_ids = np.array([[4, 7, -1], [-1, -1, -1], [0, -1, -1]], np.int32)
    for token, expected in [(7, [True, False, False]), (0, [False, False, True]), (5, [False] * 3)]:
        np.testing.assert_array_equal(sampling.is_stop(np.full(3, token, np.int32), stop_ids), expected)
