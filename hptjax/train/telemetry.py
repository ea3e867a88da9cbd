"""Where the metrics of a step go: metrics.jsonl always; TensorBoard, wandb and a line on the screen as chosen.

Only metrics.jsonl is part of the run: it is written first and its errors are errors. Another backend that fails is
named once, switched off, and training goes on.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers as numbers_abc
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from hptjax.masked import ratio

WARN_STYLE = "yellow"
# What the line shows: metric name -> (label, format). Absent metrics are left out.
LINE = {
    "critic/score/mean": ("reward", "{:.3f}"),
    "batch/solve_none": ("none", "{:.2f}"),
    "hpt/gate_sft_frac": ("sft", "{:.2f}"),
    "actor/entropy": ("entropy", "{:.3f}"),
    "actor/kl_loss": ("kl", "{:.4f}"),
    "response_length/mean": ("len", "{:.1f}"),
    "sft/loss": ("sft loss", "{:.3f}"),
    "actor/grad_norm": ("grad", "{:.3f}"),
    "perf/throughput": ("tok/s", "{:,.0f}"),
    "validation/pass@1": ("validation pass@1", "{:.3f}"),
    "validation/pass@8": ("pass@8", "{:.3f}"),
}

Write = Callable[[int, Mapping[str, Any]], None]  # (steps done, metrics)


@dataclasses.dataclass(frozen=True)
class Sink:
    """One place that metrics go to."""

    name: str
    write: Write
    close: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Telemetry:
    """`write(step, metrics)` sends to every sink; `say(text)` prints beside the progress line; `close()` ends all."""

    write: Write
    say: Callable[[str], None]
    close: Callable[[], None]


def make_telemetry(
    append_row: Callable[[Mapping[str, Any]], None], sinks: Iterable[Sink] = (), *, console: Console | None = None
) -> Telemetry:
    """Telemetry that appends to metrics.jsonl and then tells every sink.

    Args
      append_row: the append function of metrics.jsonl (`hptjax.train.jsonl`).
      sinks: the other backends; one that raises is named once and not called again.
    """
    console = console or Console(stderr=True)
    live = list(sinks)

    def guarded(sink: Sink, action: Callable[[], None], doing: str) -> bool:
        try:
            action()
        except Exception as error:  # any backend, any error: training must go on
            console.print(
                f"warning: {sink.name} failed while {doing} and is switched off: "
                f"{escape(f'{type(error).__name__}: {error}')}",
                style=WARN_STYLE,
            )
            return False
        return True

    def write(step: int, metrics: Mapping[str, Any]) -> None:
        append_row({"step": step, "time_s": time.time(), **metrics})
        scalars = numbers(metrics)
        live[:] = [sink for sink in live if guarded(sink, lambda: sink.write(step, scalars), f"writing step {step}")]  # noqa: B023

    def close() -> None:
        for sink in live:
            guarded(sink, sink.close, "closing")
        live.clear()

    return Telemetry(write, lambda text: console.print(text, markup=False, highlight=False), close)


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are numbers; texts such as the stage's name go to metrics.jsonl only."""
    return {name: float(value) for name, value in metrics.items() if isinstance(value, numbers_abc.Real)}


def tensorboard_sink(folder: str | pathlib.Path, *, first_step: int) -> Sink:
    """Scalars to TensorBoard event files (tensorboardX). Points of a killed run at `first_step` or later are purged."""
    import tensorboardX

    writer = tensorboardX.SummaryWriter(str(folder), purge_step=first_step)

    def write(step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    return Sink("TensorBoard", write, writer.close)


def wandb_sink(folder: str | pathlib.Path, *, name: str, config: Mapping[str, Any]) -> Sink:
    """Scalars to wandb; the run folder's name is the run's id, so that a resumed run continues it."""
    try:
        import wandb
    except ImportError:
        raise ValueError(
            "telemetry.wandb = true needs the package wandb, which is not installed: pip install 'hptjax[wandb]', or "
            "set telemetry.wandb = false."
        ) from None
    run = wandb.init(project="hptjax", name=name, id=name, resume="allow", dir=str(folder), config=dict(config))
    return Sink("wandb", lambda step, metrics: run.log(dict(metrics), step=step), run.finish)


def progress_sink(
    total_steps: int,
    *,
    first_step: int,
    log_every: int = 1,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Sink:
    """One short line: step, the metrics of `LINE`, and the time left; a live bar on a terminal, else a line per step.

    Args
      total_steps: of the whole run, earlier stages included. first_step: steps done before this process began; the
        estimate of the time left counts only the steps since.
      log_every: steps between lines where the output is not a terminal.
    """
    console = console or Console(stderr=True)
    began = clock()
    bar: Progress | None = None
    task = TaskID(0)
    if console.is_terminal:
        bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[line]}"),
            console=console,
        )
        task = bar.add_task("step", total=total_steps, completed=first_step, line="")
        bar.start()

    def write(step: int, metrics: Mapping[str, Any]) -> None:
        left_s = ratio((clock() - began) * (total_steps - step), step - first_step)
        line = progress_line(metrics, left_s)
        if bar is not None:
            bar.update(task, completed=step, line=line)
        elif step % log_every == 0 or step == total_steps:
            console.print(f"step {step}/{total_steps}  {line}", markup=False, highlight=False, soft_wrap=True)

    return Sink("progress", write, bar.stop if bar is not None else lambda: None)


def progress_line(metrics: Mapping[str, Any], left_s: float) -> str:
    """For example `reward 0.312  sft 0.41  tok/s 5,120  eta 3:10`."""
    parts = [f"{label} {form.format(metrics[name])}" for name, (label, form) in LINE.items() if name in metrics]
    if math.isfinite(left_s):
        minutes, seconds = divmod(round(max(left_s, 0.0)), 60)
        hours, minutes = divmod(minutes, 60)
        parts.append(f"eta {hours}:{minutes:02d}:{seconds:02d}" if hours else f"eta {minutes}:{seconds:02d}")
    return "  ".join(parts)


def write_rollouts(folder: str | pathlib.Path, step: int, rows: Iterable[Mapping[str, Any]]) -> pathlib.Path:
    """`rollouts/<step>.jsonl`, one line per sample, replaced whole so that a resumed step writes it once."""
    path = pathlib.Path(folder) / "rollouts" / f"{step:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    half.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    half.replace(path)
    return path


def rollout_row(
    *,
    step: int,
    sample_id: str,
    prompt: str,
    completion: str,
    reward: float,
    solved: bool,
    reason: str,
    objective: str,
    group_solved: int,
    finish_reason: str,
    advantage: float | None = None,
    answer: Mapping[str, Any] | None = None,
    completion_tokens: int | None = None,
) -> dict[str, Any]:
    """A line of the rollouts file: the text, its reward, the verifier's reason and what the gate decided.

    Args
      objective: "RL" or "SFT", the gate's decision for the question. group_solved: how many of the group solved it.
    """
    return {
        "step": step,
        "sample_id": sample_id,
        "prompt": prompt,
        "completion": completion,
        "reward": reward,
        "solved": solved,
        "reason": reason,
        "gate": objective,
        "group_solved": group_solved,
        "finish_reason": finish_reason,
        "advantage": advantage,
        "answer": None if answer is None else dict(answer),
        "completion_tokens": completion_tokens,
    }
