"""The figures of a comparison, read off the finished runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hptjax.build.evaluation import read_counts, read_halves, read_levels
from hptjax.compare.spent import (
    AXES,
    ended_before,
    evaluated_steps,
    nearest_evaluation,
    read_spent,
    step_within,
    values_at,
)
from hptjax.compare.transitions import exclusive, forgetting, transitions
from hptjax.diagnostics.intervals import estimate_mean, two_level_difference
from hptjax.diagnostics.passk import pass_at_k
from hptjax.masked import mean, ratio
from hptjax.rundir import read_json

Folders = Mapping[tuple[str, int], Path]
REPORT = "compare.json"  # of a comparison, in its folder


def folders_of(root: Path, arms: Sequence[str], seeds: Sequence[int]) -> dict[tuple[str, int], Path]:
    """Where each run that counts lies."""
    return {(arm, seed): root / f"{arm}-seed{seed}" for seed in seeds for arm in arms}


def read_off(
    root: Path, arms: Sequence[str], seeds: Sequence[int], *, ks: Sequence[int], metric: str, axis: str
) -> dict[str, Any]:
    """Every arm's pass@k within each budget, each seed's value, the difference to the first arm, and what was lost.

    Args
      arms: the first one set the budgets. metric, axis: the figure and the budget that count, said before the runs.
    """
    folders, first, counts_by = folders_of(root, arms, seeds), arms[0], {"metric": metric, "axis": axis}
    totals = {seed: read_spent(folders[first, seed]).total() for seed in seeds}
    steps = {
        axis: {arm: [step_within(folders[arm, seed], totals[seed][axis], axis) for seed in seeds] for arm in arms}
        for axis in AXES
    }
    counts, samples = read_counts(folders[first, seeds[0]], "test", 0)
    figures = {}
    for axis in AXES:
        values = {
            (arm, k): np.stack(
                [values_at(folders[arm, seed], at, k) for seed, at in zip(seeds, steps[axis][arm], strict=True)]
            )
            for arm in arms
            for k in ks
        }  # [S Q] each
        figures[axis] = {
            arm: {
                "steps": steps[axis][arm],
                "ended_before": [ended_before(folders[arm, seed], totals[seed][axis], axis) for seed in seeds],
                **{f"pass@{k}": _figure(values[arm, k], values[first, k], samples) for k in ks},
            }
            for arm in arms
        }
    return {
        "first_arm": first,
        "seeds": list(seeds),
        "ks": list(ks),
        "counts_by": counts_by,
        "base": {
            f"pass@{k}": dataclasses.asdict(estimate_mean(pass_at_k(counts, samples, k), samples=samples)) for k in ks
        },
        "figures": figures,
        "seconds": {f"{arm}-seed{seed}": _seconds(folder) for (arm, seed), folder in folders.items()},
        "spent": {f"{arm}-seed{seed}": read_spent(folder).total() for (arm, seed), folder in folders.items()},
        "questions": _questions(folders, arms, seeds, steps[counts_by["axis"]]),
    }


def _seconds(folder: Path) -> float:
    """The wall time of a run, s."""
    return float(read_json(folder / "summary.json")["seconds"])


def _figure(values: np.ndarray, first: np.ndarray, samples: int) -> dict[str, Any]:
    level = two_level_difference(values, samples=samples)
    difference = two_level_difference(values - first, samples=samples)
    return {
        "value": level.value,
        "ci95": [level.low, level.high],
        "per_seed": [ratio(float(row.sum()), row.size) for row in values],
        "minus_first": difference.value,
        "minus_first_ci95": [difference.low, difference.high],
    }


def _questions(
    folders: Folders, arms: Sequence[str], seeds: Sequence[int], steps: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Per arm and seed: what became of the questions since the base, what the arm alone solves, what it forgot.

    At the evaluation nearest to the budget that counts, because single questions cannot be read between two.
    """
    found: dict[str, Any] = {arm: {"transitions": [], "exclusive": [], "forgotten": []} for arm in arms}
    for place, seed in enumerate(seeds):
        at = {arm: nearest_evaluation(folders[arm, seed], steps[arm][place]) for arm in arms}
        counts = {arm: read_counts(folders[arm, seed], "test", at[arm])[0] for arm in arms}
        alone = exclusive(counts)
        for arm in arms:
            folder = folders[arm, seed]
            base, samples = read_counts(folder, "test", 0)
            levels = read_levels(folder, "test", 0)
            halves = [read_halves(folder, "test", step) for step in evaluated_steps(folder) if step <= at[arm]]
            found[arm]["transitions"].append(transitions(base, counts[arm], samples, levels))
            found[arm]["exclusive"].append(alone[arm])
            found[arm]["forgotten"].append(
                forgetting([half for half, _ in halves], [half for _, half in halves], samples // 2)
            )
    return {arm: entry | {"forgotten_mean": mean(np.asarray(entry["forgotten"]))} for arm, entry in found.items()}
