"""results.json in the shape of lm-evaluation-harness, and the table that it prints.

    results[task]["avg@32,strict"]          the figure
    results[task]["avg@32_stderr,strict"]   its standard error over questions
    results[task]["avg@32_ci95,strict"]     its interval; stderr_method[task] says how it was made

Source `spec/diagnostics.md` 10.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hptjax.eval.figures import Figure, Lengths

VERSION = 1  # of a task's definition here
MARKS = {True: "↑", False: "↓"}


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """A task that was evaluated.

    Args
      questions: of the task. evaluated: of them, with all their samples. data_hash: of the questions and answers.
      config: how it was asked: prompt policy, sampling, samples per question.
      notes: what a reader of its figures must know.
    """

    name: str
    figures: Sequence[Figure]
    lengths: Mapping[str, Lengths]
    questions: int
    evaluated: int
    data_hash: str
    config: Mapping[str, Any]
    notes: Sequence[str] = ()


def results(tasks: Sequence[TaskResult], *, model: str, run: Mapping[str, Any], date: str, seconds: float) -> dict:
    """The object of results.json.

    Args
      model: name or folder. run: settings of the whole evaluation. date: ISO. seconds: of wall time, all parts of an
        interrupted evaluation together.
    """
    by_name = {task.name: task for task in tasks}
    return {
        "results": {name: {"alias": name, **_entries(task.figures)} for name, task in by_name.items()},
        "group_subtasks": {name: [] for name in by_name},
        "configs": {name: {"task": name, **task.config, "notes": list(task.notes)} for name, task in by_name.items()},
        "versions": dict.fromkeys(by_name, VERSION),
        "n-shot": dict.fromkeys(by_name, 0),
        "higher_is_better": {
            name: {figure.name: figure.higher_is_better for figure in task.figures} for name, task in by_name.items()
        },
        "n-samples": {
            name: {"original": task.questions, "effective": task.evaluated} for name, task in by_name.items()
        },
        "config": {"model": "hptjax", "model_args": model, **run},
        "date": date,
        "task_hashes": {name: task.data_hash for name, task in by_name.items()},
        "model_source": "hptjax",
        "model_name": model,
        "total_evaluation_time_seconds": f"{seconds:.1f}",
        "stderr_method": {
            name: {f"{figure.name},{figure.filter}": figure.estimate.method for figure in task.figures}
            for name, task in by_name.items()
        },
        "lengths": {
            name: {kind: _finite(dataclasses.asdict(told)) for kind, told in task.lengths.items()}
            for name, task in by_name.items()
        },
    }


def _entries(figures: Sequence[Figure]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for figure in figures:
        told = figure.estimate
        found[f"{figure.name},{figure.filter}"] = told.value
        found[f"{figure.name}_stderr,{figure.filter}"] = told.se if math.isfinite(told.se) else "N/A"
        found[f"{figure.name}_ci95,{figure.filter}"] = [told.low, told.high]
        if figure.sampling_se is not None:
            found[f"{figure.name}_sampling_stderr,{figure.filter}"] = figure.sampling_se
    return found


def _finite(entry: Mapping[str, Any]) -> dict[str, Any]:
    """With None for what is not a number, which JSON has no word for."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in entry.items()}


def table(tasks: Sequence[TaskResult]) -> str:
    """The figures as Markdown, a row each."""
    lines = [
        "| Tasks | Version | Filter | n-shot | Metric | | Value | | Stderr | 95 % | Q | n |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for task in tasks:
        for figure in task.figures:
            told = figure.estimate
            error = f"{told.se:.4f}" if math.isfinite(told.se) else "N/A"
            lines.append(
                f"| {task.name} | {VERSION} | {figure.filter} | 0 | {figure.name} | {MARKS[figure.higher_is_better]} | "
                f"{told.value:.4f} | ± | {error} | {told.low:.4f} to {told.high:.4f} | {told.questions} | "
                f"{told.samples} |"
            )
    return "\n".join(lines)
