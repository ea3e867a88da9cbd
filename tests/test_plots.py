"""plot.png: drawn from whatever a run has measured, at the end of every run, and never able to fail one."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import hptjax.build.run as build_run
from hptjax.build.plots import plot_run, running_mean, series
from tests import tiny
from tests.test_config import changed


def step_row(step, *, stage=0, rollouts=True):
    row = {"step": step, "train/stage": stage, "witness/ok": 1, "sft/loss": 1.0 / step, "actor/grad_norm": 10.0**-step}
    row |= {"hpt/gate_sft_frac": 0.5, "timing_s/update": 1.0, "timing_s/assemble": 0.1}
    if rollouts:
        row |= {
            "critic/score/mean": 0.1 * step,
            "hpt/rate_hist_0": 3.0,
            "hpt/rate_hist_1": 1.0,
            "timing_s/rollout": 2.0,
        }
    return row


def evaluation_row(step, *, test=False):
    row = {"step": step, "validation/solve_none": 0.5, "probe/heldout_demo_nll": 0.3}
    for split in ["validation", "test"] if test else ["validation"]:
        row |= {f"{split}/pass@1": 0.2, f"{split}/pass@1_low": 0.1, f"{split}/pass@1_high": 0.4}
    return row


ROWS = {
    "nothing": [],
    "only the first evaluation": [evaluation_row(0, test=True)],
    "sft then rl": [
        evaluation_row(0, test=True),
        *(step_row(step, rollouts=False) for step in (1, 2)),
        *(step_row(step, stage=1) for step in (3, 4)),
        evaluation_row(4, test=True),
    ],
    "values that were not finite": [step_row(1) | {"sft/loss": None, "critic/score/mean": None, "nonfinite": []}],
    "long": [step_row(step) for step in range(1, 60)],
}


@pytest.mark.parametrize("rows", list(ROWS.values()), ids=list(ROWS))
def test_plot_of_any_metrics_is_one_picture(tmp_path, rows):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = plot_run(tmp_path, ks=(1, 8), title="a run")
    assert path == tmp_path / "plot.png"
    picture = matplotlib.image.imread(path)
    assert picture.shape[0] > 800
    assert np.ptp(picture[..., :3]) > 0.9
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".part"] == []


def test_plot_series_leaves_out_what_was_not_finite():
    x, y = series([{"step": 1, "a": 2.0}, {"step": 2, "a": None}, {"step": 3}, {"step": 4, "a": 5.0}], "a")
    assert (x.tolist(), y.tolist()) == ([1, 4], [2.0, 5.0])


def test_plot_running_mean_by_hand():
    assert running_mean(np.array([2.0, 4.0, 9.0, 3.0]), 2).tolist() == [2.0, 3.0, 6.5, 6.0]


def test_plot_is_drawn_at_the_end_of_a_run_and_cannot_fail_it(tmp_path, monkeypatch, capsys):
    config = changed(tiny.tiny_config(tmp_path), train__steps=1, telemetry__plot=True, eval__train_questions=0)
    summary = tiny.train(config)
    plot = Path(summary["folder"]) / "plot.png"
    assert plot.exists()

    def broken(*arguments, **options):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(build_run, "plot_run", broken)
    plot.unlink()
    (plot.parent / "summary.json").unlink()  # as if killed before the end; the same command resumes
    again = tiny.train(config)
    assert again["final"] == summary["final"]
    assert "plot.png could not be drawn: RuntimeError: no fonts" in capsys.readouterr().err
    monkeypatch.undo()
    (plot.parent / "summary.json").unlink()
    tiny.train(config)
    assert plot.exists()
