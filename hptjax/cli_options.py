"""What each command takes beside the fields of a config, as dataclasses that tyro reads; and the help of `audit`."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated, Literal

import tyro

from hptjax.config import Config

ConfigFields = Annotated[Config, tyro.conf.arg(name="")]  # the fields keep the names they have in the file
Checkpoint = Literal["base", "last", "best"]
SavedDtype = Literal["float32", "bfloat16", "float16"]

AUDIT_HELP = """\
Runs a trainer on small jobs and reads from its parameters what every token weighed.

Targets that come with hptjax:
    hptjax, jax-loop, optax.MultiSteps, optax.MultiSteps-sum, torch-loop, transformers, trl, tunix

Targets that simulate a published bug:
    simulated-deepspeed, simulated-deepspeed-first-only, simulated-openrlhf, simulated-huggingface-2024

Your own is module:function, looked up from the current folder. It carries out a job with plain SGD and
returns the parameters after every update. This one, in my_trainer.py, passes `hptjax audit my_trainer:train`:
    import numpy as np
    from hptjax.audit.job import Unsupported, accepts

    def train(job):
        if job.ranks > 1 or job.parameter_dtype != "float32": raise Unsupported("one fp32 worker")
        theta, updates = job.parameters.copy(), []
        for window, rate in zip(job.windows, job.learning_rates):
            tokens = sum(part.mask.sum() for part in window)
            # put your accumulation here; the loss of a token is features . theta
            gradient = sum(part.features[part.mask].sum(axis=0) for part in window) / tokens
            norm = np.linalg.norm(gradient)
            if job.clip_norm is not None and norm > job.clip_norm: gradient *= job.clip_norm / norm
            theta = (theta - rate * gradient).astype("float32")
            updates.append(theta)
        return updates

What a job asks for (hptjax/audit/job.py has the rest):
    ranks            data-parallel workers that share each micro-batch by rows
    clip_norm        largest norm of an update's gradient; None: no clipping
    parameter_dtype  "float32" or "bfloat16": in which the parameters are held

A target raises Unsupported for what it cannot do; a field that it ignores counts as carried out. One that
computes its own loss from logits is marked @accepts("tokens"), one whose optimizer cannot be set
@accepts("linear", own_optimizer=True).

Windows have 1 to 5, 7 or 16 micro-batches, and a job has at most five updates: what goes wrong only with
others, or later, is not seen.

Status 0: no fault (notes allowed). 1: a fault. 2: bad usage.
"""


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Training, evaluation and a summary; the same command takes a stopped run up again."""

    profile: bool = False  # write a trace of two steps into the run folder, and print where the time went
    config: ConfigFields = dataclasses.field(default_factory=Config)


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """Pass@k of a run on its held-out questions, or any model on suites and data files, with reports."""

    checkpoint: Checkpoint | None = None  # which weights of a run; None: last
    split: Literal["validation", "test", "train"] | None = None  # which of a run's own questions; None: test
    suite: str | None = None  # a published set or a group: math, other, aime24, math500, gsm8k, countdown ...
    suites: str | None = None  # folder that holds <set>.parquet or <set>.jsonl for each; None: the hub
    data: tuple[str, ...] = ()  # files of your own, as data.files takes them
    out: pathlib.Path | None = None  # folder of the results; None: evaluations/<model>-<what>
    samples: int | None = None  # per question; None: as published, or eval.samples_per_question for --data
    ks: tuple[int, ...] = ()  # of pass@k and so on; none: powers of two up to the samples
    limit: int | None = None  # only the first questions of each set
    baseline: pathlib.Path | None = None  # folder of another evaluation, to compare with question by question
    config: ConfigFields = dataclasses.field(default_factory=Config)


@dataclasses.dataclass(frozen=True)
class ExplainOptions:
    """What a config amounts to, before anything is loaded; model and data need not be there."""

    rollout_tokens: float | None = None  # mean tokens of a rollout, prompt included; None: the most there can be
    demonstration_tokens: float | None = None  # of a demonstration; None: rollout_tokens, or the most there can be
    config: ConfigFields = dataclasses.field(default_factory=Config)


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """Completions of a prompt."""

    prompt: str | None = None  # None: a question of the test split
    count: int = 4  # completions
    checkpoint: Checkpoint = "last"  # which weights
    config: ConfigFields = dataclasses.field(default_factory=Config)


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Several methods from the same base model under the same budget."""

    arms: str | None = None  # some of compare.arms, or methods, separated by commas; None: all of compare.arms
    seeds: int | None = None  # seeds per arm; None: compare.seeds
    config: ConfigFields = dataclasses.field(default_factory=Config)


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What a config does on a TPU that need not be there: the real programs, compiled. Needs hptjax[tpu]."""

    topology: tuple[str, ...] = ("v5e:4x4",)  # chip:layout, 2xchip:layout for two slices; several may follow
    slices: int = 1  # slices of each topology
    search: bool = False  # try meshes, micro-batch rows and remat policies, and rank them
    largest: bool = True  # look for the largest batch.rows that fits
    cache: pathlib.Path | None = None  # folder of earlier results; None: beside the compiled programs
    json: pathlib.Path | None = None  # also write everything there
    config: ConfigFields = dataclasses.field(default_factory=Config)


