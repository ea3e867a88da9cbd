"""A model in the Hugging Face folder layout: `config.json` and safetensors, read and written without torch.

Every key of the checkpoint must be one this decoder uses, and every parameter must be there in its shape; anything
else is an error that names the keys, because a weight that was silently dropped is a different model. What may lie
there besides stands in `DERIVED`, and a tied model's second copy of its embedding must be equal to the first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from hptjax.models.decoder import param_shapes
from hptjax.models.folder_config import CONFIG_FILE, family, read_shape, write_config
from hptjax.models.folder_files import StoredTensor, open_tensors, shown
from hptjax.models.folder_write import SHARD_BYTES, as_saved, saved_dtype, write_weights
from hptjax.models.keys import CheckpointKey
from hptjax.models.shape import DecoderConfig
from hptjax.types import Params

DERIVED = ("rotary_emb.inv_freq",)  # ends of keys: buffers that old checkpoints store, functions of the config
EMBEDDING = ("embedding",)
UNEMBEDDING = ("unembedding",)


def load_folder(path: str | os.PathLike[str]) -> tuple[DecoderConfig, Params]:
    """The shape and the parameters of a Hugging Face folder.

    Returns the config, and the tree of `hptjax.models.decoder` as float32 NumPy arrays.
    Raises a file absent or unreadable, an architecture or a switch this decoder lacks, a key missing, unexpected or of
    another shape, a weight that is not finite -> ValueError (FileNotFoundError for a file).
    """
    with contextlib.ExitStack() as files:
        config, keys, tensors = open_model(pathlib.Path(path), files)
        shapes = traverse_util.flatten_dict(param_shapes(config))
        flat = {entry.path: _gather(entry, tensors, shapes[entry.path]) for entry in keys if entry.path in shapes}
    return config, traverse_util.unflatten_dict(flat)


def open_model(
    folder: pathlib.Path, files: contextlib.ExitStack
) -> tuple[DecoderConfig, Sequence[CheckpointKey], Mapping[str, StoredTensor]]:
    """The shape, key table and tensors of a folder, compared by name and shape; no weight is read yet.

    Raises as `load_folder`.
    """
    config, keys = read_shape(folder)
    tensors = {name: tensor for name, tensor in open_tensors(folder, files).items() if not name.endswith(DERIVED)}
    if config.tie_embeddings:
        tensors = _with_twin(keys, tensors)
    check_shapes(folder, config, keys, {name: tensor.shape for name, tensor in tensors.items()})
    return config, keys, tensors


def check_shapes(
    folder: pathlib.Path,
    config: DecoderConfig,
    keys: Sequence[CheckpointKey],
    found: Mapping[str, tuple[int, ...]],
) -> None:
    """Raises ValueError, naming the keys, where the tensors of a folder are not those of its config."""
    expected = expected_shapes(keys, config)
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    wrong = [
        f"{name} (expected {list(expected[name])}, found {list(found[name])})"
        for name in sorted(set(expected) & set(found))
        if found[name] != expected[name]
    ]
    problems = [
        f"{what}: {shown(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise ValueError(
            f"the checkpoint in {folder} does not fit its {CONFIG_FILE}: keys {'; keys '.join(problems)}; put the "
            "right files there, or change model.path"
        )


def expected_shapes(keys: Sequence[CheckpointKey], config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every key that a checkpoint of this shape must hold, in the order of the table, with its shape there."""
    shapes = traverse_util.flatten_dict(param_shapes(config))
    return {
        name: entry.stored_shape(shapes[entry.path][1:] if layer is not None else shapes[entry.path])
        for name, (entry, layer) in stored_names(keys, config).items()
    }


