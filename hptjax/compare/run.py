"""The runs of a comparison, one after the other; what is finished is not run again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hptjax import build
from hptjax.build.method import build_recipe
from hptjax.compare.arms import Budget, Choice, arm_config, budget_of, choices, chosen_arms
from hptjax.compare.plots import plot
from hptjax.compare.report import REPORT, read_off
from hptjax.compare.spent import step_within, values_at
from hptjax.compare.text import as_text
from hptjax.config import Config
from hptjax.config_batch import stage_list
from hptjax.config_eval import CompareArm
from hptjax.masked import mean
from hptjax.rundir import read_json, write_json

TUNING_SEED = 1_000  # added to the first seed, so that no run that counts has chosen its own settings


def compare(config: Config, *, arms: Sequence[str] | None = None, seeds: int | None = None) -> dict[str, Any]:
    """Runs what is not yet finished, seed by seed and arm by arm, and writes table.md, compare.json and plot.png.

    The first arm sets the budget of its seed. Each run is an ordinary run folder under `runs/<name>-compare/`, so an
    interrupted comparison continues.

    Args
      arms, seeds: instead of those of the config's `compare` section.
    Raises ValueError for an unknown arm, KeyboardInterrupt when it was asked to stop; the run under way is then saved.
    """
    chosen, seeds = chosen_arms(config, arms), config.compare.seeds if seeds is None else seeds
    root = Path(config.runs_dir) / f"{config.name}-compare"
    for arm in chosen:  # the last arm's mistake is found before the first arm runs
        choice = choices(config, arm)[0]
        made = arm_config(config, arm, choice, seed=config.seed, root=root, name=arm.name, budget=None)
        build_recipe(made, arm.method, made.data.questions_per_step)
    tuned: dict[str, Choice] = {}
    for seed in range(config.seed, config.seed + seeds):
        budget: Budget | None = None
        for arm in chosen:
            if arm.name not in tuned:
                tuned[arm.name] = _tuned(config, arm, root, budget)
            name = f"{arm.name}-seed{seed}"
            _train(arm_config(config, arm, tuned[arm.name], seed=seed, root=root, name=name, budget=budget))
            if budget is None:
                budget = budget_of(root / name, config)
    report = read_off(
        root,
        [arm.name for arm in chosen],
        range(config.seed, config.seed + seeds),
        ks=config.eval.ks,
        metric=config.compare.metric,
        axis=config.compare.axis,
    )
    report["tuned"] = {name: dataclasses.asdict(choice) for name, choice in tuned.items()}
    write_json(root / REPORT, report)
    text = as_text(report)
    (root / "table.md").write_text(text + "\n", encoding="utf-8")
    plot(root, report, root / "plot.png")
    print(f"{text}\n\ntables, figures and plot: {root}")
    return report


def _train(config: Config) -> None:
    """One run of the comparison."""
    stages = " then ".join(f"{stage.steps} steps of {stage.method}" for stage in stage_list(config))
    print(f"{config.name}: {stages}", flush=True)
    try:
        summary = build.train(config, quiet=True)
    except SystemExit:  # asked to stop, and saved
        raise KeyboardInterrupt from None
    final = ", ".join(f"pass@{k} {100 * summary['final'][f'pass@{k}']['value']:.1f} %" for k in config.eval.ks)
    print(f"  test {final}; {summary['seconds']:.0f} s", flush=True)


def _tuned(config: Config, arm: CompareArm, root: Path, budget: Budget | None) -> Choice:
    """The only choice that the arm leaves, or the best on validation questions.

    The candidates run with a seed of their own and are read where they had spent the first arm's budget on
    `compare.axis`, the first arm's at their end; `compare.metric` decides, the gentler one where two are equal. The
    choice is kept in tuning.json.
    """
    candidates = choices(config, arm)
    if len(candidates) == 1:
        return candidates[0]
    seed, k = config.seed + TUNING_SEED, int(config.compare.metric.removeprefix("pass@"))
    found: dict[Choice, float] = {}
    for choice in candidates:
        made = arm_config(
            config, arm, choice, seed=seed, root=root, name=f"{arm.name}-{choice}", budget=budget, tuning=True
        )
        _train(made)
        folder, axis = root / made.name, config.compare.axis
        spent = math.inf if budget is None else budget.total[axis]
        found[choice] = mean(np.asarray(values_at(folder, step_within(folder, spent, axis), k, "validation")))
    best = max(candidates, key=found.__getitem__)
    tuning, named = root / "tuning.json", {str(choice): value for choice, value in found.items()}
    kept = read_json(tuning) if tuning.exists() else {}
    write_json(tuning, kept | {arm.name: {"chosen": str(best), "found": named}})
    print(f"{arm.name}: {best} is the best on validation questions: {named}", flush=True)
    return best
