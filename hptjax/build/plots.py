"""plot.png of a run folder: what a person wants to see of a run at one glance, drawn from its files alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hptjax.masked import mean
from hptjax.train.jsonl import read_rows

Rows = Sequence[Mapping[str, Any]]

SMOOTHED_FROM, WINDOWS = 40, 20  # a run of so many steps or more gets running means over a twentieth of it
SHOWN_PHASES = 6
PASS_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def plot_run(folder: Path, *, ks: Sequence[int], title: str) -> Path:
    """Draws `plot.png` from metrics.jsonl and returns its path; an earlier plot is replaced whole.

    Args
      ks: the k of pass@k that were evaluated.
    """
    from matplotlib.figure import Figure  # without pyplot: no state shared with a notebook's own figures

    rows = read_rows(folder / "metrics.jsonl")
    steps = [row for row in rows if "witness/ok" in row]
    evaluations = [row for row in rows if "validation/solve_none" in row]
    figure = Figure(figsize=(13, 12), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(3, 2)
    _draw_reward(axes[0][0], steps)
    _draw_pass(axes[0][1], evaluations, ks)
    _draw_losses(axes[1][0], steps, evaluations)
    _draw_gradient(axes[1][1], steps)
    _draw_solved(axes[2][0], steps)
    _draw_time(axes[2][1], steps)
    last = max([row["step"] for row in rows], default=0)
    for ax in axes.flat:
        _mark_stages(ax, steps)
        ax.set_xlabel("step")
        ax.set_xlim(0, max(last, 1) + 0.5)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.25)
    path = folder / "plot.png"
    half = path.with_name(path.name + ".part")
    figure.savefig(half, dpi=100, format="png")
    half.replace(path)
    return path


def series(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a metric where it was measured and finite."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return np.asarray([step for step, _ in points]), np.asarray([value for _, value in points], np.float64)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and up to `window - 1` values before it."""
    return np.asarray([mean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)])


