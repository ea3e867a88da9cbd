"""The plot of a comparison: pass@k against each budget, and against k at the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hptjax.build.evaluation import read_counts
from hptjax.compare.report import folders_of
from hptjax.compare.spent import AXES, evaluated_steps, read_spent
from hptjax.diagnostics.passk import pass_at_k
from hptjax.masked import mean


def plot(root: Path, report: Mapping[str, Any], path: Path) -> None:
    """pass@k for the smallest and the largest k against each budget, one thin line per seed, the arm's colour shared.

    The last column is the curve over all k after each run's last step.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    ks, arms = report["ks"], list(report["questions"])
    folders = folders_of(root, arms, report["seeds"])
    shown = sorted({ks[0], ks[-1]})
    figure = Figure(figsize=(4.2 * (len(AXES) + 1), 3.2 * len(shown)))
    axes = figure.subplots(len(shown), len(AXES) + 1, squeeze=False)
    colours = {arm: f"C{place}" for place, arm in enumerate(arms)}
    for (arm, _), folder in folders.items():
        spent, evaluated = read_spent(folder), evaluated_steps(folder)
        for row, k in enumerate(shown):
            heights = [100 * mean(pass_at_k(*read_counts(folder, "test", step), k)) for step in evaluated]
            for column, axis in enumerate(AXES):
                axes[row][column].plot(spent.on(axis)[evaluated], heights, color=colours[arm], alpha=0.8, lw=1.2)
                axes[row][column].set(xlabel=axis, ylabel=f"test pass@{k}, %")
        counts, samples = read_counts(folder, "test", evaluated[-1])
        reach = np.unique(np.geomspace(1, samples, 12).astype(int))
        curve = [100 * mean(pass_at_k(counts, samples, int(k))) for k in reach]
        axes[0][-1].plot(reach, curve, color=colours[arm], alpha=0.8, lw=1.2)
    axes[0][-1].set(xlabel="k", ylabel="test pass@k at the end, %", xscale="log")
    for row in axes[1:]:
        row[-1].set_axis_off()
    handles = [Line2D([], [], color=colours[arm], label=arm) for arm in arms]
    figure.legend(handles=handles, loc="upper center", ncols=min(len(arms), 6), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.savefig(path, dpi=120)
