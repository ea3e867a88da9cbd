"""The fields compared with their ranges and with each other, in one function, before anything runs."""

from __future__ import annotations

import datetime
import math
import re

from hptjax.config import Config, flatten, resolved
from hptjax.config_ahead import ahead_problems
from hptjax.config_batch import micro_batches_needed, samples_per_update, schedule_of, stage_list, steps_of
from hptjax.config_constants import constant_problems
from hptjax.config_lora import lora_problems
from hptjax.config_methods import GATED, PAIRED, learns_by_sft, learns_from_rollouts, samples_per_bundle
from hptjax.config_prefix import prefix_problems
from hptjax.config_server import server_problems

AT_LEAST_ONE = (
    "task.instances data.train_questions data.validation_questions data.test_questions data.questions_per_step "
    "data.max_prompt_tokens "
    "rollout.group_size rollout.max_completion_tokens rollout.slots rollout.prefill_rows rollout.tokens_per_call "
    "rollout.cache_capacity rollout.cache_page reward.workers "
    "batch.rows batch.row_tokens batch.max_segments batch.max_micro_batches "
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
        came and which field to change.
    """
    _check_ranges(config)
    for problem in lora_problems(config.lora, has_model=config.model.path is not None or sized_only):
        _refuse(*problem)
    _check_names(config, sized_only)
    _check_task(config)
    _check_data(config)
    _check_rollout(config)
    _check_objective(config)
    _check_batch(config)
    _check_stages(config)
    for problem in ahead_problems(config):
        _refuse(*problem)
    _check_optimizer(config)
    _check_evaluation(config)
    _check_compare(config)


def _refuse(expected: str, got: str, change: str) -> None:
    raise ValueError(f"expected {expected}, got {got}; change {change}.")


def _check_ranges(config: Config) -> None:
    values = flatten(resolved(config))
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            _refuse(f"a finite {name}", f"{value}", name)
    for names, holds, words in (
        (AT_LEAST_ONE, lambda value: value >= 1, "at least 1"),
        (AT_LEAST_ZERO, lambda value: value >= 0, "at least 0"),
        (ABOVE_ZERO, lambda value: value > 0, "above 0"),
    ):
        for name in names:
            if values[name] is not None and not holds(values[name]):
                _refuse(f"{name} {words}", f"{values[name]}", name)


def _check_names(config: Config, sized_only: bool) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        _refuse("a name of letters, digits, '.', '_' and '-' (it names the run folder)", repr(config.name), "name")
    model = config.model
    if model.path is None and model.tokenizer is None and not (sized_only and model.preset):
        _refuse(
            "a model folder, or a tokenizer folder for a model from scratch", "neither", "model.path or model.tokenizer"
        )
    shape = config.model.shape
    if shape.num_heads % shape.num_kv_heads:
        _refuse(
            "model.shape.num_heads to be a multiple of model.shape.num_kv_heads",
            f"{shape.num_heads} and {shape.num_kv_heads}",
            "model.shape.num_kv_heads",
        )
    if shape.head_dim % 2:
        _refuse(
            "an even model.shape.head_dim (rotary positions turn pairs)", f"{shape.head_dim}", "model.shape.head_dim"
        )


def _check_task(config: Config) -> None:
    task, data = config.task, config.data
    if not 2 <= task.numbers <= 5:
        _refuse("task.numbers in 2..5", f"{task.numbers}", "task.numbers")
    if task.numbers_to is not None and not task.numbers <= task.numbers_to <= 5:
        _refuse("task.numbers_to in task.numbers..5", f"{task.numbers_to}", "task.numbers_to")
    if not 0 <= task.corrupt < 1 or (task.corrupt and data.train_split != "base"):
        _refuse('task.corrupt in [0, 1), and 0 unless data.train_split is "base"', f"{task.corrupt}", "task.corrupt")
    if not task.operators or set(task.operators) - set("+-*/"):
        _refuse("task.operators made of + - * /", repr(task.operators), "task.operators")
    for low, first, high, second in (
        ("low", task.low, "high", task.high),
        ("target_low", task.target_low, "target_high", task.target_high),
    ):
        if first > second:
            _refuse(f"task.{low} <= task.{high}", f"{first} and {second}", f"task.{low} or task.{high}")


def _check_data(config: Config) -> None:
    data, prompt = config.data, config.prompt
    shares = flatten(resolved(config)["data"]["fractions"])
    if min(shares.values()) < 0 or sum(shares.values()) > 1 + 1e-9:
        _refuse("data.fractions of at least 0 that sum to at most 1", f"{shares}", "data.fractions")
    apart = {"validation": data.validation_files, "test": data.test_files}
    for name in (data.train_split, "validation", "test"):
        if shares[name] == 0 and not apart.get(name):
            _refuse(f"a {name} split that is not empty", "a fraction of 0", f"data.fractions.{name}")
    for name, files in apart.items():
        if files and not data.files:
            _refuse(f"data.files beside data.{name}_files", "none", f"data.files or data.{name}_files")
    if data.files and data.train_split != "train":
        _refuse(
            'data.train_split "train" where data.files are learned from', repr(data.train_split), "data.train_split"
        )
    largest = max([data.questions_per_step, *(stage.questions_per_step or 0 for stage in config.stages)])
    if data.train_questions is not None and largest > data.train_questions:
        _refuse(
            "at least as many training questions as one step takes, or no batch can be filled",
            f"data.train_questions {data.train_questions} for {largest} per step",
            "data.train_questions or data.questions_per_step",
        )
    if "{question}" not in prompt.plain:
        _refuse("prompt.plain to hold {question}", repr(prompt.plain), "prompt.plain")
    try:
        datetime.date.fromisoformat(prompt.date)
    except ValueError:
        _refuse("prompt.date as a day such as 2024-07-26", repr(prompt.date), "prompt.date")


def _check_rollout(config: Config) -> None:
    rollout, data = config.rollout, config.data
    buckets = rollout.prompt_buckets
    if not buckets or min(buckets) < 1 or list(buckets) != sorted(set(buckets)):
        _refuse(
            "rollout.prompt_buckets as ascending lengths of at least 1", f"{list(buckets)}", "rollout.prompt_buckets"
        )
    if buckets[-1] < data.max_prompt_tokens:
        _refuse(
            f"a last prompt bucket that holds data.max_prompt_tokens ({data.max_prompt_tokens})",
            f"{buckets[-1]}",
            "rollout.prompt_buckets or data.max_prompt_tokens",
        )
    needed = max(buckets[-1], data.max_prompt_tokens + rollout.max_completion_tokens)
    if rollout.cache_capacity < needed:
        _refuse(
            f"rollout.cache_capacity of at least {needed} (the last prompt bucket, {buckets[-1]}, and "
            f"data.max_prompt_tokens {data.max_prompt_tokens} + rollout.max_completion_tokens "
            f"{rollout.max_completion_tokens})",
            f"{rollout.cache_capacity}",
            "rollout.cache_capacity",
        )
    pages = -(-rollout.cache_capacity // rollout.cache_page)
    if rollout.cache_positions is not None and rollout.cache_positions // rollout.cache_page < pages:
        _refuse(
            f"rollout.cache_positions of at least {pages * rollout.cache_page} (rollout.cache_capacity "
            f"{rollout.cache_capacity} in pages of rollout.cache_page {rollout.cache_page}: room for one sample)",
            f"{rollout.cache_positions}",
            "rollout.cache_positions",
        )
    if rollout.top_p > 1:
        _refuse("rollout.top_p in (0, 1]", f"{rollout.top_p}", "rollout.top_p")
    for problem in server_problems(
        rollout.server,
        used=rollout.engine == "server",
        correction=config.hpt.sampler_correction,
        learns=any(learns_from_rollouts(method) for _, method, _ in steps_of(config)),
    ):
        _refuse(*problem)
    if config.eval.top_p > 1:
        _refuse("eval.top_p in (0, 1]", f"{config.eval.top_p}", "eval.top_p")
    functions = config.reward.functions
    names = [function.name for function in functions]
    if not functions or len(set(names)) != len(names):
        _refuse("one or more reward functions with distinct names", f"{names}", "reward.functions")
    if not all(math.isfinite(function.weight) for function in functions) or not any(f.weight for f in functions):
        weights = [function.weight for function in functions]
        _refuse("finite reward weights, not all 0", f"{weights}", "reward.functions")


def _check_objective(config: Config) -> None:
    hpt, group_size = config.hpt, config.rollout.group_size
    if not -1 <= hpt.gate <= group_size:
        _refuse(f"hpt.gate in -1..{group_size} (rollout.group_size)", f"{hpt.gate}", "hpt.gate")
    if (hpt.clip_low is None) != (hpt.clip_high is None):
        _refuse(
            "both of hpt.clip_low and hpt.clip_high, or neither",
            f"{hpt.clip_low} and {hpt.clip_high}",
            "hpt.clip_low and hpt.clip_high",
        )
    if hpt.clip_low is not None and hpt.clip_low > 1:
        _refuse("hpt.clip_low in (0, 1]", f"{hpt.clip_low}", "hpt.clip_low")
    if hpt.rl_estimator in ("ppo", "grpo") and hpt.clip_low is None:
        _refuse(
            f"a clip range for hpt.rl_estimator '{hpt.rl_estimator}'",
            "none",
            "hpt.clip_low and hpt.clip_high (0.2 each is usual), or hpt.rl_estimator",
        )
    if hpt.rl_estimator in ("reinforce", "rloo", "sapo") and hpt.clip_low is not None:
        _refuse(
            f"no clip range for hpt.rl_estimator '{hpt.rl_estimator}' (it has no clip)",
            f"{hpt.clip_low}, {hpt.clip_high}",
            "hpt.clip_low and hpt.clip_high",
        )
    if hpt.clip_kind != "row" and hpt.clip_bound <= 1:
        _refuse(f"hpt.clip_bound above 1 for hpt.clip_kind '{hpt.clip_kind}'", f"{hpt.clip_bound}", "hpt.clip_bound")
    if hpt.sampler_correction == "masked_is" and not hpt.correction_floor <= 1 <= hpt.correction_cap:
        _refuse(
            "hpt.correction_floor <= 1 <= hpt.correction_cap for hpt.sampler_correction 'masked_is'",
            f"{hpt.correction_floor} and {hpt.correction_cap}",
            "hpt.correction_floor or hpt.correction_cap",
        )
    if hpt.kl_in == "reward" and hpt.kl_coefficient is None:
        _refuse("hpt.kl_coefficient for hpt.kl_in 'reward' (0 turns it off)", "none", "hpt.kl_coefficient")
    _check_second_look(config)
    _check_method_constants(config)
    for place, method, _ in steps_of(config):
        never_rl, never_sft = method in GATED and hpt.gate == group_size, method in GATED and hpt.gate < 0
        rl = hpt.rl_coefficient if learns_from_rollouts(method) and not never_rl else 0.0
        sft = hpt.sft_coefficient if learns_by_sft(method) and not never_sft else 0.0
        if rl == sft == 0.0 and method != "kdrl":  # whose teacher alone is on-policy distillation
            _refuse(
                f"an objective that is not 0 in {place} ({method}, hpt.gate {hpt.gate})",
                f"hpt.rl_coefficient {hpt.rl_coefficient} and hpt.sft_coefficient {hpt.sft_coefficient}",
                "the one that this method reads",
            )


def _check_second_look(config: Config) -> None:
    """What is computed from a score pass of the whole update."""
    hpt = config.hpt
    if hpt.top_entropy is not None and hpt.top_entropy > 1:
        _refuse("hpt.top_entropy in (0, 1]", f"{hpt.top_entropy}", "hpt.top_entropy")
    if hpt.correction_normalised and hpt.sampler_correction not in ("token_tis", "sequence_tis"):
        _refuse(
            "hpt.sampler_correction 'token_tis' or 'sequence_tis' for hpt.correction_normalised",
            repr(hpt.sampler_correction),
            "hpt.sampler_correction or hpt.correction_normalised",
        )
    if (hpt.top_entropy is not None or hpt.correction_normalised) and hpt.kl_in == "reward" and hpt.kl_coefficient:
        _refuse(
            "hpt.kl_in 'loss' beside hpt.top_entropy or hpt.correction_normalised (both act on advantages before the "
            "reward's KL is taken off)",
            "'reward'",
            "hpt.kl_in",
        )
    in_reward = hpt.kl_in == "reward" and bool(hpt.kl_coefficient)
    changes = hpt.top_entropy is not None or hpt.correction_normalised or in_reward
    paired = [method for _, method, _ in steps_of(config) if method in PAIRED]
    if paired and changes:
        _refuse(
            f"advantages of +1 and -1 for {paired[0]}, whose margin is made of their signs",
            "hpt.top_entropy, hpt.correction_normalised or hpt.kl_in 'reward', which change them",
            "the one that is set",
        )
    if hpt.entropy_target is not None and hpt.rl_coefficient == 0:
        _refuse(
            "rollouts that learn by RL, whose entropy hpt.entropy_target steers",
            "hpt.rl_coefficient 0",
            "hpt.rl_coefficient or hpt.entropy_target",
        )


def _check_method_constants(config: Config) -> None:
    for problem in (*prefix_problems(config), *constant_problems(config)):
        _refuse(*problem)


def _check_batch(config: Config) -> None:
    batch = config.batch
    longest = config.data.max_prompt_tokens + config.rollout.max_completion_tokens
    for place, method, questions in steps_of(config):
        bundle = samples_per_bundle(method)
        if batch.row_tokens < bundle * longest:
            pair = "twice (the two samples of a pair share a row) " if bundle == 2 else ""
            _refuse(
                f"batch.row_tokens of at least {bundle * longest} for {place} ({method}: {pair}"
                "data.max_prompt_tokens + rollout.max_completion_tokens)",
                f"{batch.row_tokens}",
                "batch.row_tokens",
            )
        if batch.max_segments < bundle:
            _refuse(
                f"batch.max_segments of at least {bundle} for {method}", f"{batch.max_segments}", "batch.max_segments"
            )
        if questions % config.train.updates_per_rollout_batch:
            _refuse(
                f"questions per step of {place} to be a multiple of train.updates_per_rollout_batch "
                f"({config.train.updates_per_rollout_batch})",
                f"{questions}",
                "data.questions_per_step or train.updates_per_rollout_batch",
            )
        samples = samples_per_update(config, method=method, questions=questions)
        needed = micro_batches_needed(config, samples=samples, bundle=bundle)
        if needed > batch.max_micro_batches:
            _refuse(
                f"batch.max_micro_batches of at least {needed} for {place} ({samples} samples of up to {longest} "
                f"tokens in micro-batches of {batch.rows} x {batch.row_tokens})",
                f"{batch.max_micro_batches}",
                "batch.max_micro_batches, batch.rows or data.questions_per_step",
            )


def _check_stages(config: Config) -> None:
    for i, stage in enumerate(config.stages):
        if stage.steps < 1:
            _refuse("a stage of at least 1 step", f"{stage.steps}", f"stages.{i}.steps")
        if stage.learning_rate is not None and not (math.isfinite(stage.learning_rate) and stage.learning_rate > 0):
            _refuse("a learning rate above 0", f"{stage.learning_rate}", f"stages.{i}.learning_rate")
        if stage.warmup_steps is not None and stage.warmup_steps < 0:
            _refuse("a warm-up of at least 0 steps", f"{stage.warmup_steps}", f"stages.{i}.warmup_steps")
        if stage.end_fraction is not None and not 0 <= stage.end_fraction <= 1:
            _refuse("an end_fraction in [0, 1]", f"{stage.end_fraction}", f"stages.{i}.end_fraction")
        if stage.questions_per_step is not None and stage.questions_per_step < 1:
            _refuse("at least 1 question per step", f"{stage.questions_per_step}", f"stages.{i}.questions_per_step")


def _check_optimizer(config: Config) -> None:
    optimizer = config.optimizer
    for name, value in (("b1", optimizer.b1), ("b2", optimizer.b2)):
        if not 0 <= value < 1:
            _refuse(f"optimizer.{name} in [0, 1)", f"{value}", f"optimizer.{name}")
    for i, stage in enumerate(stage_list(config)):
        chosen, last = schedule_of(config, stage), i == len(config.stages)
        if chosen.kind != "constant" and chosen.warmup_steps >= chosen.decay_steps:
            place = "the last stage" if last else f"stages.{i}"
            own = "" if last or stage.warmup_steps is None else f"stages.{i}.warmup_steps, "
            _refuse(
                f"a warm-up shorter than the schedule ({chosen.decay_steps} optimizer steps) of {place}",
                f"{chosen.warmup_steps}",
                f"{own}optimizer.warmup_steps or optimizer.decay_steps",
            )


def _check_evaluation(config: Config) -> None:
    evaluation, data = config.eval, config.data
    if not evaluation.ks or min(evaluation.ks) < 1 or max(evaluation.ks) > evaluation.samples_per_question:
        _refuse(
            f"eval.ks within 1..{evaluation.samples_per_question} (eval.samples_per_question)",
            f"{list(evaluation.ks)}",
            "eval.ks or eval.samples_per_question",
        )
    if evaluation.questions > data.validation_questions:
        _refuse(
            f"eval.questions of at most data.validation_questions ({data.validation_questions})",
            f"{evaluation.questions}",
            "eval.questions or data.validation_questions",
        )
    if config.train.panel_questions > evaluation.questions:
        _refuse(
            "a panel no larger than the validation questions of an evaluation (eval.questions)",
            f"train.panel_questions {config.train.panel_questions} of {evaluation.questions}",
            "train.panel_questions or eval.questions",
        )
    if data.train_questions is not None and evaluation.train_questions > data.train_questions:
        _refuse(
            f"eval.train_questions of at most data.train_questions ({data.train_questions})",
            f"{evaluation.train_questions}",
            "eval.train_questions",
        )
    if any(step < 0 for step in evaluation.test_steps):
        _refuse("eval.test_steps of at least 0", f"{list(evaluation.test_steps)}", "eval.test_steps")
    if "test" in config.checkpoint.metric.split("/")[0]:
        _refuse(
            "a validation metric to choose checkpoints by (test questions are for the final figures only)",
            repr(config.checkpoint.metric),
            "checkpoint.metric",
        )


def _check_compare(config: Config) -> None:
    metrics = [f"pass@{k}" for k in config.eval.ks]
    if config.compare.metric not in metrics:
        _refuse(f"compare.metric among {metrics} (eval.ks)", repr(config.compare.metric), "compare.metric or eval.ks")
    if config.compare.seeds < 1:
        _refuse("compare.seeds of at least 1", f"{config.compare.seeds}", "compare.seeds")
    group_size = config.rollout.group_size
    for arm in config.compare.arms:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._]*", arm.name):
            _refuse("an arm's name of letters, digits, '.' and '_'", repr(arm.name), "compare.arms")
        if arm.gate is not None and not -1 <= arm.gate <= group_size:
            _refuse(f"a gate in -1..{group_size} for arm {arm.name}", f"{arm.gate}", "compare.arms")
        rates = [*arm.learning_rate, *([] if arm.sft_learning_rate is None else [arm.sft_learning_rate])]
        if any(not 0 < rate < math.inf for rate in rates):
            _refuse(f"learning rates above 0 for arm {arm.name}", f"{rates}", "compare.arms")
        if any(not 0 < share <= 10 for share in arm.sft_share):
            _refuse(f"an sft_share in (0, 10] for arm {arm.name}", f"{list(arm.sft_share)}", "compare.arms")
