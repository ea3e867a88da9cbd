"""Several methods from the same base model under the same budget: one table, one plot, whatever comes out.

Budgets come from the first arm's own run: its updates, its tokens (generated + trained) and its FLOPs. Every other arm
is read off three times, where it had spent each budget (on the straight line between the two nearest evaluations), or
at its end where it never did: `sft` is made long enough for all three, `sft_then_rl` has half as many SFT steps before
the first arm's number of RL steps, the others have the first arm's number of steps. Equal updates favour arms that
generate much per update, equal FLOPs favour SFT. Nothing is chosen on test questions.

FLOPs are 2 N per token generated or prefilled and 6 N per position trained, N the parameters a token meets.
Source `spec/diagnostics.md` 12.3.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hptjax import build
from hptjax.build.evaluation import read_counts
from hptjax.config import Config, StageConfig
from hptjax.config_batch import stage_list
from hptjax.config_check import check
from hptjax.config_methods import FROM_DEMONSTRATIONS, MethodName
from hptjax.diagnostics.intervals import Estimate, estimate_mean, two_level_difference
from hptjax.diagnostics.passk import pass_at_k
from hptjax.masked import ratio
from hptjax.rundir import write_json
from hptjax.train.jsonl import read_rows

BUDGETS = ("updates", "tokens", "flops")
POINTS = 8  # evaluations per run, beside those at the budgets
ARMS: dict[str, MethodName] = {  # arm -> the method of its last stage
    **{name: name for name in typing.get_args(MethodName)},
    "sft_then_rl": "dr_grpo",
}


@dataclasses.dataclass(frozen=True)
class Spent:
    """What a run had spent after each of its steps, from its metrics; index 0 is before the first."""

    updates: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray


def compare(config: Config, *, arms: Sequence[str], seeds: int) -> dict[str, Any]:
    """Runs what is not yet finished, arm by arm and seed by seed, and writes table.md, compare.json and plot.png.

    The first arm sets the budget of its seed. Each run is an ordinary run folder under `runs/<name>-compare/`, so an
    interrupted comparison continues.

    Raises ValueError for an unknown arm, KeyboardInterrupt when it was asked to stop; the run under way is then saved.
    """
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise ValueError(f"expected arms among {', '.join(ARMS)}, got {', '.join(unknown)}; change --arms.")
    root = Path(config.runs_dir) / f"{config.name}-compare"
    folders: dict[tuple[str, int], Path] = {}
    for seed in range(config.seed, config.seed + seeds):
        budget: dict[str, float] | None = None
        for arm in arms:
            name = f"{arm}-seed{seed}"
            folders[arm, seed] = root / name
            arm_config = _arm_config(config, arm, seed, root, name, budget)
            print(f"{name}: {_length(arm_config)}", flush=True)
            try:
                summary = build.train(arm_config, quiet=True)
            except SystemExit:  # asked to stop, and saved
                raise KeyboardInterrupt from None
            final = ", ".join(f"pass@{k} {100 * summary['final'][f'pass@{k}']['value']:.1f} %" for k in config.eval.ks)
            print(f"  test {final}; {summary['seconds']:.0f} s", flush=True)
            if budget is None:
                spent = read_spent(root / name)
                budget = {axis: float(getattr(spent, axis)[-1]) for axis in BUDGETS}
                budget["sft_step_tokens"], budget["sft_step_flops"] = _sft_step(root / name, config)
    report = read_off(folders, arms, range(config.seed, config.seed + seeds), config.eval.ks)
    write_json(root / "compare.json", report)
    table = as_table(report, config.eval.ks)
    (root / "table.md").write_text(table + "\n", encoding="utf-8")
    plot(folders, arms, config.eval.ks, root / "plot.png")
    print(f"{table}\n\ntable, figures and plot: {root}")
    return report


def _length(config: Config) -> str:
    return " then ".join(f"{stage.steps} steps of {stage.method}" for stage in stage_list(config))


def _arm_config(config: Config, arm: str, seed: int, root: Path, name: str, budget: dict[str, float] | None) -> Config:
    """The config of one run: method and stages of the arm, as long as its largest budget asks."""
    updates_per_step = config.train.updates_per_rollout_batch
    steps = config.train.steps
    stages: tuple[StageConfig, ...] = ()
    if budget is not None and arm in FROM_DEMONSTRATIONS:
        steps = math.ceil(
            max(
                budget["updates"] / updates_per_step,
                budget["tokens"] / budget["sft_step_tokens"],
                budget["flops"] / budget["sft_step_flops"],
            )
        )
    if arm == "sft_then_rl":
        stages = (StageConfig(method="sft", steps=max(1, steps // 2)),)
    total = steps + sum(stage.steps for stage in stages)
    grid = {round(total * point / POINTS) for point in range(1, POINTS + 1)}
    exact = {config.train.steps} if budget is not None else set()
    if budget is not None and arm in FROM_DEMONSTRATIONS:
        exact |= {int(budget[axis] // budget[f"sft_step_{axis}"]) for axis in ("tokens", "flops")}
    arm_config = dataclasses.replace(
        config,
        name=name,
        seed=seed,
        runs_dir=str(root),
        method=ARMS[arm],
        stages=stages,
        train=dataclasses.replace(config.train, steps=steps, eval_every=0, rollouts_every=0, probe_every=0),
        eval=dataclasses.replace(config.eval, test_steps=tuple(sorted(grid | exact)), train_questions=0),
        checkpoint=dataclasses.replace(config.checkpoint, export_folder=None),
        telemetry=dataclasses.replace(config.telemetry, tensorboard=False, wandb=False, progress=False),
    )
    check(arm_config)
    return arm_config


def read_spent(folder: Path) -> Spent:
    """Cumulative updates, tokens and FLOPs of a run after each step."""
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "witness/ok" in row]
    parameters = json.loads((folder / "data.json").read_text(encoding="utf-8"))["parameters"]

    def cumulative(values: Sequence[float]) -> np.ndarray:
        return np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])

    return Spent(
        updates=cumulative([row["train/updates"] for row in rows]),
        tokens=cumulative([row["perf/generated_tokens"] + row["perf/trained_tokens"] for row in rows]),
        flops=cumulative(
            [
                2.0 * parameters * (row["perf/generated_tokens"] + row["perf/prefilled_tokens"])
                + 6.0 * parameters * row["perf/packed_tokens"]
                for row in rows
            ]
        ),
    )


def _sft_step(folder: Path, config: Config) -> tuple[float, float]:
    """Tokens and FLOPs of a step that trains one demonstration per question, from the data's mean lengths."""
    record = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    questions = config.data.questions_per_step
    trained = questions * record["mean_demonstration_tokens"]
    packed = questions * (record["mean_demonstration_tokens"] + record["mean_prompt_tokens"] - 1)
    return trained, 6.0 * record["parameters"] * packed


