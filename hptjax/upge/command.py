"""`hptjax upge`: a saved batch and a checkpoint in; a table, a JSON file and a picture out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from hptjax.build.method import options
from hptjax.build.parts import open_parts
from hptjax.build.weights import load_weights
from hptjax.config import Config
from hptjax.masked import mean
from hptjax.rundir import write_json
from hptjax.upge.batch import draws_of, load, sampled, save
from hptjax.upge.measure import measure
from hptjax.upge.rows import measured_rows
from hptjax.upge.toy import PROVIDED, biases

TOY_SEEDS = 20
DRIFTS = (0.0, 0.3, 1.0)


def upge_command(
    config: Config,
    *,
    batch: Path,
    checkpoint: str,
    sampler: str,
    questions: int,
    draws: int,
    json: Path | None,
    plot: Path | None,
) -> int:
    """Measures every row and prints what it found.

    Args
      batch: recorded rollouts; sampled and written there if the file does not exist.
      checkpoint: at which gradients are taken: "base", "last" or "best". sampler: likewise, who samples a new batch.
      questions: of the training split, in a new batch. draws: groups of each.
    Raises fewer than 1 question or 2 draws, a batch of another run -> ValueError.
    """
    if questions < 1 or draws < 2:
        raise ValueError(
            f"expected at least 1 question and 2 draws, got {questions} and {draws}; change --questions or --draws"
        )
    with open_parts(config) as parts:
        if not batch.exists():
            steps = sampled(parts, load_weights(parts, sampler), parts.questions.train[:questions], draws)
            save(batch, parts, sampler, steps)
        sampled_by, steps = load(batch, parts)
        found = measure(parts, load_weights(parts, checkpoint), load_weights(parts, sampled_by), draws_of(parts, steps))
    toy = biases(measured_rows(options(config), PROVIDED), seeds=TOY_SEEDS, drifts=DRIFTS)
    report = {
        "batch": {"sampler": sampled_by, "questions": len(steps[0].questions), "draws": len(steps)},
        "checkpoint": checkpoint,
        "rows": found,
        "toy": {
            row: {
                drift: {
                    "bias": mean(np.asarray([each.bias for each in of_seeds])),
                    "cosine": mean(np.asarray([each.cosine for each in of_seeds])),
                    "masked_frac": mean(np.asarray([each.masked_frac for each in of_seeds])),
                }
                for drift, of_seeds in by_drift.items()
            }
            for row, by_drift in toy.items()
        },
    }
    if json is not None:
        write_json(json, report)
    print_report(report)
    if plot is not None:
        draw(report, plot)
        print(f"picture: {plot}")
    return 0


def print_report(report: Mapping[str, Any]) -> None:
    """The two tables."""
    console = Console(width=140)
    batch = report["batch"]
    measured = Table(
        title=f"{batch['questions']} questions x {batch['draws']} groups sampled by {batch['sampler']}, gradients at "
        f"{report['checkpoint']}",
        title_justify="left",
    )
    for name in (
        "row",
        "norm",
        "cos SFT",
        "cos RLOO",
        "variance / norm^2",
        "masked",
        "weight 5 %",
        "50 %",
        "95 %",
        "largest",
        "effective",
    ):
        measured.add_column(name, justify="left" if name == "row" else "right")
    for name, row in report["rows"].items():
        weights = [number(row["weights"].get(q)) for q in ("0.05", "0.5", "0.95", "1")]
        measured.add_row(
            name,
            number(row["grad_norm"]),
            number(row["cos_sft"]),
            number(row["cos_rl"]),
            number(row["relative_variance"]),
            f"{100 * row['masked_frac']:.1f} %",
            *weights,
            number(row["effective_frac"]),
        )
    console.print(measured)
    drifts = list(next(iter(report["toy"].values())))
    known = Table(
        title="Bias of the direction on the toy, by enumeration (0: exact, 1: nothing of it); mean of "
        f"{TOY_SEEDS} toys, by the policy's drift since it sampled",
        title_justify="left",
    )
    for name in ("row", *(f"drift {drift}" for drift in drifts), *(f"masked at {drift}" for drift in drifts)):
        known.add_column(name, justify="left" if name == "row" else "right")
    for name, by_drift in report["toy"].items():
        known.add_row(
            name,
            *(f"{by_drift[drift]['bias']:.3f}" for drift in drifts),
            *(f"{100 * by_drift[drift]['masked_frac']:.1f} %" for drift in drifts),
        )
    console.print(known)


def number(value: float | None) -> str:
    """Three significant digits; a dash for what is not there."""
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """The bias-variance picture: every row's spread on the recorded batch against its bias on the toy."""
    from matplotlib.figure import Figure

    drift = list(next(iter(report["toy"].values())))[1]
    shown = _points(report, drift)
    figure = Figure(figsize=(7, 5))
    axes = figure.subplots()
    for place, (name, bias, variance) in enumerate(shown, 1):
        axes.scatter([bias], [variance], marker=f"${place}$", color=f"C{place % 10}", s=50, label=name)
    axes.set(
        xlabel=f"bias of the direction, toy at drift {drift}, by enumeration",
        ylabel="variance over resampled groups / norm^2, measured",
        yscale="symlog",
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _points(report: Mapping[str, Any], drift: str) -> Sequence[tuple[str, float, float]]:
    return [
        (name, report["toy"][name][drift]["bias"], row["relative_variance"])
        for name, row in report["rows"].items()
        if name in report["toy"] and not math.isnan(row["relative_variance"])
    ]