def stored_names(keys: Sequence[CheckpointKey], config: DecoderConfig) -> dict[str, tuple[CheckpointKey, int | None]]:
    """Key of a checkpoint -> its row of the table, and its layer where it is one's."""
    shapes = traverse_util.flatten_dict(param_shapes(config))
    names: dict[str, tuple[CheckpointKey, int | None]] = {}
    for entry in keys:
        if entry.path in shapes:
            layers: Sequence[int | None] = range(config.num_layers) if entry.path[0] == "layers" else [None]
            names |= {entry.key.format(layer=layer): (entry, layer) for layer in layers}
    return names


def save_folder(
    path: str | os.PathLike[str],
    config: DecoderConfig,
    params: Params,
    *,
    dtype: Any,
    shard_bytes: int = SHARD_BYTES,
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder that `load_folder` and transformers read: config.json, and weights as `write_weights` does.

    Args
      params: host arrays (`to_host` first), in the shapes of `config`.
      dtype: of the stored tensors; float32, bfloat16 or float16, rounded to nearest even.
      shard_bytes: weights that take more are cut into shards of at most so much.
      beside: fields that config.json is to keep of another one, such as token ids.

    A tied model gets no unembedding key.
    Raises a parameter missing, unexpected, of another shape, on a device or not finite, a config of no family ->
    ValueError.
    """
    stored_dtype = saved_dtype(dtype)
    _, keys = family(config)
    flat = traverse_util.flatten_dict(params)
    _check_params(config, flat)
    names = stored_names(keys, config)

    def tensor(name: str) -> np.ndarray:
        entry, layer = names[name]
        value = flat[entry.path] if layer is None else flat[entry.path][layer]
        return as_saved(name, entry.to_stored(value), stored_dtype)

    sizes = {name: int(np.prod(shape)) * stored_dtype.itemsize for name, shape in expected_shapes(keys, config).items()}
    documents = {CONFIG_FILE: write_config(config, stored_dtype.name, beside or {})}
    write_weights(pathlib.Path(path), sizes, tensor, documents, shard_bytes=shard_bytes)


def _check_params(config: DecoderConfig, flat: Mapping[tuple[str, ...], Any]) -> None:
    shapes = traverse_util.flatten_dict(param_shapes(config))
    if set(shapes) != set(flat):
        raise ValueError(
            "the parameters do not fit the config: "
            f"missing {shown(sorted('/'.join(p) for p in set(shapes) - set(flat)))}; "
            f"unexpected {shown(sorted('/'.join(p) for p in set(flat) - set(shapes)))}"
        )
    for place, value in flat.items():
        if not isinstance(value, np.ndarray):
            raise ValueError(f"save_folder takes host arrays (call to_host first); {'/'.join(place)} is {type(value)}")
        if value.shape != shapes[place]:
            raise ValueError(f"{'/'.join(place)} has shape {value.shape}; the config asks for {shapes[place]}")


def _with_twin(keys: Sequence[CheckpointKey], tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors without a tied model's unembedding, which the embedding is then compared with as it is read."""
    (embedding,) = (entry.key for entry in keys if entry.path == EMBEDDING)
    (unembedding,) = (entry.key for entry in keys if entry.path == UNEMBEDDING)
    kept = {name: tensor for name, tensor in tensors.items() if name != unembedding}
    twin = tensors.get(unembedding)
    if twin is not None and embedding in kept:
        if twin.shape != kept[embedding].shape:
            raise ValueError(
                f"{twin.where}: config.json says tie_word_embeddings, but {unembedding} has shape {list(twin.shape)} "
                f"and {embedding} {list(kept[embedding].shape)}; change model.path"
            )
        kept[embedding] = dataclasses.replace(kept[embedding], twin=twin)
    return kept


def _gather(entry: CheckpointKey, tensors: Mapping[str, StoredTensor], shape: tuple[int, ...]) -> np.ndarray:
    result = np.empty(shape, np.float32)
    if entry.path[0] != "layers":
        result[...] = entry.from_stored(tensors[entry.key][:], shape)
        return result
    for number in range(shape[0]):
        result[number] = entry.from_stored(tensors[entry.key.format(layer=number)][:], shape[1:])
    return result
