"""The order of a step as a whole: one compilation, one declared read, bad input that costs nothing, and identities."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import hptjax.sharding.host
from hptjax import explain_memory
from hptjax.build import run as build_run
from hptjax.build.parts import open_parts
from hptjax.build.stages import build_stages
from hptjax.config import TrainConfig
from hptjax.hpt.gate import demonstration_sample
from hptjax.model_shape import decoder_shape
from hptjax.records import Sample, SampleId, Source
from tests import tiny


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    with open_parts(tiny.tiny_config(tmp_path_factory.mktemp("parts"))) as opened:
        yield opened


@pytest.fixture(scope="module")
def stage(parts):
    return build_stages(parts.config, parts.policy, parts.questions.train)[-1]


def mixed_samples(questions, gated, rng, group_size=4):
    """The first `gated` questions with their demonstration, the rest with random judged rollouts."""
    samples = [demonstration_sample(question) for question in questions[:gated]]
    for question in questions[gated:]:
        for index in range(group_size):
            tokens = rng.integers(3, 15, rng.integers(2, 18)).astype(np.int32)
            samples.append(
                Sample(
                    sample_id=SampleId(question.question_id, 0, index),
                    group_id=question.question_id,
                    source=Source.ROLLOUT,
                    prompt_tokens=question.prompt_tokens,
                    completion_tokens=tokens,
                    sampler_logprobs=np.full(len(tokens), -2.5, np.float32),
                    reward=float(index % 2),
                    solved=bool(index % 2),
                )
            )
    return samples


def apply(stage, parts, samples, state=None):
    """One update of these samples; the state after it."""
    from hptjax.sharding.mesh import put_micro_batch

    state = stage.start({"policy": parts.policy.params}, None) if state is None else state
    update = stage.assemble(samples, frozenset())
    for index, micro_batch in enumerate(update.micro_batches):
        last = jax.numpy.asarray(index == len(update.micro_batches) - 1)
        state = stage.micro_step(state, put_micro_batch(parts.policy.mesh, micro_batch), last)
    return state


def test_gate_shares_from_0_to_1_compile_the_train_step_once(parts, stage):
    rng = np.random.default_rng(0)
    state = stage.start({"policy": parts.policy.params}, None)
    before = stage.micro_step.__wrapped__._cache_size()
    counts = set()
    for update in range(50):
        samples = mixed_samples(parts.questions.train[:6], update % 7, rng)
        state = apply(stage, parts, samples, state)
        counts.add(int(state.report.micro_batches))
    assert stage.micro_step.__wrapped__._cache_size() - before <= 1
    assert stage.micro_step.__wrapped__._cache_size() == 1
    assert int(state.totals.optimizer_steps) == 50
    assert len(counts) > 2


def test_every_device_read_goes_through_the_declared_function(tmp_path, monkeypatch):
    """Any conversion of a device array outside `to_host` (or the checkpoint writer) is recorded with its caller."""
    from jax._src.array import ArrayImpl

    inside, strays = [0], []
    real_read, real_array, real_value = jax.device_get, ArrayImpl.__array__, ArrayImpl._value

    def declared(tree):
        inside[0] += 1
        try:
            return real_read(tree)
        finally:
            inside[0] -= 1

    def note():
        if inside[0]:
            return
        frame, callers = sys._getframe(2), []
        while frame is not None:
            callers.append(frame.f_code.co_filename)
            frame = frame.f_back
        if not any("orbax" in name or "checkpoint" in name or "tensorstore" in name for name in callers):
            ours = [name for name in callers if "hptjax" in name or "tests" in name]
            strays.append(ours[:3])

    def spy_array(self, *arguments, **options):
        note()
        return real_array(self, *arguments, **options)

    def spy_value(self):
        note()
        return real_value.fget(self)

    config = tiny.as_off_policy(tiny.tiny_config(tmp_path))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2, probe_every=1))
    monkeypatch.setattr(hptjax.sharding.host.jax, "device_get", declared)
    monkeypatch.setattr(ArrayImpl, "__array__", spy_array)
    monkeypatch.setattr(ArrayImpl, "_value", property(spy_value))
    tiny.train(config)
    assert strays == []
    float(jax.numpy.ones(()))  # the spy sees a stray read
    assert len(strays) >= 1


def test_a_discarded_rollout_or_unused_demonstration_changes_no_bit(parts, stage):
    """HPT property 14: what the gate leaves out does not reach the update at all."""
    from hptjax.hpt.gate import gate, group_rollouts, select_live, solved_counts

    rng = np.random.default_rng(1)
    questions = parts.questions.train[:4]
    rollouts = mixed_samples(questions, 0, rng)
    for place, sample in enumerate(rollouts):  # the first two questions: all failed
        if sample.sample_id.question in {q.question_id for q in questions[:2]}:
            rollouts[place] = dataclasses.replace(sample, reward=0.0, solved=False)

    def updated(samples, asked):
        groups = group_rollouts(samples)
        counts = solved_counts([q.question_id for q in asked], groups)
        live = select_live(asked, groups, gate(counts, threshold=0, group_size=4))
        return apply(stage, parts, live)

    before = updated(rollouts, questions)
    garbled = [
        dataclasses.replace(s, completion_tokens=s.completion_tokens[::-1].copy())
        if s.sample_id.question in {q.question_id for q in questions[:2]}
        else s
        for s in rollouts
    ]
    swapped = [
        dataclasses.replace(q, demonstration_tokens=q.demonstration_tokens[::-1].copy()) if place >= 2 else q
        for place, q in enumerate(questions)
    ]
    after = updated(garbled, swapped)
    assert all(map(np.array_equal, jax.tree.leaves(before.params), jax.tree.leaves(after.params)))


def test_all_sft_step_is_cross_entropy_training(parts, stage):
    """HPT property 26: every question gated, coefficient 1, is plain token-mean cross-entropy; by a slow route."""
    questions = parts.questions.train[:2]
    state = apply(stage, parts, [demonstration_sample(question) for question in questions])
    from hptjax.models import decoder

    def nll(params):
        total, count = 0.0, 0
        for question in questions:
            tokens = np.concatenate([question.prompt_tokens, question.demonstration_tokens])[None, :]
            ones = np.ones((1, tokens.shape[1] - 1), np.int32)
            hidden = decoder.forward(
                params,
                tokens[:, :-1],
                np.arange(tokens.shape[1] - 1, dtype=np.int32)[None, :],
                ones,
                config=parts.policy.config,
                compute_dtype=jax.numpy.float32,
            )
            logits = hidden[0] @ decoder.unembedding(params, parts.policy.config)
            start = len(question.prompt_tokens) - 1
            picked = jax.nn.log_softmax(logits)[np.arange(start, tokens.shape[1] - 1), tokens[0, start + 1 :]]
            total, count = total - picked.sum(), count + len(picked)
        return total / count

    gradient = jax.grad(nll)(parts.policy.params)
    norm = float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient))))
    np.testing.assert_allclose(float(state.report.grad_norm["policy"]), norm, rtol=1e-5)
    np.testing.assert_allclose(float(state.report.stats["loss/sft"].total), float(nll(parts.policy.params)), rtol=1e-5)


def test_equal_rewards_give_exactly_no_rl_gradient(parts, stage):
    """HPT property 17: a group without a difference teaches nothing."""
    rng = np.random.default_rng(2)
    samples = [dataclasses.replace(s, reward=1.0) for s in mixed_samples(parts.questions.train[:3], 0, rng)]
    state = apply(stage, parts, samples)
    assert float(state.report.grad_norm["policy"]) == 0.0


def test_sft_coefficient_scales_demonstrations_only(parts):
    """HPT property 27: gradient(0.3) - gradient(0) = 0.3 (gradient(1) - gradient(0)), read off the loss terms."""
    rng = np.random.default_rng(3)
    samples = mixed_samples(parts.questions.train[:6], 3, rng)
    values = {}
    for coefficient in (0.3, 1.0):
        config = dataclasses.replace(
            parts.config, hpt=dataclasses.replace(parts.config.hpt, sft_coefficient=coefficient)
        )
        built = build_stages(config, parts.policy, parts.questions.train)[-1]
        stats = apply(built, parts, samples).report.stats
        values[coefficient] = (float(stats["loss/sft"].total), float(stats["loss/rl"].total))
    np.testing.assert_allclose(values[0.3][0], 0.3 * values[1.0][0], rtol=1e-5)
    np.testing.assert_allclose(values[0.3][1], values[1.0][1], rtol=1e-6)


@pytest.mark.parametrize("form", [lambda config: config, tiny.as_off_policy], ids=["on policy", "two updates"])
def test_sampler_and_trainer_agree_on_every_step(tmp_path, form):
    """Measured at the weights that sampled: a second update of the step is no measure of the sampler."""
    config = form(tiny.tiny_config(tmp_path))
    tiny.train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2, eval_every=0)))
    rows = [json.loads(line) for line in (Path(config.runs_dir) / "tiny" / "metrics.jsonl").read_text().splitlines()]
    gaps = [row["rollout/logp_diff_max"] for row in rows if "witness/ok" in row]
    assert len(gaps) == 2
    assert all(0 <= gap <= 1e-4 for gap in gaps)


def test_stages_run_one_after_the_other_through_the_same_loop(tmp_path):
    from hptjax.config import StageConfig

    config = tiny.tiny_config(tmp_path, method="grpo", stages=(StageConfig(method="sft", steps=2),))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
    tiny.train(config)
    rows = [json.loads(line) for line in (Path(config.runs_dir) / "tiny" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "witness/ok" in row]
    assert [row["train/stage"] for row in steps] == [0, 0, 1, 1]
    assert [row["hpt/gate_sft_frac"] for row in steps] == [1, 1, 0, 0]
    assert [row["batch/rollouts"] for row in steps] == [0, 0, 24, 24]
    assert [row["train/optimizer_step"] for row in steps] == [1, 2, 3, 4]


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.01])
def test_weights_at_the_start_stay_only_where_a_kl_reads_them(tmp_path, monkeypatch, kl_coefficient):
    config = tiny.tiny_config(tmp_path, train=TrainConfig(steps=1, eval_every=0, rollouts_every=0, panel_questions=0))
    config = dataclasses.replace(config, hpt=dataclasses.replace(config.hpt, kl_coefficient=kl_coefficient))
    opened, held = [], {row.name for row in explain_memory.held(config, decoder_shape(config, lambda: 30))}
    whole = build_run.open_parts

    @contextlib.contextmanager
    def spied(config):
        with whole(config) as parts:
            opened.append(parts)
            yield parts

    monkeypatch.setattr(build_run, "open_parts", spied)
    tiny.train(config)
    gone = {leaf.is_deleted() for leaf in jax.tree.leaves(opened[0].policy.params)}
    assert gone == {kl_coefficient == 0.0}
    assert ("parameters at the start (KL reference)" in " ".join(held)) == (kl_coefficient > 0)
