"""The plot of the suite: a panel for each series, time and memory against what grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hptjax.bench.record import Record
from hptjax.bench.series import MEMORY, SERIES, Series
from hptjax.bench.table import points_of, x_of, y_of

COLUMNS = 3
ROOM = 1.8  # of the memory's axis over its largest value: the legend stands there


def plot_growth(records: Sequence[Record], path: Path) -> None:
    """Draws a PNG: both axes logarithmic, bars from least to largest, grey what a straight proportion would be."""
    from matplotlib.figure import Figure

    rows = -(-len(SERIES) // COLUMNS)
    figure = Figure(figsize=(4.4 * COLUMNS, 3.3 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False)
    for ax, series in zip(axes.flat, SERIES, strict=False):
        _draw(ax, series, points_of(series, records))
    half = path.with_name(path.name + ".part")
    figure.savefig(half, dpi=80, format="png", metadata={"Software": None})
    half.replace(path)


def _draw(ax: Any, series: Series, points: Sequence[Record]) -> None:
    ax.set_title(series.title, fontsize=10)
    ax.set_xlabel(series.axis)
    if not points:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="grey")
        return
    seconds = {name: label for name, label in series.figures.items() if label.endswith(", s")}
    for place, (name, label) in enumerate(seconds.items()):
        shown = [(x_of(series, one), one["figures"][name]) for one in points if name in one["figures"]]
        xs, medians = [x for x, _ in shown], [one["median"] for _, one in shown]
        bars = [[one["median"] - one["min"] for _, one in shown], [one["max"] - one["median"] for _, one in shown]]
        ax.errorbar(xs, medians, bars, color=f"C{place}", marker=".", capsize=3, lw=1.2, label=label)
        if place == 0 and len(xs) > 1:
            ax.plot(xs, [medians[-1] * x / xs[-1] for x in xs], color="0.75", lw=1, zorder=0, label="in proportion")
    ax.set(xscale="log", yscale="log", ylabel="seconds")
    xs = [x_of(series, one) for one in points]
    ax.set_xticks(xs, [f"{x:,.0f}" if x < 10_000 else f"{x / 1e6:.2g} M" for x in xs])
    ax.xaxis.set_minor_locator(_no_ticks())
    memory = ax.twinx()
    peaks = [y_of(one, MEMORY) or 0.0 for one in points]
    memory.plot(xs, peaks, color="tab:red", ls=":", marker="x", ms=4, label="memory")
    memory.set_ylabel("peak MiB", color="tab:red")
    memory.set_ylim(0, ROOM * max(peaks))
    memory.tick_params(axis="y", labelcolor="tab:red")
    ax.legend(fontsize=7, loc="upper left")


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()
