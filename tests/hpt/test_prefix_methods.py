"""TRAPO, UFT and Prefix-RFT on packed rows, plane by plane: against loops over tokens, and identity 29."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from hptjax.config_methods import MicroGroupRow
from hptjax.hpt.plan import CODE_GROUPS, PAPER_GROUPS
from hptjax.hpt.route import Routed, by_gate
from hptjax.hpt.unpack import by_sample
from hptjax.records import Source
from hptjax.train.objective import make_losses
from tests.hpt.prefixed import (
    MAX_TOKENS,
    QUESTIONS,
    SHAPES,
    TABLE,
    bigram,
    build,
    config_of,
    continued,
    entropy_at,
    gradients,
    packed,
    questions,
    sampled,
    slow_gradient,
    wide,
)

REWARDS = {  # of eight rollouts each: every depth of TRAPO's rounds
    0: [1, 0, 0, 0, 0, 1, 0, 1],
    1: [1, 1, 0, 1, 1, 0, 1, 1],
    2: [0, 0, 0, 0, 0, 0, 0, 1],
    3: [1, 1, 1, 1, 1, 1, 1, 1],
}


def close(got, want):
    assert np.abs(want).max() > 1e-3  # two zeros prove nothing
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)  # weights are float32


def ppo_keeps(ratio, advantage, low=0.2, high=0.2, cap=math.inf):
    if advantage > 0:
        return ratio <= 1 + high
    return 1 - low <= ratio <= cap if advantage < 0 else True


@functools.cache
def groups_of(method, constants="paper"):
    """(recipe, samples) of a method, made once: its own plan on the questions of `prefixed`."""
    size = 8 if method == "trapo" else 4
    recipe = build(config_of(method, group_size=size, constants={"trapo_constants": constants}))
    return recipe, sampled(recipe.method.sampled(), REWARDS.__getitem__, step=100)


def test_the_samples_hold_every_kind_of_prefix():
    for constants, shares in (("paper", PAPER_GROUPS), ("code", CODE_GROUPS)):
        _, samples = groups_of("trapo", constants)
        given = [[s.prefix_len for s in samples if s.group_id == q] for q in range(QUESTIONS)]
        length = [len(q.demonstration_tokens) for q in questions()]
        part = [int(shares[1].ratio * n) for n in length]
        assert given[0] == [0] * 4 + [part[0]] * 2 + [length[0] // 2, length[0]]
        assert given[1][:6] == [0] * 6
        assert given[2] == [0] * 4 + [part[2]] * 2 + [length[2] // 2, length[2]]
        assert given[3] == [0] * 8
    for method in ("uft", "prefix_rft"):
        assert sum(s.prefix_len > 0 for s in groups_of(method)[1]) >= 3


METHODS = [("trapo", "paper"), ("trapo", "code"), ("uft", "paper"), ("prefix_rft", "paper")]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("method", "constants"), METHODS)
def test_prefix_and_continuation_have_exactly_the_weight_of_their_own_plane(method, constants, shape):
    recipe, samples = groups_of(method, constants)
    update = packed(recipe, samples, shape=shape)
    weights = {
        name: by_sample(update, [batch.planes[name].weights for batch in update.micro_batches])
        for name in ("rl", "prefix")
    }
    marks = by_sample(update, [batch.completion_mask for batch in update.micro_batches])
    seen: dict[str, set[float]] = {"rl": set(), "prefix": set()}
    first = set()
    for sample in update.samples:
        start = len(sample.prompt_tokens) - 1
        written = start + sample.prefix_len
        key = (sample.group_id, sample.prefix_len)
        learns = sample.prefix_len > 0 and not (constants == "code" and key in first)
        first.add(key)
        rl, prefix = (weights[name][sample.sample_id] for name in ("rl", "prefix"))
        assert not rl[:written].any()
        assert not prefix[:start].any()
        assert not prefix[written:].any()
        assert (rl[written:] > 0).all()
        assert ((prefix[start:written] > 0) == learns).all()
        seen["rl"] |= set(rl[written:].tolist())
        seen["prefix"] |= set(prefix[start:written].tolist()) - {0.0}
        assert marks[sample.sample_id].tolist() == [i >= (start if learns else written) for i in range(len(rl))]
    assert all(len(values) == 1 for values in seen.values())  # one constant each, exactly
    assert int(update.planned_tokens.sum()) == sum(int(m.completion_mask.sum()) for m in update.micro_batches)
    for batch in update.micro_batches:
        assert update.planned_tokens[int(batch.micro_index)] == batch.completion_mask.sum()


def standardised(samples, *, by_std=True):
    """Sample id -> (R - mean) / std of its group, by NumPy."""
    groups = {q: np.array([s.reward for s in samples if s.group_id == q]) for q in range(QUESTIONS)}
    scale = {q: rewards.std(ddof=1) + 1e-6 if by_std else 1.0 for q, rewards in groups.items()}
    return {s.sample_id: (s.reward - groups[s.group_id].mean()) / scale[s.group_id] for s in samples}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("constants", ["paper", "code"])
def test_trapo_gradient_is_that_of_the_loop(constants, shape):
    """Whole demonstrations count in the group's mean; prefixes learn by p / max(p, 0.1), one per prefix in the code."""
    recipe, samples = groups_of("trapo", constants)
    clips = constants == "paper"
    normaliser = MAX_TOKENS * QUESTIONS * 8 / 64
    advantages = standardised(samples, by_std=constants == "paper")
    learning = set()
    for s in samples:
        if s.prefix_len and (constants == "paper" or (s.group_id, s.prefix_len) not in {k[:2] for k in learning}):
            learning.add((s.group_id, s.prefix_len, s.sample_id.index))
    clipped = []

    def rl(s, place, p, old, entropy, reference):
        if place < s.prefix_len:
            return 0.0
        advantage = advantages[s.sample_id]
        keeps = not clips or ppo_keeps(p / old, advantage)
        clipped.append(not keeps)
        return keeps * p / old * advantage / normaliser

    def prefix(s, place, p, old, entropy, reference):
        learns = place < s.prefix_len and (s.group_id, s.prefix_len, s.sample_id.index) in learning
        return learns * p / max(p, 0.1) / normaliser

    got = gradients(recipe, packed(recipe, samples, shape=shape))
    close(got["rl"], slow_gradient(samples, rl))
    close(got["prefix"], slow_gradient(samples, prefix))
    assert any(clipped) == clips


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_uft_gradient_is_that_of_the_loop(shape):
    """GRPO and k3 as token means of what was written, SFT of the hint as 0.001 x its token mean."""
    recipe, samples = groups_of("uft")
    written = sum(len(s.completion_tokens) - s.prefix_len for s in samples)
    hinted = sum(s.prefix_len for s in samples)
    advantages = standardised(samples)

    def rl(s, place, p, old, entropy, reference):
        advantage = advantages[s.sample_id]
        return (place >= s.prefix_len) * ppo_keeps(p / old, advantage) * p / old * advantage / written

    def kl(s, place, p, old, entropy, reference):
        return -(place >= s.prefix_len) * 0.001 * (1 - reference / p) / written

    def hint(s, place, p, old, entropy, reference):
        return (place < s.prefix_len) * 0.001 / hinted

    got = gradients(recipe, packed(recipe, samples, shape=shape))
    close(got["rl"], slow_gradient(samples, rl))
    close(got["kl"] * 1e3, slow_gradient(samples, kl) * 1e3)
    close(got["prefix"] * 1e3, slow_gradient(samples, hint) * 1e3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefix_rft_gradient_is_that_of_the_loop(shape):
    """A continuation alone with its prefix has A = R; a prefix R - mean of the free; some of its tokens learn."""
    constants = {
        "prefix_entropy_share": 0.6,
        "prefix_clip_low": 0.05,
        "prefix_clip_high": 0.9,
        "prefix_clip_bound": 1.5,
    }
    recipe = build(config_of("prefix_rft", constants=constants))
    samples = groups_of("prefix_rft")[1]
    total = sum(len(s.completion_tokens) for s in samples)
    free = [s for s in samples if not s.prefix_len]
    advantages = {s.sample_id: s.reward / (1 + 1e-6) for s in samples} | standardised(free)
    mean = {q: np.mean([s.reward for s in free if s.group_id == q]) for q in range(QUESTIONS)}
    clipped = {"rl": 0, "prefix": 0}

    def keeps(plane, *arguments):
        kept = ppo_keeps(*arguments)
        clipped[plane] += not kept
        return kept

    def rl(s, place, p, old, entropy, reference):
        if place < s.prefix_len:
            return 0.0
        advantage = advantages[s.sample_id]
        return keeps("rl", p / old, advantage, 0.2, 0.2, 1.5) * p / old * advantage / total

    def prefix(s, place, p, old, entropy, reference):
        if place >= s.prefix_len:
            return 0.0
        advantage = s.reward - mean[s.group_id]
        others = [entropy_at(s, i) for i in range(s.prefix_len)]
        rank = sum(o > entropy + 1e-12 or (abs(o - entropy) <= 1e-12 and i < place) for i, o in enumerate(others))
        if rank >= s.prefix_len - int(s.prefix_len * 0.4):
            return 0.0
        return keeps("prefix", p / old, advantage, 0.05, 0.9, 1.5) * p / old * advantage / total

    got = gradients(recipe, packed(recipe, samples, shape=shape))
    close(got["rl"], slow_gradient(samples, rl))
    close(got["prefix"], slow_gradient(samples, prefix))
    assert min(clipped.values()) > 0


def assert_same_update(recipe, other, samples, names):
    """The planes of `names` are bitwise those of another method whose samples all learn, and so are their gradients."""
    everything = by_gate(-1, recipe.method.rollouts)
    other = dataclasses.replace(other, method=dataclasses.replace(other.method, route=everything))
    mine, theirs = packed(recipe, samples), packed(other, samples)
    for batch, reference in zip(mine.micro_batches, theirs.micro_batches, strict=True):
        for name in names:
            np.testing.assert_array_equal(batch.planes[name].weights, reference.planes[name].weights)
            np.testing.assert_array_equal(batch.planes[name].advantages, reference.planes[name].advantages)
    left, right = gradients(recipe, mine), gradients(other, theirs)
    assert {name for name, gradient in left.items() if gradient.any()} == set(names)
    for name in names:
        np.testing.assert_array_equal(left[name], right[name])


@pytest.mark.parametrize(("constants", "row"), [("paper", "grpo"), ("code", "dr_grpo")])
def test_identity_29_trapo_without_thresholds_is_its_rl_row(constants, row):
    """GRPO for the paper's row, Dr.GRPO for the code's, as HPT's gate -1 runs them: bit for bit."""
    published = PAPER_GROUPS if constants == "paper" else CODE_GROUPS
    free = tuple(MicroGroupRow(group.count, group.ratio, -math.inf) for group in published)
    settings = {"trapo_constants": constants, "trapo_groups": free}
    recipe = build(config_of("trapo", group_size=8, constants=settings))
    samples = sampled(recipe.method.sampled(), REWARDS.__getitem__)
    assert all(s.source == Source.ROLLOUT for s in samples)
    clip = {"clip_low": 0.2, "clip_high": 0.2} if row == "grpo" else {}
    other = build(config_of("hpt", group_size=8, gate=-1, rl_estimator=row, **clip))
    assert_same_update(recipe, other, samples, ["rl"])


def test_identity_29_uft_without_hints_is_grpo_with_kl():
    """Token means of GRPO's surrogate and of k3: DAPO's row with GRPO's clip and the config's penalty, bit for bit."""
    recipe = build(config_of("uft", constants={"uft_steps": 0}))
    samples = sampled(recipe.method.sampled(), REWARDS.__getitem__)
    assert all(s.source == Source.ROLLOUT for s in samples)
    other = build(config_of("dapo", clip_low=0.2, clip_high=0.2, kl_coefficient=0.001))
    assert_same_update(recipe, other, samples, ["rl", "kl"])


def test_identity_29_prefix_rft_without_prefixes_is_rl():
    """GRPO's surrogate with the dual clip and a token mean, bit for bit."""
    recipe = build(config_of("prefix_rft", constants={"prefix_low": 0.0, "prefix_high": 0.0}))
    samples = sampled(recipe.method.sampled(), REWARDS.__getitem__)
    assert all(s.source == Source.ROLLOUT for s in samples)
    other = build(config_of("dapo", clip_low=0.2, clip_high=0.2, clip_kind="dual", clip_bound=3.0))
    assert_same_update(recipe, other, samples, ["rl"])


def test_kl_in_the_reward_is_of_the_tokens_that_the_policy_wrote():
    """A forced prefix was not sampled from the policy: its plane does not change, that of the continuation does."""
    plain = build(config_of("prefix_rft"))
    samples = sampled(plain.method.sampled(), REWARDS.__getitem__)
    rewarded = build(config_of("prefix_rft", kl_in="reward", kl_coefficient=0.1))
    want, got = (gradients(recipe, packed(recipe, samples)) for recipe in (plain, rewarded))
    assert np.abs(want["prefix"]).max() > 1e-3
    np.testing.assert_array_equal(got["prefix"], want["prefix"])
    assert np.abs(got["rl"] - want["rl"]).max() > 1e-3


def whole(question, index, reward):
    return continued(question, index, question.demonstration_tokens, np.random.default_rng(0), reward)


@pytest.mark.parametrize(
    ("method", "row", "factor"),
    [("trapo", "trsft", "normaliser"), ("uft", "sft", 0.001), ("prefix_rft", "sft", "advantage")],
)
def test_identity_29_a_full_prefix_is_a_demonstration(method, row, factor):
    """The gradient of nothing but whole demonstrations is that of the row for demonstrations, but for a factor.

    At ratio 1, where Prefix-RFT's tokens are pushed by log pi; its prefixes have no free rollouts, so A = R = 1.
    """
    recipe = build(config_of(method, group_size=2, constants={"prefix_entropy_share": 1.0}, updates=1))
    samples = [whole(question, 0, 1.0) for question in questions()]
    tokens = sum(len(s.completion_tokens) for s in samples)
    got = gradients(recipe, packed(recipe, samples))
    other = build(config_of(row, updates=1))
    demonstrations = [
        dataclasses.replace(s, source=Source.DEMONSTRATION, prefix_len=0, sample_id=s.sample_id._replace(index=-1))
        for s in samples
    ]
    plain = dataclasses.replace(other.method, route=lambda judged: Routed([], demonstrations))
    want = gradients(other, packed(dataclasses.replace(other, method=plain), samples))["sft"]
    factor = {"normaliser": tokens / (MAX_TOKENS * QUESTIONS * 2 / 64), "advantage": 1.0}.get(factor, factor)
    close(got["prefix"] / factor, want)
    assert not any(gradient.any() for name, gradient in got.items() if name != "prefix")


def test_a_whole_demonstration_counts_in_the_mean_of_its_group():
    """Trap 10: of rewards 1, 0, 0 and the demonstration's 1 the mean is 1/2."""
    groups = (MicroGroupRow(3, 0.0, 0.0), MicroGroupRow(1, 1.0, 1.0))
    recipe = build(config_of("trapo", constants={"trapo_constants": "code", "trapo_groups": groups}))
    samples = sampled(recipe.method.sampled(), lambda question: [1, 0, 0, 1])
    assert [s.prefix_len for s in samples[:4]] == [0, 0, 0, len(samples[3].completion_tokens)]
    update = packed(recipe, samples)
    advantages = by_sample(update, [batch.planes["rl"].advantages for batch in update.micro_batches])
    for sample in update.samples:
        if not sample.prefix_len:
            mine = advantages[sample.sample_id][len(sample.prompt_tokens) - 1 :]
            assert set(mine.tolist()) == {0.5 if sample.reward else -0.5}
        else:
            assert not advantages[sample.sample_id].any()


def test_statistics_keep_forced_tokens_apart():
    """The sampler's log-probs, 0 on the prefix, are compared on written tokens alone."""
    recipe, samples = groups_of("trapo")
    close_to_policy = [dataclasses.replace(s, sampler_logprobs=own_logprobs(s)) for s in samples]
    update = packed(recipe, close_to_policy)
    losses = make_losses(bigram, recipe.token_losses, scored=recipe.scores)
    counts, gaps = np.zeros(2), []
    for batch in update.micro_batches:
        stats = losses({"policy": jnp.asarray(TABLE)}, wide(batch))[1]
        counts += [stats["actor/rollout_nll"].count, stats["actor/prefix_nll"].count]
        gaps.append(float(stats["rollout/logp_diff_max"].value))
    assert counts.tolist() == [
        sum(len(s.completion_tokens) - s.prefix_len for s in samples),
        sum(s.prefix_len for s in samples),
    ]
    assert max(gaps) < 1e-6


def own_logprobs(sample):
    """The policy's, in float32, and 0 on the forced prefix."""
    every = TABLE - np.log(np.exp(TABLE).sum(1, keepdims=True))
    tokens = np.concatenate([sample.prompt_tokens, sample.completion_tokens])
    mine = every[tokens[:-1], tokens[1:]][len(sample.prompt_tokens) - 1 :].astype(np.float32)
    mine[: sample.prefix_len] = 0.0
    return mine