@dataclasses.dataclass(frozen=True)
class UpgeOptions:
    """What every row of the token table does on one recorded batch, and on a toy where the truth is known."""

    batch: pathlib.Path = pathlib.Path("upge_batch.json")  # recorded rollouts; sampled and written if there is no file
    checkpoint: Checkpoint = "last"  # weights at which the gradients are taken
    sampler: Checkpoint = "base"  # weights that sample a new batch
    questions: int = 32  # of a new batch
    draws: int = 8  # groups of each question in a new batch
    json: pathlib.Path | None = None  # also write everything there
    plot: pathlib.Path | None = None  # bias on the toy against variance on the batch, as a PNG
    config: ConfigFields = dataclasses.field(default_factory=Config)


@dataclasses.dataclass(frozen=True)
class DataCheckOptions:
    """What a run would make of data files, before it is paid for. Status 2 where no run could use them, else 0."""

    json: pathlib.Path | None = None  # also write everything there
    config: ConfigFields = dataclasses.field(default_factory=Config)


@dataclasses.dataclass(frozen=True)
class MethodsOptions:
    """What the methods are: the table, or one of them in full."""

    name: Annotated[
        str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]", help="one method; left out: the table of all")
    ] = None
    toml: bool = False  # of one method: only a config that trains it
    json: bool = False  # as JSON


@dataclasses.dataclass(frozen=True)
class AuditOptions:
    """What is audited, and how."""

    target: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="TARGET", help="module:function, or the name of a target that comes with hptjax"),
    ]
    model: Literal["linear", "tokens"] | None = None  # tokens: it computes its own loss; None: as the target is marked
    own_optimizer: bool = False  # its optimizer cannot be set to SGD: compare splits of the same window
    inject_drop: bool = False  # blank a micro-batch in what the target sees: the audit must then fail and name it
    json: pathlib.Path | None = None  # also write the report there


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """A run's checkpoint as a Hugging Face folder that transformers, vLLM and others load."""

    source: Annotated[
        pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="a run folder, or the config of a run")
    ]
    out: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT", help="the folder to write")]
    checkpoint: Literal["last", "best"] = "last"  # which weights; best: by checkpoint.metric on validation questions
    dtype: SavedDtype = "bfloat16"  # of the stored weights
    shard_gb: float = 5.0  # weights that take more are cut into shards of at most so many 10^9 bytes
    tokenizer: str | None = None  # folder of the run's tokenizer, where it has moved since
    adapter: bool = False  # of a run that trained adapters, a PEFT folder instead of the model with them merged


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """A model folder written anew: another dtype, other shards. What would not load is refused, not converted."""

    source: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN", help="the folder to read")]
    out: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT", help="the folder to write")]
    dtype: SavedDtype | None = None  # of the stored weights; None: as they are stored
    shard_gb: float = 5.0  # weights that take more are cut into shards of at most so many 10^9 bytes


@dataclasses.dataclass(frozen=True)
class InspectOptions:
    """What a model folder or a run's checkpoint holds. Status 1 where something would keep it from loading."""

    path: Annotated[
        pathlib.Path,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="PATH", help="a model folder, a PEFT adapter, a run folder or one checkpoint"),
    ]
    all: bool = False  # of a checkpoint, sums, moments and counters too
    json: bool = False  # as JSON


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What a step costs as the work grows. A point that was measured with the same code and settings is kept."""

    only: str | None = None  # micro_batches,response_length,group_size,model_size,questions,mixed_lengths; None: all
    repeats: int = 5  # of each point, after one that compiles
    tiny: bool = False  # the smallest sizes: to try the command, not to measure
    json: pathlib.Path = pathlib.Path("docs/growth.json")  # raw figures; the same command goes on from them
    docs: pathlib.Path | None = pathlib.Path("docs/benchmarks.md")  # page whose tables are written, the plot beside it
    redraw: Annotated[pathlib.Path | None, tyro.conf.arg(name="from")] = None  # raw figures to draw again, and no more


@dataclasses.dataclass(frozen=True)
class DoctorOptions:
    """What this machine has and lacks. Status 1 where training cannot run."""

    runs_dir: str = "runs"  # where the runs would go
