"""Weights into a folder: one safetensors file, or shards of a limited size and an index, named as by transformers."""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from hptjax.models.folder_config import ADAPTER_CONFIG
from hptjax.models.folder_files import INDEX_FILE, WEIGHTS_FILE, all_finite

SHARD_BYTES = 5 * 10**9  # of a file: the limit that published folders are cut at
SAVED_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
SHARD_NAME = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")


def saved_dtype(dtype: Any) -> np.dtype:
    """The NumPy dtype of stored tensors. Raises one that is not among `SAVED_DTYPES` -> ValueError."""
    stored = np.dtype(dtype)
    if stored not in SAVED_DTYPES.values():
        raise ValueError(f"weights are written as {', '.join(SAVED_DTYPES)}; got dtype {stored}")
    return stored


def as_saved(name: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A tensor in the dtype of a file, rounded to nearest even, contiguous.

    Raises a value that is not finite, or one that the dtype cannot hold -> ValueError naming the tensor.
    """
    with np.errstate(over="ignore"):  # what overflows shows as infinite
        stored = np.ascontiguousarray(value.astype(dtype))
    if not all_finite(stored):
        reason = "the weight itself is not finite" if not all_finite(value) else f"{dtype} cannot hold it"
        raise ValueError(
            f"{name}: expected finite weights as {dtype}, got NaN or infinite ones: {reason}; change dtype"
        )
    return stored


def make_folder(folder: pathlib.Path) -> None:
    """Makes a folder where there is none. Raises a place that cannot be one, or be written to -> ValueError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"expected to make the folder {folder}, got {error.strerror}; name another one") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(
            f"expected a folder that can be written to, got {folder}; change its mode, or name another one"
        )


def write_weights(
    folder: pathlib.Path,
    sizes: Mapping[str, int],
    tensor: Callable[[str], np.ndarray],
    documents: Mapping[str, Any],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes tensors in the order of `sizes`, as one file or, where they take more than `shard_bytes`, as shards.

    Args
      sizes: key -> bytes as stored. tensor: makes one, when its shard is written: one shard is in memory at a time.
      documents: name -> JSON value, of the files that say how the weights are read.
      shard_bytes: limit of a file; a tensor that is larger has a file of its own.

    Everything is written beside its final name and moved there at the end. A save that is interrupted before leaves the
    old folder whole; between the moves its documents and index are gone, so nothing can read a mixture.
    """
    shards = split(sizes, shard_bytes)
    names = [WEIGHTS_FILE]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    make_folder(folder)
    if (folder / ADAPTER_CONFIG).exists():
        raise ValueError(
            f"expected a folder without a PEFT adapter, got one with {ADAPTER_CONFIG} in {folder}, which other tools "
            "would put on top of the model; name another folder, or remove the adapter"
        )
    for name, keys in zip(names, shards, strict=True):
        write_tensors(folder / f"{name}.partial", {key: tensor(key) for key in keys})
    index = {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {key: name for name, keys in zip(names, shards, strict=True) for key in keys},
    }
    if len(names) > 1:
        documents = {INDEX_FILE: index, **documents}
    for stale in [*documents, INDEX_FILE, *_weights_in(folder, names)]:
        (folder / stale).unlink(missing_ok=True)
    for name in names:
        os.replace(folder / f"{name}.partial", folder / name)
    for name, value in documents.items():
        write_json(folder / name, value)


def write_tensors(path: pathlib.Path, tensors: Mapping[str, Any]) -> None:
    """A safetensors file that whoever may read the folder can read."""
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(0o666 & ~_umask())  # safetensors lets only the owner read


def _weights_in(folder: pathlib.Path, names: Sequence[str]) -> list[str]:
    """The weight files that lie in a folder beside those of these names."""
    found = [path.name for path in folder.iterdir() if SHARD_NAME.fullmatch(path.name)]
    return [name for name in [WEIGHTS_FILE, *found] if name not in names]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Keys in order, cut where the next one would exceed the limit. Raises a limit below 1 -> ValueError."""
    if limit < 1:
        raise ValueError(f"expected a shard limit of at least 1 byte, got {limit}")
    shards: list[list[str]] = [[]]
    used = 0
    for key, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(key)
        used += size
    return shards


def write_json(path: pathlib.Path, value: Any) -> None:
    """A JSON file, the old one or the new one and no mixture."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
