"""How much a step and an update of a config hold, by arithmetic alone."""

from __future__ import annotations

import dataclasses
import math

from hptjax.config import Config, ScheduleKind, StageConfig
from hptjax.config_methods import APART, samples_per_question

# up to here `model.attention = "auto"` takes the plain form: its [B H T T] scores are small, and it is the fastest
SHORT_ROW_TOKENS = 1024

MESH_AXES = ("replica", "data", "fsdp", "sequence", "tensor")  # as `sharding.rules.AXES`, which loads jax


def stage_list(config: Config) -> list[StageConfig]:
    """The stages before the last one and the last one, which `method` and `train.steps` describe."""
    return [*config.stages, StageConfig(method=config.method, steps=config.train.steps)]


@dataclasses.dataclass(frozen=True)
class StageSchedule:
    """The learning rate of a stage over its optimizer steps."""

    kind: ScheduleKind
    learning_rate: float
    warmup_steps: int
    end_fraction: float
    decay_steps: int


def schedule_of(config: Config, stage: StageConfig) -> StageSchedule:
    """The stage's own settings where it has any, the optimizer's where not."""
    optimizer = config.optimizer
    updates = stage.steps * config.train.updates_per_rollout_batch
    return StageSchedule(
        kind=stage.schedule or optimizer.schedule,
        learning_rate=optimizer.learning_rate if stage.learning_rate is None else stage.learning_rate,
        warmup_steps=optimizer.warmup_steps if stage.warmup_steps is None else stage.warmup_steps,
        end_fraction=optimizer.end_fraction if stage.end_fraction is None else stage.end_fraction,
        decay_steps=updates if stage.schedule is not None else optimizer.decay_steps or updates,
    )


def steps_of(config: Config) -> list[tuple[str, str, int]]:
    """(where it is set, method, questions per step) of every stage, the last one included."""
    questions = config.data.questions_per_step
    stages = [
        (f"stages.{i}", stage.method, stage.questions_per_step or questions) for i, stage in enumerate(config.stages)
    ]
    return [*stages, ("the last stage", config.method, questions)]


def samples_per_update(config: Config, *, method: str, questions: int) -> int:
    """The most samples an update of `method` can hold: by what a question can leave."""
    per_question = samples_per_question(method, config.rollout.group_size)
    apart = config.methods.relift_buffer if method in APART else 0
    return max(questions // config.train.updates_per_rollout_batch * per_question, apart)


def micro_batches_needed(config: Config, *, samples: int, bundle: int = 1) -> int:
    """Micro-batches that hold `samples` samples of the greatest length, packed by any rule that fills open rows.

    Samples come in bundles of `bundle` that share a row.

    A row that refuses a sample of at most `longest` tokens already holds `row_tokens // longest` samples (or
    `max_segments`), so ceil(samples / that) rows are enough whatever the lengths are.
    """
    longest = bundle * (config.data.max_prompt_tokens + config.rollout.max_completion_tokens)
    per_row = min(config.batch.max_segments // bundle, config.batch.row_tokens // longest)
    return math.ceil(math.ceil(samples / bundle / per_row) / config.batch.rows)


def mesh_sizes(config: Config) -> dict[str, int]:
    """Mesh axis -> devices along it, in the order of the mesh."""
    return {axis: getattr(config.mesh, axis) for axis in MESH_AXES}


def mesh_devices(config: Config) -> int:
    """How many devices the mesh has."""
    return math.prod(mesh_sizes(config).values())


def mesh_words(config: Config) -> str:
    """The mesh as a reader sees it, such as `mesh.data 4 x mesh.tensor 2`."""
    sizes = {axis: size for axis, size in mesh_sizes(config).items() if size > 1}
    return " x ".join(f"mesh.{axis} {size}" for axis, size in sizes.items()) or "mesh.data 1"
