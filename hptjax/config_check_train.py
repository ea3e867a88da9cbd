"""What is asked of the loop: room in micro-batches, stages, schedules, and what is measured and compared."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from hptjax.config import Config
from hptjax.config_batch import (
    SHORT_ROW_TOKENS,
    longest_in_row,
    micro_batches_needed,
    samples_in_row,
    samples_per_update,
    schedule_of,
    shared_tokens,
    stage_list,
    steps_of,
)
from hptjax.config_methods import samples_per_bundle
from hptjax.config_problem import Problem


def batch_problems(config: Config) -> Iterator[Problem]:
    """What is wrong with `[batch]`: whether every stage fits into its micro-batches."""
    batch = config.batch
    yield from _sharing_problems(config)
    longest, lanes = longest_in_row(config), batch.lanes
    one_prompt = ", a row for each prompt" if batch.share_prompts else ""
    for place, method, questions in steps_of(config):
        bundle = samples_per_bundle(method)
        least = lanes * bundle * longest
        if batch.row_tokens < least:
            pair = "twice (the two samples of a pair share a row) " if bundle == 2 else ""
            each = "batch.lanes x " if lanes > 1 else ""
            prompt = "" if batch.share_prompts else "data.max_prompt_tokens + "
            yield (
                f"batch.row_tokens of at least {least} for {place} ({method}: {pair}{each}{prompt}"
                "rollout.max_completion_tokens)",
                f"{batch.row_tokens}",
                "batch.row_tokens",
            )
        if batch.max_segments < lanes * bundle:
            yield (
                f"batch.max_segments of at least {lanes * bundle} for {method}",
                f"{batch.max_segments}",
                "batch.max_segments",
            )
        if not samples_in_row(config, bundle):
            continue
        if questions % config.train.updates_per_rollout_batch:
            yield (
                f"questions per step of {place} to be a multiple of train.updates_per_rollout_batch "
                f"({config.train.updates_per_rollout_batch})",
                f"{questions}",
                "data.questions_per_step or train.updates_per_rollout_batch",
            )
        samples = samples_per_update(config, method=method, questions=questions)
        needed = micro_batches_needed(config, samples=samples, method=method, bundle=bundle)
        if needed > batch.max_micro_batches:
            yield (
                f"batch.max_micro_batches of at least {needed} for {place} ({samples} samples of up to {longest} "
                f"tokens in micro-batches of {batch.rows} x {batch.row_tokens}{one_prompt})",
                f"{batch.max_micro_batches}",
                "batch.max_micro_batches, batch.rows or data.questions_per_step",
            )


def _sharing_problems(config: Config) -> Iterator[Problem]:
    """What is wrong with `batch.share_prompts` and `batch.lanes` in themselves."""
    batch = config.batch
    if not batch.share_prompts:
        if batch.lanes > 1:
            yield "batch.lanes of 1 where rows do not share a prompt", f"{batch.lanes}", "batch.share_prompts"
        return
    for field in ("row_tokens", "max_segments"):
        if getattr(batch, field) % batch.lanes:
            yield (
                f"batch.{field} to be a multiple of batch.lanes ({batch.lanes})",
                f"{getattr(batch, field)}",
                f"batch.{field} or batch.lanes",
            )
    if config.mesh.sequence > 1:
        yield "mesh.sequence of 1 with batch.share_prompts", f"{config.mesh.sequence}", "mesh.sequence"
    seen = shared_tokens(config) + batch.row_tokens // batch.lanes
    if config.model.attention != "reference" and (config.model.attention != "auto" or seen > SHORT_ROW_TOKENS):
        yield (
            'model.attention "reference" with batch.share_prompts (or "auto" where a prompt and a lane have at most '
            f"{SHORT_ROW_TOKENS} positions): it has the plain form alone, with all its scores",
            f'"{config.model.attention}" and {seen} positions',
            "model.attention, batch.lanes or batch.share_prompts",
        )


def stage_problems(config: Config) -> Iterator[Problem]:
    """What is wrong with the stages before the last one, each in itself."""
    for i, stage in enumerate(config.stages):
        if stage.steps < 1:
            yield "a stage of at least 1 step", f"{stage.steps}", f"stages.{i}.steps"
        if stage.learning_rate is not None and not (math.isfinite(stage.learning_rate) and stage.learning_rate > 0):
            yield "a learning rate above 0", f"{stage.learning_rate}", f"stages.{i}.learning_rate"
        if stage.warmup_steps is not None and stage.warmup_steps < 0:
            yield "a warm-up of at least 0 steps", f"{stage.warmup_steps}", f"stages.{i}.warmup_steps"
        if stage.end_fraction is not None and not 0 <= stage.end_fraction <= 1:
            yield "an end_fraction in [0, 1]", f"{stage.end_fraction}", f"stages.{i}.end_fraction"
        if stage.questions_per_step is not None and stage.questions_per_step < 1:
            yield "at least 1 question per step", f"{stage.questions_per_step}", f"stages.{i}.questions_per_step"


def optimizer_problems(config: Config) -> Iterator[Problem]:
    """What is wrong with `[optimizer]`, the schedules of the stages included."""
    optimizer = config.optimizer
    for name, value in (("b1", optimizer.b1), ("b2", optimizer.b2)):
        if not 0 <= value < 1:
            yield f"optimizer.{name} in [0, 1)", f"{value}", f"optimizer.{name}"
    for i, stage in enumerate(stage_list(config)):
        chosen, last = schedule_of(config, stage), i == len(config.stages)
        if chosen.kind != "constant" and chosen.warmup_steps >= chosen.decay_steps:
            place = "the last stage" if last else f"stages.{i}"
            own = "" if last or stage.warmup_steps is None else f"stages.{i}.warmup_steps, "
            yield (
                f"a warm-up shorter than the schedule ({chosen.decay_steps} optimizer steps) of {place}",
                f"{chosen.warmup_steps}",
                f"{own}optimizer.warmup_steps or optimizer.decay_steps",
            )


def evaluation_problems(config: Config) -> Iterator[Problem]:
    """What is wrong with `[eval]`, and with what checkpoints are chosen by."""
    evaluation, data = config.eval, config.data
    if not evaluation.ks or min(evaluation.ks) < 1 or max(evaluation.ks) > evaluation.samples_per_question:
        yield (
            f"eval.ks within 1..{evaluation.samples_per_question} (eval.samples_per_question)",
            f"{list(evaluation.ks)}",
            "eval.ks or eval.samples_per_question",
        )
    if evaluation.questions > data.validation_questions:
        yield (
            f"eval.questions of at most data.validation_questions ({data.validation_questions})",
            f"{evaluation.questions}",
            "eval.questions or data.validation_questions",
        )
    if config.train.panel_questions > evaluation.questions:
        yield (
            "a panel no larger than the validation questions of an evaluation (eval.questions)",
            f"train.panel_questions {config.train.panel_questions} of {evaluation.questions}",
            "train.panel_questions or eval.questions",
        )
    if data.train_questions is not None and evaluation.train_questions > data.train_questions:
        yield (
            f"eval.train_questions of at most data.train_questions ({data.train_questions})",
            f"{evaluation.train_questions}",
            "eval.train_questions",
        )
    if any(step < 0 for step in evaluation.test_steps):
        yield "eval.test_steps of at least 0", f"{list(evaluation.test_steps)}", "eval.test_steps"
    if "test" in config.checkpoint.metric.split("/")[0]:
        yield (
            "a validation metric to choose checkpoints by (test questions are for the final figures only)",
            repr(config.checkpoint.metric),
            "checkpoint.metric",
        )


def compare_problems(config: Config) -> Iterator[Problem]:
    """What is wrong with `[compare]`."""
    metrics = [f"pass@{k}" for k in config.eval.ks]
    if config.compare.metric not in metrics:
        yield f"compare.metric among {metrics} (eval.ks)", repr(config.compare.metric), "compare.metric or eval.ks"
    if config.compare.seeds < 1:
        yield "compare.seeds of at least 1", f"{config.compare.seeds}", "compare.seeds"
    group_size = config.rollout.group_size
    for arm in config.compare.arms:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._]*", arm.name):
            yield "an arm's name of letters, digits, '.' and '_'", repr(arm.name), "compare.arms"
        if arm.gate is not None and not -1 <= arm.gate <= group_size:
            yield f"a gate in -1..{group_size} for arm {arm.name}", f"{arm.gate}", "compare.arms"
        rates = [*arm.learning_rate, *([] if arm.sft_learning_rate is None else [arm.sft_learning_rate])]
        if any(not 0 < rate < math.inf for rate in rates):
            yield f"learning rates above 0 for arm {arm.name}", f"{rates}", "compare.arms"
        if any(not 0 < share <= 10 for share in arm.sft_share):
            yield f"an sft_share in (0, 10] for arm {arm.name}", f"{list(arm.sft_share)}", "compare.arms"
