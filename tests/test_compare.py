"""A comparison at the smallest size: equal budgets, a whole table, and nothing that is finished runs again."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import hptjax.build.parts as build_parts
from hptjax import build, compare
from hptjax.compare.__main__ import main, recomputed
from hptjax.compare.spent import AXES
from hptjax.train.jsonl import read_rows
from tests import tiny
from tests.test_config import changed

ARMS = ("hpt", "sft", "dr_grpo", "sft_then_rl")


@dataclasses.dataclass(frozen=True)
class Compared:
    """A comparison that was stopped before its third arm and then continued."""

    root: object
    report: dict
    finished_before: dict  # file -> (bytes, time of its last change) when it was stopped
    started: list


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    config = changed(tiny.tiny_config(folder), train__steps=2, checkpoint__every_steps=50)
    root = folder / "runs" / "tiny-compare"
    started: list[str] = []
    train = build.train

    def stopped_at_grpo(arm_config, **options):
        if arm_config.name.startswith("dr_grpo"):
            raise SystemExit(0)
        return train(arm_config, **options)

    def noted(arm_config, **options):
        if not (root / arm_config.name / "summary.json").exists():
            started.append(arm_config.name)
        return train(arm_config, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_parts, "build_judge", tiny.hash_judge)
        patch.setattr(build, "train", stopped_at_grpo)
        with pytest.raises(KeyboardInterrupt):
            compare.compare(config, arms=ARMS, seeds=1)
        before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in root.glob("*/*.json*")}
        patch.setattr(build, "train", noted)
        report = compare.compare(config, arms=ARMS, seeds=1)
    return Compared(root, report, before, started)


def spent_by_rows(folder):
    """Cumulative updates and tokens after each step, added up row by row."""
    totals = [{"updates": 0.0, "tokens": 0.0}]
    for row in read_rows(folder / "metrics.jsonl"):
        if "witness/ok" in row:
            now = dict(totals[-1])
            now["updates"] += row["train/updates"]
            now["tokens"] += row["perf/generated_tokens"] + row["perf/trained_tokens"]
            totals.append(now)
    return totals


@pytest.mark.slow
def test_compare_continued_runs_nothing_twice(compared):
    assert {path.parent.name for path in compared.finished_before} == {"hpt-seed0", "sft-seed0"}
    for path, (content, changed_at) in compared.finished_before.items():
        assert (path.read_bytes(), path.stat().st_mtime_ns) == (content, changed_at)
    assert compared.started == ["dr_grpo-seed0", "sft_then_rl-seed0"]


def test_compare_table_has_every_arm_on_every_axis(compared):
    table = (compared.root / "table.md").read_text()
    said, settings, budgets, questions = table.split("\n\n", 3)
    assert said.splitlines()[0].startswith("Said before the runs: pass@1 at equal flops, minus hpt, over 1 seeds")
    assert [line.split(":")[0] for line in said.splitlines()[1:]] == [f"- {arm}" for arm in ARMS[1:]]
    assert settings.startswith("Learning rates (SFT before it as a share of the arm's steps): hpt 0.001, sft 0.001, ")
    assert "sft_then_rl 0.001 after SFT of 0.5. 4 runs, " in settings
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in budgets.splitlines()[2:]]
    assert rows == [["-", "base"]] + [[axis, arm] for axis in AXES for arm in ARMS]
    assert len({line.count("|") for line in budgets.splitlines()}) == 1
    assert all(questions.count(f"| {arm} |") == 2 for arm in ARMS)
    assert (compared.root / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((compared.root / "compare.json").read_text()) == json.loads(json.dumps(compared.report))


def test_compare_respects_the_budgets_of_the_first_arm(compared):
    first = spent_by_rows(compared.root / "hpt-seed0")[-1]
    for axis in ("updates", "tokens"):
        for arm in ARMS:
            totals = [entry[axis] for entry in spent_by_rows(compared.root / f"{arm}-seed0")]
            (step,) = compared.report["figures"][axis][arm]["steps"]
            whole, share = int(step), step - int(step)
            spent = totals[whole] + (share * (totals[whole + 1] - totals[whole]) if share else 0.0)
            assert spent <= first[axis] * (1 + 1e-9)
            # equal, unless the run ended before it had spent as much
            assert spent == pytest.approx(min(first[axis], totals[-1]), rel=1e-9)


def test_compare_sft_runs_until_it_has_spent_every_budget(compared):
    spent = compared.report["spent"]
    for axis in AXES:
        assert spent["sft-seed0"][axis] >= 0.9 * spent["hpt-seed0"][axis]  # planned from mean lengths
    assert spent["sft-seed0"]["updates"] > spent["hpt-seed0"]["updates"]


def test_compare_figures_are_those_of_the_evaluations(compared):
    """At the end of a run nothing is between two evaluations: the share of solved samples, counted."""
    counts = json.loads((compared.root / "hpt-seed0" / "evaluations" / "test_000002.json").read_text())
    figure = compared.report["figures"]["updates"]["hpt"]["pass@1"]
    assert figure["value"] == pytest.approx(sum(counts["solved"]) / (len(counts["solved"]) * counts["samples"]))
    assert compared.report["figures"]["updates"]["hpt"]["pass@1"]["minus_first"] == 0.0


def test_compare_every_arm_starts_from_the_same_base(compared):
    bases = [
        json.loads((compared.root / f"{arm}-seed0" / "evaluations" / "test_000000.json").read_text()) for arm in ARMS
    ]
    assert all(base == bases[0] for base in bases)
    assert np.sum(bases[0]["solved"]) > 0


def test_compare_arms_differ_in_method_only(compared):
    configs = {arm: json.loads((compared.root / f"{arm}-seed0" / "config.json").read_text()) for arm in ARMS}
    assert [configs[arm]["method"] for arm in ARMS] == ["hpt", "sft", "dr_grpo", "dr_grpo"]
    assert [stage["method"] for stage in configs["sft_then_rl"]["stages"]] == ["sft"]
    for section in ("seed", "model", "task", "data", "rollout", "hpt", "batch", "optimizer"):
        assert all(configs[arm][section] == configs["hpt"][section] for arm in ARMS)


def test_compare_refuses_an_unknown_arm(tmp_path):
    with pytest.raises(ValueError, match=r"got ddpo; change --arms"):
        compare.compare(tiny.tiny_config(tmp_path), arms=("hpt", "ddpo"), seeds=1)


def test_compare_tables_are_recomputed_from_the_counts_of_the_runs(compared, capsys):
    """From the folder with everything read anew; from the JSON alone as it is written there."""
    assert recomputed(compared.root) == compared.report
    table = (compared.root / "table.md").read_text()
    for path in (compared.root, compared.root / "compare.json"):
        assert main([str(path)]) == 0
        assert capsys.readouterr().out == table
    assert main([str(compared.root / "nothing")]) == 2
    assert "expected the folder of a comparison" in capsys.readouterr().err
