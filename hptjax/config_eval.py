"""What is measured on held-out questions, and what `hptjax compare` compares."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from hptjax.config_methods import MethodName
from hptjax.config_text import struct_list


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation."""

    questions: int = 128  # validation questions of an evaluation during the run
    samples_per_question: int = 8
    temperature: float = 1.0
    top_p: float = 1.0  # 1: off
    train_questions: int = 128  # training questions evaluated beside them at the start and the end
    ks: tuple[int, ...] = (1, 8)  # pass@k
    test_steps: tuple[int, ...] = ()  # test questions are also measured after these steps; they choose nothing


@dataclasses.dataclass(frozen=True)
class CompareArm:
    """One arm of `hptjax compare`; of several learning rates and shares the best on validation questions is taken."""

    name: str
    method: MethodName
    gate: int | None = None  # None: hpt.gate
    learning_rate: tuple[float, ...] = ()  # of the method's own steps; none: optimizer.learning_rate
    sft_share: tuple[float, ...] = ()  # SFT steps before the method's, as a share of them
    sft_learning_rate: float | None = None  # of these steps; None: as the method's


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """`hptjax compare`: what is compared, and by which figure, said before anything runs."""

    arms: Annotated[tuple[CompareArm, ...], struct_list(CompareArm)] = (
        CompareArm("hpt", "hpt"),
        CompareArm("sft", "sft"),
        CompareArm("dr_grpo", "dr_grpo"),
        CompareArm("sft_then_rl", "dr_grpo", sft_share=(0.5,)),
    )  # the first one sets the budgets
    seeds: int = 3
    metric: str = "pass@1"  # the figure that counts; its k is one of eval.ks
    axis: Literal["updates", "tokens", "flops"] = "flops"  # the budget that counts
