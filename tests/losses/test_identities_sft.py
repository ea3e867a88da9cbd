"""Identities of `spec/methods.md` section 11 for rows on demonstrations: numbers 5 (LUFFY), 7 to 10, 24."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hptjax.losses.denominators import shaped, unit
from hptjax.losses.pear import PearRange
from hptjax.losses.table import (
    CHORD_PHI,
    DFT,
    IMPLICIT_REWARD,
    PEAR_BLOCK,
    PEAR_SEQUENCE,
    PEAR_TOKEN,
    SFT,
    TRSFT,
    Need,
    missing_needs,
    policy_token_loss,
)
from tests.losses.packed import LAYOUT, literal_gradient, make_toy, row_gradient, same, view_of

ALL = (SFT, DFT, TRSFT(), CHORD_PHI, PEAR_TOKEN(), PEAR_BLOCK(3), PEAR_SEQUENCE(), IMPLICIT_REWARD())


def ones(toy):
    return np.ones(len(toy.sequences))


def sft_row_gradient(row, toy, **changed):
    return row_gradient(row, toy, toy.token_mean, ones(toy), **changed)


def mean_of(toy, token_loss):
    """Gradient of the token mean of `token_loss(lp, s) [n]`."""
    return literal_gradient(toy, lambda lp, A, s: jnp.sum(token_loss(lp, s)) / float(toy.lengths.sum()))


def coefficients(row, toy, **changed):
    """What multiplies -grad log pi on each live token."""

    def loss(logprobs):
        view = dataclasses.replace(view_of(toy, toy.logits, **changed), logprobs=logprobs)
        return jnp.sum(policy_token_loss(row, view, toy.spread(ones(toy))))

    logprobs = view_of(toy, toy.logits).logprobs
    return -np.asarray(jax.grad(loss)(logprobs)), np.exp(np.asarray(logprobs))


def test_identity_07_dft_is_sft_over_denominator_one():
    toy = make_toy(20)
    want = mean_of(toy, lambda lp, s: -jnp.exp(lp))
    same(sft_row_gradient(DFT, toy), want)
    same(sft_row_gradient(dataclasses.replace(SFT, denominator=unit), toy), want)  # CHORD's sft_is, LUFFY with f(x) = x
    assert DFT.denominator is unit
    same(sft_row_gradient(SFT, toy), mean_of(toy, lambda lp, s: -lp))


def test_identity_08_trsft_lies_between_sft_and_dft():
    toy = make_toy(21)
    same(sft_row_gradient(TRSFT(1e-12), toy), sft_row_gradient(SFT, toy))
    same(sft_row_gradient(TRSFT(1.0), toy), sft_row_gradient(DFT, toy))
    # the integral of min(1, p / a) / p in p is the loss it descends
    want = mean_of(toy, lambda lp, s: -jnp.where(lp > jnp.log(0.2), lp, jnp.exp(lp) / 0.2))
    same(sft_row_gradient(TRSFT(0.2), toy), want)
    p = coefficients(SFT, toy)[1][toy.live]
    assert 0 < (p < 0.2).sum() < p.size


def test_identity_09_luffy_shaping():
    toy = make_toy(22)
    row = dataclasses.replace(SFT, denominator=shaped(0.1))
    same(sft_row_gradient(row, toy), mean_of(toy, lambda lp, s: -jnp.exp(lp) / (jnp.exp(lp) + 0.1)))
    got, p = coefficients(row, toy)
    np.testing.assert_allclose(got[toy.live], (0.1 * p / (p + 0.1) ** 2)[toy.live], rtol=1e-12)
    wide = dataclasses.replace(SFT, denominator=shaped(1e7))
    np.testing.assert_allclose(1e7 * coefficients(wide, toy)[0][toy.live], p[toy.live], rtol=1e-5)


def test_identity_10_chord_phi_is_denominator_one_over_doubt():
    toy = make_toy(23)
    # d/dp of p - p^2 / 2 is 1 - p
    same(sft_row_gradient(CHORD_PHI, toy), mean_of(toy, lambda lp, s: -jnp.exp(lp) + jnp.exp(2 * lp) / 2))
    got, p = coefficients(CHORD_PHI, toy)
    np.testing.assert_allclose(got[toy.live], (p * (1 - p))[toy.live], rtol=1e-12)


def test_chord_phi_of_a_certain_token_is_zero_and_finite():
    toy = make_toy(23)
    view = view_of(toy, toy.logits)

    def loss(logprobs):
        return jnp.sum(policy_token_loss(CHORD_PHI, dataclasses.replace(view, logprobs=logprobs), np.ones((4, 14))))

    for certain in (0.0, 1e-9, -1e-300):
        np.testing.assert_allclose(jax.grad(loss)(jnp.full((4, 14), certain)), 0, atol=1e-250)


WIDE = PearRange(-10.0, 10.0, 1e-9, 1e9)


def test_identity_24_pear_suffix_recursion_and_its_ends():
    toy = make_toy(24)
    got, _ = coefficients(PEAR_TOKEN(0.9, WIDE), toy)
    delta = np.exp(np.asarray(view_of(toy, toy.logits).logprobs) - toy.author)
    for s in toy.sequences:
        weight, ratio = got[s.row, s.places], delta[s.row, s.places]
        assert weight[-1] == pytest.approx(1.0, rel=1e-12)
        np.testing.assert_allclose(weight[:-1], 0.9 * weight[1:] * ratio[1:], rtol=1e-10)
    # a block of one token is the token variant; a block that holds the sequence is SFT
    np.testing.assert_allclose(coefficients(PEAR_BLOCK(1, 0.9, WIDE), toy)[0], got, rtol=1e-12)
    np.testing.assert_allclose(coefficients(PEAR_BLOCK(50, 0.9, WIDE), toy)[0][toy.live], 1.0, rtol=1e-12)
    # blocks of three: constant inside, product over the later blocks
    blocks, _ = coefficients(PEAR_BLOCK(3, 0.9, WIDE), toy)
    for s in toy.sequences:
        ratio, n = delta[s.row, s.places], len(s.places)
        want = [np.prod(0.9 * ratio[min((t // 3 + 1) * 3, n) :]) for t in range(n)]
        np.testing.assert_allclose(blocks[s.row, s.places], want, rtol=1e-10)
    # the whole product on every token
    whole, _ = coefficients(PEAR_SEQUENCE(WIDE), toy)
    for s in toy.sequences:
        np.testing.assert_allclose(whole[s.row, s.places], np.prod(delta[s.row, s.places]), rtol=1e-10)


def test_identity_24_pear_without_a_gap_is_sft_and_its_clips_act():
    toy = make_toy(25)
    own = np.asarray(view_of(toy, toy.logits).logprobs)
    for row in (PEAR_TOKEN(1.0), PEAR_BLOCK(3, 1.0), PEAR_SEQUENCE()):
        same(sft_row_gradient(row, toy, demonstration_logprobs=own), sft_row_gradient(SFT, toy))
    held, _ = coefficients(PEAR_TOKEN(0.999), toy)
    delta = np.clip(own - toy.author, -0.08, 0.3)
    assert 0 < (delta[toy.live] == 0.3).sum() < toy.live.sum()
    for s in toy.sequences:
        n = len(s.places)
        want = [np.exp(np.sum(delta[s.row, s.places][t + 1 :])) * 0.999 ** (n - 1 - t) for t in range(n)]
        np.testing.assert_allclose(held[s.row, s.places], np.clip(want, 0.1, 10), rtol=1e-10)
    far = coefficients(PEAR_SEQUENCE(PearRange(-1.0, 0.3, 0.5, 10.0)), toy, demonstration_logprobs=own + 3)[0]
    np.testing.assert_allclose(far[toy.spread(toy.lengths) > 1], 0.5, rtol=1e-12)  # held at the floor


def test_implicit_reward_hook_is_sft_at_weight_one_and_at_the_reference():
    toy = make_toy(26)
    own = np.asarray(view_of(toy, toy.logits).logprobs)
    flat = IMPLICIT_REWARD(log_weight=jnp.zeros_like)
    same(sft_row_gradient(flat, toy), sft_row_gradient(SFT, toy))
    same(sft_row_gradient(IMPLICIT_REWARD(), toy, reference_logprobs=own), sft_row_gradient(SFT, toy))
    x = 0.5 * (own - toy.reference)
    got, _ = coefficients(IMPLICIT_REWARD(0.5), toy)
    np.testing.assert_allclose(got[toy.live], (2 / (1 + np.exp(x)))[toy.live], rtol=1e-12)
    got, _ = coefficients(IMPLICIT_REWARD(0.5, whole_sequence=True), toy)
    for s in toy.sequences:
        np.testing.assert_allclose(got[s.row, s.places], 2 / (1 + np.exp(x[s.row, s.places].sum())), rtol=1e-12)


@pytest.mark.parametrize("row", ALL, ids=lambda row: row.name)
def test_identity_31_padding_and_garbage_change_nothing(row):
    toy, wide = make_toy(27), make_toy(27, layout=[*LAYOUT, []], width=23)
    want = sft_row_gradient(row, toy)
    np.testing.assert_allclose(sft_row_gradient(row, wide)[:-1, :14], want, rtol=1e-12, atol=1e-15)
    spoilt = {
        name: np.where(toy.live, values, np.nan)
        for name, values in (("demonstration_logprobs", toy.author), ("reference_logprobs", toy.reference))
    }
    np.testing.assert_array_equal(sft_row_gradient(row, toy, **spoilt), want)


def test_a_row_says_what_it_is_missing_and_fails_by_name():
    assert missing_needs(PEAR_TOKEN(), frozenset({Need.DEMONSTRATIONS})) == (Need.DEMONSTRATION_LOGPROBS,)
    assert missing_needs(SFT, frozenset(Need)) == ()
    toy = make_toy(28)
    with pytest.raises(ValueError, match="demonstration_logprobs"):
        sft_row_gradient(PEAR_TOKEN(), toy, demonstration_logprobs=None)
    with pytest.raises(ValueError, match="reference_logprobs"):
        sft_row_gradient(IMPLICIT_REWARD(), toy, reference_logprobs=None)
    assert [row.name for row in ALL] == [
        "sft",
        "dft",
        "trsft",
        "chord_phi",
        "pear_token",
        "pear_block",
        "pear_sequence",
        "implicit_reward",
    ]
