"""The mesh, and how a micro-batch enters it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from hptjax.sharding.host import finished
from hptjax.sharding.rules import (
    AXES,
    DATA,
    FSDP,
    FSDP_RULES,
    REPLICA,
    SEQUENCE,
    TENSOR,
    Rules,
    partition_spec,
    place,
    replicated,
)
from hptjax.types import MicroBatch

P = ParamSpec("P")
R = TypeVar("R")

REPLICATED_FIELDS = (
    "micro_index",
    "planned_tokens",
    "planned_digest",
    "optimizer",
)  # every other field of a micro-batch has rows
SEGMENT_FIELDS = (
    "temperature",
    "sample_index",
    "sample_hash",
    "source",
    "pair_ids",
    "first_written",
    "shared_tokens",
    "shared_mask",
)  # rows of segments and of shared prompts; the others are [B T]


def make_mesh(
    data: int = 1,
    tensor: int = 1,
    *,
    replica: int = 1,
    fsdp: int = 1,
    sequence: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with the five axes of `sharding.rules`; those of size 1 cost nothing.

    Args
      replica: copies of everything on different slices, which only exchange gradients. data: parts of a batch's rows
        whose devices hold whole copies of what is not cut otherwise. fsdp: parts of rows, and of weights and moments
        too. sequence: parts of a row's time axis. tensor: parts of heads, mlp and vocabulary.
      devices: default the first of all; several processes must use all of theirs.

    Raises sizes below 1, too few devices, devices of several processes left over, replicas that do not divide over the
    slices of the devices -> ValueError.
    """
    sizes = {REPLICA: replica, DATA: data, FSDP: fsdp, SEQUENCE: sequence, TENSOR: tensor}
    product = " x ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size != 1) or "mesh.data=1"
    if min(sizes.values()) < 1:
        raise ValueError(f"every axis of the mesh must be at least 1, got {product}")
    available = list(jax.devices() if devices is None else devices)
    wanted = math.prod(sizes.values())
    if wanted > len(available):
        raise ValueError(f"a mesh of {product} needs {wanted} devices, this machine shows {len(available)}")
    if wanted < len(available) and len({device.process_index for device in available}) > 1:
        raise ValueError(
            f"{product} is {wanted} of {len(available)} devices; with several processes the mesh must use them all"
        )
    used, kinds = available[:wanted], (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", None) or 0 for device in used})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(list(sizes.values()), used, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=kinds)
    if replica % slices:
        raise ValueError(
            f"expected mesh.replica to be a multiple of the {slices} slices that the devices lie on, got {replica}: "
            "only replicas may be apart; change mesh.replica"
        )
    inside = {**sizes, REPLICA: replica // slices}
    outside = [slices if axis == REPLICA else 1 for axis in AXES]
    grid = mesh_utils.create_hybrid_device_mesh(
        list(inside.values()), outside, devices=used, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES, axis_types=kinds)


def row_sharding(mesh: Mesh, rules: Rules = FSDP_RULES) -> NamedSharding:
    """Axis 0 cut as rows are, the other axes whole: for [B S], [B S 2] and so on."""
    return NamedSharding(mesh, partition_spec(mesh, ("batch",), rules=rules))


def put_rows(mesh: Mesh, tree: Any, rules: Rules = FSDP_RULES, *, time: bool = False) -> Any:
    """Host arrays with rows on axis 0 (and time on axis 1, if so said), on the mesh.

    Every process passes the whole array (host decisions are agreed on); each places its own part.
    Raises rows or positions that do not divide evenly -> ValueError.
    """
    return jax.tree.map(functools.partial(_put_rows, mesh, rules, time), tree)


def _put_rows(mesh: Mesh, rules: Rules, time: bool, leaf: Any) -> jax.Array:
    names = ("batch", "time" if time else None)[: leaf.ndim]
    spec = partition_spec(mesh, (*names, *[None] * (leaf.ndim - len(names))), leaf.shape, rules)
    return place(leaf, NamedSharding(mesh, spec))


def put_replicated(mesh: Mesh, tree: Any) -> Any:
    """Host arrays copied to every device of the mesh."""
    return jax.tree.map(lambda leaf: place(leaf, replicated(mesh)), tree)


def put_micro_batch(mesh: Mesh, micro_batch: MicroBatch, rules: Rules = FSDP_RULES) -> MicroBatch:
    """A host micro-batch on the mesh: rows and time cut, scalars and the plan of the update on every device.

    Raises rows or row tokens that the mesh does not divide -> ValueError.
    """

    def put(name: str) -> Any:
        value = getattr(micro_batch, name)
        if name in REPLICATED_FIELDS:
            return put_replicated(mesh, value)
        return put_rows(mesh, value, rules, time=name not in SEGMENT_FIELDS)

    return MicroBatch(**{name: put(name) for name in MicroBatch.__dataclass_fields__})


def one_at_a_time(mesh: Mesh, program: Callable[P, R]) -> Callable[P, R]:
    """A compiled program that may be called again before its last result is read.

    On several CPU devices of one process it waits for each result: there every device of every program in flight holds
    one of a few threads while it waits in a collective, and when all are held by waiting ones XLA gives up after 40 s
    and ends the process. Elsewhere it is the program itself, and calls go on without waiting.
    """
    devices = list(mesh.devices.flat)
    if len(devices) == 1 or devices[0].platform != "cpu":
        return program

    def waiting(*args: P.args, **kwargs: P.kwargs) -> R:
        return finished(program(*args, **kwargs))

    return waiting
