"""Seconds of a phase, and its name in a trace."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from hptjax.sharding.peers import phase


@contextmanager
def timed(seconds: dict[str, float], name: str, *, beside: bool = False) -> Iterator[None]:
    """Adds the seconds of the block to `seconds[name]`.

    Args
      beside: this is not the main thread, which alone says where the process stands.
    """
    if not beside:
        phase(name)
    start = time.perf_counter()
    with jax.profiler.TraceAnnotation(name):
        yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
