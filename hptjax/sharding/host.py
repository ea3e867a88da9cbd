"""The one declared read from device to host."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import multihost_utils

from hptjax.sharding.peers import waiting


def to_host(tree: Any) -> Any:
    """The tree with NumPy arrays in the place of device arrays; waits for the work they depend on.

    Every device-to-host read of the package goes through here, so that a test can count them. An array that is cut over
    several processes is gathered, whole, on each of them: they must all read it, at the same place.
    """
    with waiting():
        return jax.device_get(jax.tree.map(_gathered, tree))


def finished(tree: Any) -> Any:
    """The tree, once the work on devices that it depends on is done."""
    with waiting():
        return jax.block_until_ready(tree)


def _gathered(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return multihost_utils.process_allgather(leaf, tiled=True)
    return leaf
