"""The runs of a comparison, one after the other; what is finished is not run again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hptjax import build
from hptjax.build.method import build_recipe
from hptjax.compare.arms import Budget, arm_config, budget_of, chosen_arms
from hptjax.compare.plots import plot
from hptjax.compare.report import read_off
from hptjax.compare.spent import step_within, values_at
from hptjax.compare.text import as_text
from hptjax.config import CompareArm, Config
from hptjax.config_batch import stage_list
from hptjax.masked import mean
from hptjax.rundir import read_json, write_json

TUNING_SEED = 1_000  # added to the first seed, so that no run that counts has chosen its own split


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
        made = arm_config(config, arm, seed=config.seed, root=root, name=arm.name, budget=None)
        build_recipe(made, arm.method, made.data.questions_per_step)
    folders: dict[tuple[str, int], Path] = {}
    shares: dict[str, float] = {}
    for seed in range(config.seed, config.seed + seeds):
        budget: Budget | None = None
        for arm in chosen:
            if arm.name not in shares:
                shares[arm.name] = _sft_share(config, arm, root, budget)
            name = f"{arm.name}-seed{seed}"
            folders[arm.name, seed] = root / name
            _train(config, arm, seed, root, name, budget, shares[arm.name])
            if budget is None:
                budget = budget_of(root / name, config)
    names = [arm.name for arm in chosen]
    report = read_off(folders, names, range(config.seed, config.seed + seeds), config)
    report["sft_share"] = {name: share for name, share in shares.items() if share}
    write_json(root / "compare.json", report)
    text = as_text(report)
    (root / "table.md").write_text(text + "\n", encoding="utf-8")
    plot(folders, names, config.eval.ks, root / "plot.png")
    print(f"{text}\n\ntables, figures and plot: {root}")
    return report


def _train(
    config: Config, arm: CompareArm, seed: int, root: Path, name: str, budget: Budget | None, share: float
) -> None:
    made = arm_config(config, arm, seed=seed, root=root, name=name, budget=budget, sft_share=share)
    print(
        f"{name}: " + " then ".join(f"{stage.steps} steps of {stage.method}" for stage in stage_list(made)), flush=True
    )
    try:
        summary = build.train(made, quiet=True)
    except SystemExit:  # asked to stop, and saved
        raise KeyboardInterrupt from None
    final = ", ".join(f"pass@{k} {100 * summary['final'][f'pass@{k}']['value']:.1f} %" for k in config.eval.ks)
    print(f"  test {final}; {summary['seconds']:.0f} s", flush=True)


def _sft_share(config: Config, arm: CompareArm, root: Path, budget: Budget | None) -> float:
    """The share of SFT before the arm's method: the only one it has, or the best of them on validation questions.

    The candidates run with a seed of their own and are read where they had spent the first arm's budget on
    `compare.axis`; `compare.metric` decides, the smaller share where two are equal. The choice is kept in tuning.json.
    """
    if len(arm.sft_share) <= 1:
        return arm.sft_share[0] if arm.sft_share else 0.0
    if budget is None:
        raise ValueError(
            f"expected a first arm that sets the budget, got {arm.name!r}, whose sft_share is to be tuned within it; "
            "change the order of compare.arms."
        )
    seed, k = config.seed + TUNING_SEED, int(config.compare.metric.removeprefix("pass@"))
    found: dict[str, float] = {}
    for share in sorted(arm.sft_share):
        name = f"{arm.name}-tuning-{share:g}"
        _train(config, arm, seed, root, name, budget, share)
        step = step_within(root / name, budget.total[config.compare.axis], config.compare.axis)
        found[f"{share:g}"] = mean(np.asarray(values_at(root / name, step, k, "validation")))
    best = max(sorted(arm.sft_share), key=lambda share: found[f"{share:g}"])
    tuning = root / "tuning.json"
    write_json(tuning, (read_json(tuning) if tuning.exists() else {}) | {arm.name: {"chosen": best, "found": found}})
    print(f"{arm.name}: {best:g} of the steps as SFT is the best on validation questions: {found}", flush=True)
    return best
