"""What can be set: every field of a run, its default (the quickstart's) and its meaning.

A TOML file in `configs/` sets fields by section; the command line sets any of them again (`--train.steps 50`).
`hptjax.config_load` reads both, `hptjax.config_check` compares fields with each other. Only the composition root
(`hptjax.build`) and the commands see a `Config`; everything below takes plain values.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from hptjax.config_lora import LoraConfig
from hptjax.config_methods import MethodName, MethodsConfig, RolloutRow
from hptjax.config_server import ServerConfig
from hptjax.config_text import struct_list

ScheduleKind = Literal["constant", "linear", "cosine"]
RowFormat = Literal["auto", "verl", "prompt_completion", "messages", "native", "problem_answer", "alpaca"]

Preset = Literal[
    "qwen2.5-0.5b", "qwen2.5-math-1.5b", "qwen2.5-math-7b", "qwen3-0.6b", "llama-3.2-1b", "llama-3.1-8b"
]  # the names of models/presets.py


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
class RewardFunction:
    """A reward by name, with its weight in the sum."""

    # "verify" is the task's verifier, "well_formed" looks at the form alone; with data.files they are "math_strict" and
    # "math_format", and there are "math_lenient", "math_hpt" (HPT's published grader) and "countdown" too;
    # module:function is your own, (prompt, completion, answer) -> float or Verdict. The first named decides "solved"
    name: str
    weight: float = 1.0  # rewards add as weight x value


@dataclasses.dataclass(frozen=True)
class ShapeConfig:
    """Sizes of a decoder trained from scratch; read only where `model.path` is not set."""

    hidden_size: int = 128  # D
    num_layers: int = 4  # L
    num_heads: int = 4  # H
    num_kv_heads: int = 2  # K, divides H
    head_dim: int = 32  # E, even
    mlp_size: int = 384  # F
    rope_theta: float = 10_000.0
    qk_norm: bool = True  # Qwen3 style
    attention_bias: bool = False  # Qwen2 style
    tie_embeddings: bool = True
    max_positions: int = 256


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model that the run starts from."""

    path: str | None = None  # folder in the Hugging Face layout; None: from scratch, with `model.shape`
    tokenizer: str | None = None  # folder of the tokenizer; None: the same as `model.path`
    preset: Preset | None = None  # where `model.path` is not set: a published model's shape instead of `model.shape`
    rope_theta: float | None = None  # base of the rotary wavelengths; None: that of the folder, preset or shape
    max_positions: int | None = None  # longest context, likewise; an exported folder carries both
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; what is trained stays float32
    remat: Literal["none", "full", "dots", "dots_no_batch", "attention", "offload"] = (
        "none"  # what layers keep for the backward pass, see models/remat.py; "full" keeps least and computes most
    )
    attention: Literal["auto", "reference", "chunked", "splash", "cudnn"] = (
        "auto"  # of packed rows, by platform and length; "chunked", "splash" and "cudnn" hold no scores
    )
    attention_block: int = 512  # side of an attention tile, and positions of a long cache read at a time
    logprob_chunk_tokens: int = 2048  # tokens whose logits exist at the same time
    reference: str | None = (
        "start"  # frozen model of KL terms and DPO: "start" (this run's), "base" (without adapters), a folder, None
    )
    teacher: str | None = None  # folder of a frozen model with the same tokenizer, for kdrl
    demonstration_author: str | None = None  # folder of the model that wrote the demonstrations, for pear_*
    shape: ShapeConfig = dataclasses.field(default_factory=ShapeConfig)


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """The problems: a generator with a solver, a writer of demonstrations and a verifier."""

    name: Literal["countdown"] = "countdown"
    instances: int = 12_000  # distinct problems generated, before they are split
    seed: int = 0  # of the generator; the run's own seed is `seed`
    numbers: int = 3  # how many numbers a problem gives, 2 to 5
    numbers_to: int | None = None  # problems give `numbers` to so many numbers, each as often; None: `numbers` only
    low: int = 1  # smallest number
    high: int = 20  # largest number
    target_low: int = 1  # smallest target
    target_high: int = 60  # largest target
    operators: str = "+-*/"
    negative: bool = False  # whether a value may be negative
    max_value: int = 9999  # no value of a demonstration exceeds it
    style: Literal["random", "first"] = "random"  # which of the solutions a demonstration shows
    shuffle: bool = True  # whether a prompt lists its numbers in random order
    corrupt: float = 0.0  # share of training demonstrations that miss the target; only for a base model's corpus


