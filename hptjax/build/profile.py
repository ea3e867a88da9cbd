"""Where the time of a run goes: a trace of some steps, and the seconds of each phase as a table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hptjax.masked import ratio

FOLDER = "profile"
TRACED_STEPS = 2
PREFIX = "timing_s/"
AHEAD = "perf/rollout_ahead_s"


@contextlib.contextmanager
def tracing(
    folder: Path, first_step: int, say: Callable[[str], None]
) -> Iterator[Callable[[int], AbstractContextManager[None]]]:
    """Gives a `World.traced` that records two steps after the first of this process, which compiles.

    The trace is written when both are done, or when the block ends before that.

    Args
      folder: the run's. first_step: steps that are done already.
    """
    wanted = range(first_step + 1, first_step + 1 + TRACED_STEPS)
    running: list[int] = []  # the steps that the open trace has

    def finish() -> None:
        jax.profiler.stop_trace()
        shown = " and ".join(str(step + 1) for step in running)
        say(f"{folder / FOLDER}: trace of step {shown}, for Perfetto (perfetto_trace.json.gz) and TensorBoard")
        running.clear()

    @contextlib.contextmanager
    def traced(step: int) -> Iterator[None]:
        if step not in wanted:
            yield
            return
        if not running:
            jax.profiler.start_trace(folder / FOLDER, create_perfetto_trace=True)
        running.append(step)
        with jax.profiler.StepTraceAnnotation("step", step_num=step):
            yield
        if step == wanted[-1]:
            finish()

    try:
        yield traced
    finally:
        if running:
            finish()


def phase_seconds(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Phase -> its seconds in each step, by the rows of metrics.jsonl; without the first step, which compiles."""
    steps = [row for row in rows if "perf/time_per_step" in row][1:]
    names = list(dict.fromkeys(name for row in steps for name in row if name.startswith(PREFIX)))
    return {name.removeprefix(PREFIX): [float(row.get(name, 0.0)) for row in steps] for name in names}


def time_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The phases as a table, the longest first: median, least and most seconds of a step, share of all time."""
    phases = phase_seconds(rows)
    total = sum(sum(values) for values in phases.values())
    lines = [f"{'seconds per step':18s}{'median':>9s}{'min':>9s}{'max':>9s}{'share':>9s}"]
    for name, values in sorted(phases.items(), key=lambda item: -sum(item[1])):
        share = 100.0 * ratio(sum(values), total)
        lines.append(f"{name:18s}{np.median(values):9.3f}{min(values):9.3f}{max(values):9.3f}{share:8.1f}%")
    hidden = [float(row[AHEAD]) for row in rows if AHEAD in row]
    if hidden:
        lines.append(f"beside them {np.median(hidden):.3f} s of rollouts ahead, which nobody waited for")
    return "\n".join(lines) if phases else "no step after the first: nothing to say about time"
