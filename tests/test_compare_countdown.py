"""The comparison that `make compare` runs, small: the shipped config with its ten arms, two seeds, stopped once."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

from hptjax import build, compare
from hptjax.compare.__main__ import recomputed
from hptjax.config_load import read_file
from hptjax.train.jsonl import read_rows
from tests.test_config import changed

ROOT = pathlib.Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "configs" / "compare_countdown.toml"
ARMS = "hpt hpt_gate1 hpt_gate2 random_gate sft dr_grpo sft_then_rl luffy srft trapo".split()
STEPS = 3


def small(folder):
    """Few questions, few steps, and only one arm that has something to choose; all else as it is published."""
    config = read_file(PUBLISHED)
    arms = [
        dataclasses.replace(arm, learning_rate=arm.learning_rate if arm.name == "luffy" else arm.learning_rate[:1])
        for arm in config.compare.arms
    ]
    arms = [dataclasses.replace(arm, sft_share=arm.sft_share[-1:]) for arm in arms]
    return changed(
        dataclasses.replace(config, runs_dir=str(folder)),
        data__train_questions=80,
        data__validation_questions=8,
        data__test_questions=8,
        data__questions_per_step=8,
        rollout__slots=64,
        batch__max_micro_batches=8,
        train__steps=STEPS,
        eval__questions=8,
        eval__samples_per_question=2,
        eval__ks=(1, 2),
        compare__arms=tuple(arms),
        compare__seeds=2,
    )


def test_published_comparison_is_the_one_that_was_announced():
    """Its arms, seeds and the figure that counts; a change here is a change of what was said beforehand."""
    config = read_file(PUBLISHED)
    assert [arm.name for arm in config.compare.arms] == ARMS
    assert [arm.gate for arm in config.compare.arms][:3] == [None, 1, 2]
    assert config.hpt.gate == 0
    assert (config.compare.seeds, config.compare.metric, config.compare.axis) == (5, "pass@1", "flops")
    assert (config.task.numbers, config.task.numbers_to) == (3, 4)
    assert config.task.instances >= 20_000
    assert len(next(arm for arm in config.compare.arms if arm.name == "sft_then_rl").sft_share) > 1


@pytest.mark.slow
def test_compare_of_ten_arms_with_two_seeds_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the config names the base model from the repository's root
    config, train, started = small(tmp_path), build.train, []

    def stopped(made, **options):
        if made.name == "srft-seed0":
            raise SystemExit(0)
        return train(made, **options)

    def noted(made, **options):
        if not (pathlib.Path(made.runs_dir) / made.name / "summary.json").exists():
            started.append(made.name)
        return train(made, **options)

    with monkeypatch.context() as patch:
        patch.setattr(build, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            compare.compare(config)
    monkeypatch.setattr(build, "train", noted)
    report = compare.compare(config)
    assert started == [f"{arm}-seed0" for arm in ARMS[-2:]] + [f"{arm}-seed1" for arm in ARMS]
    root = tmp_path / "compare_countdown-compare"
    assert recomputed(root) == report
    assert set(report["figures"]["flops"]) == set(ARMS)
    assert report["seeds"] == [0, 1]
    for name in report["spent"]:
        rows = [row for row in read_rows(root / name / "metrics.jsonl") if "witness/ok" in row]
        assert all(row["witness/ok"] == 1 for row in rows)
        assert len(rows) >= STEPS
    for arm in ARMS[1:]:
        low, high = report["figures"]["flops"][arm]["pass@1"]["minus_first_ci95"]
        assert low <= report["figures"]["flops"][arm]["pass@1"]["minus_first"] <= high