@dataclasses.dataclass(frozen=True)
class FractionsConfig:
    """Shares of all problems; the base model is trained on a share that nothing else uses.

    Of `data.files`, the training questions have the base model's share and that of each split with files of its own.
    """

    base: float = 0.4
    train: float = 0.4
    validation: float = 0.1
    test: float = 0.1


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """How a question of `data.files` is put to the model; a task's own questions are written out already."""

    template: Literal["chat", "plain"] = "chat"  # "chat": by the tokenizer's chat template; "plain": by `plain`
    plain: str = "{question}"  # template "plain": the prompt, for models without a chat template
    bos: bool = False  # template "plain": whether the tokenizer's bos stands before it
    system: str | None = None  # None: the rows' own system turns; "": none; a text: this one instead of theirs
    suffix: str = ""  # stands after the question, unless the question ends with it
    end: Literal["turn", "eos"] = "turn"  # of a demonstration: as the template ends a turn, or the tokenizer's eos
    date: str = "2024-07-26"  # the day that a template is told, so that it renders the same every day


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The questions: from files, or from the task's generator. Splits are seeded, and disjoint by problem."""

    files: tuple[str, ...] = ()  # to learn from: files, folders, or owner/name:config@split of the hub; none: the task
    validation_files: tuple[str, ...] = ()  # none: a share of `files`
    test_files: tuple[str, ...] = ()  # none: a share of `files`
    format: RowFormat = "auto"  # of the rows in these; "auto": by their columns
    long_demonstrations: Literal["drop", "cut"] = "drop"  # over rollout.max_completion_tokens; "cut": the end is lost
    train_split: Literal["train", "base"] = "train"  # "base": this run makes the base model
    train_questions: int | None = None  # at most so many are kept of this split; None: all; likewise below
    validation_questions: int = 512  # choose the best checkpoint
    test_questions: int = 1024  # for figures only; they choose nothing
    fractions: FractionsConfig = dataclasses.field(default_factory=FractionsConfig)
    split_seed: int = 0  # of the splits
    questions_per_step: int = 64  # P
    max_prompt_tokens: int = 24  # longer questions are dropped and counted
    demonstrations: bool = True  # whether methods may learn from the demonstrations


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Sampling. The sizes are compiled shapes and are stored with each sample."""

    group_size: int = 8  # G, rollouts per question
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    stop_ids: tuple[int, ...] = ()  # tokens that end a completion beside the tokenizer's eos
    max_completion_tokens: int = 24  # limit of a completion, stop token and forced prefix included
    slots: int = 256  # rows decoded together
    prefill_rows: int = 32  # prompts prefilled together
    prompt_buckets: tuple[int, ...] = (24,)  # padded prompt lengths, ascending
    tokens_per_call: int = 8  # tokens decoded per call from the host
    cache_capacity: int = 48  # positions of the KV cache per slot
    # positions of the KV cache of all slots together, in pages that samples take as they grow, so that memory follows
    # real lengths; None: cache_capacity for each slot
    cache_positions: int | None = None
    cache_page: int = 64  # positions of a page
    # "int8" takes half of bf16, and samples, in evaluations too, from a policy a little off the one that learns:
    # rollout/logp_diff_mean says how far, hpt.sampler_correction weighs samples by it
    weights_dtype: Literal["compute_dtype", "int8"] = "compute_dtype"  # the layers' matrices, a scale per output
    cache_dtype: Literal["compute_dtype", "int8"] = "compute_dtype"  # keys and values, a scale per position and head
    engine: Literal["own", "server"] = "own"  # who samples for training; evaluations are always our own engine's
    server: ServerConfig = dataclasses.field(default_factory=ServerConfig)  # docs/outside_engine.md


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Verification in killable worker processes."""

    functions: Annotated[tuple[RewardFunction, ...], struct_list(RewardFunction)] = (RewardFunction("verify"),)
    workers: int = 1  # processes
    deadline_s: float = 5.0  # per completion; past it the worker is killed, counted, reward 0


