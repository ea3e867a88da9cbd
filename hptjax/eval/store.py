"""The folder of an evaluation: what it is of, and the rows that are there already. A stopped evaluation goes on.

manifest.json            what the rows are of: model, data, sampling; another evaluation is refused the folder
samples_<task>.jsonl     a row per completion, in lm-evaluation-harness's keys
seconds.txt              wall time, a line per chunk
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hptjax.eval.samples import Graded, from_row, to_row

MANIFEST, SECONDS = "manifest.json", "seconds.txt"


def begin(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Makes the folder, or takes up the one that an evaluation of the same things has begun.

    Raises a folder of another evaluation, one that holds other things or that cannot be made -> ValueError that names
    what differs.
    """
    path, told = folder / MANIFEST, json.loads(json.dumps(manifest))
    if path.exists():
        found = _read_manifest(path)
        differing = sorted(name for name in found.keys() | told.keys() if found.get(name) != told.get(name))
        if differing:
            shown = "; ".join(f"{name} was {found.get(name)!r}, is {told.get(name)!r}" for name in differing[:3])
            raise ValueError(
                f"expected the evaluation that {folder} holds, got another one ({', '.join(differing)}): "
                f"{shown[:400]}; change --out, or the settings back"
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"expected an empty folder or one of an evaluation, got {folder} with files in it; change --out"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"expected to make the folder {folder}, got {error.strerror}; change --out") from error
    partial = path.with_name(f"{MANIFEST}.partial")
    partial.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected JSON in {path}, got {error}; change --out") from error
    return found if isinstance(found, dict) else {}


def rows_file(folder: Path, task: str) -> Path:
    """Where the rows of a task lie."""
    return folder / f"samples_{task}.jsonl"


def saved(path: Path, n: int) -> list[Graded]:
    """The samples of a file. What a killed process leaves at its end is cut off: half a line, the rows of a question
    that has fewer than n. `begin` has made sure that the folder is of an evaluation with as many samples.

    Raises a damaged line before the last -> ValueError that names it.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    lines, found = _rows(path, content)
    last = [entry for entry in found if entry.question == found[-1].question]
    kept = len(found) - (len(last) if len(last) < n else 0)
    size = sum(map(len, lines[:kept]))
    if size < len(content):
        with path.open("r+b") as file:
            file.truncate(size)
    return found[:kept]


def read_rows_file(path: Path) -> list[Graded]:
    """The samples of a file that is not to be changed; half a line at its end is not read. Raises as `saved` does."""
    return _rows(path, path.read_bytes())[1]


def _rows(path: Path, content: bytes) -> tuple[list[bytes], list[Graded]]:
    """The whole lines of a file and their samples."""
    lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(from_row(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}; change --out, or remove that file") from error
    return lines, found


def add_seconds(folder: Path, seconds: float) -> None:
    """Counts wall time of this evaluation."""
    with (folder / SECONDS).open("a", encoding="ascii") as file:
        file.write(f"{seconds:.3f}\n")


def total_seconds(folder: Path) -> float:
    """The wall time of all parts of an evaluation; what a killed process had not saved is not in it."""
    path = folder / SECONDS
    lines = path.read_text(encoding="ascii", errors="replace").split() if path.exists() else []
    return sum(float(line) for line in lines if line.replace(".", "", 1).isdigit())


def append(path: Path, samples: Sequence[Graded], generation: Mapping[str, Any]) -> None:
    """Adds the rows of some samples, whole lines in one write."""
    lines = "".join(json.dumps(to_row(sample, generation)) + "\n" for sample in samples)
    with path.open("ab") as file:
        file.write(lines.encode("ascii"))
        file.flush()
        os.fsync(file.fileno())
