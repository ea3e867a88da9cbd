"""The weight files of a Hugging Face folder: one safetensors file, or shards and the index that says what is where.

safetensors is data only. Files that are pickles (`pytorch_model.bin`) are never opened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from hptjax.models.folder_config import read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes of weights, in the format's names
NAMED_IN_ERROR = 8  # keys shown before a long list is cut
CHECKED_AT_ONCE = 1 << 22  # entries looked at together, so that a check takes no memory to speak of


@dataclasses.dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor on disk, which can be cut before it is read: `stored[4:8, :]` is float32, and every entry is finite.

    Args
      part: safetensors' slice of it. where: the file.
      twin: of a tied model that also stores its unembedding: that tensor, which must hold the same numbers.
    """

    name: str
    where: pathlib.Path
    part: Any
    twin: StoredTensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return tuple(self.part.get_shape())

    @property
    def dtype(self) -> str:
        """In the format's names, such as `BF16`."""
        return self.part.get_dtype()

    def __getitem__(self, index: Any) -> np.ndarray:
        value = self.read(index)
        if not all_finite(value):
            raise ValueError(
                f"{self.where}: {self.name} holds NaN or infinite weights (as float32); `hptjax inspect` counts them. "
                "Use another copy, or change model.path"
            )
        if self.twin is not None and not np.array_equal(value, self.twin.read(index)):
            raise ValueError(
                f"{self.where}: config.json says tie_word_embeddings, but {self.twin.name} is not {self.name}; "
                "set tie_word_embeddings to false there, or remove the tensor that is wrong"
            )
        return value

    def read(self, index: Any) -> np.ndarray:
        """A part as float32, looked at no further. Raises what is not stored as floats -> ValueError."""
        if self.dtype not in FLOATS:
            raise ValueError(
                f"{self.where}: expected {self.name} as one of {', '.join(FLOATS)}, got {self.dtype} (a quantised "
                "model?); change model.path to a folder of plain weights"
            )
        with np.errstate(over="ignore"):  # what overflows shows as infinite
            return np.asarray(self.part[index]).astype(np.float32)


def all_finite(value: np.ndarray) -> bool:
    """Whether no entry is NaN or infinite."""
    rows = max(1, CHECKED_AT_ONCE // max(1, math.prod(value.shape[1:])))
    return all(bool(np.isfinite(value[first : first + rows]).all()) for first in range(0, len(value), rows))


def open_tensors(
    folder: pathlib.Path, files: contextlib.ExitStack, problems: list[str] | None = None
) -> dict[str, StoredTensor]:
    """Every tensor of a folder by its key. Nothing is read before it is asked for; `files` closes the files.

    Args
      problems: where it is given, what is wrong with one of the files goes there, and the others are read.

    Raises a file that is absent -> FileNotFoundError; one that is cut off, an index that does not fit its shards, or
    both an index and a file that it does not name -> ValueError.
    """
    names, listed = weight_files(folder)
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        missing = FileNotFoundError(
            f"expected the {len(names)} shards that {INDEX_FILE} names in {folder}, missing {shown(absent)}; fetch "
            "them, or change model.path"
        )
        _raise_or_keep(missing, problems)
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        if name in absent:
            continue
        try:
            opened = files.enter_context(safe_open(folder / name, framework="np"))
        except (SafetensorError, OSError) as error:
            problem = f"{folder / name} is not a whole safetensors file: {error}; fetch it again, or change model.path"
            _raise_or_keep(ValueError(problem), problems)
            continue
        held = list(opened.keys())
        if listed is not None:
            _check_shard(folder, name, held, listed, problems)
        tensors |= {key: StoredTensor(key, folder / name, opened.get_slice(key)) for key in held}
    return tensors


def _raise_or_keep(problem: Exception, problems: list[str] | None) -> None:
    if problems is None:
        raise problem
    problems.append(str(problem))


def weight_files(folder: pathlib.Path) -> tuple[list[str], dict[str, str] | None]:
    """The names of the weight files, and of a sharded folder which key its index puts into which file.

    Raises as `open_tensors`, where the files' names alone tell.
    """
    index = folder / INDEX_FILE
    if not index.exists():
        if not (folder / WEIGHTS_FILE).is_file():
            pickles = [name for name in PICKLES if (folder / name).exists()]
            hint = f" ({pickles[0]} is there, but a pickle can run code and is never opened)" if pickles else ""
            raise FileNotFoundError(
                f"expected the weights {WEIGHTS_FILE}, or {INDEX_FILE} and its shards, in {folder}, found none{hint}; "
                "change model.path"
            )
        return [WEIGHTS_FILE], None
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(_is_plain(name) for name in listed.values()):
        raise ValueError(
            f"{index}: expected weight_map, an object of keys and names of .safetensors files in {folder}; fetch it "
            "again, or change model.path"
        )
    names = sorted(set(listed.values()))
    if (folder / WEIGHTS_FILE).exists() and WEIGHTS_FILE not in names:
        raise ValueError(
            f"{folder} holds {WEIGHTS_FILE} and an index that does not name it: two models, and other tools would take "
            "the first; remove one of them"
        )
    return names, listed


def shown(names: Sequence[str]) -> str:
    """Names for a message, a long list cut."""
    more = len(names) - NAMED_IN_ERROR
    return ", ".join(names[:NAMED_IN_ERROR]) + (f" and {more} more" if more > 0 else "") if names else "none"


def _check_shard(
    folder: pathlib.Path, name: str, held: Sequence[str], listed: Mapping[str, str], problems: list[str] | None
) -> None:
    promised = {key for key, file in listed.items() if file == name}
    missing, extra = sorted(promised - set(held)), sorted(set(held) - promised)
    if missing or extra:
        words = [f"it lacks {shown(missing)}"] * bool(missing) + [f"it also holds {shown(extra)}"] * bool(extra)
        problem = ValueError(
            f"{folder / name} does not hold what {INDEX_FILE} says: {'; '.join(words)}. The files are of different "
            "downloads or models: fetch all of them again"
        )
        _raise_or_keep(problem, problems)


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and pathlib.PurePath(name).name == name and name.endswith(".safetensors")
