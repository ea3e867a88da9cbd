"""Every choice of the `hpt` section builds a step that runs, and agrees with its neighbours where theory says so."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from hptjax.build.parts import open_parts
from hptjax.build.stages import build_stages
from hptjax.sharding.mesh import put_micro_batch
from hptjax.train.accumulate import Status
from tests import tiny
from tests.test_loop import mixed_samples


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    with open_parts(tiny.tiny_config(tmp_path_factory.mktemp("methods"))) as opened:
        yield opened


def gradient(parts, samples, *, method="hpt", **hpt):
    """The summed gradient of one update, read before the flush, and the state after it."""
    config = dataclasses.replace(parts.config, method=method, hpt=dataclasses.replace(parts.config.hpt, **hpt))
    stage = build_stages(config, parts.policy, parts.questions.train)[-1]
    batches = [
        put_micro_batch(parts.policy.mesh, micro_batch)
        for micro_batch in stage.assemble(samples, frozenset()).micro_batches
    ]
    if stage.add_frozen is not None:
        batches = [stage.add_frozen(micro_batch) for micro_batch in batches]
    state = stage.start({"policy": parts.policy.params}, None)
    for micro_batch in batches:
        state = stage.micro_step(state, micro_batch, jax.numpy.asarray(False))
    sums = jax.tree.map(np.asarray, state.chains["policy"].sums.gradients)
    state = stage.start({"policy": parts.policy.params}, None)
    for index, micro_batch in enumerate(batches):
        state = stage.micro_step(state, micro_batch, jax.numpy.asarray(index == len(batches) - 1))
    assert int(state.report.status) == Status.UPDATED
    return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(sums)]), state


@pytest.fixture(scope="module")
def samples(parts):
    return mixed_samples(parts.questions.train[:6], 2, np.random.default_rng(0))


@pytest.fixture(scope="module")
def default(parts, samples):
    return gradient(parts, samples)[0]


@pytest.mark.parametrize(
    "hpt",
    [
        {"rl_estimator": "grpo", "clip_low": 0.2, "clip_high": 0.28},
        {"rl_estimator": "reinforce"},
        pytest.param({"rl_estimator": "ppo", "clip_low": 0.2, "clip_high": 0.2}, marks=pytest.mark.slow),
        {"preset": "official"},
        {"preset": "paper"},
        {"preset": "separate"},
        {"preset": "joint"},
        pytest.param({"entropy_coefficient": 0.001}, marks=pytest.mark.slow),
        {"entropy_coefficient": 0.01, "entropy_on_demonstrations": False},
    ],
    ids=lambda hpt: "-".join(map(str, hpt.values())),
)
def test_method_choices_update_and_differ_from_the_default(parts, samples, default, hpt):
    got, _ = gradient(parts, samples, **hpt)
    assert np.all(np.isfinite(got))
    assert np.linalg.norm(got - default) > 2e-6 * np.linalg.norm(default)  # a random model is near maximal entropy


def test_method_clip_changes_nothing_at_ratio_one(parts, samples, default):
    """One update per rollout batch: the denominator is sg(logprobs), every ratio is 1, no clip can act (bitwise)."""
    assert np.array_equal(gradient(parts, samples, clip_low=0.2, clip_high=0.2)[0], default)


@pytest.mark.parametrize("estimator", [pytest.param("k2", marks=pytest.mark.slow), "k3"])
def test_method_kl_to_the_starting_model_has_no_gradient_there(parts, samples, default, estimator):
    got, state = gradient(parts, samples, kl_coefficient=0.5, kl_estimator=estimator)
    assert np.linalg.norm(got - default) <= 1e-5 * np.linalg.norm(default)
    assert "loss/kl" in state.report.stats


def test_method_official_weighs_a_rollout_token_by_one_over_length_and_ranks(parts, samples):
    """Hand numbers: L = 20, R = 8 ranks: 1/160 per token; one rank-local micro-batch mean per demonstration."""
    config = dataclasses.replace(parts.config, hpt=dataclasses.replace(parts.config.hpt, preset="official"))
    stage = build_stages(config, parts.policy, parts.questions.train)[-1]
    update = stage.assemble(samples, frozenset())
    assert update.terms["rl"].token_weight_min == update.terms["rl"].token_weight_max == 1 / (20 * 8)
    tokens = [len(sample.completion_tokens) for sample in samples if sample.sample_id.index < 0]
    # 18 samples over 8 ranks put the two demonstrations into micro-batches of their own
    np.testing.assert_allclose(update.terms["sft"].token_weight_max, 1 / (8 * min(tokens)), rtol=1e-12)
    np.testing.assert_allclose(update.terms["sft"].weight_sum, 2 / 8, rtol=1e-12)


def test_method_sft_and_dr_grpo_are_hpt_with_the_gate_at_its_ends(parts):
    """Under one reducer; each row's own differs by a constant."""
    rng = np.random.default_rng(1)
    demonstrations = mixed_samples(parts.questions.train[:4], 4, rng)
    rollouts = mixed_samples(parts.questions.train[:4], 0, rng)
    assert np.array_equal(gradient(parts, demonstrations, method="sft")[0], gradient(parts, demonstrations, gate=4)[0])
    assert np.array_equal(
        gradient(parts, rollouts, method="dr_grpo", preset="separate")[0],
        gradient(parts, rollouts, gate=-1, preset="separate")[0],
    )


def test_method_overlong_samples_keep_their_group_and_lose_their_weight(parts):
    rng = np.random.default_rng(2)
    samples = mixed_samples(parts.questions.train[:3], 0, rng)
    stage = build_stages(parts.config, parts.policy, parts.questions.train)[-1]
    dead = frozenset({samples[1].sample_id})
    update = stage.assemble(samples, dead)
    assert update.terms["rl"].sequences == len(samples) - 1
    alive = np.concatenate([m.planes["rl"].advantages[m.planes["rl"].weights > 0] for m in update.micro_batches])
    assert set(np.round(np.abs(alive), 6)) == {0.5}  # the group mean of four still counts the dead


def test_method_entropy_can_leave_demonstrations_out(parts, samples):
    """HPT property 28: over rollouts and demonstrations by the global count, or over rollouts only."""
    counts = {}
    for both in (True, False):
        hpt = dataclasses.replace(parts.config.hpt, entropy_coefficient=0.001, entropy_on_demonstrations=both)
        stage = build_stages(dataclasses.replace(parts.config, hpt=hpt), parts.policy, parts.questions.train)[-1]
        term = stage.assemble(samples, frozenset()).terms["entropy"]
        counts[both] = term.tokens
        np.testing.assert_allclose(term.token_weight_max, 0.001 / term.tokens, rtol=1e-12)
    demonstrations = sum(len(sample.completion_tokens) for sample in samples if sample.sample_id.index < 0)
    assert counts[True] - counts[False] == demonstrations > 0
