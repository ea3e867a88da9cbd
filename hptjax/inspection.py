"""`hptjax inspect`: what a model folder or a run's checkpoint holds, tensor by tensor, with counts and problems."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hptjax.explain import human_bytes
from hptjax.models.folder_config import ADAPTER_CONFIG
from hptjax.models.folder_report import FolderReport, adapter_report, folder_report
from hptjax.models.tensor_stats import TensorStats, tensor_stats
from hptjax.train.checkpoint_read import RECORD, SavedCheckpoint, read_leaves, read_record, saved_checkpoints

PARAMS = "params."  # how the names of parameters begin in a checkpoint, beside sums, moments and counters


def inspect(path: pathlib.Path, *, everything: bool = False) -> dict[str, Any]:
    """What is at a path, as JSON values: `kind`, `about`, `tensors`, `totals`, `problems` and `notes`.

    Args
      path: a model folder, a PEFT adapter, a run folder (its last checkpoint), or one checkpoint of a run.
      everything: of a checkpoint, sums, moments and counters too, and not the parameters alone.

    Raises a path that is none of these -> ValueError.
    """
    if (path / RECORD).is_file():
        saved = read_record(path)
        if saved is None:
            raise ValueError(f"expected a checkpoint in '{path}', got one whose record cannot be read")
        return _of_checkpoint(saved, everything)
    for folder in (path / "checkpoints", path):
        found = saved_checkpoints(folder) if folder.is_dir() else []
        if found:
            return _of_checkpoint(found[-1], everything)
    if (path / ADAPTER_CONFIG).is_file():
        return _of_folder(path, adapter_report(path), "PEFT adapter")
    if not path.is_dir() or not any((path / name).exists() for name in ("config.json", "model.safetensors")):
        raise ValueError(
            f"expected a model folder (config.json, safetensors), a run folder or a checkpoint, got '{path}'"
        )
    return _of_folder(path, folder_report(path), "model folder")


def report_text(report: Mapping[str, Any]) -> str:
    """The report as lines for a terminal: a row per tensor, totals, notes and problems."""
    about = ", ".join(f"{name} {value}" for name, value in report["about"].items())
    rows = [("tensor", "dtype", "shape", "min", "max", "mean", "norm")]
    rows += [
        (
            tensor["name"],
            tensor["dtype"],
            "x".join(map(str, tensor["shape"])) or "scalar",
            *(_figure(tensor[name]) for name in ("min", "max", "mean", "norm")),
        )
        for tensor in report["tensors"]
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"{report['path']}: {report['kind']}", *([about] if about else []), ""]
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        lines.append("  ".join([*left, *right]))
    totals = report["totals"]
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in totals["tensors_by_dtype"].items())
    size = human_bytes(totals["bytes"])
    lines += ["", f"{totals['tensors']} tensors ({kinds}), {totals['entries']:,} entries, {size}"]
    lines += [f"note: {note}" for note in report["notes"]]
    lines += [f"problem: {problem}" for problem in report["problems"]]
    lines.append(f"{len(report['problems'])} problems" if report["problems"] else "no problems")
    return "\n".join(lines)


def _of_folder(path: pathlib.Path, found: FolderReport, kind: str) -> dict[str, Any]:
    tensors = [
        _row(each.name, each.dtype, each.shape, each.stats) | {"file": each.file, "problem": each.problem}
        for each in found.tensors
    ]
    shape = {} if found.shape is None else dataclasses.asdict(found.shape)
    problems, notes = list(found.problems), list(found.notes)
    if not (path / "tokenizer_config.json").is_file():
        notes += ["no tokenizer in this folder"] if kind == "model folder" else []
    elif found.shape is not None:
        problems += _tokenizer_problems(path, found.shape.vocab_size)
    return {
        "path": str(path),
        "kind": kind,
        "about": {name: value for name, value in shape.items() if value is not None},
        "tensors": tensors,
        "totals": _totals(tensors, sum(each.stored_bytes for each in found.tensors)),
        "problems": problems,
        "notes": notes,
    }


def _tokenizer_problems(path: pathlib.Path, vocab_size: int) -> list[str]:
    from hptjax.data.tokenizer import load_tokenizer, vocabulary_size

    try:
        tokens = vocabulary_size(load_tokenizer(path))
    except Exception as error:  # transformers raises many kinds for a broken file
        return [f"the tokenizer cannot be read: {error}"]
    return [f"the tokenizer has {tokens} tokens, the model {vocab_size}"] if tokens > vocab_size else []


def _of_checkpoint(saved: SavedCheckpoint, everything: bool) -> dict[str, Any]:
    names = [name for name in saved.leaves if everything or name.startswith(PARAMS)]
    problems: list[str] = []
    leaves: Mapping[str, np.ndarray] = {}
    try:
        leaves = read_leaves(saved, names)
    except ValueError as error:
        problems.append(str(error))
    tensors = []
    for name, value in leaves.items():
        floats = np.issubdtype(value.dtype, np.floating)
        stats = tensor_stats(value.shape, lambda rows, v=value: v[rows] if v.ndim else v) if floats else None
        row = _row(name, str(value.dtype), value.shape, stats)
        row["problem"] = f"{stats.nonfinite} entries are NaN or infinite" if stats and stats.nonfinite else ""
        tensors.append(row)
    problems += [f"{row['name']}: {row['problem']}" for row in tensors if row["problem"]]
    others = [name for name in saved.leaves if name not in leaves]
    left_out = [f"{len(others)} leaves of sums, moments and counters are not shown (--all)"] if others else []
    about = {"step": saved.step, "metric": saved.metric, "checkpoint": saved.ordinal}
    return {
        "path": str(saved.path),
        "kind": "checkpoint of a run",
        "about": {name: value for name, value in about.items() if value is not None},
        "tensors": tensors,
        "totals": _totals(tensors, sum(value.nbytes for value in leaves.values())),
        "problems": problems,
        "notes": [*_of_adapters(saved), *left_out],
    }


def _of_adapters(saved: SavedCheckpoint) -> list[str]:
    lora = saved.fingerprint.get("lora")
    if lora is None:
        return []
    kind = ", rank-stabilised" if lora["rank_stabilised"] else ""
    return [f"adapters of rank {lora['rank']}, alpha {lora['alpha']:g}{kind}, on {', '.join(lora['targets'])}"]


def _row(name: str, dtype: str, shape: Sequence[int], stats: TensorStats | None) -> dict[str, Any]:
    figures = (stats.least, stats.largest, stats.middle, stats.norm) if stats is not None else (math.nan,) * 4
    known = {
        key: value if math.isfinite(value) else None
        for key, value in zip(("min", "max", "mean", "norm"), figures, strict=True)
    }
    return {
        "name": name,
        "dtype": dtype,
        "shape": list(shape),
        **known,
        "entries": math.prod(shape),
        "nonfinite": 0 if stats is None else stats.nonfinite,
        "zeros": 0 if stats is None else stats.zeros,
    }


def _totals(tensors: Sequence[Mapping[str, Any]], stored_bytes: int) -> dict[str, Any]:
    by_dtype: dict[str, int] = {}
    for tensor in tensors:
        by_dtype[tensor["dtype"]] = by_dtype.get(tensor["dtype"], 0) + 1
    return {
        "tensors": len(tensors),
        "entries": sum(tensor["entries"] for tensor in tensors),
        "bytes": stored_bytes,
        "tensors_by_dtype": by_dtype,
    }


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
