"""Append-only files of one JSON object per line: metrics, ledger, rollouts. A resumed run leaves no gaps or repeats.

Each row is flushed as it is written, so `kill -9` loses at most a half-written last line. On resume `truncate_after`
removes that line and every row past the checkpoint's step; the run then writes those rows again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

NONFINITE = "nonfinite"  # the names of the values in a row that were NaN or infinite and are written as null


@dataclasses.dataclass(frozen=True, eq=False)
class JsonlWriter:
    """A file open for appending rows. Make it with `open_jsonl`; use it as a context manager, or call `close`."""

    path: pathlib.Path
    file: BinaryIO

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row and flushes it to the operating system. Raises as `encode_row`."""
        self.file.write(encode_row(row))
        self.file.flush()

    def close(self) -> None:
        """Closes the file."""
        self.file.close()

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_jsonl(path: str | pathlib.Path) -> JsonlWriter:
    """Opens a file for appending, made with its folders if absent.

    Raises: the file ends in a half-written line -> ValueError; `truncate_after` removes it.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    if file.tell():
        with path.open("rb") as existing:
            existing.seek(-1, os.SEEK_END)
            whole = existing.read(1) == b"\n"
        if not whole:
            file.close()
            raise ValueError(
                f"{path}: expected whole lines, but the last one is half-written; call truncate_after first"
            )
    return JsonlWriter(path, file)


def encode_row(row: Mapping[str, Any]) -> bytes:
    """A row as one line of JSON, in ASCII.

    NaN and infinities become null, and the row gets `"nonfinite": [their dotted names]`. NumPy scalars and arrays
    become numbers and lists.

    Raises: no integer `step`, a `nonfinite` that is no list of names, a value or key that JSON does not have
      -> ValueError.
    """
    if not isinstance(row.get("step"), int | np.integer) or isinstance(row["step"], bool):
        raise ValueError(f"expected a row with an integer 'step', got {row.get('step')!r} in {sorted(map(str, row))}")
    named = row.get(NONFINITE, [])  # a caller may have named some itself
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"expected '{NONFINITE}' to be a list of names, got {named!r}")
    found: list[str] = []
    plain = plain_value({name: value for name, value in row.items() if name != NONFINITE}, "", found)
    if named or found:
        plain[NONFINITE] = [*named, *found]
    return json.dumps(plain, allow_nan=False).encode("ascii") + b"\n"


def plain_value(value: Any, name: str, nonfinite: list[str]) -> Any:
    """The value made of JSON types; names of non-finite floats inside it are appended to `nonfinite`."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        if bad := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"'{name}': expected string keys, got {bad[0]!r}")
        return {key: plain_value(inner, f"{name}.{key}" if name else key, nonfinite) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(inner, f"{name}[{place}]", nonfinite) for place, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(name)
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(f"'{name}': expected a JSON value, got {type(value).__name__}")


def read_rows(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The whole rows of a file, in order; none where it is absent. A half-written last line is left out.

    Raises: a damaged line before the last -> ValueError naming it.
    """
    return [row for row, _ in whole_lines(pathlib.Path(path))]


def truncate_after(path: str | pathlib.Path, step: int) -> int:
    """Removes the rows of steps past `step`, and a half-written last line; atomic. Returns how many rows went.

    Raises: a damaged line before the last, or a row without `step` -> ValueError naming it; the file is left alone.
    """
    return keep_rows(path, lambda row: row["step"] <= step)


def keep_rows(path: str | pathlib.Path, keep: Callable[[Mapping[str, Any]], bool]) -> int:
    """Removes the rows that `keep` refuses, as `truncate_after`. The rest keep their bytes."""
    path = pathlib.Path(path)
    if not path.exists():
        return 0
    removed = 0
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            for row, line in whole_lines(path):
                if keep(row):
                    file.write(line)
                else:
                    removed += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return removed


def whole_lines(path: pathlib.Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Rows with their lines (each with its line feed), leaving out a half-written last one."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:80]!r}") from error
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError(f"{path}, line {number}: expected a JSON object with a 'step', got {line[:80]!r}")
            yield row, line if line.endswith(b"\n") else line + b"\n"
