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
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column

from hptjax.masked import ratio

WARN_STYLE = "yellow"
EVALUATION = re.compile(r"validation/(pass@\d+)")
# What the line shows of a step: metric name -> (label, format). Absent metrics are left out.
LINE = {
    "critic/score/mean": ("reward", "{:.3f}"),
    "batch/solve_none": ("none", "{:.2f}"),
    "hpt/gate_sft_frac": ("sft", "{:.2f}"),
    "sft/loss": ("sft loss", "{:.3f}"),
    "actor/entropy": ("entropy", "{:.3f}"),
    "response_length/mean": ("len", "{:.1f}"),
    "perf/throughput": ("tok/s", "{:,.0f}"),
}
LOGP_DIFF_LIMIT = 1e-4  # nats; float32 rounding of sampler against trainer stays below it (design contract 4)

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
        scalars = finite_numbers(metrics)
        live[:] = [sink for sink in live if guarded(sink, lambda: sink.write(step, scalars), f"writing step {step}")]  # noqa: B023

    def close() -> None:
        for sink in live:
            guarded(sink, sink.close, "closing")
        live.clear()

    return Telemetry(write, lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True), close)


def finite_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that a curve can show. Texts, NaN and infinities go to metrics.jsonl only, which names the latter."""
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, numbers_abc.Real)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def watch_sampler(write: Write, say: Callable[[str], None]) -> Write:
    """`write`, with an alarm at the step where sampler and trainer begin to disagree by more than float32 rounding.

    A disagreement means that the policy learns from samples of another distribution than it believes. Steps whose
    samples are of older weights say nothing about it.
    """
    above = False

    def watched(step: int, metrics: Mapping[str, Any]) -> None:
        nonlocal above
        write(step, metrics)
        gap = metrics.get("rollout/logp_diff_max")
        if gap is None or metrics.get("rollout/staleness", 0) > 0:
            return
        was, above = above, not gap <= LOGP_DIFF_LIMIT  # NaN is an alarm
        if above and not was:
            say(
                f"alarm: at step {step} sampler and trainer disagree on a token's log-prob by {gap:.1e} nats, expected "
                f"at most {LOGP_DIFF_LIMIT:.0e} in float32; see rollout/logp_diff_max (a matmul precision below "
                "float32, or decoding that differs from training)"
            )

    return watched


def say_sampler_gap(write: Write, say: Callable[[str], None], held: str) -> Write:
    """`write`, and once, at the first step that has rollouts, how far off the trainer's log-probs the sampler's are.

    Steps whose samples are of older weights are passed over.

    Args
      held: what makes them differ, in words.
    """
    said = False

    def told(step: int, metrics: Mapping[str, Any]) -> None:
        nonlocal said
        write(step, metrics)
        if said or "rollout/logp_diff_max" not in metrics or metrics.get("rollout/staleness", 0) > 0:
            return
        said = True
        say(
            f"step {step}: the sampler ({held}) and the trainer differ by {metrics['rollout/logp_diff_mean']:.1e} nats "
            f"per token on average, by {metrics['rollout/logp_diff_max']:.1e} at most (rollout/logp_diff_mean, _max)"
        )

    return told


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
    stages: Sequence[str] = (),
    log_every: int = 1,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Sink:
    """One short line: step, time left, the metrics of `LINE`; a live bar on a terminal, else a line per step.

    Evaluations always get a line that stays.

    Args
      total_steps: of the whole run, earlier stages included. first_step: steps done before this process began; the
        estimate of the time left counts only the steps since.
      stages: their names, shown where there is more than one.
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
            BarColumn(bar_width=10),
            TextColumn("{task.fields[line]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console,
        )
        task = bar.add_task("step", total=total_steps, completed=first_step, line="")
        bar.start()

    def write(step: int, metrics: Mapping[str, Any]) -> None:
        left_s = ratio((clock() - began) * (total_steps - step), step - first_step)
        evaluation = any(EVALUATION.fullmatch(name) for name in metrics)
        line = progress_line(metrics, left_s, stages=stages)
        if bar is not None:
            bar.update(task, completed=step)
            if not evaluation:
                bar.update(task, line=line)
        if evaluation or (bar is None and (step % log_every == 0 or step == total_steps)):
            console.print(f"step {step}/{total_steps}  {line}", markup=False, highlight=False, soft_wrap=True)

    return Sink("progress", write, bar.stop if bar is not None else lambda: None)


def progress_line(metrics: Mapping[str, Any], left_s: float, *, stages: Sequence[str] = ()) -> str:
    """For example `eta 3:10  grpo 2/2  reward 0.312  none 0.44  sft 0.41  tok/s 5,120`.

    `none` is the share of the step's questions of which no rollout is solved.
    """
    parts = []
    if math.isfinite(left_s):
        minutes, seconds = divmod(round(max(left_s, 0.0)), 60)
        hours, minutes = divmod(minutes, 60)
        parts.append(f"eta {hours}:{minutes:02d}:{seconds:02d}" if hours else f"eta {minutes}:{seconds:02d}")
    if len(stages) > 1 and "train/stage" in metrics:
        index = int(metrics["train/stage"])
        parts.append(f"{stages[index]} {index + 1}/{len(stages)}")
    shown = dict(metrics)
    if "batch/solve_none" in metrics:
        none = metrics["batch/solve_none"]
        shown["batch/solve_none"] = ratio(none, none + metrics["batch/solved"])
    parts += [f"{label} {form.format(shown[name])}" for name, (label, form) in LINE.items() if name in shown]
    evaluated = {found[1]: metrics[name] for name in metrics if (found := EVALUATION.fullmatch(name))}
    if evaluated:
        parts.append("validation " + "  ".join(f"{name} {value:.3f}" for name, value in evaluated.items()))
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
        "answer": None if answer is None else dict(answer),
        "completion_tokens": completion_tokens,
    }
