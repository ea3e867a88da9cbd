"""Which array lives on which devices: tables from logical axis names to mesh axes, and what follows from them.

A table is chosen by name (`mesh.rules`, `mesh.rollout_rules`) and single lines of it can be replaced (`mesh.axes`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from hptjax.types import Array

REPLICA, DATA, FSDP, SEQUENCE, TENSOR = "replica", "data", "fsdp", "sequence", "tensor"
AXES = (
    REPLICA,
    DATA,
    FSDP,
    SEQUENCE,
    TENSOR,
)  # slowest links first: replicas lie on other slices

Rules = Mapping[str, tuple[str, ...]]
"""Logical axis name -> the mesh axes it is cut over, the slowest first; () is a copy on every device."""

FSDP_RULES: Rules = {
    "batch": (REPLICA, DATA, FSDP),  # rows
    "time": (SEQUENCE,),
    "features": (),  # the hidden states' last axis
    "embed": (FSDP,),  # the weights' side of it: gathered where a layer uses it
    "vocab": (TENSOR,),
    "heads": (TENSOR,),
    "kv_heads": (TENSOR,),
    "mlp": (TENSOR,),
    "layers": (),
    "head_dim": (),
    "cache": (),
}
"""Training: rows over all data axes, weights and moments cut over `fsdp` besides `tensor`."""

REPLICATED_RULES: Rules = {**FSDP_RULES, "embed": ()}
"""Plain data parallelism beside `tensor`: no gathering of weights, a whole copy of them on every data part."""

DECODE_RULES: Rules = {
    **FSDP_RULES,
    "batch": (REPLICA, DATA, SEQUENCE),
    "time": (),
    "embed": (),
    "vocab": (FSDP, TENSOR),
    "heads": (FSDP, TENSOR),
    "kv_heads": (FSDP, TENSOR),
    "mlp": (FSDP, TENSOR),
}
"""Rollouts: a token needs every weight, so weights stay where they are and `fsdp` is more of `tensor`."""

PRESETS: Mapping[str, Rules] = {"fsdp": FSDP_RULES, "replicated": REPLICATED_RULES, "decode": DECODE_RULES}

# Axes that are copied over mesh axes that have more devices than they have parts (grouped-query attention).
COPIED_WHEN_FEWER = frozenset({"kv_heads"})


def make_rules(preset: str, axes: Mapping[str, Sequence[str]] | None = None, *, field: str = "mesh.axes") -> Rules:
    """The table of a preset, with the lines of `axes` in the place of its own; `field` is where they were set.

    Raises an unknown preset, logical axis or mesh axis, or a mesh axis twice in one line -> ValueError, naming it.
    """
    if preset not in PRESETS:
        raise ValueError(f"expected one of the rules {', '.join(PRESETS)}, got {preset!r}; change mesh.rules")
    rules = dict(PRESETS[preset])
    for name, mesh_axes in (axes or {}).items():
        if name not in rules:
            raise ValueError(f"unknown logical axis {name!r} in {field}; the tables know {', '.join(rules)}")
        unknown = [axis for axis in mesh_axes if axis not in AXES]
        if unknown or len(set(mesh_axes)) < len(mesh_axes):
            raise ValueError(
                f"{field}, {name!r}: expected distinct mesh axes out of {', '.join(AXES)}, got {list(mesh_axes)}"
            )
        rules[name] = tuple(mesh_axes)
    return rules


def partition_spec(
    mesh: Mesh | AbstractMesh, axes: Sequence[str | None], shape: Sequence[int] | None = None, rules: Rules = FSDP_RULES
) -> PartitionSpec:
    """How an array with these logical axes is cut over the mesh; mesh axes of one device are left out.

    Args
      axes: one logical name, or None, per array axis.
      shape: its sizes, for the checks that need them; without it only names and collisions are checked.

    Raises an unknown name, two axes on one mesh axis, an axis that does not divide evenly -> ValueError, naming it.
    A kv_heads axis smaller than its mesh axes is cut over the first of them as far as it goes and copied over the
    rest, if it divides them.
    """
    if shape is not None and len(shape) != len(axes):
        raise ValueError(f"expected one logical axis name per array axis: names {tuple(axes)}, shape {tuple(shape)}")
    owner: dict[str, str] = {}  # mesh axis -> the logical axis that lies on it
    placed: list[Any] = []
    for place, name in enumerate(axes):
        if name is not None and name not in rules:
            raise ValueError(f"unknown logical axis {name!r}; sharding/rules.py knows {', '.join(rules)}")
        listed = () if name is None else rules[name]
        for axis in listed:
            if axis in owner:
                raise ValueError(
                    f"logical axes {owner[axis]!r} and {name!r} of one array both lie on mesh axis {axis!r}; "
                    "change mesh.rules or mesh.axes"
                )
            owner[axis] = str(name)
        mesh_axes = tuple(axis for axis in listed if mesh.shape[axis] > 1)
        if shape is not None:
            mesh_axes = axes_that_divide(str(name), shape[place], mesh_axes, mesh.shape)
        placed.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
    return PartitionSpec(*placed)


def parts(sizes: Mapping[str, int], name: str, rules: Rules = FSDP_RULES) -> int:
    """How many parts a logical axis is cut into; `sizes` are those of the mesh axes."""
    return math.prod(sizes[axis] for axis in rules[name])


def axes_that_divide(name: str, size: int, mesh_axes: Sequence[str], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes that a logical axis of this size is cut over: all of them, or fewer for one that may be copied.

    Raises a size that does not divide -> ValueError, naming the axis and the sizes that clash.
    """
    devices = math.prod(sizes[axis] for axis in mesh_axes)
    kept = tuple(mesh_axes)
    while size % math.prod(sizes[axis] for axis in kept) and name in COPIED_WHEN_FEWER and devices % size == 0:
        kept = kept[:-1]
    if size % math.prod(sizes[axis] for axis in kept) == 0:
        return kept
    hint = f"make the axis a multiple of {devices}"
    if name in COPIED_WHEN_FEWER:
        hint += " or a divisor of it"
    clash = [f"mesh.{axis} ({sizes[axis]})" for axis in mesh_axes if sizes[axis] > 1]
    raise ValueError(
        f"logical axis {name!r} of size {size} does not divide over the {devices} devices of {' x '.join(clash)}; "
        f"{hint}, or change {' or '.join(clash)}"
    )


