"""How much a step and an update of a config hold, by arithmetic alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from hptjax.config import Config, StageConfig
from hptjax.config_methods import (
    APART,
    BESIDE_A_GROUP,
    GATED,
    IN_A_GROUP,
    PAIRED,
    learns_from_rollouts,
    samples_per_question,
)
from hptjax.config_train import ScheduleKind

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


def stage_alone(config: Config, stage: StageConfig) -> Config:
    """The config of a run that is this stage and no other."""
    data = dataclasses.replace(
        config.data, questions_per_step=stage.questions_per_step or config.data.questions_per_step
    )
    chosen = schedule_of(config, stage)
    optimizer = dataclasses.replace(
        config.optimizer,
        schedule=chosen.kind,
        learning_rate=chosen.learning_rate,
        warmup_steps=chosen.warmup_steps,
        end_fraction=chosen.end_fraction,
        decay_steps=chosen.decay_steps,
    )
    train = dataclasses.replace(config.train, steps=stage.steps)
    return dataclasses.replace(config, method=stage.method, stages=(), data=data, optimizer=optimizer, train=train)


def rollouts_sampled(config: Config, method: str) -> tuple[int, int]:
    """The fewest and the most rollouts that a visit to a question of `method` samples, prefixes counted as sampled."""
    group = config.rollout.group_size - int(method in IN_A_GROUP) if learns_from_rollouts(method) else 0
    return group, group * (config.methods.dapo_draws if method == "dapo" else 1)


def samples_left(config: Config, method: str) -> tuple[tuple[int, int], ...]:
    """What a visit to a question of `method` can leave to train on: (rollouts, demonstrations), each way it can go.

    Demonstrations that wait for an update of their own (relift) are counted with the visit. The routes of
    `hpt/route.py` decide; this is what is known of them before there are any verdicts.
    """
    group, _ = rollouts_sampled(config, method)
    if not group:
        return ((0, 1),)
    if method in GATED:
        gate = max(config.hpt.gate, config.methods.gate_off) if method == "hpt_off_band" else config.hpt.gate
        ways = [(0, 1)] * (gate >= 0) + [(group, 0)] * (gate < group)
        return tuple(ways)
    if method in BESIDE_A_GROUP | IN_A_GROUP:
        return ((group, 1),)
    if method in APART:
        return ((group, 0), (group, 1))
    may_leave_nothing = method in PAIRED or method == "dapo"
    return ((0, 0), (group, 0)) if may_leave_nothing else ((group, 0),)


def samples_per_update(config: Config, *, method: str, questions: int) -> int:
    """The most samples an update of `method` can hold: by what a question can leave."""
    per_question = samples_per_question(method, config.rollout.group_size)
    apart = config.methods.relift_buffer if method in APART else 0
    return max(questions // config.train.updates_per_rollout_batch * per_question, apart)


def shared_tokens(config: Config) -> int:
    """Positions before a row's own that hold the prompt which its samples share; 0: each sample brings its prompt."""
    return max(1, config.data.max_prompt_tokens - 1) if config.batch.share_prompts else 0


def row_positions(config: Config) -> int:
    """Positions of a row that a forward pass computes."""
    return shared_tokens(config) + config.batch.row_tokens


def row_room(config: Config) -> dict[str, Any]:
    """What `hpt.assemble.assemble` must know of a micro-batch's rows, by its names."""
    batch = config.batch
    return {
        "rows": batch.rows,
        "row_tokens": batch.row_tokens,
        "max_segments": batch.max_segments,
        "lanes": batch.lanes,
        "shared_tokens": shared_tokens(config),
    }


def longest_in_row(config: Config) -> int:
    """The most positions that a sample takes up in a row."""
    completion = config.rollout.max_completion_tokens
    return completion if config.batch.share_prompts else config.data.max_prompt_tokens + completion


def samples_in_row(config: Config, bundle: int = 1) -> int:
    """Samples of the greatest length that a row holds: whole bundles of `bundle`, none of them in two lanes."""
    batch = config.batch
    seats, positions = batch.max_segments // batch.lanes, batch.row_tokens // batch.lanes
    return batch.lanes * bundle * min(seats // bundle, positions // (bundle * longest_in_row(config)))


def micro_batches_needed(config: Config, *, samples: int, method: str | None = None, bundle: int = 1) -> int:
    """Micro-batches of `rows_needed` rows."""
    return math.ceil(rows_needed(config, samples=samples, method=method, bundle=bundle) / config.batch.rows)


def rows_needed(config: Config, *, samples: int, method: str | None = None, bundle: int = 1) -> int:
    """Rows that hold `samples` samples of the greatest length, packed by any rule that fills open rows.

    Samples come in bundles of `bundle` that share a row.

    A row that refuses a sample of at most `longest` tokens already holds `row_tokens // longest` samples (or
    `max_segments`), so ceil(samples / that) rows are enough whatever the lengths are. Where rows hold one prompt each,
    that is so for the samples of every question; those that wait for an update of their own may all be of different
    ones.

    Args
      method: whose samples they are; that of the last stage if not said.
    """
    per_row, per_question, apart = samples_in_row(config, bundle), max(samples, 1), 0
    if config.batch.share_prompts:
        name = method or config.method
        per_question = samples_per_question(name, config.rollout.group_size)
        apart = config.methods.relift_buffer if name in APART else 0
    return max(math.ceil(samples / per_question) * math.ceil(per_question / per_row), apart)


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
