"""The loop that trains: its stages, micro-batches and optimizer, what it keeps and what it says."""

from __future__ import annotations

import dataclasses
from typing import Literal

from hptjax.config_methods import MethodName

ScheduleKind = Literal["constant", "linear", "cosine"]


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """A stage that runs before the last one, through the same loop."""

    method: MethodName  # as `method`
    steps: int  # rollout batches of this stage
    learning_rate: float | None = None  # None: optimizer.learning_rate
    schedule: ScheduleKind | None = None  # None: optimizer.schedule; a schedule of its own lasts for the stage
    warmup_steps: int | None = None  # None: optimizer.warmup_steps
    end_fraction: float | None = None  # None: optimizer.end_fraction
    questions_per_step: int | None = None  # None: data.questions_per_step


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """The compiled shape of one forward and backward pass, and how many an update may take."""

    rows: int = 64  # B
    row_tokens: int = 128  # T
    max_segments: int = 8  # S, samples in a row
    max_micro_batches: int = 16  # M, per update
    share_prompts: bool = False  # samples of one prompt share a row, and the prompt is computed once for all of them
    lanes: int = 1  # equal parts of such a row, that no sample crosses


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping; schedules count optimizer steps."""

    learning_rate: float = 2e-4
    critic_learning_rate: float | None = None  # of ppo's critic, by the same schedule; None: learning_rate
    schedule: ScheduleKind = "constant"
    warmup_steps: int = 0
    end_fraction: float = 0.0  # of the learning rate, where a linear or cosine schedule ends
    decay_steps: int | None = None  # None: the stage's own steps
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0  # global gradient norm
    host_memory: bool = False  # moments in the host's memory, on the device only during an update (TPU, GPU)
    skip_norm: float | None = None  # an update with a larger norm is skipped and counted
    nonfinite: Literal["raise", "skip_window"] = "raise"  # what a non-finite micro-batch does


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 60  # rollout batches of the last stage
    updates_per_rollout_batch: int = 1  # optimizer updates per step; the later ones are off-policy
    # whether the next step's rollouts are made while a step trains, by the weights from before its updates; needs
    # hpt.sampler_correction, and one device or rollout.engine "server"
    rollouts_ahead: bool = False
    checksum_every: int = 1  # updates between checks of every leaf's gradient sum; 0: the first, and after a resume
    eval_every: int = 20  # steps; 0: only at the start and the end
    probe_every: int = 10  # steps between gradient-norm probes per objective; 0: never
    rollouts_every: int = 10  # steps between rollout files; 0: never
    panel_questions: int = 8  # the first validation questions, followed over time in panel.jsonl
    log_every: int = 1  # steps between lines on the screen


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept, and for how long."""

    every_steps: int = 10
    keep_last: int = 2
    keep_best: int = 1  # by `metric`, on validation questions
    metric: str = "validation/pass@1"  # larger is better
    export_folder: str | None = None  # the final model goes here, in the Hugging Face layout


@dataclasses.dataclass(frozen=True)
class TelemetryConfig:
    """Where metrics go beside metrics.jsonl, which is always written."""

    tensorboard: bool = True
    wandb: bool = False  # needs the extra: pip install 'hptjax[wandb]'
    progress: bool = True  # the progress line
    plot: bool = True  # plot.png in the run folder at the end
