"""Which array lives on which devices: one table from logical axis names to mesh axes, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hptjax.types import Array

DATA, TENSOR = "data", "tensor"

RULES: dict[str, str | None] = {
    "batch": DATA,  # rows
    "vocab": TENSOR,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "mlp": TENSOR,
    "layers": None,
    "embed": None,
    "head_dim": None,
    "time": None,
    "cache": None,
}
# axes that are copied to every device of the mesh axis where they are too few to be cut (grouped-query attention)
COPIED_WHEN_FEWER = frozenset({"kv_heads"})


def partition_spec(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int] | None = None) -> PartitionSpec:
    """How an array with these logical axes is cut over the mesh.

    Args
      axes: one logical name, or None, per array axis.
      shape: its sizes, for the checks that need them; without it only names and collisions are checked.

    Raises an unknown name, two axes on one mesh axis, an axis that does not divide evenly -> ValueError, naming it.
    A kv_heads axis smaller than its mesh axis is copied instead of cut, if it divides the mesh axis.
    """
    if shape is not None and len(shape) != len(axes):
        raise ValueError(f"expected one logical axis name per array axis: names {tuple(axes)}, shape {tuple(shape)}")
    placed: list[str | None] = []
    for place, name in enumerate(axes):
        if name is not None and name not in RULES:
            raise ValueError(f"unknown logical axis {name!r}; sharding/rules.py knows {', '.join(RULES)}")
        mesh_axis = None if name is None else RULES[name]
        if mesh_axis is not None and mesh_axis in placed:
            other = axes[placed.index(mesh_axis)]
            raise ValueError(f"logical axes {other!r} and {name!r} of one array both lie on mesh axis {mesh_axis!r}")
        if mesh_axis is not None and shape is not None:
            mesh_axis = _checked(str(name), shape[place], mesh_axis, mesh.shape[mesh_axis])
        placed.append(mesh_axis)
    return PartitionSpec(*placed)


def _checked(name: str, size: int, mesh_axis: str, devices: int) -> str | None:
    if size % devices == 0:
        return mesh_axis
    if name in COPIED_WHEN_FEWER and devices % size == 0:
        return None
    hint = f"make the axis a multiple of {devices}"
    if name in COPIED_WHEN_FEWER:
        hint += " or a divisor of it"
    raise ValueError(
        f"logical axis {name!r} of size {size} does not divide over the {devices} devices of mesh axis {mesh_axis!r}; "
        f"{hint}, or change mesh.{mesh_axis}"
    )


def named_shardings(mesh: Mesh, axes_tree: Any, shapes: Any = None) -> Any:
    """The tree of shardings that belongs to a tree of logical axis names.

    Args
      axes_tree: a pytree whose leaves are plain tuples of names.
      shapes: a pytree of the same structure whose leaves have a `.shape` or are shape tuples; give it wherever it is
        known, because uneven axes and copied kv heads cannot be seen without it.
    """
    if shapes is None:
        return jax.tree.map(lambda axes: NamedSharding(mesh, partition_spec(mesh, axes)), axes_tree, is_leaf=_is_plain)
    return jax.tree.map(
        lambda axes, leaf: NamedSharding(mesh, partition_spec(mesh, axes, leaf if _is_plain(leaf) else leaf.shape)),
        axes_tree,
        shapes,
        is_leaf=_is_plain,
    )


def _is_plain(node: Any) -> bool:
    return type(node) is tuple  # a named tuple is a container here


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def make_constrain(mesh: Mesh) -> Callable[[Array, tuple[str | None, ...]], Array]:
    """The `constrain(x, axes) -> x` that models call; on a mesh of one device it returns x."""

    def constrain(x: Array, axes: tuple[str | None, ...]) -> Array:
        if mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition_spec(mesh, axes, x.shape)))

    return constrain


def shard_tree(tree: Any, shardings: Any) -> Any:
    """Each leaf placed by the sharding of its place (or by one sharding for all).

    Host arrays are taken to be the whole array, the same in every process; each process places what its devices hold.
    """
    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda leaf: place(leaf, shardings), tree)
    return jax.tree.map(place, tree, shardings)


def shard_params(mesh: Mesh, axes_tree: Any, params: Any) -> Any:
    """Parameters placed by the rules table, with their shapes checked."""
    return shard_tree(params, named_shardings(mesh, axes_tree, params))


def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """One array on its devices: a host array is cut up, a device array is moved."""
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf, sharding)
    whole = np.asarray(leaf)
    return jax.make_array_from_process_local_data(sharding, whole, whole.shape)
