"""What a process must say before jax loads, if it is to compile for chips that it does not have. Imports no jax."""

from __future__ import annotations

import os

# libtpu looks for the chips of this machine, and complains of each thing that it does not find
WITHOUT_CHIPS = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it is held by one process otherwise, for the sake of the chips
}


def expect_no_chips() -> None:
    """Sets these variables where they are not set."""
    for name, value in WITHOUT_CHIPS.items():
        os.environ.setdefault(name, value)