def read_off(
    folders: dict[tuple[str, int], Path], arms: Sequence[str], seeds: Sequence[int], ks: Sequence[int]
) -> dict[str, Any]:
    """Every arm's pass@k within each budget, each seed's value, and the difference to the first arm by question."""
    figures: dict[str, Any] = {}
    samples = read_counts(folders[arms[0], seeds[0]], "test", 0)[1]
    for axis in BUDGETS:
        within = {
            arm: [_within_budget(folders[arm, seed], folders[arms[0], seed], axis) for seed in seeds] for arm in arms
        }
        values = {
            (arm, k): np.stack(
                [_values_at(folders[arm, seed], step, k) for seed, step in zip(seeds, within[arm], strict=True)]
            )
            for arm in arms
            for k in ks
        }  # [S Q] each
        figures[axis] = {
            arm: {
                "steps": within[arm],
                "ended_before": [_ended_before(folders[arm, seed], folders[arms[0], seed], axis) for seed in seeds],
                **{f"pass@{k}": _figure(values[arm, k], values[arms[0], k], samples) for k in ks},
            }
            for arm in arms
        }
    base = {
        f"pass@{k}": dataclasses.asdict(
            estimate_mean(
                pass_at_k(*(counts := read_counts(folders[arms[0], seeds[0]], "test", 0)), k), samples=counts[1]
            )
        )
        for k in ks
    }
    spent = {
        f"{arm}-seed{seed}": {axis: float(getattr(read_spent(folder), axis)[-1]) for axis in BUDGETS}
        for (arm, seed), folder in folders.items()
    }
    return {"base": base, "figures": figures, "spent": spent, "first_arm": arms[0], "seeds": list(seeds)}


def _within_budget(folder: Path, first: Path, axis: str) -> float:
    """The step, with its fraction, at which a run had spent what the first arm did in all; its end if it never had.

    Between two steps the spending is taken as even.
    """
    budget = float(getattr(read_spent(first), axis)[-1])
    spent = getattr(read_spent(folder), axis)
    return float(np.interp(budget, spent, np.arange(spent.size)))


