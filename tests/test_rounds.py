"""Rollouts in rounds: TRAPO's micro-groups on the tiny run, stopped inside and between rounds and taken up again."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import hptjax.build.run as build_run
import hptjax.train.loop as loop
from hptjax.config_methods import MicroGroupRow
from hptjax.records import Source
from hptjax.train.open_step import from_json, to_json
from tests import tiny
from tests.test_resume import rows, same_run

GROUPS = (MicroGroupRow(2, 0.0, 0.0), MicroGroupRow(1, 0.5, 0.9), MicroGroupRow(1, 1.0, 1.0))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The config of a TRAPO run of two steps whose rounds take several waves, which share their programs."""
    config = tiny.tiny_config(tmp_path_factory.mktemp("rounds"), method="trapo")
    config = dataclasses.replace(
        config,
        methods=dataclasses.replace(config.methods, trapo_groups=GROUPS),
        rollout=dataclasses.replace(config.rollout, prompt_buckets=(24, 34), slots=4),
        train=dataclasses.replace(config.train, steps=2, eval_every=0),
        eval=dataclasses.replace(config.eval, train_questions=0),
    )
    with tiny.shared_programs(config):
        yield config


@pytest.fixture(scope="module")
def uninterrupted(shared):
    """The whole run, and its open steps as they stood before their updates."""
    steps = []
    original = loop.gate_step

    def watched(step, **options):
        steps.append((step, dict(step.samples)))
        return original(step, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "gate_step", watched)
        build_run.train(shared, quiet=True)
    return shared, steps


def test_rounds_follow_the_verdicts(uninterrupted):
    """Each rollout's prefix by the thresholds on the rewards before it; a whole demonstration is judged unsampled."""
    config, steps = uninterrupted
    depths = set()
    for step, samples in steps:
        for question in step.questions:
            group = [samples[key] for key in sorted(samples) if key.question == question.question_id]
            assert len(group) == 4
            rewards = [s.reward for s in group]
            demonstration = question.demonstration_tokens
            part = int(0.5 * len(demonstration)) if sum(rewards[:2]) < 0.9 * 2 else 0
            whole = len(demonstration) if sum(rewards[:3]) < 3 else 0
            assert [s.prefix_len for s in group] == [0, 0, part, whole]
            depths.add((part > 0, whole > 0))
            for sample in group:
                assert sample.source == (Source.PREFIX if sample.prefix_len else Source.ROLLOUT)
                given = sample.completion_tokens[: sample.prefix_len]
                assert given.tolist() == demonstration[: sample.prefix_len].tolist()
                assert len(sample.completion_tokens) <= config.rollout.max_completion_tokens
                written = len(sample.completion_tokens) - sample.prefix_len
                assert (sample.decode_shape == "") == (written == 0) == (sample.prefix_len == len(demonstration))
    assert len(depths) >= 2
    metrics = [row for row in rows(config, "metrics.jsonl") if "witness/ok" in row]
    for row, (_, samples) in zip(metrics, steps, strict=True):
        free = [sample.reward for sample in samples.values() if not sample.prefix_len]
        assert row["critic/free_score/mean"] == pytest.approx(sum(free) / len(free))
        assert row["batch/continued"] == len(samples) - len(free)
    ledger = rows(config, "ledger.jsonl")
    assert all(row["tokens_by_term"]["prefix"] > 0 < row["tokens_by_term"]["rl"] for row in ledger)


def test_an_open_step_between_rounds_survives_json(uninterrupted):
    _, steps = uninterrupted
    step, _ = steps[0]
    saved = json.loads(json.dumps(to_json(step)))
    back = from_json(saved, {question.question_id: question for question in step.questions}, None)
    assert list(back.samples) == list(step.samples)
    assert back.verdicts == step.verdicts
    for key, sample in step.samples.items():
        for field in dataclasses.fields(sample):
            np.testing.assert_array_equal(getattr(back.samples[key], field.name), getattr(sample, field.name))


STANDS = {
    "inside the first round": lambda step: step.samples and not step.verdicts,
    "between rounds": lambda step: step.verdicts and len(step.samples) == len(step.verdicts) == 12,
    "inside a later round": lambda step: step.verdicts and len(step.samples) > len(step.verdicts),
}


@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=pytest.mark.slow) if "first" in place else place for place in STANDS]
)
def test_a_run_stopped_in_its_rounds_ends_with_the_same_bits(uninterrupted, tmp_path, monkeypatch, place):
    whole, _ = uninterrupted
    config = dataclasses.replace(whole, runs_dir=str(tmp_path / "runs"))
    original = loop.run
    stopped = []

    def stopping_run(stages, state, progress, world, cadence):
        def should_stop():
            step = progress.open_step
            if not stopped and progress.step == 1 and step is not None and STANDS[place](step):
                stopped.append(len(step.samples))
                return True
            return False

        return original(stages, state, progress, dataclasses.replace(world, should_stop=should_stop), cadence)

    monkeypatch.setattr("hptjax.build.run.run", stopping_run)
    with pytest.raises(SystemExit):
        build_run.train(config, quiet=True)
    assert stopped
    monkeypatch.setattr("hptjax.build.run.run", original)
    build_run.train(config, quiet=True)
    same_run(whole, config)
