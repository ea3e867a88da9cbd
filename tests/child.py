"""The environment of a process that a test starts: a few devices of its own, the compiler's other flags kept."""

from __future__ import annotations

import os

DEVICE_FLAG = "--xla_force_host_platform_device_count"


def with_devices(count: int) -> dict[str, str]:
    """This process's environment with so many CPU devices in the place of the tests' eight."""
    others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(DEVICE_FLAG)]
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join([*others, f"{DEVICE_FLAG}={count}"])}
