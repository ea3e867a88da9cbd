"""The points of the suite, one after the other; what has been measured already is not measured again."""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hptjax.bench.point import in_a_process
from hptjax.bench.record import Record, busy_seconds, read_records, same, spread, surroundings, write_records
from hptjax.bench.series import Series
from hptjax.bench.sizes import Sizes
from hptjax.masked import ratio

Measure = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""A task -> its figures, as `point.measured`."""


def tasks(series: Sequence[Series], sizes: Sizes, repeats: int) -> list[dict[str, Any]]:
    """Every point of these series with its settings, in their order."""
    return [
        {
            "series": one.name,
            "point": point,
            "settings": one.settings(sizes, point),
            "vocabulary": sizes.vocabulary,
            "repeats": repeats,
        }
        for one in series
        for point in sizes.points[one.name]
    ]


def run_suite(
    path: pathlib.Path,
    series: Sequence[Series],
    sizes: Sizes,
    *,
    repeats: int,
    say: Callable[[str], None],
    measure: Measure = in_a_process,
) -> list[Record]:
    """Measures what is missing in the file, writes it after every point, and returns all of its points.

    A point of another code, machine or version gives way to the new one.
    """
    around = surroundings()
    wanted = tasks(series, sizes, repeats)
    for number, task in enumerate(wanted, start=1):
        records = read_records(path, sizes=sizes.name)
        asked = task | around
        name = f"{number}/{len(wanted)} {task['series']} {task['point']}"
        if any(same(record, asked) for record in records):
            say(f"{name}: measured before")
            continue
        record = _measured(task, around, measure)
        kept = [old for old in records if (old["series"], old["point"]) != (task["series"], task["point"])]
        write_records(path, [*kept, record], sizes=sizes.name)
        first, figure = next(iter(record["figures"].items()))
        noise = f"{figure['median']:.4g} [{figure['min']:.4g}, {figure['max']:.4g}]"
        say(f"{name}: {first} {noise}, {record['peak_mib']:.0f} MiB, other work {record['other_cpu']:.0%} of the CPU")
    return read_records(path, sizes=sizes.name)


def _measured(task: Mapping[str, Any], around: Mapping[str, Any], measure: Measure) -> dict[str, Any]:
    """A point's record: its figures, with what they depend on, and how much of the CPU others used meanwhile."""
    busy, before, began = busy_seconds(), os.times(), time.monotonic()
    found = dict(measure(task))
    wall, after, busy_after = time.monotonic() - began, os.times(), busy_seconds()
    own = sum(after[:4]) - sum(before[:4])
    other = 0.0
    if busy is not None and busy_after is not None:
        other = max(0.0, ratio(busy_after - busy - own, wall * (os.cpu_count() or 1)))
    figures = {name: spread(values) for name, values in found.pop("figures").items()}
    return {
        **{name: task[name] for name in ("series", "point", "settings", "repeats")},
        **around,
        "date": time.strftime("%Y-%m-%d"),
        "wall_s": round(wall, 1),
        "other_cpu": round(other, 3),
        "figures": figures,
        **found,
    }