def named_shardings(mesh: Mesh | AbstractMesh, axes_tree: Any, shapes: Any = None, rules: Rules = FSDP_RULES) -> Any:
    """The tree of shardings that belongs to a tree of logical axis names.

    Args
      axes_tree: a pytree whose leaves are plain tuples of names.
      shapes: a pytree of the same structure whose leaves have a `.shape` or are shape tuples; give it wherever it is
        known, because uneven axes and copied kv heads cannot be seen without it.
    """
    if shapes is None:
        return jax.tree.map(
            lambda axes: NamedSharding(mesh, partition_spec(mesh, axes, rules=rules)), axes_tree, is_leaf=_is_plain
        )
    return jax.tree.map(
        lambda axes, leaf: NamedSharding(
            mesh, partition_spec(mesh, axes, leaf if _is_plain(leaf) else leaf.shape, rules)
        ),
        axes_tree,
        shapes,
        is_leaf=_is_plain,
    )


def _is_plain(node: Any) -> bool:
    return type(node) is tuple  # a named tuple is a container here


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def make_constrain(mesh: Mesh, rules: Rules = FSDP_RULES) -> Callable[[Array, tuple[str | None, ...]], Array]:
    """The `constrain(x, axes) -> x` that models call; on a mesh of one device it returns x."""

    def constrain(x: Array, axes: tuple[str | None, ...]) -> Array:
        if mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition_spec(mesh, axes, x.shape, rules)))

    return constrain


def shard_tree(tree: Any, shardings: Any) -> Any:
    """Each leaf placed by the sharding of its place (or by one sharding for all).

    Host arrays are taken to be the whole array, the same in every process; each process places what its devices hold.
    """
    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda leaf: place(leaf, shardings), tree)
    return jax.tree.map(place, tree, shardings)


def shard_params(mesh: Mesh, axes_tree: Any, params: Any, rules: Rules = FSDP_RULES) -> Any:
    """Parameters placed by the rules table, with their shapes checked."""
    return shard_tree(params, named_shardings(mesh, axes_tree, params, rules))


def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """One array on its devices: a host array is cut up, a device array is moved."""
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf, sharding)
    whole = np.asarray(leaf)
    return jax.make_array_from_process_local_data(sharding, whole, whole.shape)
