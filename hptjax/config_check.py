"""The fields compared with their ranges and with each other, in one function, before anything runs.

What is asked of single subjects stands in `config_check_data` (what is learned from), `config_check_objective` (how),
`config_check_train` (for how long, and how it is measured) and beside the fields themselves; each yields `Problem`s.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator

from hptjax.config import Config, flatten, resolved
from hptjax.config_ahead import ahead_problems
from hptjax.config_check_data import (
    data_problems,
    prompt_problems,
    reward_problems,
    rollout_problems,
    task_problems,
)
from hptjax.config_check_objective import objective_problems
from hptjax.config_check_train import (
    batch_problems,
    compare_problems,
    evaluation_problems,
    optimizer_problems,
    stage_problems,
)
from hptjax.config_lora import lora_problems
from hptjax.config_problem import Problem

AT_LEAST_ONE = (
    "task.instances data.train_questions data.validation_questions data.test_questions data.questions_per_step "
    "data.max_prompt_tokens "
    "rollout.group_size rollout.max_completion_tokens rollout.slots rollout.prefill_rows rollout.tokens_per_call "
    "rollout.cache_capacity rollout.cache_page reward.workers "
    "batch.rows batch.row_tokens batch.max_segments batch.max_micro_batches batch.lanes "
    "train.steps train.updates_per_rollout_batch train.log_every eval.questions eval.samples_per_question "
    "checkpoint.every_steps checkpoint.keep_last mesh.replica mesh.data mesh.fsdp mesh.sequence mesh.tensor "
    "rollout.server.concurrency rollout.server.attempts "
    "methods.relift_buffer methods.dapo_draws methods.pear_block_tokens "
    "model.logprob_chunk_tokens model.attention_block hpt.ranks hpt.logical_micro_tokens model.shape.hidden_size "
    "model.shape.num_layers model.shape.num_heads methods.uft_segments "
    "model.shape.num_kv_heads model.shape.head_dim model.shape.mlp_size model.shape.max_positions "
    "model.max_positions"
).split()
AT_LEAST_ZERO = (
    "seed task.seed task.low task.target_low task.max_value data.split_seed "
    "rollout.top_k optimizer.end_fraction hpt.sft_coefficient hpt.rl_coefficient hpt.entropy_coefficient "
    "hpt.kl_coefficient hpt.correction_floor methods.ppo_lambda methods.ppo_value_clip methods.dapo_cushion_frac "
    "methods.chord_peak methods.chord_valley methods.chord_rise_steps methods.chord_fall_steps "
    "methods.kdrl_beta methods.kdrl_end_beta methods.kdrl_steps "
    "methods.uft_steps methods.uft_coefficient methods.prefix_steps "
    "optimizer.warmup_steps optimizer.weight_decay train.checksum_every train.eval_every "
    "train.probe_every train.rollouts_every train.panel_questions eval.train_questions checkpoint.keep_best"
).split()
ABOVE_ZERO = (
    "rollout.server.timeout_s rollout.server.update_timeout_s "
    "rollout.temperature rollout.top_p reward.deadline_s optimizer.learning_rate optimizer.eps eval.temperature "
    "eval.top_p "
    "optimizer.clip_norm optimizer.skip_norm hpt.clip_low hpt.clip_high optimizer.decay_steps model.shape.rope_theta "
    "distributed.timeout_s optimizer.critic_learning_rate hpt.entropy_target hpt.entropy_delta hpt.top_entropy "
    "hpt.clip_bound hpt.correction_cap methods.ppo_gamma methods.ppo_value_coefficient "
    "methods.trsft_floor methods.pear_gamma methods.prefix_clip_low methods.prefix_clip_high "
    "methods.implicit_beta methods.dpo_beta methods.luffy_gamma methods.relift_clip_norm model.rope_theta"
).split()


def check(config: Config, *, sized_only: bool = False) -> None:
    """Nothing, where the fields make a run possible.

    Args
      sized_only: the model's shape is all that is needed of it, as in `hptjax plan`: no folder has to be named.

    Raises
      ValueError: a field is out of its range, or two contradict each other. The message says what was expected, what
        came and which field to change. It is the first problem that is found: later ones rely on what was asked before.
    """
    has_model = config.model.path is not None or sized_only
    problems = itertools.chain(
        _range_problems(config),
        lora_problems(config.lora, has_model=has_model),
        _model_problems(config, sized_only),
        task_problems(config),
        data_problems(config),
        rollout_problems(config),
        objective_problems(config),
        batch_problems(config),
        stage_problems(config),
        ahead_problems(config),
        optimizer_problems(config),
        evaluation_problems(config),
        compare_problems(config),
    )
    _refuse_first(problems)


def check_rows(config: Config) -> None:
    """As `check`, of the fields that say how rows of data files are put and judged, where no run is made of them."""
    _refuse_first(
        itertools.chain(_range_problems(config), prompt_problems(config.prompt), reward_problems(config.reward))
    )


def _refuse_first(problems: Iterator[Problem]) -> None:
    problem = next(problems, None)
    if problem is not None:
        expected, got, change = problem
        raise ValueError(f"expected {expected}, got {got}; change {change}.")


def _range_problems(config: Config) -> Iterator[Problem]:
    values = flatten(resolved(config))
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"a finite {name}", f"{value}", name
    for names, holds, words in (
        (AT_LEAST_ONE, lambda value: value >= 1, "at least 1"),
        (AT_LEAST_ZERO, lambda value: value >= 0, "at least 0"),
        (ABOVE_ZERO, lambda value: value > 0, "above 0"),
    ):
        for name in names:
            if values[name] is not None and not holds(values[name]):
                yield f"{name} {words}", f"{values[name]}", name
    if any(token < 0 for token in config.rollout.stop_ids):
        yield "rollout.stop_ids of at least 0", f"{list(config.rollout.stop_ids)}", "rollout.stop_ids"


def _model_problems(config: Config, sized_only: bool) -> Iterator[Problem]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        yield "a name of letters, digits, '.', '_' and '-' (it names the run folder)", repr(config.name), "name"
    model, shape = config.model, config.model.shape
    if model.path is None and model.tokenizer is None and not (sized_only and model.preset):
        yield (
            "a model folder, or a tokenizer folder for a model from scratch",
            "neither",
            "model.path or model.tokenizer",
        )
    yield from _export_problems(config)
    if shape.num_heads % shape.num_kv_heads:
        yield (
            "model.shape.num_heads to be a multiple of model.shape.num_kv_heads",
            f"{shape.num_heads} and {shape.num_kv_heads}",
            "model.shape.num_kv_heads",
        )
    if shape.head_dim % 2:
        yield (
            "an even model.shape.head_dim (rotary positions turn pairs)",
            f"{shape.head_dim}",
            "model.shape.head_dim",
        )


def _export_problems(config: Config) -> Iterator[Problem]:
    """The exported model would replace what the run reads."""
    out = config.checkpoint.export_folder
    read = {"model.path": config.model.path, "lora.adapter": config.lora.adapter}
    for name, folder in {**read, "name": f"{config.runs_dir}/{config.name}"}.items():
        if out is not None and folder is not None and os.path.realpath(out) == os.path.realpath(folder):
            yield "another folder for the exported model", f"'{out}', that of {name}", "checkpoint.export_folder"
