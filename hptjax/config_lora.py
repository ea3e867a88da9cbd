"""The fields of low-rank adapters, and what they exclude."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from hptjax.config_problem import Problem

LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: they alone are trained, beside the model of `model.path`. Off without rank or adapter."""

    rank: int | None = None  # of every adapter; None: that of lora.adapter, or no adapters
    alpha: float | None = None  # the product of the factors counts alpha / rank; None: 2 x rank, or lora.adapter's
    rank_stabilised: bool | None = None  # it counts alpha / sqrt(rank); None: as lora.adapter has it, else it does not
    targets: tuple[LoraTarget, ...] | None = None  # matrices that have one; None: all seven, or lora.adapter's
    adapter: str | None = None  # folder of a PEFT adapter that the run starts from

    @property
    def on(self) -> bool:
        """Whether adapters are trained, and not the model."""
        return self.rank is not None or self.adapter is not None


def lora_problems(lora: LoraConfig, *, has_model: bool) -> Iterator[Problem]:
    """What is wrong with these fields; `has_model`: there is a model for the adapters."""
    if lora.on and not has_model:
        yield "a model folder that the adapters belong to", "none", "model.path or lora.rank"
    given = {"alpha": lora.alpha, "rank_stabilised": lora.rank_stabilised, "targets": lora.targets}
    beside = [name for name, value in given.items() if value is not None]
    if not lora.on and beside:
        yield f"lora.rank beside lora.{beside[0]}", "none", "lora.rank"
    if lora.rank is not None and lora.rank < 1:
        yield "lora.rank of at least 1", f"{lora.rank}", "lora.rank"
    if lora.alpha is not None and not 0 < lora.alpha < float("inf"):
        yield "lora.alpha above 0", f"{lora.alpha}", "lora.alpha"
    if lora.targets is not None and (not lora.targets or len(set(lora.targets)) < len(lora.targets)):
        yield "distinct names in lora.targets", f"{list(lora.targets)}", "lora.targets"
