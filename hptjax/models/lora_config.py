"""What an adapter is but its numbers: rank, alpha and targets, as `adapter_config.json` of PEFT has them. No jax."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from hptjax.models.folder_config import ADAPTER_CONFIG, read_json

TARGETS: Mapping[str, tuple[str, int]] = {  # name of the module -> name of its matrix here, and its input axes
    "q_proj": ("query", 1),
    "k_proj": ("key", 1),
    "v_proj": ("value", 1),
    "o_proj": ("output", 2),
    "gate_proj": ("gate", 1),
    "up_proj": ("up", 1),
    "down_proj": ("down", 1),
}
# What each of these must say. Among the starts of PEFT, those that are not here change the weights of the base model,
# so that the adapter would not belong to the model in its folder (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA).
ONLY: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "use_rslora": (False, True, None),
}
# What says nothing about the numbers: where it comes from, how it was trained, defaults of parts that are off.
WITHOUT_EFFECT = frozenset(
    """r lora_alpha target_modules lora_dropout base_model_name_or_path revision auto_mapping inference_mode
    peft_version runtime_config megatron_core qalora_group_size layers_pattern eva_config""".split()
)
OFF: tuple[Any, ...] = (None, False, "", [], {})  # what every other field must say: DoRA, biases, patterns of ranks ...


@dataclasses.dataclass(frozen=True)
class AdapterShape:
    """What an adapter is but its numbers: rank, alpha, and the modules that have one, in the order of `TARGETS`.

    Source: rank_stabilised: Kalajdzievski 2023, 2312.03732; `use_rslora` of PEFT.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rank_stabilised: bool = False

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied with: alpha / rank, or alpha / sqrt(rank) if stabilised."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


def read_adapter_shape(path: str | os.PathLike[str]) -> AdapterShape:
    """The shape of the adapter in a PEFT folder.

    Raises no such file -> FileNotFoundError; another kind of adapter, or one with parts that we lack or do not know,
    -> ValueError that names the field.
    """
    file = pathlib.Path(path) / ADAPTER_CONFIG
    if not os.path.isfile(file):
        raise FileNotFoundError(f"expected {ADAPTER_CONFIG} in {file.parent}, found none; change lora.adapter")
    raw = read_json(file)
    for field, value in raw.items():
        if field not in WITHOUT_EFFECT and value not in ONLY.get(field, OFF):
            wanted = " or ".join(repr(allowed) for allowed in ONLY.get(field, (None,)) if allowed is not None) or "none"
            raise ValueError(
                f"{file}: adapters here need {field} to be {wanted}, got {str(value)[:100]!r}; change lora.adapter"
            )
    if "peft_type" not in raw:
        raise ValueError(f"{file}: expected peft_type 'LORA', got none; change lora.adapter")
    targets: Any = raw.get("target_modules")
    rank: Any = raw.get("r")
    alpha: Any = raw.get("lora_alpha")
    listed = isinstance(targets, list) and bool(targets)
    wrong = [name for name in targets if not isinstance(name, str) or name not in TARGETS] if listed else targets
    if not isinstance(targets, list) or wrong or not targets:
        raise ValueError(
            f"{file}: target_modules must list some of {', '.join(TARGETS)}, got {wrong!r}; change lora.adapter"
        )
    ranked = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    scaled = isinstance(alpha, int | float) and not isinstance(alpha, bool) and 0 < alpha <= sys.float_info.max
    if not ranked or not scaled:
        raise ValueError(
            f"{file}: expected r of at least 1 and lora_alpha above 0, got {rank!r} and {alpha!r}; change lora.adapter"
        )
    stabilised = bool(raw.get("use_rslora"))
    return AdapterShape(rank, float(alpha), tuple(name for name in TARGETS if name in targets), stabilised)


def adapter_config(shape: AdapterShape, base: str | None) -> dict[str, Any]:
    """`adapter_config.json` of an adapter; `base` is the folder or name of its model."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": shape.rank,
        "lora_alpha": shape.alpha,
        "target_modules": list(shape.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": shape.rank_stabilised,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
