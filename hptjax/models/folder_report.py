"""What a model folder holds, tensor by tensor, and everything that is wrong with it: all problems, not the first."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from hptjax.models.folder import DERIVED, expected_shapes
from hptjax.models.folder_config import read_eos_ids, read_shape
from hptjax.models.folder_files import FLOATS, StoredTensor, open_tensors
from hptjax.models.lora_config import read_adapter_shape
from hptjax.models.lora_folder import open_adapter
from hptjax.models.shape import DecoderConfig
from hptjax.models.tensor_stats import TensorStats, tensor_stats

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """One tensor. `stats` is None where its entries are no floats; `problem` is empty where there is none."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    stats: TensorStats | None
    problem: str

    @property
    def stored_bytes(self) -> int:
        """On disk."""
        entries = 1
        for size in self.shape:
            entries *= size
        return entries * BYTES.get(self.dtype, 1)


@dataclasses.dataclass(frozen=True)
class FolderReport:
    """A folder: shape (None where its config cannot be followed), tensors, what keeps it from loading, and notes."""

    shape: DecoderConfig | None
    tensors: Sequence[TensorReport]
    problems: Sequence[str]
    notes: Sequence[str]


def folder_report(folder: pathlib.Path) -> FolderReport:
    """Reads every tensor once. Whatever is wrong is in the report; nothing is raised for it."""
    problems: list[str] = []
    notes: list[str] = []
    shape, expected = None, {}
    try:
        shape, keys = read_shape(folder)
        expected = expected_shapes(keys, shape)
    except (ValueError, OSError) as error:
        problems.append(str(error))
    if shape is not None:
        problems += _token_problems(folder, shape)
    with contextlib.ExitStack() as files:
        tensors: Mapping[str, StoredTensor] = {}
        try:
            tensors = open_tensors(folder, files, problems)
        except (ValueError, OSError) as error:
            problems.append(str(error))
        reports = [_tensor_report(tensors[name], expected, tensors, shape) for name in sorted(tensors, key=_in_order)]
    missing = sorted(set(expected) - set(tensors)) if shape is not None else []
    problems += [f"{name}: missing" for name in missing]
    problems += [f"{report.name}: {report.problem}" for report in reports if report.problem]
    derived = [name for name in tensors if name.endswith(DERIVED)]
    if derived:
        notes.append(f"{len(derived)} buffers that follow from the config are left alone, such as {derived[0]}")
    notes += [f"{report.name}: {word}" for report in reports if (word := _noted(report))]
    return FolderReport(shape, reports, problems, notes)


def adapter_report(folder: pathlib.Path) -> FolderReport:
    """As `folder_report`, of a PEFT adapter; whether it fits a model is seen where it meets one."""
    problems: list[str] = []
    notes: list[str] = []
    try:
        shape = read_adapter_shape(folder)
        kind = ", rank-stabilised" if shape.rank_stabilised else ""
        notes.append(f"rank {shape.rank}, alpha {shape.alpha:g}{kind}, on {', '.join(shape.targets)}")
    except (ValueError, OSError) as error:
        problems.append(str(error))
    with contextlib.ExitStack() as files:
        try:
            tensors = open_adapter(folder, files)
        except (ValueError, OSError) as error:
            return FolderReport(None, [], [*problems, str(error)], notes)
        reports = [_tensor_report(tensors[name], {}, tensors, None) for name in sorted(tensors, key=_in_order)]
    problems += [f"{report.name}: {report.problem}" for report in reports if report.problem]
    notes += [f"{report.name}: {word}" for report in reports if (word := _noted(report))]
    return FolderReport(None, reports, problems, notes)


def _in_order(name: str) -> list[tuple[bool, int, str]]:
    """So that layer 10 stands behind layer 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _tensor_report(
    tensor: StoredTensor,
    expected: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, StoredTensor],
    shape: DecoderConfig | None,
) -> TensorReport:
    stats = None
    if tensor.dtype in FLOATS:
        stats = tensor_stats(tensor.shape, lambda rows: tensor.read((rows,) if tensor.shape else ()))
    problem = ""
    if tensor.dtype not in FLOATS:
        problem = f"stored as {tensor.dtype}, expected floats"
    elif stats is not None and stats.nonfinite:
        problem = f"{stats.nonfinite} of {stats.entries} entries are NaN or infinite"
    elif tensor.name in expected and tensor.shape != expected[tensor.name]:
        problem = f"of shape {list(tensor.shape)}, expected {list(expected[tensor.name])}"
    elif expected and tensor.name not in expected and not tensor.name.endswith(DERIVED):
        problem = _of_twin(tensor, tensors) if shape is not None and shape.tie_embeddings else "unexpected"
    return TensorReport(tensor.name, tensor.where.name, tensor.dtype, tensor.shape, stats, problem)


def _of_twin(tensor: StoredTensor, tensors: Mapping[str, StoredTensor]) -> str:
    """What is wrong with a tensor that a tied model need not have: nothing, where it repeats the embedding."""
    embedding = tensors.get("model.embed_tokens.weight")
    if tensor.name != "lm_head.weight" or embedding is None or embedding.shape != tensor.shape:
        return "unexpected"
    with_twin = dataclasses.replace(embedding, twin=tensor)
    try:
        for row in range(0, tensor.shape[0], 4096):
            with_twin[row : min(row + 4096, tensor.shape[0]), :]
    except ValueError:
        return "differs from the embedding, although the config ties them"
    return ""


def _noted(report: TensorReport) -> str:
    """What is no fault and yet worth a word: a tensor that looks as if nothing had ever been read into it."""
    if report.stats is None or report.stats.nonfinite or not report.stats.entries:
        return ""
    if report.stats.zeros == report.stats.entries:
        return "all zeros, as a fresh bias is"
    if report.stats.entries > 1 and report.stats.least == report.stats.largest:
        return f"every entry is {report.stats.least:g}" + (", as in a fresh norm" if report.stats.least == 1 else "")
    return ""


def _token_problems(folder: pathlib.Path, shape: DecoderConfig) -> list[str]:
    try:
        outside = [token for token in read_eos_ids(folder) if token >= shape.vocab_size]
    except (ValueError, OSError) as error:
        return [str(error)]
    return [f"eos_token_id {token} is outside the vocabulary of {shape.vocab_size} tokens" for token in outside]