def _line(ax: Any, rows: Rows, name: str, label: str, colour: str, *, scale: float = 1.0) -> None:
    """A metric against the step; faint under its running mean where the run is long."""
    x, y = series(rows, name)
    if not len(x):
        return
    y = scale * y
    if len(x) < SMOOTHED_FROM:
        ax.plot(x, y, color=colour, label=label, marker=".", ms=4, lw=1.4)
        return
    ax.plot(x, y, color=colour, alpha=0.25, lw=0.8)
    ax.plot(x, running_mean(y, len(x) // WINDOWS), color=colour, label=label, lw=1.6)


def _finish(ax: Any, title: str, ylabel: str, *, legend: bool = True) -> None:
    ax.set_title(title, fontsize=10)
    ax.set_ylabel(ylabel)
    handles, _ = ax.get_legend_handles_labels()
    if not handles:
        ax.text(0.5, 0.5, "not measured in this run", transform=ax.transAxes, ha="center", color="grey")
    elif legend:
        ax.legend(fontsize=8)


def _draw_reward(ax: Any, steps: Rows) -> None:
    _line(ax, steps, "critic/score/mean", "reward of rollouts, mean", "tab:blue", scale=100.0)
    _line(ax, steps, "hpt/gate_sft_frac", "questions sent to SFT by the gate", "tab:orange", scale=100.0)
    ax.set_ylim(0, 102)
    _finish(ax, "Reward and SFT share on training questions", "%")


def _draw_pass(ax: Any, evaluations: Rows, ks: Sequence[int]) -> None:
    """Validation as a line in its band, test as marks with error bars, both with 95 % intervals."""
    for colour, k in zip(PASS_COLOURS, ks, strict=False):
        name = f"validation/pass@{k}"
        x, y = series(evaluations, name)
        (_, low), (_, high) = series(evaluations, f"{name}_low"), series(evaluations, f"{name}_high")
        ax.plot(x, 100 * y, color=colour, marker=".", label=f"validation pass@{k}")
        if len(low) == len(x) == len(high):
            ax.fill_between(x, 100 * low, 100 * high, color=colour, alpha=0.15, lw=0)
        name = f"test/pass@{k}"
        x, y = series(evaluations, name)
        (_, low), (_, high) = series(evaluations, f"{name}_low"), series(evaluations, f"{name}_high")
        if len(x) and len(low) == len(x) == len(high):
            bars = 100 * np.stack([np.maximum(y - low, 0), np.maximum(high - y, 0)])
            label = f"test pass@{k}"
            ax.errorbar(x, 100 * y, bars, color=colour, fmt="D", ms=5, capsize=4, label=label, clip_on=False, zorder=5)
    ax.set_ylim(bottom=0)
    _finish(ax, "Held-out questions, with 95 % intervals", "%")


def _draw_losses(ax: Any, steps: Rows, evaluations: Rows) -> None:
    _line(ax, steps, "sft/loss", "-log p of demonstrations that are trained", "tab:orange")
    _line(ax, steps, "actor/rollout_nll", "-log p of rollouts", "tab:blue")
    _line(ax, steps, "actor/entropy", "entropy of the policy", "tab:green")
    x, y = series(evaluations, "probe/heldout_demo_nll")
    if len(x):
        ax.plot(x, y, color="tab:red", marker="D", ms=4, label="-log p of held-out demonstrations")
    _finish(ax, "Losses", "nats per token")


def _draw_gradient(ax: Any, steps: Rows) -> None:
    _line(ax, steps, "actor/grad_norm", "whole update, before clipping", "black")
    _, norms = series(steps, "actor/grad_norm")
    for name, label, colour in (("sft", "SFT alone", "tab:orange"), ("rl", "RL alone", "tab:blue")):
        x, y = series(steps, f"grad/norm_{name}")
        if len(x):
            ax.plot(x, y, color=colour, marker="D", ls=":", ms=4, label=label)
    if len(norms) and norms.min() > 0 and norms.max() > 20 * norms.min():
        ax.set_yscale("log")
    _finish(ax, "Gradient norm", "norm")


def _draw_solved(ax: Any, steps: Rows) -> None:
    """Questions by how many of their rollouts are solved, as shares stacked from none to all."""
    from matplotlib import colormaps

    prefix = "hpt/rate_hist_"
    rolled = [row for row in steps if f"{prefix}0" in row]
    names = sorted(
        {name for row in rolled for name in row if name.startswith(prefix)}, key=lambda n: int(n[len(prefix) :])
    )
    if rolled:
        counts = np.asarray([[row.get(name) or 0.0 for name in names] for row in rolled], np.float64)  # [steps G+1]
        counts = _smooth_columns(counts)
        shares = np.stack([100 * row * (1 / max(float(row.sum()), 1.0)) for row in counts], axis=1)
        colours = ["0.75", *colormaps["viridis"](np.linspace(0.15, 0.95, max(len(names) - 1, 1)))]
        labels = [name[len(prefix) :] for name in names]
        ax.stackplot([row["step"] for row in rolled], shares, colors=colours[: len(names)], labels=labels, lw=0)
        handles, texts = ax.get_legend_handles_labels()
        ax.legend(
            handles[::-1],
            texts[::-1],
            title="solved",
            fontsize=7,
            title_fontsize=7,
            loc="center left",
            bbox_to_anchor=(1, 0.5),
        )
    ax.set_ylim(0, 100)
    _finish(ax, "Training questions by solved rollouts", "% of questions", legend=False)


def _smooth_columns(counts: np.ndarray) -> np.ndarray:
    if len(counts) < SMOOTHED_FROM:
        return counts
    return np.stack([running_mean(column, len(counts) // WINDOWS) for column in counts.T], axis=1)


def _draw_time(ax: Any, steps: Rows) -> None:
    """Seconds per step, stacked by phase. The axis fits the steps after the first, which also compiles."""
    prefix = "timing_s/"
    totals: dict[str, float] = {}
    for row in steps:
        for name, seconds in row.items():
            if name.startswith(prefix) and seconds is not None:
                totals[name] = totals.get(name, 0.0) + seconds
    shown = sorted(totals, key=totals.__getitem__, reverse=True)[:SHOWN_PHASES]
    if shown:
        x = [row["step"] for row in steps]
        heights = np.asarray([[row.get(name) or 0.0 for row in steps] for name in shown])
        labels = [f"{name[len(prefix) :]} ({totals[name]:,.0f} s in all)" for name in shown]
        for height, label, floor in zip(heights, labels, np.cumsum(heights, axis=0) - heights, strict=True):
            ax.bar(x, height, 1.0, floor, label=label, alpha=0.8)
        sums = heights.sum(axis=0)
        if len(sums) > 2:
            limit = 1.25 * float(np.sort(sums)[-max(2, len(sums) // 20)])
            ax.set_ylim(0, limit)
            if sums[0] > limit:
                box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8}
                note = f"step {x[0]}: {sums[0]:.0f} s, with compilation"
                ax.text(0.03, 0.95, note, transform=ax.transAxes, fontsize=8, va="top", bbox=box)
    _finish(ax, "Time per phase", "s per step")


def _mark_stages(ax: Any, steps: Rows) -> None:
    """A dotted line where one stage ends and the next begins."""
    for before, after in itertools.pairwise(steps):
        if before.get("train/stage") != after.get("train/stage"):
            ax.axvline(before["step"] + 0.5, color="grey", ls=":", lw=1)
