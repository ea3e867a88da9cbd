"""The one declared read from device to host."""

from __future__ import annotations

from typing import Any

import jax


def to_host(tree: Any) -> Any:
    """The tree with NumPy arrays in the place of device arrays; waits for the work they depend on.

    Every device-to-host read of the package goes through here, so that a test can count them. Arrays must be whole in
    this process: replicated, or on its own devices only.
    """
    return jax.device_get(tree)
