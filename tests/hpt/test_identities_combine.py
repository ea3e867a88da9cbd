"""Identities of `spec/methods.md` 11 for gradients taken apart: 27, 28 and 33, on policies that can be written down."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hptjax.hpt.combine import (
    bridge_directions,
    drop_if_conflict,
    inner,
    meta_gradient,
    norm,
    total,
    weighted,
)
from hptjax.hpt.controllers import next_sft_share
from hptjax.losses.table import DR_GRPO, SFT, policy_token_loss
from hptjax.losses.upge import weighted_sum
from hptjax.losses.view import TokenView

LETTERS, LENGTH = 3, 2
STRINGS = np.array(list(itertools.product(range(LETTERS), repeat=LENGTH)))  # [9 2]
CONTEXT = np.stack([np.zeros(9, int), 1 + STRINGS[:, 0]], axis=1)  # which row of logits predicts each token
REWARD = np.random.default_rng(0).normal(size=9)
DEMONSTRATION = 5
RNG = np.random.default_rng(1)
BASE, ADAPTER = RNG.normal(size=(4, LETTERS)), 0.3 * RNG.normal(size=(4, LETTERS))
GRADIENTS = {name: {"a": RNG.normal(size=(2, 3)), "b": [RNG.normal(size=4)]} for name in ("sft", "rl", "kd")}


def string_probabilities(logits):
    """In NumPy: the probability of each of the nine strings."""
    table = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return table[CONTEXT, STRINGS].prod(1)


def central_differences(function, at, step=1e-5):
    out = np.zeros_like(at)
    for place in np.ndindex(*at.shape):
        bump = np.zeros_like(at)
        bump[place] = step
        out[place] = (function(at + bump) - function(at - bump)) / (2 * step)
    return out


def expected_reward(logits):
    return float(string_probabilities(logits) @ REWARD)


def likelihood(logits):
    return float(np.log(string_probabilities(logits)[DEMONSTRATION]))


def row_gradient(row, logits, advantages, sampling, *, strings=STRINGS, context=CONTEXT, sampled_at=None):
    """Uphill: minus the gradient of the row's losses over strings drawn from `sampling`."""
    shape = strings.shape

    def token_logprobs(logits):
        return jax.nn.log_softmax(logits)[context, strings]

    stored = token_logprobs(jnp.asarray(logits if sampled_at is None else sampled_at))

    def loss(logits):
        view = TokenView(
            token_logprobs(logits),
            rollout_logprobs=stored,
            segment_ids=np.ones(shape, np.int32),
            live=np.ones(shape, bool),
        )
        per_token = np.repeat(np.asarray(advantages)[:, None], shape[1], axis=1)
        return weighted_sum(policy_token_loss(row, view, per_token), np.repeat(sampling[:, None], shape[1], axis=1))

    return -jax.grad(loss)(jnp.asarray(logits))


def rl_gradient(logits):
    """grad E R, by the Dr.GRPO row on all strings, as often as the policy writes them."""
    return row_gradient(DR_GRPO(), logits, REWARD, string_probabilities(np.asarray(logits)))


def sft_gradient(logits):
    """grad log pi(demonstration), by the SFT row."""
    one = slice(DEMONSTRATION, DEMONSTRATION + 1)
    return row_gradient(SFT, logits, np.ones(1), np.ones(1), strings=STRINGS[one], context=CONTEXT[one])


def test_inner_norm_total_and_weighted_by_hand():
    flat = {name: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for name, tree in GRADIENTS.items()}
    assert inner(GRADIENTS["sft"], GRADIENTS["rl"]) == pytest.approx(flat["sft"] @ flat["rl"], abs=1e-14)
    assert norm(GRADIENTS["rl"]) == pytest.approx(np.linalg.norm(flat["rl"]), abs=1e-14)
    weights = {"sft": 0.3, "rl": -2.0, "kd": 0.0}
    for got, want in (
        (total(GRADIENTS), sum(flat.values())),
        (weighted(GRADIENTS, weights), 0.3 * flat["sft"] - 2.0 * flat["rl"]),
    ):
        np.testing.assert_allclose(np.concatenate([np.ravel(x) for x in jax.tree.leaves(got)]), want, atol=1e-14)
    with pytest.raises(ValueError, match="one weight for each"):
        weighted(GRADIENTS, {"sft": 1.0})
    with pytest.raises(ValueError, match="one weight for each"):
        total({})


@pytest.mark.parametrize("mu", [0.1, 0.4, 0.9])
def test_identity_27_amft_meta_gradient_is_the_finite_difference(mu):
    rate = 0.3
    sft, rl = -sft_gradient(BASE), -rl_gradient(BASE)  # of losses

    def stepped(mu):
        return BASE - rate * np.asarray(weighted({"rl": rl, "sft": sft}, {"rl": 1 - mu, "sft": mu}))

    want = (expected_reward(stepped(mu + 1e-6)) - expected_reward(stepped(mu - 1e-6))) / 2e-6
    got = meta_gradient(rl_gradient(stepped(mu)), sft=sft, rl=rl, rate=rate)
    assert abs(want) > 1e-3
    assert float(got) == pytest.approx(want, abs=1e-8)
    # the controller climbs: a step in mu along it raises the utility, the released code's sign lowers it
    higher = next_sft_share(mu, meta_gradient=float(got), entropy=1.0, target_entropy=1.0, rate=1e-3, lowest=0.0)
    lower = next_sft_share(mu, meta_gradient=-float(got), entropy=1.0, target_entropy=1.0, rate=1e-3, lowest=0.0)
    assert expected_reward(stepped(higher)) > expected_reward(stepped(mu)) > expected_reward(stepped(lower))


