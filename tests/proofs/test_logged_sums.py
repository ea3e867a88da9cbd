"""Logged losses and evaluation figures: one sum over one count, however the work was cut into batches (T32)."""

from __future__ import annotations

import dataclasses
import functools
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from hptjax.build.policy import build_policy
from hptjax.build.stages import build_stages
from hptjax.diagnostics.metrics import merge
from hptjax.eval.evaluate import evaluate, heldout_demonstration_nll
from hptjax.hpt.gate import demonstration_sample
from hptjax.records import Request, SampleId, Source, Verdict
from hptjax.sharding.host import to_host
from hptjax.sharding.mesh import put_micro_batch
from hptjax.train.step_metrics import merge_stats
from tests import recorded, tiny
from tests.proofs import two_processes as pair

CUTS = [(2, 48), (5, 64)]  # batch.rows x batch.row_tokens
ROUNDING = 4e-6  # relative, of a sum of a few hundred log-probs in float32
LOGGED = {"sft/loss": Source.DEMONSTRATION, "actor/rollout_nll": Source.ROLLOUT}
SAMPLES = 4  # of every question that is evaluated


def parts(folder, rows, row_tokens):
    """(policy, stage) of the tiny run on one device, with micro-batches of this shape.

    Its parameters are four times larger than at a start: a fresh model gives every token nearly the same loss, and
    then every mean is right.
    """
    config = tiny.tiny_config(folder)
    batch = dataclasses.replace(config.batch, rows=rows, row_tokens=row_tokens)
    config = dataclasses.replace(config, batch=batch)
    policy = build_policy(config)
    policy = dataclasses.replace(policy, params=jax.tree.map(lambda leaf: 4.0 * leaf, policy.params))
    return policy, build_stages(config, policy, recorded.questions())[-1]


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    """The policy and stage for each micro-batch size; they share their parameters' bits."""
    folder = tmp_path_factory.mktemp("logged")
    return [parts(folder, rows, row_tokens) for rows, row_tokens in CUTS]


@functools.cache
def scorer(policy):
    return jax.jit(lambda params, batch: policy.token_stats(False)(params, batch).logprobs)


@pytest.fixture(scope="module")
def one_by_one(cuts):
    """Sample id -> log-probs of its live tokens, each sample in a micro-batch of its own, as float64."""
    policy, stage = cuts[0]
    score, found = scorer(policy), {}
    for sample in [*recorded.mixed(8, 8), *map(demonstration_sample, recorded.questions())]:
        update = stage.assemble([sample], frozenset())
        assert len(update.micro_batches) == 1
        batch = put_micro_batch(policy.mesh, update.micro_batches[0])
        logprobs, live = to_host((score(policy.params, batch), batch.completion_mask))
        found[sample.sample_id] = logprobs[live].astype(np.float64)
    return found


def totals(one_by_one, samples):
    """(sum of -log p, tokens) over these samples' tokens."""
    tokens = np.concatenate([one_by_one[sample.sample_id] for sample in samples])
    return -tokens.sum(), tokens.size


@pytest.mark.parametrize("cut", range(len(CUTS)))
def test_t32_logged_losses_do_not_depend_on_the_micro_batch_size(cuts, one_by_one, cut):
    policy, stage = cuts[cut]
    samples = recorded.mixed(8, 8)
    update = stage.assemble(samples, frozenset())
    assert len(update.micro_batches) > 1
    stats = to_host(pair.added(policy, stage, update.micro_batches, flush=True).report.stats)
    single = [to_host(pair.added(policy, stage, [batch], flush=False).window.stats) for batch in update.micro_batches]
    for name, source in LOGGED.items():
        total, count = totals(one_by_one, [sample for sample in samples if sample.source == source])
        assert stats[name].count == count
        np.testing.assert_allclose(stats[name].total, total, rtol=ROUNDING)
        shown = merge([{name: (stats[name].total, stats[name].count)}])[name]
        np.testing.assert_allclose(shown, total / count, rtol=ROUNDING)
        of_each = [part[name].total / part[name].count for part in single if part[name].count]
        assert abs(np.mean(of_each) - total / count) > 100 * ROUNDING * total / count  # a mean of means would be seen


