"""What is asked of orbax's manager: which checkpoints it keeps, how it is made, and how a failed one is let go."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import orbax.checkpoint as ocp

from hptjax.sharding.peers import several


@dataclasses.dataclass(frozen=True)
class Retention:
    """Keeps the `keep_last` newest checkpoints and the `keep_best` of largest metric (of equals, the newer)."""

    keep_last: int
    keep_best: int
    metrics: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Which checkpoints stay, in the order given. The signature is orbax's `PreservationPolicy`."""
        del context
        ordinals = sorted(checkpoint.step for checkpoint in checkpoints)
        ranked = sorted((self.metrics[n], n) for n in ordinals if n in self.metrics)
        kept = set(ordinals[-self.keep_last :]) | {n for _, n in ranked[len(ranked) - self.keep_best :]}
        return [checkpoint.step in kept for checkpoint in checkpoints]


def make_manager(folder: pathlib.Path, retention: Retention, *, read_only: bool = False) -> ocp.CheckpointManager:
    """Orbax's manager of a folder, made if absent; what killed saves left in it is removed, unless `read_only`."""
    options = ocp.CheckpointManagerOptions(
        enable_async_checkpointing=True,
        cleanup_tmp_directories=not read_only,
        preservation_policy=retention,
        async_options=ocp.AsyncOptions(barrier_sync_fn=meet) if several() else None,
    )
    return ocp.CheckpointManager(folder, options=options)


def meet(*, key: str, timeout_ms: int) -> None:
    """Waits in the background of a save until every process has come to the same point of it.

    Orbax calls it in a `finally` too: a process whose write has failed would wait 20 minutes there, for others that
    wait at an earlier point for it. It must hand its error on at once.
    """
    if (failed := sys.exception()) is not None:
        raise failed
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def close_failed(manager: ocp.CheckpointManager) -> None:
    """Closes a manager whose save failed; each of its threads may raise the same failure once before it lets go."""
    for _ in range(4):
        with contextlib.suppress(Exception):
            manager.close()
            return


def remove_unfinished(folder: pathlib.Path) -> None:
    """Removes what a failed save has written, so that a full disk gets its space back.

    Writes that orbax has left to themselves may make a folder again behind the first removal, so this looks for 0.1 s.
    """
    for _ in range(5):
        for path in folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.02)


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Orbax shows long tracebacks of failures that reach the caller as an exception anyway; not inside this."""
    logger = logging.getLogger("absl")
    logger.addFilter(not_an_orbax_error)
    show = sys.unraisablehook

    def show_others(unraisable: Any) -> None:
        if not is_late_answer(unraisable.exc_value):
            show(unraisable)

    sys.unraisablehook = show_others
    try:
        yield
    finally:
        sys.unraisablehook = show
        logger.removeFilter(not_an_orbax_error)


def is_late_answer(error: BaseException | None) -> bool:
    """Whether an error is that of a write whose save has failed already and has closed its event loop."""
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def not_an_orbax_error(record: logging.LogRecord) -> bool:
    """A logging filter that drops errors which orbax logs."""
    return record.levelno < logging.ERROR or "orbax" not in record.pathname
