"""The file of raw figures: what stands in it, what of it may be used again, and its form."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hptjax.bench.series import BY_NAME
from hptjax.rundir import git_state, package_versions, read_json, write_json

FORMAT = 1
PACKAGE = pathlib.Path(__file__).resolve().parent.parent
VERSIONS = ("jax", "jaxlib", "flax", "optax", "numpy")
SAME = ("series", "point", "settings", "repeats", "code", "machine", "versions")
"""What two measurements of a point must share for the second one to be needless."""

Record = Mapping[str, Any]
"""A point: the fields of SAME, figures as `spread` makes them, counts, memory, device, commit, date, others' work."""

FIELDS: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("series", "code", "date", "device"), str),
    **dict.fromkeys(("point", "repeats"), int),
    **dict.fromkeys(("settings", "machine", "versions", "figures", "counts"), dict),
    **dict.fromkeys(("peak_mib", "other_cpu"), (float, int)),
    "timed_peak_mib": (float, int, type(None)),
    "commit": (str, type(None)),
    "dirty": (bool, type(None)),
}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """The median with the least and the largest value, and all of them in the order in which they were measured."""
    return {
        "median": float(np.median(values)),
        "min": float(min(values)),
        "max": float(max(values)),
        "all": [round(float(value), 6) for value in values],
    }


def surroundings() -> dict[str, Any]:
    """What a figure depends on beside its settings: machine, versions, and a digest of the package's sources."""
    state = git_state(PACKAGE.parent) or {}
    versions = package_versions()
    return {
        "code": code_digest(),
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {name: versions[name] for name in VERSIONS if name in versions},
        "commit": state.get("commit"),
        "dirty": state.get("dirty"),
    }


def code_digest(folder: pathlib.Path = PACKAGE) -> str:
    """A digest of all Python sources: the same commit with other text in the working tree is other code."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\x00".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def machine() -> dict[str, Any]:
    """The processor and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", pathlib.Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
        name = found[1] if found else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": name, "cores": cores}


def busy_seconds() -> float | None:
    """CPU seconds of the whole machine that were not idle, so far; None where the system does not say."""
    try:
        words = pathlib.Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]
    except OSError:
        return None
    ticks = [int(word) for word in words]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def same(record: Record, asked: Mapping[str, Any]) -> bool:
    """Whether a point that has been measured is the one that is asked for."""
    return all(record[name] == asked[name] for name in SAME)


def read_records(path: pathlib.Path, *, sizes: str | None = None) -> list[Record]:
    """The points of a file, checked; none where there is no file.

    Args
      sizes: the name of the sizes that they must be of; None: of any.
    Raises a file of another form, or of other sizes -> ValueError.
    """
    if not path.exists():
        return []
    try:
        found = read_json(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"expected the figures of `hptjax bench` in '{path}', got {error}") from None
    problem = _problem(found)
    if problem is not None:
        raise ValueError(f"expected the figures of `hptjax bench` in '{path}', got {problem}; name another file.")
    if sizes is not None and found["sizes"] != sizes:
        raise ValueError(f"expected figures of the {sizes} sizes in '{path}', got {found['sizes']}; change --json.")
    return found["points"]


def _problem(found: Any) -> str | None:
    """What keeps a JSON value from being a file of ours."""
    if not isinstance(found, dict) or not {"format", "sizes", "points"} <= found.keys():
        return "a value without format, sizes and points"
    if found["format"] != FORMAT:
        return f"format {found['format']!r} (known is {FORMAT})"
    if not isinstance(found["points"], list):
        return "points that are no list"
    for place, record in enumerate(found["points"]):
        if not isinstance(record, dict):
            return f"point {place}, which is no object"
        for name, kind in FIELDS.items():
            if name not in record or not isinstance(record[name], kind):
                return f"point {place} without a fitting {name}"
        series = BY_NAME.get(record["series"])
        if series is None:
            return f"point {place} of an unknown series {record['series']!r}"
        figures = record["figures"]
        if not all(isinstance(one, dict) and {"median", "min", "max"} <= one.keys() for one in figures.values()):
            return f"point {place} with figures that have no median, min and max"
        if next(iter(series.figures)) not in figures:
            return f"point {place} without the figure {next(iter(series.figures))!r}"
        if series.counted is not None and series.counted not in record["counts"]:
            return f"point {place} without the count {series.counted!r}"
    return None


def write_records(path: pathlib.Path, records: Sequence[Record], *, sizes: str) -> None:
    """The whole file at once; a process killed meanwhile leaves the old one."""
    places = {name: place for place, name in enumerate(BY_NAME)}
    ordered = sorted(records, key=lambda record: (places[record["series"]], record["point"]))
    write_json(path, {"format": FORMAT, "sizes": sizes, "points": ordered})