def test_t32_the_updates_of_a_step_are_merged_by_sum_and_count():
    """(4 over 1) and (0 over 3) are 1, where the mean of means is 2; so over the phases of a step."""
    merged = {}
    for total, count in ((4.0, 1.0), (0.0, 3.0)):
        stat = SimpleNamespace(total=total, count=count)
        merge_stats(merged, {"sft/loss": jax.tree.map(np.float32, (stat.total, stat.count))})
    assert merged["sft/loss"] == [4.0, 4.0]
    assert merge([{"sft/loss": tuple(merged["sft/loss"])}]) == {"sft/loss": 1.0}
    assert merge([{"sft/loss": (4.0, 1.0)}, {"sft/loss": (0.0, 3.0)}]) == {"sft/loss": 1.0}


@pytest.mark.parametrize("cut", range(len(CUTS)))
@pytest.mark.parametrize("first", [1, 5, 13])
def test_t32_held_out_loss_does_not_depend_on_the_batch_size(cuts, one_by_one, cut, first):
    """Thirteen demonstrations, the first so many packed on their own."""
    policy, stage = cuts[cut]
    samples = [demonstration_sample(question) for question in recorded.questions()[:13]]
    halves = [half for half in (samples[:first], samples[first:]) if half]
    batches = [batch for half in halves for batch in stage.assemble(half, frozenset()).micro_batches]
    placed = [put_micro_batch(policy.mesh, batch) for batch in batches]
    loss = heldout_demonstration_nll(policy.params, placed, scorer(policy))
    total, count = totals(one_by_one, samples)
    assert loss.tokens == count
    np.testing.assert_allclose(loss.nll_sum, total, rtol=ROUNDING)
    np.testing.assert_allclose(loss.per_token, total / count, rtol=ROUNDING)
    if first == 1:
        means = [heldout_demonstration_nll(policy.params, [batch], scorer(policy)).per_token for batch in placed]
        assert abs(np.mean(means) - total / count) > 100 * ROUNDING * total / count


def solves(sample):
    """A made-up verdict: some questions are easier than others."""
    return int(sample.completion_tokens.sum()) % (2 + sample.sample_id.question % 3) == 0


def judge(samples, questions):
    return [
        (dataclasses.replace(sample, reward=float(solves(sample)), solved=solves(sample)), [Verdict(0.0, True, "")])
        for sample in samples
    ]


def requests(questions, visit):
    return [
        Request(
            sample_id=SampleId(question.question_id, visit, index),
            prompt_tokens=question.prompt_tokens,
            max_completion_tokens=recorded.MAX_COMPLETION,
            stop_ids=frozenset({recorded.STOP}),
        )
        for question in questions
        for index in range(SAMPLES)
    ]


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory):
    """The evaluation of seven questions, 28 completions, decoded in 16 slots and in 6."""
    folder, found = tmp_path_factory.mktemp("evaluations"), []
    for slots in (16, 6):
        config = tiny.tiny_config(folder)
        config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, slots=slots, prefill_rows=2))
        policy = build_policy(config)
        found.append(
            evaluate(
                policy.params,
                recorded.questions()[:7],
                jax.random.key(4),
                make_requests=requests,
                sample=policy.sample,
                judge=judge,
                samples_per_question=SAMPLES,
                ks=(1, 2, 4),
            )
        )
    return found


def test_t32_evaluation_figures_do_not_depend_on_the_slots(evaluations):
    one = evaluations[0]
    assert len(set(one.solved_counts.tolist())) > 1
    for other in evaluations[1:]:
        assert np.array_equal(other.solved_counts, one.solved_counts)
        assert {k: e.value for k, e in other.pass_at_k.items()} == {k: e.value for k, e in one.pass_at_k.items()}
        assert (other.mean_length, other.length_clip_ratio) == (one.mean_length, one.length_clip_ratio)


def test_t32_evaluation_figures_are_those_of_all_samples_together(evaluations):
    """pass@k and lengths by hand from the samples; lengths averaged wave by wave would be others."""
    for result in evaluations:
        samples = [result.judged[key][0] for key in sorted(result.judged)]
        lengths = np.asarray([len(sample.completion_tokens) for sample in samples], np.float64)
        assert len(samples) == 28
        assert result.mean_length == pytest.approx(lengths.sum() / 28, rel=1e-12)
        for k, estimate in result.pass_at_k.items():
            hits = [
                sum(s.solved for s in samples if s.sample_id.question == question) for question in result.question_ids
            ]
            by_question = [1 - math.comb(SAMPLES - hit, k) / math.comb(SAMPLES, k) for hit in hits]
            assert estimate.value == pytest.approx(sum(by_question) / 7, rel=1e-12)
        waves = [lengths[:16].mean(), lengths[16:].mean()]
        assert abs(np.mean(waves) - lengths.mean()) > 1e-3
