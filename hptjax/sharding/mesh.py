"""The mesh, and how a micro-batch enters it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hptjax.sharding.rules import DATA, TENSOR, partition_spec, place, replicated
from hptjax.types import MicroBatch

P = ParamSpec("P")
R = TypeVar("R")

REPLICATED_FIELDS = ("micro_index", "planned_tokens", "planned_digest")  # every other field of a micro-batch has rows


def make_mesh(data: int, tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `data` x `tensor` devices.

    Args
      data: how many parts the rows of a batch are cut into. tensor: how many parts the heads, mlp and vocabulary are.
      devices: default the first data x tensor of all; several processes must use all of theirs.

    Raises sizes below 1, too few devices, devices of several processes left over -> ValueError.
    """
    if data < 1 or tensor < 1:
        raise ValueError(f"mesh.data and mesh.tensor must be at least 1, got {data} and {tensor}")
    available = list(jax.devices() if devices is None else devices)
    wanted = data * tensor
    if wanted > len(available):
        raise ValueError(
            f"a mesh of mesh.data={data} x mesh.tensor={tensor} needs {wanted} devices, "
            f"this machine shows {len(available)}"
        )
    if wanted < len(available) and jax.process_count() > 1:
        raise ValueError(
            f"mesh.data={data} x mesh.tensor={tensor} is {wanted} of {len(available)} devices; with "
            f"{jax.process_count()} processes the mesh must use them all"
        )
    return jax.make_mesh(
        (data, tensor), (DATA, TENSOR), axis_types=(AxisType.Auto, AxisType.Auto), devices=available[:wanted]
    )


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 cut over `data`, the other axes whole: for [B T], [B S], [B T D] and so on."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def put_rows(mesh: Mesh, tree: Any) -> Any:
    """Host arrays with rows on axis 0, on the mesh with their rows over `data`.

    Every process passes the whole array (host decisions are agreed on); each places its own rows.
    Raises rows that do not divide evenly -> ValueError.
    """

    def put(leaf: Any) -> jax.Array:
        partition_spec(mesh, ("batch", *[None] * (leaf.ndim - 1)), leaf.shape)
        return place(leaf, row_sharding(mesh))

    return jax.tree.map(put, tree)


def put_replicated(mesh: Mesh, tree: Any) -> Any:
    """Host arrays copied to every device of the mesh."""
    return jax.tree.map(lambda leaf: place(leaf, replicated(mesh)), tree)


def put_micro_batch(mesh: Mesh, micro_batch: MicroBatch) -> MicroBatch:
    """A host micro-batch on the mesh: rows over `data`; scalars and the plan of the update on every device.

    Raises rows that `mesh.data` does not divide -> ValueError.
    """
    whole = {name: put_replicated(mesh, getattr(micro_batch, name)) for name in REPLICATED_FIELDS}
    rows = {
        name: put_rows(mesh, getattr(micro_batch, name))
        for name in micro_batch.__dataclass_fields__
        if name not in REPLICATED_FIELDS
    }
    return MicroBatch(**rows, **whole)


def micro_batch_shardings(mesh: Mesh) -> dict[str, NamedSharding]:
    """Field name -> where `put_micro_batch` puts it (one sharding for all planes)."""
    return {
        name: replicated(mesh) if name in REPLICATED_FIELDS else row_sharding(mesh)
        for name in MicroBatch.__dataclass_fields__
    }


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
        return jax.block_until_ready(program(*args, **kwargs))

    return waiting