@dataclasses.dataclass(frozen=True)
class HptConfig:
    """The objective: who decides between SFT and RL, and what one token of each weighs."""

    gate: int = 0  # SFT where at most this many of the group solved; -1: pure RL; group_size: pure SFT
    # the reducers: what one token weighs. "separate": RL, KL, SFT and entropy are each a token mean of their own;
    # "joint": each is divided by the live tokens of rollouts and demonstrations together. Methods other than HPT take
    # the reducers of their own rows under "official_fixed"
    preset: Literal["official_fixed", "official", "paper", "separate", "joint"] = "official_fixed"
    rl_estimator: RolloutRow = (
        "dr_grpo"  # hpt*, random_gate: the row of losses/table.py for rollouts; "ppo" has no critic
    )
    clip_low: float | None = None  # ratio below 1 - clip_low is masked where the advantage is negative; None: the row's
    clip_high: float | None = (
        None  # ratio above 1 + clip_high is masked where the advantage is positive; None: the row's
    )
    clip_kind: Literal["row", "dual", "two_sided"] = "row"  # which clip of losses/stability.py takes these widths
    clip_bound: float = 3.0  # "dual": cap of the ratio where the advantage is negative; "two_sided": its ceiling, 4
    sampler_correction: Literal["none", "token_tis", "sequence_tis", "masked_is"] = (
        "none"  # importance weights from the sampler's log-probs to the trainer's, see losses/weights.py
    )
    correction_cap: float = 2.0  # of "token_tis" and "sequence_tis"; the upper end of "masked_is"
    correction_floor: float = 0.5  # the lower end of "masked_is"
    correction_normalised: bool = False  # "token_tis", "sequence_tis": weights scaled to mean 1 over each update
    sft_coefficient: float = 1.0
    rl_coefficient: float = 1.0
    entropy_coefficient: float = 0.0  # 0.001 in the published recipes
    entropy_on_demonstrations: bool = True  # whether the entropy term covers demonstrations too, as published
    entropy_target: float | None = None  # nats per rollout token that the bonus, then on rollouts alone, steers to
    entropy_delta: float = 0.001  # step of the steered coefficient, which starts at entropy_coefficient; unverified
    top_entropy: float | None = None  # share of rollout tokens, those of highest entropy, that learn by RL; None: all
    kl_coefficient: float | None = None  # to model.reference; None: as published, 0 but for grpo and uft
    kl_estimator: Literal["k1", "k2", "k3", "k3_plus"] = "k3"  # of the loss
    kl_in: Literal["loss", "reward"] = "loss"  # "reward": a rollout token's advantage loses kl_coefficient x k1
    mask_overlong: bool = False  # weight 0 for completions that met their limit
    ranks: int = 8  # preset "official" only: data-parallel ranks of the published script
    logical_micro_tokens: int = 32_768  # preset "official" only: tokens of one of its micro-batches


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """The compiled shape of one forward and backward pass, and how many an update may take."""

    rows: int = 64  # B
    row_tokens: int = 128  # T
    max_segments: int = 8  # S, samples in a row
    max_micro_batches: int = 16  # M, per update


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


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept, and for how long."""

    every_steps: int = 10
    keep_last: int = 2
    keep_best: int = 1  # by `metric`, on validation questions
    metric: str = "validation/pass@1"  # larger is better
    export_folder: str | None = None  # the final model goes here, in the Hugging Face layout


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """One line of a sharding table: a logical axis and the mesh axes it is cut over, the slowest first."""

    axis: str  # a name of the tables in sharding/rules.py
    over: tuple[str, ...]  # replica, data, fsdp, sequence, tensor; empty: a copy on every device


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis, and what is cut over which. The product is the number of devices, or 1: the first."""

    replica: int = 1  # slices of a multi-slice pod; only gradients travel between them
    data: int = 1  # parts of a batch's rows
    fsdp: int = 1  # parts of rows, and of weights, sums and moments
    sequence: int = 1  # parts of a row's time axis, for long responses
    tensor: int = 1  # parts of heads, mlp and vocabulary
    devices: int | None = None  # how many of the devices are used, the first ones; None: all, or one where all is 1
    rules: Literal["fsdp", "replicated", "decode"] = "fsdp"  # the table of training, see sharding/rules.py
    axes: Annotated[tuple[RuleConfig, ...], struct_list(RuleConfig)] = ()  # lines that replace those of the table
    rollout_rules: Literal["fsdp", "replicated", "decode"] | None = None  # None: as in training, `axes` included
    rollout_axes: Annotated[tuple[RuleConfig, ...], struct_list(RuleConfig)] = ()  # likewise, for `rollout_rules`


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Several processes that train one model together, usually one per host; each is started with the same config."""

    mode: Literal["none", "auto", "slurm", "tpu", "explicit"] = "none"  # how they find each other
    coordinator: str | None = None  # host:port of process 0, for "explicit"
    processes: int | None = None  # how many, for "explicit"
    process: int | None = None  # which of them this is, from 0, for "explicit"
    timeout_s: float = 300.0  # a process that is waited for longer ends the run, by name


@dataclasses.dataclass(frozen=True)
class TelemetryConfig:
    """Where metrics go beside metrics.jsonl, which is always written."""

    tensorboard: bool = True
    wandb: bool = False  # needs the extra: pip install 'hptjax[wandb]'
    progress: bool = True  # the progress line
    plot: bool = True  # plot.png in the run folder at the end


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
