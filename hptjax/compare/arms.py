"""The arms of a comparison: a method with what is changed for it, and the config of one of its runs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from hptjax.compare.spent import read_spent
from hptjax.config import Config, StageConfig
from hptjax.config_check import check
from hptjax.config_eval import CompareArm
from hptjax.config_methods import FROM_DEMONSTRATIONS, MethodName

POINTS = 8  # evaluations per run, beside those at the budgets
SFT_THEN_RL = CompareArm(name="sft_then_rl", method="dr_grpo", sft_share=(0.5,))


@dataclasses.dataclass(frozen=True)
class Budget:
    """What the first arm spent, and what one step of an arm that samples nothing takes of it."""

    total: dict[str, float]
    sft_step: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is tuned of an arm: the learning rate of its method, and the share of SFT steps before it."""

    learning_rate: float
    sft_share: float = 0.0

    def __str__(self) -> str:
        return f"lr{self.learning_rate:g}" + (f"-sft{self.sft_share:g}" if self.sft_share else "")


def choices(config: Config, arm: CompareArm) -> list[Choice]:
    """Every choice that an arm leaves open, the gentlest first; one where it leaves none."""
    return [
        Choice(rate, share)
        for rate in sorted(arm.learning_rate or (config.optimizer.learning_rate,))
        for share in sorted(arm.sft_share or (0.0,))
    ]


def chosen_arms(config: Config, names: Sequence[str] | None) -> list[CompareArm]:
    """The arms by name: those of the config, any method by its own name, and sft_then_rl. None: all of the config.

    Raises no arms, an unknown name, or two arms of one name -> ValueError.
    """
    known = {arm.name: arm for arm in config.compare.arms}
    names = list(known) if names is None else list(names)
    if not names:
        raise ValueError("expected arms to compare, got none; list them in compare.arms, or give --arms.")
    if len(set(names)) < len(names) or len(known) < len(config.compare.arms):
        raise ValueError(f"expected arms with distinct names, got {', '.join(names)}; change compare.arms or --arms.")
    methods = {name: CompareArm(name=name, method=name) for name in get_args(MethodName)}
    every = {**methods, SFT_THEN_RL.name: SFT_THEN_RL, **known}
    unknown = [name for name in names if name not in every]
    if unknown:
        raise ValueError(
            f"expected arms among those of compare.arms ({', '.join(known) or 'none'}), sft_then_rl and the methods, "
            f"got {', '.join(unknown)}; change --arms."
        )
    return [every[name] for name in names]


def arm_config(
    config: Config,
    arm: CompareArm,
    choice: Choice,
    *,
    seed: int,
    root: Path,
    name: str,
    budget: Budget | None,
    tuning: bool = False,
) -> Config:
    """The config of one run: method and stages of the arm, as long as its largest budget asks.

    Args
      budget: None for the first arm, which sets it.
      tuning: a run that only chooses; it measures validation questions, and test questions at its ends alone.
    """
    steps = config.train.steps
    per_step = config.train.updates_per_rollout_batch
    exact = set() if budget is None else {steps}
    if budget is not None and arm.method in FROM_DEMONSTRATIONS:
        needed = {"updates": budget.total["updates"] / per_step}
        needed |= {axis: budget.total[axis] / budget.sft_step[axis] for axis in ("tokens", "flops")}
        steps = math.ceil(max(needed.values()))
        exact |= {int(needed[axis]) for axis in ("tokens", "flops")}
    stages: tuple[StageConfig, ...] = ()
    if choice.sft_share:
        first_steps = max(1, round(steps * choice.sft_share))
        stages = (StageConfig(method="sft", steps=first_steps, learning_rate=arm.sft_learning_rate),)
    total = steps + sum(stage.steps for stage in stages)
    measured = {round(total * point / POINTS) for point in range(1, POINTS + 1)} | exact
    made = dataclasses.replace(
        config,
        name=name,
        seed=seed,
        runs_dir=str(root),
        method=arm.method,
        stages=stages,
        hpt=config.hpt if arm.gate is None else dataclasses.replace(config.hpt, gate=arm.gate),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=choice.learning_rate),
        train=dataclasses.replace(
            config.train,
            steps=steps,
            eval_every=max(1, total // POINTS) if tuning else 0,
            rollouts_every=0,
            probe_every=0,
        ),
        eval=dataclasses.replace(config.eval, test_steps=() if tuning else tuple(sorted(measured)), train_questions=0),
        checkpoint=dataclasses.replace(config.checkpoint, export_folder=None),
        telemetry=dataclasses.replace(config.telemetry, tensorboard=False, wandb=False, progress=False),
    )
    check(made)
    return made


def budget_of(folder: Path, config: Config) -> Budget:
    """The budget that a finished run of the first arm sets.

    A step that trains one demonstration per question is counted from the data's mean lengths.
    """
    record = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    questions = config.data.questions_per_step
    trained = questions * record["mean_demonstration_tokens"]
    packed = questions * (record["mean_demonstration_tokens"] + record["mean_prompt_tokens"] - 1)
    return Budget(
        total=read_spent(folder).total(),
        sft_step={"tokens": trained, "flops": 6.0 * record["parameters"] * packed},
    )
