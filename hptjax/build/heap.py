"""What a compilation leaves in the C heap, given back to the system.

XLA's compiler for CPUs frees what it worked with, but glibc keeps those pages for the process: hundreds of MiB after a
train step, on top of which its buffers then come.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator

from jax import monitoring

COMPILED = "/jax/core/compile/backend_compile_duration"
LONG_S = 0.5  # of a compilation: shorter ones leave little


@contextlib.contextmanager
def trimmed_after_compilations(trim: Callable[[], object] | None = None) -> Iterator[None]:
    """Inside the block, `trim` follows every compilation of some length, before the program first runs.

    Args
      trim: default glibc's `malloc_trim`; nothing where the C library has none.
    """
    trim = trim or _malloc_trim()
    if trim is None:
        yield
        return

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED and duration_secs >= LONG_S:
            trim()

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        monitoring.unregister_event_duration_listener(listen)


def _malloc_trim() -> Callable[[], object] | None:
    """None on systems without glibc: other allocators give pages back by themselves, or cannot be asked."""
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return None if function is None else lambda: function(0)
