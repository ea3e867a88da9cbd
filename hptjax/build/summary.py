"""What a finished run amounts to: base against final with intervals, the gate's share, speed, the witness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hptjax.build.evaluation import counts_path, estimate_json, read_counts
from hptjax.diagnostics.intervals import paired_difference
from hptjax.diagnostics.passk import estimate_pass_at_k, pass_at_k
from hptjax.masked import mean, ratio
from hptjax.train.jsonl import plain_value, read_rows

SHARE_STEPS = 10  # the SFT share is shown over the first and the last so many steps
PHASES = {  # phase -> its tokens, and the metrics whose seconds it took
    "rollout": ("perf/generated_tokens", ("timing_s/rollout", "perf/rollout_ahead_s")),
    "update": ("perf/trained_tokens", ("timing_s/update",)),
}


def summarise(folder: Path, *, seconds: float, ks: tuple[int, ...]) -> dict[str, Any]:
    """The summary of a run folder whose run has ended, from its files alone; None where nothing was counted.

    Args
      seconds: wall time over all processes that worked on the run. ks: the k of pass@k.
    """
    rows = read_rows(folder / "metrics.jsonl")
    ledger = read_rows(folder / "ledger.jsonl")
    steps = [row for row in rows if "witness/ok" in row]
    last = max(row["step"] for row in rows)
    shares = [row["hpt/gate_sft_frac"] for row in steps]
    summary = {
        "base": _figures(folder, 0, ks),
        "final": _figures(folder, last, ks),
        "change": {
            f"pass@{k}": estimate_json(
                paired_difference(
                    pass_at_k(*read_counts(folder, "test", 0), k),
                    pass_at_k(*read_counts(folder, "test", last), k),
                    samples=read_counts(folder, "test", last)[1],
                )
            )
            for k in ks
        },
        "sft_share": {
            "first": mean(np.asarray(shares[:SHARE_STEPS])),
            "last": mean(np.asarray(shares[-SHARE_STEPS:])),
        },
        "all_fail": {name: _all_fail(folder, step) for name, step in (("base", 0), ("final", last))},
        "tokens_per_s": {
            phase: ratio(
                sum(row.get(tokens, 0) for row in steps), sum(row.get(name, 0.0) for row in steps for name in times)
            )
            for phase, (tokens, times) in PHASES.items()
        },
        "witness_ok": bool(ledger) and all(row["witness_ok"] for row in ledger),
        "updates": len(ledger),
        "applied": sum(row["status"] == "updated" for row in ledger),
        "steps": last,
        "seconds": seconds,
        "folder": str(folder),
    }
    return plain_value(summary, "", [])


def _figures(folder: Path, step: int, ks: tuple[int, ...]) -> dict[str, Any]:
    """pass@k on test questions, and pass@1 on the training questions measured beside them."""
    solved, samples = read_counts(folder, "test", step)
    figures = {f"pass@{k}": estimate_json(estimate_pass_at_k(solved, samples, k)) for k in ks}
    if counts_path(folder, "train", step).exists():
        figures["train_pass@1"] = estimate_json(estimate_pass_at_k(*read_counts(folder, "train", step), 1))
    return figures


def _all_fail(folder: Path, step: int) -> float:
    solved, _ = read_counts(folder, "test", step)
    return ratio(int(np.sum(solved == 0)), solved.size)


def summary_table(summary: dict[str, Any]) -> str:
    """The summary for a person, and where to look further."""
    names = [name for name in summary["base"] if name in summary["final"]]
    lines = [f"{'':14s}{'base':>22s}{'final':>22s}{'change':>22s}   (%, 95 % interval)"]
    for name in names:
        cells = [summary["base"][name], summary["final"][name], summary["change"].get(name)]
        lines.append(f"{name:14s}" + "".join(f"{_interval(cell):>22s}" for cell in cells))
    share, speed = summary["sft_share"], summary["tokens_per_s"]
    fail = summary["all_fail"]
    idle = summary["updates"] - summary.get("applied", summary["updates"])
    witness = (
        f"every micro-batch of {summary['updates']} updates once in its sum" if summary["witness_ok"] else "FAILED"
    )
    lines += [
        f"none solved   {100 * fail['base']:.1f} % of test questions -> {100 * fail['final']:.1f} %",
        f"SFT share     {100 * share['first']:.1f} % of questions over the first {SHARE_STEPS} steps -> "
        f"{100 * share['last']:.1f} % over the last {SHARE_STEPS}",
        "tokens/s      " + ", ".join(f"{name} {rate:,.0f}" for name, rate in speed.items() if rate is not None),
        f"witness       {witness}",
        *([f"not applied   {idle} updates: empty, not finite or above optimizer.skip_norm"] if idle else []),
        f"time          {summary['seconds']:.0f} s for {summary['steps']} steps",
        f"written to    {summary['folder']}: summary.json, metrics.jsonl, ledger.jsonl",
    ]
    folder = Path(summary["folder"])
    plots = [str(folder / "plot.png")] if (folder / "plot.png").exists() else []
    plots += [f"tensorboard --logdir {folder / 'tensorboard'}"] if (folder / "tensorboard").exists() else []
    return "\n".join([*lines, *([f"plots         {', or '.join(plots)}"] if plots else [])])


def _interval(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return ""
    low, high = figure["ci95"]
    return f"{100 * figure['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