def _ended_before(folder: Path, first: Path, axis: str) -> bool:
    """Whether a run ended with less than the first arm's budget spent; it is then read at its end."""
    spent, budget = (getattr(read_spent(path), axis)[-1] for path in (folder, first))
    return bool(spent < budget * (1 - 1e-9))


def _values_at(folder: Path, step: float, k: int) -> np.ndarray:
    """pass@k per question at a step between two evaluations, on the straight line between them."""
    evaluated = evaluated_steps(folder)
    after = next((other for other in evaluated if other >= step), evaluated[-1])
    before = max((other for other in evaluated if other <= step), default=after)
    share = ratio(step - before, after - before) if after > before else 0.0
    left, right = (pass_at_k(*read_counts(folder, "test", other), k) for other in (before, after))
    return left + share * (right - left)


def evaluated_steps(folder: Path) -> list[int]:
    """The steps after which a run measured the test questions."""
    return sorted(int(path.stem.split("_")[1]) for path in (folder / "evaluations").glob("test_*.json"))


def _figure(values: np.ndarray, first: np.ndarray, samples: int) -> dict[str, Any]:
    level: Estimate = two_level_difference(values, samples=samples)
    difference: Estimate = two_level_difference(values - first, samples=samples)
    return {
        "value": level.value,
        "ci95": [level.low, level.high],
        "per_seed": [ratio(float(row.sum()), row.size) for row in values],
        "minus_first": difference.value,
        "minus_first_ci95": [difference.low, difference.high],
    }


def as_table(report: dict[str, Any], ks: Sequence[int]) -> str:
    """The report as a Markdown table, in per cent."""
    names = [f"pass@{k}" for k in ks]
    first = report["first_arm"]
    lines = [
        "| equal | arm | steps | " + " | ".join(f"{name} | minus {first}" for name in names) + " |",
        "|---|---|---|" + "---|---|" * len(names),
        "| - | base | 0 | "
        + " | ".join(
            _interval(report["base"][n]["value"], report["base"][n]["low"], report["base"][n]["high"]) + " | "
            for n in names
        )
        + "|",
    ]
    for axis, arms in report["figures"].items():
        for arm, row in arms.items():
            cells = [
                f"{_interval(row[name]['value'], *row[name]['ci95'])} | "
                + (
                    ""
                    if arm == first
                    else _interval(row[name]["minus_first"], *row[name]["minus_first_ci95"], sign=True)
                )
                for name in names
            ]
            steps = [
                f"{step:.0f}{'*' if short else ''}"
                for step, short in zip(row["steps"], row["ended_before"], strict=True)
            ]
            lines.append(f"| {axis} | {arm} | {', '.join(steps)} | {' | '.join(cells)} |")
    if any(any(row["ended_before"]) for arms in report["figures"].values() for row in arms.values()):
        lines.append("\n`*` the run ended before it had spent this budget and is read at its end.")
    return "\n".join(lines)


def _interval(value: float, low: float, high: float, *, sign: bool = False) -> str:
    form = "+.1f" if sign else ".1f"
    return f"{100 * value:{form}} [{100 * low:{form}}, {100 * high:{form}}]"


def plot(folders: dict[tuple[str, int], Path], arms: Sequence[str], ks: Sequence[int], path: Path) -> None:
    """pass@k against each budget, one thin line per seed, the arm's colour shared."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(4.2 * len(BUDGETS), 3.2 * len(ks)))
    axes = figure.subplots(len(ks), len(BUDGETS), squeeze=False)
    colours = {arm: f"C{place}" for place, arm in enumerate(arms)}
    for (arm, _), folder in folders.items():
        spent = read_spent(folder)
        evaluated = evaluated_steps(folder)
        for row, k in enumerate(ks):
            heights = []
            for step in evaluated:
                values = pass_at_k(*read_counts(folder, "test", step), k)
                heights.append(100 * ratio(float(values.sum()), values.size))
            for column, axis in enumerate(BUDGETS):
                axes[row][column].plot(getattr(spent, axis)[evaluated], heights, color=colours[arm], alpha=0.8, lw=1.2)
                axes[row][column].set(xlabel=axis, ylabel=f"test pass@{k}, %")
    handles = [Line2D([], [], color=colours[arm], label=arm) for arm in arms]
    figure.legend(handles=handles, loc="upper center", ncols=len(arms), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(path, dpi=120)
