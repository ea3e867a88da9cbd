"""Identities of `spec/methods.md` section 11 for rows on rollouts: numbers 1 to 6, 11, 12, 25, 26, 31."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from hptjax.losses import table
from hptjax.losses.stability import dual_clip, everywhere, two_sided_clip
from hptjax.losses.table import (
    CISPO,
    CISPO_TABLE,
    DAPO,
    DPO,
    DR_GRPO,
    GMPO,
    GRPO,
    GSPO,
    PPO,
    REINFORCE,
    REINFORCE_PP,
    RLOO,
    SAPO,
    policy_token_loss,
)
from hptjax.losses.weights import sequence_tis, token_tis
from tests.losses.packed import (
    LAYOUT,
    joint_gradient,
    literal_gradient,
    make_toy,
    row_gradient,
    same,
    silent_tokens,
    view_of,
)

RATIO_ROWS = (
    PPO(),
    GRPO(),
    DR_GRPO(),
    DR_GRPO((0.2, 0.2)),
    DAPO(),
    REINFORCE_PP(),
    CISPO(),
    CISPO(0.2, 0.2),
    CISPO_TABLE(),
    GSPO(),
    GMPO(),
    SAPO(),
    SAPO(0.3, 7.0),
)
INF = math.inf


def unclipped(lp, A, s):
    return -A * jnp.sum(jnp.exp(lp - s["old"]))


def ppo_loss(low, high):
    def loss(lp, A, s):
        ratio = jnp.exp(lp - s["old"])
        return -jnp.sum(jnp.minimum(ratio * A, jnp.clip(ratio, 1 - low, 1 + high) * A))

    return loss


def dual_loss(low, high, cap):
    def loss(lp, A, s):
        ratio = jnp.exp(lp - s["old"])
        inner = jnp.minimum(ratio * A, jnp.clip(ratio, 1 - low, 1 + high) * A)
        return -jnp.sum(jnp.maximum(inner, cap * A) if A < 0 else inner)

    return loss


def two_sided_loss(low, high, delta):
    def loss(lp, A, s):
        ratio = jnp.exp(lp - s["old"])
        return -jnp.sum(jnp.minimum(jnp.minimum(ratio, delta) * A, jnp.clip(ratio, 1 - low, 1 + high) * A))

    return loss


def gspo_loss(low, high):
    def loss(lp, A, s):
        ratio = jnp.exp(jnp.mean(lp - s["old"]))
        return -jnp.minimum(ratio * A, jnp.clip(ratio, 1 - low, 1 + high) * A)

    return loss


def gmpo_loss(width):
    def loss(lp, A, s):
        d, sign = lp - s["old"], np.sign(A)
        held = sign * jnp.minimum(sign * d, sign * jnp.clip(d, -width, width))
        return -A * jnp.exp(jnp.mean(held))

    return loss


def sapo_loss(positive, negative):
    def loss(lp, A, s):
        tau = positive if A > 0 else negative
        return -A * jnp.sum(4 / tau / (1 + jnp.exp(-tau * (jnp.exp(lp - s["old"]) - 1))))

    return loss


def reinforce_loss(lp, A, s):
    return -A * jnp.sum(lp)


@pytest.mark.parametrize("row", RATIO_ROWS, ids=lambda row: row.name)
def test_identity_01_on_policy_every_ratio_row_is_reinforce(row):
    toy = make_toy(1, on_policy=True)
    want = literal_gradient(toy, lambda lp, A, s: -A * jnp.sum(lp) / len(lp) / len(toy.sequences))
    same(row_gradient(row, toy, toy.sequence_mean), want)


def test_identity_02_ppo_without_clip_is_importance_weighted():
    toy = make_toy(2)
    same(row_gradient(PPO((INF, INF)), toy, toy.live.astype(float)), literal_gradient(toy, unclipped))


def test_identity_03_cispo_between_importance_weighting_and_reinforce():
    toy, one = make_toy(3), make_toy(3).live.astype(float)
    same(row_gradient(CISPO(INF, INF), toy, one), literal_gradient(toy, unclipped))
    same(row_gradient(CISPO(0.0, 0.0), toy, one), literal_gradient(toy, reinforce_loss))
    assert np.abs(toy.old - make_toy(3, on_policy=True).old).max() > 0.1  # the rows are off-policy


def test_identity_04_ppo_is_mask_over_rollout_policy():
    toy = make_toy(4)
    got = row_gradient(PPO((0.2, 0.28)), toy, toy.live.astype(float))
    same(got, literal_gradient(toy, ppo_loss(0.2, 0.28)))
    assert 0 < silent_tokens(got, toy) < toy.live.sum()
    # the mask by its definition, token by token
    z = toy.logits
    p = np.take_along_axis(np.exp(z) / np.exp(z).sum(-1, keepdims=True), toy.targets[:, :, None], -1)[:, :, 0]
    ratio, advantage = p / np.exp(toy.old), toy.spread(toy.advantages)
    off = ((advantage > 0) & (ratio > 1.28)) | ((advantage < 0) & (ratio < 0.8))
    np.testing.assert_array_equal((np.abs(got).max(-1) == 0)[toy.live], off[toy.live])
    # and the gradient is A grad pi / pi_rollout where the mask is 1
    score = np.eye(z.shape[-1])[toy.targets] - np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    same(got, -np.where(toy.live & ~off, advantage * ratio, 0)[:, :, None] * score)


LITERAL = {
    "ppo": (PPO((0.2, 0.28)), ppo_loss(0.2, 0.28), "sum"),
    "dual_clip": (
        dataclasses.replace(PPO(), stability_mask=dual_clip(0.2, 0.2, 1.5)),
        dual_loss(0.2, 0.2, 1.5),
        "sum",
    ),
    "gspo": (GSPO((0.1, 0.1)), gspo_loss(0.1, 0.1), "mean"),
    "gmpo": (GMPO((0.4, 0.4)), gmpo_loss(0.4), "mean"),
    "sapo": (SAPO(1.0, 1.05), sapo_loss(1.0, 1.05), "sum"),
}


@pytest.mark.parametrize("name", LITERAL)
def test_identity_05_coefficients_reproduce_the_literal_loss(name):
    row, loss, over = LITERAL[name]
    toy = make_toy(5)
    weights = toy.live.astype(float) if over == "sum" else toy.spread(1 / toy.lengths)
    got = row_gradient(row, toy, weights)
    same(got, literal_gradient(toy, loss))
    assert (silent_tokens(got, toy) > 0) == (name != "sapo")  # the clip is at work
    assert silent_tokens(got, toy) < toy.live.sum()


def test_identity_05_dpo_reproduces_the_literal_loss():
    toy = make_toy(6, layout=[[(1, 4), (1, 6)], [(0, 3), (2, 5)], [], []])
    sign = np.array([1.0, -1.0, 1.0, -1.0])
    beta = 0.7

    def loss(sequences):
        way = [jnp.sum(lp - stored["reference"]) for lp, stored in sequences]
        return sum(jnp.log(1 + jnp.exp(-beta * (way[w] - way[r]))) for w, r in ((0, 1), (2, 3))) / 2

    want = joint_gradient(toy, loss)
    same(row_gradient(DPO(beta), toy, toy.live / 2, sign), want)


def test_identity_06_dual_clip_is_ppo_at_infinity_and_two_sided_at_its_cap():
    toy, one = make_toy(7), make_toy(7).live.astype(float)
    masked = lambda mask: row_gradient(dataclasses.replace(PPO(), stability_mask=mask), toy, one)  # noqa: E731
    ppo = masked(table.PPO((0.2, 0.2)).stability_mask)
    np.testing.assert_array_equal(masked(dual_clip(0.2, 0.2, INF)), ppo)
    np.testing.assert_array_equal(masked(two_sided_clip(0.2, 0.2, INF)), ppo)
    capped = masked(dual_clip(0.2, 0.2, 1.5))
    assert silent_tokens(capped, toy) > silent_tokens(ppo, toy)
    np.testing.assert_array_equal(masked(two_sided_clip(0.2, 0.2, 1.5)), capped)
    # the literal two-sided loss, also with a ceiling inside a wide trust region
    for high, delta in ((0.2, 1.5), (0.8, 1.2)):
        want = literal_gradient(toy, two_sided_loss(0.2, high, delta))
        same(masked(two_sided_clip(0.2, high, delta)), want)
    own = np.asarray(view_of(toy, toy.logits).logprobs)
    between = (np.exp(own - toy.old) > 1.2) & (np.exp(own - toy.old) < 1.8) & toy.live
    sign = toy.spread(toy.advantages)
    assert (between & (sign > 0)).any()  # below the upper clip, above the ceiling
    assert (between & (sign < 0)).any()
    with pytest.raises(ValueError, match="delta"):
        two_sided_clip(0.2, 0.2, 1.0)


def test_identity_11_gspo_sequence_form_is_its_token_form():
    toy = make_toy(8)
    want = literal_gradient(toy, lambda lp, A, s: gspo_loss(0.15, 0.15)(lp, A, s) / len(toy.sequences))
    got = row_gradient(GSPO((0.15, 0.15)), toy, toy.sequence_mean)
    same(got, want)
    assert 0 < silent_tokens(got, toy) < toy.live.sum()
    # one bit per sequence
    for s in toy.sequences:
        assert len(set((np.abs(got[s.row, s.places]).max(-1) == 0).tolist())) == 1


def test_identity_12_gmpo_without_clipping_is_gspo_without_clipping():
    toy = make_toy(9)
    want = row_gradient(GSPO((INF, INF)), toy, toy.sequence_mean)
    same(row_gradient(GMPO((INF, INF)), toy, toy.sequence_mean), want)
    assert np.abs(row_gradient(GMPO(), toy, toy.sequence_mean) - want).max() > 1e-3


def test_gmpo_counts_tokens_without_an_advantage_in_the_mean_of_their_sequence():
    """Tokens of low entropy whose advantage was taken away: the others keep their weight, and these have none."""
    toy = make_toy(9)
    kept = toy.live & (np.arange(toy.live.shape[1]) % 3 > 0)
    view, advantages = view_of(toy, jnp.asarray(toy.logits)), toy.spread(toy.advantages)
    want = np.asarray(policy_token_loss(GMPO(), view, jnp.asarray(advantages)))
    got = np.asarray(policy_token_loss(GMPO(), view, jnp.asarray(np.where(kept, advantages, 0))))
    np.testing.assert_array_equal(got[kept], want[kept])
    assert np.abs(want[kept]).max() > 1e-4
    assert not got[toy.live & ~kept].any()


def test_identity_25_tis_is_nothing_without_mismatch_and_completes_the_ratio():
    toy, one = make_toy(10), make_toy(10).live.astype(float)
    plain = DR_GRPO()
    for weight in (token_tis(2.0), sequence_tis(2.0)):
        weighted = dataclasses.replace(plain, weights=(weight,))
        same(row_gradient(weighted, toy, one, sampler_logprobs=toy.old), row_gradient(plain, toy, one))
    # untruncated: (pi / pi_rollout) * (pi_rollout / pi_sampler) = pi / pi_sampler
    through = dataclasses.replace(plain, weights=(token_tis(INF),))
    want = literal_gradient(toy, lambda lp, A, s: -A * jnp.sum(jnp.exp(lp - s["sampler"])))
    same(row_gradient(through, toy, one), want)
    # truncated, on the sequence: the cap acts on some and not on all
    rho = np.array([np.exp((toy.old - toy.sampler)[s.row, s.places].sum()) for s in toy.sequences])
    assert 0 < (rho > 1.2).sum() < rho.size
    whole = dataclasses.replace(plain, weights=(sequence_tis(1.2),))
    want = literal_gradient(
        toy,
        lambda lp, A, s: -A * jnp.sum(jnp.exp(lp - s["old"])) * min(np.exp((s["old"] - s["sampler"]).sum()), 1.2),
    )
    same(row_gradient(whole, toy, one), want)


def test_identity_26_signed_reinforce_is_sft_plus_unlikelihood():
    toy, one = make_toy(11), make_toy(11).live.astype(float)
    rewards = np.arange(len(toy.sequences)) % 2
    sign = REINFORCE.advantage(rewards.astype(float), np.zeros(len(rewards), int))
    want = literal_gradient(toy, lambda lp, A, s: -jnp.sum(lp) if A > 0 else jnp.sum(lp), rewards - 0.5)
    same(row_gradient(REINFORCE, toy, one, sign), want)


@pytest.mark.parametrize("row", [*RATIO_ROWS, REINFORCE, RLOO], ids=lambda row: row.name)
def test_identity_31_padding_and_garbage_change_nothing(row):
    toy, wide = make_toy(12), make_toy(12, layout=[*LAYOUT, []], width=23)  # more columns, and a row of padding
    got = row_gradient(row, wide, wide.sequence_mean)
    want = row_gradient(row, toy, toy.sequence_mean)
    np.testing.assert_allclose(got[:-1, :14], want, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(got[:, 14:], 0)
    np.testing.assert_array_equal(got[-1], 0)
    spoilt = {
        name: np.where(toy.live, values, np.nan)
        for name, values in (("rollout_logprobs", toy.old), ("sampler_logprobs", toy.sampler))
    }
    np.testing.assert_array_equal(row_gradient(row, toy, toy.sequence_mean, **spoilt), want)


def test_the_mask_of_no_row_is_everywhere_by_accident():
    masked = {row.name for row in RATIO_ROWS if row.stability_mask is not everywhere}
    assert masked == {"ppo", "grpo", "dr_grpo", "dapo", "reinforce_pp", "cispo_table", "gspo", "gmpo"}
