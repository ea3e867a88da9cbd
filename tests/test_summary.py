"""The summary of a run, from files written by hand."""

from __future__ import annotations

import json
from pathlib import Path

from hptjax.build.summary import summarise, summary_table
from hptjax.rundir import write_json


def run_folder(folder: Path, statuses: list[str], **metrics: float) -> Path:
    """A finished run of a step per status: one test question, one sample, solved at the end."""
    step = {"witness/ok": 1, "hpt/gate_sft_frac": 1.0, "perf/trained_tokens": 10, "timing_s/update": 2.0, **metrics}
    rows = [{"step": 0}, *({"step": place, **step} for place in range(1, len(statuses) + 1))]
    ledger = [{"step": place, "status": status, "witness_ok": True} for place, status in enumerate(statuses, start=1)]
    (folder / "evaluations").mkdir(parents=True)
    for name, entries in (("metrics", rows), ("ledger", ledger)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    for place, solved in ((0, 0), (len(statuses), 1)):
        write_json(folder / "evaluations" / f"test_{place:06d}.json", {"samples": 1, "solved": [solved]})
    return folder


def test_summary_holds_json_values_where_nothing_was_counted(tmp_path):
    """SFT samples nothing, so it has no tokens per second of rollouts; one question has no standard error."""
    summary = summarise(run_folder(tmp_path / "run", ["updated"]), seconds=1.0, ks=(1,))
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["tokens_per_s"] == {"rollout": None, "update": 5.0}
    assert summary["final"]["pass@1"]["se"] is None
    assert "tokens/s      update 5\n" in summary_table(summary)


def test_summary_says_which_updates_were_not_applied(tmp_path):
    """A witness that is right says nothing of an update that was left out."""
    rollout = {"perf/generated_tokens": 6, "timing_s/rollout": 2.0}
    folder = run_folder(tmp_path / "run", ["updated", "norm_skipped", "empty"], **rollout)
    summary = summarise(folder, seconds=1.0, ks=(1,))
    assert (summary["updates"], summary["applied"]) == (3, 1)
    assert "not applied   2 updates" in summary_table(summary)
    whole = summarise(run_folder(tmp_path / "whole", ["updated"] * 3, **rollout), seconds=1.0, ks=(1,))
    assert "not applied" not in summary_table(whole)
