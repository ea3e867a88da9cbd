"""Every method trains on the quickstart's model and task, by the example that `hptjax methods NAME --toml` prints."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

from hptjax.build.run import train
from hptjax.config_check import check
from hptjax.config_load import read_file
from hptjax.methods_text import all_names, toml
from hptjax.train.jsonl import read_rows

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS = 5


def shortened(config, folder):
    """The example with fewer questions and hardly an evaluation: model, task, group size and limits are its own."""
    changes = {
        "data": {"train_questions": 200, "validation_questions": 8, "test_questions": 8, "questions_per_step": 16},
        "rollout": {"slots": 128},
        "batch": {"rows": 16, "max_micro_batches": 16},
        "train": {"steps": STEPS, "eval_every": 0, "probe_every": 0, "rollouts_every": 0, "panel_questions": 0},
        "eval": {"questions": 8, "samples_per_question": 1, "train_questions": 0, "ks": (1,)},
        "checkpoint": {"every_steps": 100},
        "methods": {"relift_buffer": 4},  # so that the second optimizer has its turn
        "telemetry": {"tensorboard": False, "progress": False, "plot": False},
    }
    config = dataclasses.replace(config, runs_dir=str(folder / "runs"))
    for section, fields in changes.items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})
    return config


@pytest.mark.slow
@pytest.mark.parametrize("name", all_names())
def test_method_trains_five_steps_of_the_quickstart(name, tmp_path, monkeypatch):
    """All names in one process."""
    monkeypatch.chdir(ROOT)  # the example names folders from the repository's root
    path = tmp_path / f"{name}.toml"
    path.write_text(toml(name))
    config = shortened(read_file(path), tmp_path)
    check(config)
    summary = train(config, quiet=True)
    rows = [row for row in read_rows(tmp_path / "runs" / config.name / "metrics.jsonl") if "witness/ok" in row]
    assert len(rows) == summary["steps"] == STEPS
    assert summary["witness_ok"]
    assert summary["applied"] >= STEPS - 1  # a step may leave nothing to learn from
    assert all(row["actor/grad_norm"] > 0 for row in rows if "actor/grad_norm" in row)
