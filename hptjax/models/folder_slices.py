"""The weights of a Hugging Face folder straight onto their devices: every process reads what its devices hold.

stored on disk   q_proj.weight [H E, D]           ours   [L D H E], cut over D and H
a device's part  layers 0..L, D 8..16, H 2..4     reads  rows 2 E..4 E, columns 8..16 of L tensors
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from hptjax.models.decoder import param_shapes
from hptjax.models.folder import open_model
from hptjax.models.folder_config import read_shape
from hptjax.models.keys import CheckpointKey
from hptjax.models.shape import DecoderConfig
from hptjax.types import Array, Params

Index = tuple[slice, ...]
AT_ONCE_BYTES = 64 << 20  # a stacked parameter up to this, as float32, is read whole; to fill one needs two programs
Tensors = Callable[[str], Any]
"""Key of the checkpoint -> what can be sliced as the stored tensor."""


def folder_shape(path: str | os.PathLike[str]) -> DecoderConfig:
    """The shape of the model in a folder, from its config alone. Raises as `load_folder`."""
    return read_shape(path)[0]


def load_placed(path: str | os.PathLike[str], shardings: Any, *, dtype: Any = jnp.float32) -> Params:
    """The parameters of a folder as device arrays, each process reading the parts that its own devices hold.

    A stacked parameter of some size is filled layer by layer, so that beside the arrays no more than one layer of one
    parameter, or the embedding, or `AT_ONCE_BYTES` is in the host's memory.

    Args
      shardings: of every parameter, in the tree of `hptjax.models.decoder`.
      dtype: of the arrays; the scales of norms are float32 all the same.

    Raises as `load_folder`; of weights that are not finite, a process sees those that it reads.
    """
    places = traverse_util.flatten_dict(shardings)
    with contextlib.ExitStack() as files:
        config, keys, tensors = open_model(pathlib.Path(path), files)
        shapes = traverse_util.flatten_dict(param_shapes(config))
        flat = {
            entry.path: _place(
                entry,
                shapes[entry.path],
                places[entry.path],
                tensors.__getitem__,
                jnp.float32 if entry.path[-1].endswith("norm") else dtype,
            )
            for entry in keys
            if entry.path in shapes
        }
    return traverse_util.unflatten_dict(flat)


def _place(entry: CheckpointKey, shape: tuple[int, ...], place: Any, tensor: Tensors, dtype: Any) -> Array:
    """A parameter where its sharding says."""
    layer = _layer_sharding(entry, place)
    if layer is None or 4 * math.prod(shape) <= AT_ONCE_BYTES:
        return jax.make_array_from_callback(shape, place, _reader(entry, shape, tensor, dtype))
    whole = jnp.zeros(shape, dtype, device=place)
    for number in range(shape[0]):
        one = CheckpointKey(("layer",), entry.key.format(layer=number), entry.input_axes)
        part = jax.make_array_from_callback(shape[1:], layer, _reader(one, shape[1:], tensor, dtype))
        whole = _with_layer(place)(whole, part, number)
        jax.block_until_ready(whole)  # or the parts of many layers would wait in memory
    return whole


def _layer_sharding(entry: CheckpointKey, place: Any) -> Any:
    """Where one layer of a stacked parameter lies; None where it is read at once."""
    if entry.path[0] != "layers":
        return None
    if isinstance(place, jax.sharding.SingleDeviceSharding):
        return place
    if not isinstance(place, jax.sharding.NamedSharding) or (place.spec and place.spec[0] is not None):
        return None
    return place.update(spec=jax.sharding.PartitionSpec(*place.spec[1:]))


@functools.cache
def _with_layer(place: Any) -> Callable[[Array, Array, int], Array]:
    def write(whole: Array, part: Array, number: Any) -> Array:
        return jax.lax.dynamic_update_index_in_dim(whole, part, number, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=place)


def _reader(entry: CheckpointKey, shape: tuple[int, ...], tensor: Tensors, dtype: Any) -> Callable[[Index | None], Any]:
    """The function that reads a part of a parameter; a part that several devices hold is read once."""
    known: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def read(index: Index | None) -> np.ndarray:
        ranges = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        if ranges not in known:
            known[ranges] = read_part(entry, shape, ranges, tensor).astype(dtype, copy=False)
        return known[ranges]

    return read


def read_part(
    entry: CheckpointKey,
    shape: Sequence[int],
    ranges: Sequence[tuple[int, int]],
    tensor: Tensors,
) -> np.ndarray:
    """A part of a parameter, float32.

    Args
      shape: of the whole parameter. ranges: (start, stop) of the part along each of its axes.
      tensor: key -> what can be sliced as the stored tensor.
    """
    if entry.path[0] != "layers":
        return _read_matrix(entry, shape, ranges, tensor(entry.key))
    part = np.empty([stop - start for start, stop in ranges], np.float32)
    for place, number in enumerate(range(*ranges[0])):
        part[place] = _read_matrix(entry, shape[1:], ranges[1:], tensor(entry.key.format(layer=number)))
    return part


def _read_matrix(
    entry: CheckpointKey, shape: Sequence[int], ranges: Sequence[tuple[int, int]], stored: Any
) -> np.ndarray:
    """A part of one stored tensor in our layout: whole blocks along the first of the axes that it stores as one."""
    axes = list(range(len(shape)))
    if entry.input_axes is not None:
        groups = [axes[entry.input_axes :], axes[: entry.input_axes]]  # stored as [outputs, inputs]
    elif len(entry.stored_shape(tuple(shape))) == len(shape):
        groups = [[axis] for axis in axes]
    else:
        groups = [axes]
    blocks: list[slice] = []
    inner: dict[int, tuple[int, int]] = {}
    for group in groups:
        (start, stop), rest = ranges[group[0]], math.prod(shape[axis] for axis in group[1:])
        blocks.append(slice(start * rest, stop * rest))
        inner |= {group[0]: (0, stop - start)} | {axis: ranges[axis] for axis in group[1:]}
    read = np.asarray(stored[tuple(blocks)], np.float32)
    firsts = {group[0] for group in groups}
    sizes = [inner[axis][1] if axis in firsts else shape[axis] for axis in axes]
    ours = (read if entry.input_axes is None else read.T).reshape(sizes)
    return ours[tuple(slice(*inner[axis]) for axis in axes)]
