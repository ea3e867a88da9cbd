"""What can be set: every field of a run, its default (the quickstart's) and its meaning.

The sections stand in modules of their own, by subject: `config_model`, `config_lora`, `config_data`, `config_rollout`
(with `config_server`), `config_objective`, `config_methods`, `config_train`, `config_eval`, `config_mesh`.

A TOML file in `configs/` sets fields by section; the command line sets any of them again (`--train.steps 50`).
`hptjax.config_load` reads both, `hptjax.config_check` compares fields with each other. Only the composition root
(`hptjax.build`) and the commands see a `Config`; everything below takes plain values.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Any

from hptjax.config_data import DataConfig, PromptConfig, TaskConfig
from hptjax.config_eval import CompareConfig, EvalConfig
from hptjax.config_lora import LoraConfig
from hptjax.config_mesh import DistributedConfig, MeshConfig
from hptjax.config_methods import MethodName, MethodsConfig
from hptjax.config_model import ModelConfig
from hptjax.config_objective import HptConfig
from hptjax.config_rollout import RewardConfig, RolloutConfig
from hptjax.config_text import struct_list
from hptjax.config_train import (
    BatchConfig,
    CheckpointConfig,
    OptimizerConfig,
    StageConfig,
    TelemetryConfig,
    TrainConfig,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run: where it starts, what it learns from, how, and for how long."""

    name: str = "quickstart"  # the run folder is `runs_dir`/`name`
    seed: int = 0
    method: MethodName = "hpt"  # of the last stage; `hptjax methods` lists them
    stages: Annotated[tuple[StageConfig, ...], struct_list(StageConfig)] = ()  # stages before the last one
    runs_dir: str = "runs"
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    prompt: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    hpt: HptConfig = dataclasses.field(default_factory=HptConfig)
    methods: MethodsConfig = dataclasses.field(default_factory=MethodsConfig)
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    compare: CompareConfig = dataclasses.field(default_factory=CompareConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    telemetry: TelemetryConfig = dataclasses.field(default_factory=TelemetryConfig)


# A run folder may be opened again with these changed. None of them reaches a number that the run computes, but for the
# mesh and the processes: after a move to other devices counts stay exact, summed gradients agree within rounding
# (accumulation spec 3.6) and not to the bit, and a token sampled near a tie may differ. A server may move, and be
# reached otherwise; that it samples, and what it is told beside, may not change.
SERVER_MAY_CHANGE = "url model weights_folder updates concurrency attempts timeout_s update_timeout_s api_key_env"
MAY_CHANGE = (
    *("telemetry.", "compare.", "runs_dir", "train.log_every", "mesh.", "distributed."),
    *(f"rollout.server.{name}" for name in SERVER_MAY_CHANGE.split()),
)


def resolved(config: Config) -> dict[str, Any]:
    """Every field with its value, as JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The fields that differ between two resolved configs, as `"hpt.gate: 0 -> 1"`; sorted.

    Fields that may change within a run folder (`MAY_CHANGE`) are left out, and so are switches that the old config did
    not have yet and that are off; and nothing is listed where all that changed is a larger `train.steps` and neither a
    schedule nor the last step's rollouts depend on it: the steps so far are those of the longer run, too.
    """
    before, after = flatten(old), flatten(new)
    before = {name: False for name, value in after.items() if value is False} | before
    names = sorted(before.keys() | after.keys())
    changed = [name for name in names if not name.startswith(MAY_CHANGE) and before.get(name) != after.get(name)]
    fixed = after.get("optimizer.schedule") == "constant" or after.get("optimizer.decay_steps") is not None
    fixed = fixed and not after.get("train.rollouts_ahead")  # the last step makes none for a next one
    if changed == ["train.steps"] and fixed and before.get("train.steps", 0) < after["train.steps"]:
        return []
    return [f"{name}: {json.dumps(before.get(name))} -> {json.dumps(after.get(name))}" for name in changed]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keyed by dotted path. Lists are leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
