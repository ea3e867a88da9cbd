"""Adapters as a PEFT folder: `adapter_config.json` and `adapter_model.safetensors`, read and written without torch."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from hptjax.models.folder_config import ADAPTER_CONFIG, CONFIG_FILE, family
from hptjax.models.folder_files import StoredTensor, shown
from hptjax.models.folder_write import as_saved, make_folder, saved_dtype, write_json, write_tensors
from hptjax.models.lora import adapter_shapes
from hptjax.models.lora_config import TARGETS, AdapterShape, adapter_config, read_adapter_shape
from hptjax.models.shape import DecoderConfig
from hptjax.types import Params

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's, before the key of the base model


def load_adapter(path: str | os.PathLike[str], config: DecoderConfig) -> Params:
    """The adapters in a PEFT folder, for a model of this shape; float32 host arrays.

    Raises a file absent -> FileNotFoundError; keys or shapes that are not those of the model, weights that are not
    finite -> ValueError.
    """
    folder = pathlib.Path(path)
    shape, file = read_adapter_shape(folder), folder / ADAPTER_WEIGHTS
    shapes = adapter_shapes(config, shape.rank, shape.targets)["layers"]
    keys = _keys(config, shape.targets)
    with contextlib.ExitStack() as files:
        tensors = open_adapter(folder, files)
        missing, unexpected = sorted(set(keys) - set(tensors)), sorted(set(tensors) - set(keys))
        if missing or unexpected:
            raise ValueError(
                f"{file} does not fit the model: keys missing: {shown(missing)}; unexpected: {shown(unexpected)}; "
                "change lora.adapter"
            )
        layers: dict[str, dict[str, np.ndarray]] = {
            name: {factor: np.empty(sizes, np.float32) for factor, sizes in one.items()} for name, one in shapes.items()
        }
        for key, (name, factor, layer) in keys.items():
            whole = layers[name][factor]
            stored = _stored_shape(factor, whole.shape[1:])
            if tensors[key].shape != stored:
                raise ValueError(
                    f"{file}: expected {key} of shape {list(stored)}, got {list(tensors[key].shape)}; "
                    "change lora.adapter or model.path"
                )
            whole[layer] = tensors[key][:].T.reshape(whole.shape[1:])
    return {"layers": layers}


def open_adapter(folder: pathlib.Path, files: contextlib.ExitStack) -> dict[str, StoredTensor]:
    """The tensors of a PEFT folder by PEFT's keys; `files` closes the file.

    Raises no weights -> FileNotFoundError; a file that is cut off -> ValueError.
    """
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"expected {ADAPTER_WEIGHTS} in {folder}, found none; change lora.adapter")
    try:
        opened = files.enter_context(safe_open(file, framework="np"))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}; change lora.adapter") from error
    return {key: StoredTensor(key, file, opened.get_slice(key)) for key in opened.keys()}  # noqa: SIM118


def save_adapter(
    path: str | os.PathLike[str],
    config: DecoderConfig,
    adapters: Params,
    shape: AdapterShape,
    *,
    dtype: Any,
    base: str | None,
) -> None:
    """Writes a folder that `peft` and `load_adapter` read.

    Args
      adapters: host arrays. base: folder or name of the model that they belong to, which PEFT looks up.
    """
    folder, stored = pathlib.Path(path), saved_dtype(dtype)
    make_folder(folder)
    if (folder / CONFIG_FILE).exists():
        raise ValueError(
            f"expected a folder without a model, got one with {CONFIG_FILE} in {folder}, which the adapter would "
            "be put on top of; name another folder"
        )
    tensors = {}
    for key, (name, factor, layer) in _keys(config, shape.targets).items():
        value = np.asarray(adapters["layers"][name][factor][layer])
        tensors[key] = as_saved(key, value.reshape(_stored_shape(factor, value.shape)[::-1]).T, stored)
    partial = folder / f"{ADAPTER_WEIGHTS}.partial"
    write_tensors(partial, tensors)
    (folder / ADAPTER_CONFIG).unlink(missing_ok=True)
    os.replace(partial, folder / ADAPTER_WEIGHTS)
    write_json(folder / ADAPTER_CONFIG, adapter_config(shape, base))


def _keys(config: DecoderConfig, targets: Sequence[str]) -> dict[str, tuple[str, str, int]]:
    """PEFT's key -> our matrix, its factor, its layer."""
    matrices = {TARGETS[target][0] for target in targets}
    keys: dict[str, tuple[str, str, int]] = {}
    for entry in family(config)[1]:
        if entry.path[0] == "layers" and entry.path[1] in matrices:
            for layer in range(config.num_layers):
                module = PREFIX + entry.key.format(layer=layer).removesuffix(".weight")
                keys |= {
                    f"{module}.lora_{factor.upper()}.weight": (entry.path[1], factor, layer) for factor in ("a", "b")
                }
    return keys


def _stored_shape(factor: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """There, of one layer's factor: [rank, inputs] of A, [outputs, rank] of B."""
    if factor == "a":
        return shape[-1], int(np.prod(shape[:-1]))
    return int(np.prod(shape[1:])), shape[0]
