"""The one declared read from device to host."""

from __future__ import annotations

from typing import Any

import jax


def to_host(tree: Any) -> Any:
    """The tree with NumPy arrays in the place of device arrays; waits for the device."""
    return jax.device_get(tree)