def test_identity_27_share_moves_with_the_entropy_and_stays_in_its_range():
    still = {"meta_gradient": 0.0, "entropy": 1.0}
    assert next_sft_share(0.5, **still, target_entropy=3.0, entropy_rate=0.1) == pytest.approx(0.7, abs=1e-15)
    assert next_sft_share(0.5, **still, target_entropy=3.0, entropy_rate=-0.1) == pytest.approx(0.3, abs=1e-15)
    assert next_sft_share(0.5, **still, target_entropy=99.0, entropy_rate=0.1) == 0.95
    assert next_sft_share(0.5, **still, target_entropy=-99.0, entropy_rate=0.1) == 0.05
    with pytest.raises(ValueError, match="lowest <= highest"):
        next_sft_share(0.5, **still, target_entropy=1.0, lowest=0.6, highest=0.5)


def bridge(share, *, adapter, steps=6, rate=0.2, adapter_rate=0.1):
    """Bases, shadows and adapters over some meta-steps, the policy being softmax of base + adapter."""
    base, shadow = BASE, BASE.copy()
    seen = []
    for _ in range(steps):
        # one table of logits: the gradient with respect to the base is that with respect to the adapter
        sft, rl, shadowed = sft_gradient(base + adapter), rl_gradient(base + adapter), rl_gradient(shadow + adapter)
        ways = bridge_directions(sft=(sft, sft), rl=(rl, rl), rl_at_shadow=(shadowed, shadowed), share=share)
        seen.append((base, shadow, adapter, ways))
        base, shadow = base + rate * np.asarray(ways.base), shadow + rate * np.asarray(ways.shadow)
        adapter = adapter + adapter_rate * np.asarray(ways.adapter)
    return seen


def test_identity_28_bridge_at_share_one_keeps_base_and_shadow_together_and_the_adapter_still():
    for base, shadow, adapter, ways in bridge(1.0, adapter=ADAPTER):
        np.testing.assert_array_equal(base, shadow)
        np.testing.assert_array_equal(adapter, ADAPTER)
        np.testing.assert_array_equal(ways.adapter, 0.0)
        assert np.abs(ways.base).max() > 1e-3
    # and at another share they part, so the equality says something
    base, shadow, adapter, _ = bridge(0.5, adapter=ADAPTER)[-1]
    assert min(np.abs(base - shadow).max(), np.abs(adapter - ADAPTER).max()) > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_identity_28_bridge_with_the_adapter_frozen_at_zero_is_the_static_mix(share):
    base = BASE
    for seen, _, _, _ in bridge(share, adapter=np.zeros_like(ADAPTER), adapter_rate=0.0):
        np.testing.assert_allclose(seen, base, rtol=0, atol=1e-8)
        # the static mix by central differences
        base = base + 0.2 * central_differences(
            lambda z: (1 - share) * likelihood(z) + share * expected_reward(z), base
        )
    with pytest.raises(ValueError, match="share"):
        bridge(1.5, adapter=ADAPTER)


def test_identity_28_shared_rollouts_give_the_shadow_its_gradient_by_the_ratio():
    """Rollouts of base + adapter serve the shadow, whole strings reweighed; token by token would be biased."""
    shadow = BASE + 0.4 * np.random.default_rng(3).normal(size=BASE.shape)
    sampling, own = string_probabilities(BASE), string_probabilities(shadow)
    want = central_differences(expected_reward, shadow)
    got = row_gradient(SFT, shadow, REWARD * own / sampling, sampling)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-8)
    by_token = row_gradient(DR_GRPO(), shadow, REWARD, sampling, sampled_at=BASE)
    assert np.abs(by_token - want).max() > 1e-3


@pytest.mark.parametrize("seed", range(20))
def test_identity_33_gta_never_points_against_rl_and_is_the_sum_where_they_agree(seed):
    rng = np.random.default_rng(seed)
    gradients = {name: {"w": rng.normal(size=5), "b": rng.normal(size=2)} for name in ("sft", "rl")}
    flat = {name: np.concatenate([tree["b"], tree["w"]]) for name, tree in gradients.items()}
    got = jax.jit(lambda tree: drop_if_conflict(tree, kept="rl"))(gradients)
    got = np.concatenate([got["b"], got["w"]])
    aligned = flat["sft"] @ flat["rl"] >= 0
    np.testing.assert_allclose(got, flat["rl"] + flat["sft"] if aligned else flat["rl"], rtol=0, atol=1e-15)
    assert got @ flat["rl"] >= 0
    # the plain sum would not do
    strong = {"rl": gradients["rl"], "sft": jax.tree.map(lambda leaf: -3.0 * leaf, gradients["rl"])}
    assert inner(total(strong), gradients["rl"]) < 0 <= inner(drop_if_conflict(strong, kept="rl"), gradients["rl"])


def test_identity_33_gta_on_a_policy_whose_objectives_conflict():
    worst = int(np.argmin(REWARD))
    one = slice(worst, worst + 1)
    rl = rl_gradient(BASE)
    sft = row_gradient(SFT, BASE, np.ones(1), np.ones(1), strings=STRINGS[one], context=CONTEXT[one])
    assert inner(sft, rl) < 0
    np.testing.assert_array_equal(drop_if_conflict({"sft": sft, "rl": rl}, kept="rl"), rl)
    best = int(np.argmax(REWARD))
    one = slice(best, best + 1)
    sft = row_gradient(SFT, BASE, np.ones(1), np.ones(1), strings=STRINGS[one], context=CONTEXT[one])
    assert inner(sft, rl) > 0
    np.testing.assert_allclose(drop_if_conflict({"sft": sft, "rl": rl}, kept="rl"), sft + rl, rtol=0, atol=1e-15)
