"""The raw figures as Markdown: a table for each series, its fits beside what is expected, and what they come from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hptjax.bench.record import Record
from hptjax.bench.series import MEMORY, SERIES, Fit, Series
from hptjax.masked import ratio

NOT_MEASURED = "Not measured."


def points_of(series: Series, records: Sequence[Record]) -> list[Record]:
    """The points of a series, ascending."""
    return sorted((record for record in records if record["series"] == series.name), key=lambda one: one["point"])


def x_of(series: Series, record: Record) -> float:
    """Where a point stands on the axis of its series."""
    return float(record["point"] if series.counted is None else record["counts"][series.counted])


def y_of(record: Record, figure: str) -> float | None:
    """The median of a figure of a point, or its peak memory while it was timed; None where it has none."""
    if figure == MEMORY:
        return float(record["peak_mib"] if record["timed_peak_mib"] is None else record["timed_peak_mib"])
    return record["figures"][figure]["median"] if figure in record["figures"] else None


def fitted(series: Series, one: Fit, records: Sequence[Record]) -> tuple[str, float] | None:
    """(what it is about, the number); None where too little has been measured.

    Where there are fewer points than the fit would pass over, it takes the last two.
    """
    points = points_of(series, records)
    points = points[min(one.first, max(0, len(points) - 2)) :]
    values = [y_of(record, one.of) for record in points]
    ys = [value for value in values if value is not None]
    xs = [x_of(series, record) for record, value in zip(points, values, strict=True) if value is not None]
    try:
        number = one.how(xs, ys) * one.scale
    except (ValueError, IndexError):
        return None
    return one.what.format(first=f"{xs[0]:,.0f}", last=f"{xs[-1]:,.0f}"), number


def expected_words(one: Fit) -> str:
    """The range in which a number is expected."""
    return f"at least {one.low:g}" if math.isinf(one.high) else f"{one.low:g} to {one.high:g}"


def figure_words(figure: Mapping[str, Any]) -> str:
    """Median, and in brackets least and largest."""
    return f"{figure['median']:.3g} [{figure['min']:.3g}, {figure['max']:.3g}]"


def series_text(series: Series, records: Sequence[Record]) -> str:
    """The section of one series."""
    points = points_of(series, records)
    lines = [f"### {series.title}", "", f"Expected: {series.expected}", ""]
    if not points:
        return "\n".join([*lines, NOT_MEASURED])
    headings = [series.axis, *series.figures.values(), *([series.per] if series.per else [])]
    headings += ["peak memory while timed, MiB", "of the whole process, MiB"]
    lines += [_row(headings), "|---" * len(headings) + "|"]
    for record in points:
        x = x_of(series, record)
        cells = [f"{x:,.0f}"]
        cells += [figure_words(record["figures"][n]) if n in record["figures"] else "-" for n in series.figures]
        first = y_of(record, next(iter(series.figures)))
        cells += [f"{ratio(first or 0.0, x):.3g}"] if series.per else []
        timed = record["timed_peak_mib"]
        lines.append(_row([*cells, "-" if timed is None else f"{timed:.0f}", f"{record['peak_mib']:.0f}"]))
    lines += ["", _row(["fit", "measured", "expected", ""]), "|---|---|---|---|"]
    for one in series.fits:
        found = fitted(series, one, records)
        if found is not None:
            holds = one.low <= found[1] <= one.high
            lines.append(
                _row([found[0], f"{found[1]:.2f}", expected_words(one), "as expected" if holds else "**not**"])
            )
    return "\n".join(lines)


def tables(records: Sequence[Record], *, plot: str | None = None, source: str | None = None) -> str:
    """All sections, after a word on where, when and with what they were measured.

    Args
      plot: name of the picture beside the page. source: name of the file of raw figures.
    """
    if not records:
        return NOT_MEASURED
    head = [origin(records)]
    if source is not None:
        head.append(f"Raw figures: `{source}`.")
    if plot is not None:
        head.append(f"![What a step costs as the work grows]({plot})")
    return "\n\n".join([*head, *(series_text(series, records) for series in SERIES)])


def origin(records: Sequence[Record]) -> str:
    """Machine, versions, commits, days and noise, each once if all points share it."""

    def each(values: Sequence[str]) -> str:
        return " and ".join(dict.fromkeys(values))

    machines = each([f"{one['machine']['cores']} cores of {one['machine']['cpu']}" for one in records])
    devices = each([one["device"] for one in records])
    versions = each([", ".join(f"{name} {number}" for name, number in one["versions"].items()) for one in records])
    commits = each([_commit(one) for one in records])
    days = each(sorted(one["date"] for one in records))
    repeats = each([str(one["repeats"]) for one in records])
    other = max(one["other_cpu"] for one in records)
    return (
        f"{machines} (device: {devices}); {versions}; {commits}; {days}. Median [least, largest] of {repeats} repeats "
        f"after one that compiles; each point in a process of its own, with nothing compiled before. Other work took "
        f"at most {100 * other:.0f} % of the CPU meanwhile."
    )


def _commit(record: Record) -> str:
    if record["commit"] is None:
        return f"code {record['code']}"
    return f"commit {record['commit'][:7]}" + (" with changes" if record["dirty"] else "")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
