"""What a config amounts to, by arithmetic alone: batches, bytes, and what one token of each objective weighs."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hptjax.config import Config
from hptjax.config_batch import (
    StageSchedule,
    micro_batches_needed,
    row_positions,
    samples_in_row,
    samples_per_update,
    schedule_of,
    shared_tokens,
    stage_alone,
    stage_list,
    steps_of,
)
from hptjax.config_methods import (
    GATED,
    IN_A_GROUP,
    learns_from_demonstrations,
    learns_from_rollouts,
    samples_per_bundle,
)
from hptjax.config_model import ShapeConfig
from hptjax.explain_flops import Lengths, flop_lines
from hptjax.masked import inverse_count
from hptjax.model_shape import decoder_shape
from hptjax.models.folder_config import CONFIG_FILE
from hptjax.models.shape import DecoderConfig

if TYPE_CHECKING:
    from hptjax.build.token_weights import TokenWeight

SHOWN_SHARES = (0.1, 0.5, 1.0)
TOKEN_MEANS = ("separate", "joint")  # presets whose rollout weight depends on the tokens of the update


def explain(config: Config, *, given: Mapping[str, str] | None = None, lengths: Lengths | None = None) -> str:
    """The report, as text. Nothing is loaded but two small JSON files of the model folder, where it is there.

    Args
      given: field -> who has set it (`config_sources.field_sources`); None: "set" wherever it differs from the default.
      lengths: mean tokens of a sample, for its operations; None: the most there can be.
    """
    from hptjax.explain_fields import field_lines
    from hptjax.explain_memory import memory_lines, parameter_count

    sized, unknown = known_here(config)
    shape = folder_shape(sized)
    stages = stage_list(sized)
    parts = [("Not known here", unknown)] if unknown else []
    parts.append(("Stages", stage_lines(sized)))
    for number, stage in enumerate(stages, start=1):
        alone = stage_alone(sized, stage)
        of_stage = f" of stage {number}, {stage.method}" if len(stages) > 1 else ""
        parts.append((f"One update{of_stage}", update_lines(alone)))
        title = f"What one token{of_stage} weighs (its factor in the loss, advantage not included)"
        parts.append((title, weight_lines(alone)))
    parameters = parameter_count(shape, shape.vocab_size)
    parts.append((f"Memory, estimated (vocabulary {shape.vocab_size})", memory_lines(sized, shape)))
    parts.append(("Operations", flop_lines(sized, shape, parameters, lengths)))
    parts.append(("Fields, and who has set them", field_lines(config, shape, given)))
    return "\n\n".join(f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in parts)


def known_here(config: Config) -> tuple[Config, list[str]]:
    """The config with the preset's sizes where the folder of model.path is absent, and what nobody can know yet."""
    model, data, unknown = config.model, config.data, []
    if model.path is None and model.preset is not None and model.tokenizer is None:
        unknown.append(f"no model.path is set: the sizes are those of model.preset '{model.preset}'")
    elif model.path is not None and model.preset is not None and not os.path.isfile(f"{model.path}/{CONFIG_FILE}"):
        unknown.append(f"'{model.path}' holds no {CONFIG_FILE}: the sizes are those of model.preset '{model.preset}'")
        config = dataclasses.replace(config, model=dataclasses.replace(model, path=None))
    if data.files:
        unknown.append(
            f"{', '.join(data.files)}: not opened; how many questions are left and how long they are, `hptjax data "
            "check` says"
        )
    others = {"model.teacher": model.teacher, "model.demonstration_author": model.demonstration_author}
    own = model.reference == "start" or (model.reference == "base" and config.lora.on)
    others["model.reference"] = None if own else model.reference
    return config, unknown + [
        f"{name} '{folder}': its weights come on top" for name, folder in others.items() if folder is not None
    ]


def stage_lines(config: Config) -> list[str]:
    """One line per stage, in order."""
    lines = []
    updates = config.train.updates_per_rollout_batch
    for i, (stage, (_, _, questions)) in enumerate(zip(stage_list(config), steps_of(config), strict=True)):
        drawn = stage.steps * questions
        known = _training_questions(config)
        passes = "" if known is None else f", {inverse_count(known) * drawn:.2f} passes over the training questions"
        lines.append(
            f"{i + 1}. {stage.method}: {stage.steps} steps x {questions} questions, {stage.steps * updates} updates, "
            f"{_rate_words(schedule_of(config, stage))}{passes}"
        )
    return lines


def _rate_words(chosen: StageSchedule) -> str:
    """The learning rate of a stage, with its schedule where it has one."""
    words = f"learning rate {chosen.learning_rate:g}"
    if chosen.warmup_steps:
        words += f" after {chosen.warmup_steps} updates of warm-up"
    if chosen.kind != "constant":
        words += f", {chosen.kind} to {chosen.end_fraction:g} of it after {chosen.decay_steps} updates"
    return words


def _training_questions(config: Config) -> int | None:
    """How many there are, before any is dropped; None where only the files know."""
    data = config.data
    if data.train_questions is not None or data.files:
        return data.train_questions
    share = data.fractions.base if data.train_split == "base" else data.fractions.train
    return max(round(share * config.task.instances), 1)


def update_lines(config: Config) -> list[str]:
    """How the samples of one update of the last stage fill its micro-batches."""
    batch, rollout = config.batch, config.rollout
    questions = config.data.questions_per_step
    samples = samples_per_update(config, method=config.method, questions=questions)
    longest = config.data.max_prompt_tokens + rollout.max_completion_tokens
    updates = config.train.updates_per_rollout_batch
    lines = []
    if learns_from_rollouts(config.method):
        group = _group_size(config)
        fills = -(-questions * group // rollout.slots)
        where = f"in {rollout.slots} slots, each filled {fills} time{'s' * (fills > 1)}"
        if rollout.engine == "server":
            where = f"by the server at {rollout.server.url}, {rollout.server.concurrency} at a time"
        lines.append(f"rollouts     {questions} questions x {group} = {questions * group} per step, {where}")
    if config.method in GATED:
        fewest = questions // updates
        lines.append(f"samples      {fewest} (every question gated to its demonstration) to {samples} (none)")
    else:
        lines.append(f"samples      {samples}")
    prompt, completion = config.data.max_prompt_tokens, rollout.max_completion_tokens
    positions = batch.rows * row_positions(config)
    row = f"({shared_tokens(config)} shared + {batch.row_tokens})" if batch.share_prompts else f"{batch.row_tokens}"
    per_row = samples_in_row(config)
    needed = micro_batches_needed(
        config, samples=samples, method=config.method, bundle=samples_per_bundle(config.method)
    )
    later = "; the later ones are off-policy" if updates > 1 and learns_from_rollouts(config.method) else ""
    return [
        *lines,
        f"longest      {prompt} prompt + {completion} completion = {longest} tokens",
        f"micro-batch  {batch.rows} rows x {row} tokens = {positions} positions, {per_row} to "
        + f"{batch.max_segments} samples in a full row",
        f"per update   at most {needed} micro-batches needed, {batch.max_micro_batches} allowed "
        + "(batch.max_micro_batches)",
        f"per step     {updates} update(s){later}",
        f"tokens       at most {samples * longest:,} per update, {updates * samples * longest:,} per step, "
        + f"{config.train.steps * updates * samples * longest:,} in all {config.train.steps:,} steps",
    ]


def weight_lines(config: Config) -> list[str]:
    """The weight of one token of each part; for gated methods, how many rollout tokens outweigh one demonstrated."""
    questions = config.data.questions_per_step // config.train.updates_per_rollout_batch
    first = f"preset {config.hpt.preset}, {questions} questions per update"
    return [first, *(_gated_lines if config.method in GATED else _part_lines)(config, questions)]


def _gated_lines(config: Config, questions: int) -> list[str]:
    from hptjax.build.token_weights import split_weights

    demo_tokens = config.rollout.max_completion_tokens
    counts_tokens = config.hpt.preset in TOKEN_MEANS
    none = split_weights(config, questions=questions, demonstrations=0, demo_tokens=demo_tokens)
    where = f", where every question has {config.rollout.group_size} rollouts of {demo_tokens} tokens"
    lines = [f"one rollout token: {_range(none['rl'])} (times its advantage){where if counts_tokens else ''}"]
    others = {name: each for name, each in none.items() if name not in ("rl", "sft")}
    for share in SHOWN_SHARES:
        demonstrations = max(1, round(share * questions))
        found = split_weights(config, questions=questions, demonstrations=demonstrations, demo_tokens=demo_tokens)
        line = f"one demonstration token: {_range(found['sft'])} with {demonstrations} demonstrations of "
        line += f"{demo_tokens} tokens"
        rl = found["rl"] if counts_tokens else none["rl"]
        if rl.high:  # else there is no rollout to compare with
            line += f" = {_range(found['sft'], inverse_count(rl.high), '.3g')} rollout tokens of advantage 1"
        lines.append(line)
        others = {name: each if each.high else found[name] for name, each in others.items()}
    return [*lines, *map(_part_line, others.values())]


def _part_lines(config: Config, questions: int) -> list[str]:
    from hptjax.build.token_weights import routed_weights

    tokens, group = config.rollout.max_completion_tokens, _group_size(config)
    lines = []
    if learns_from_rollouts(config.method):
        beside = f", and a demonstration of {tokens}" if learns_from_demonstrations(config.method) else ""
        lines.append(
            f"where every question has {group} rollouts of {tokens} tokens, {-(-group // 2)} solved{beside}; first step"
        )
        return [*lines, *map(_part_line, routed_weights(config, questions=questions))]
    (sft, *others) = routed_weights(config, questions=questions)
    counted = f"one demonstration token: {_range(sft)} with {questions} demonstrations of {tokens} tokens"
    return [counted, *map(_part_line, others)]


def _part_line(weight: TokenWeight) -> str:
    token = f"one {weight.of} token" if weight.of else "one token"
    named = {"rl": "rollout", "sft": "demonstration", "prefix": "prefix"}.get(weight.part) == weight.of
    advantage = " (times its advantage)" if weight.has_advantage else ""
    return f"{token}{'' if named else f' of {weight.part}'}: {_range(weight)}{advantage}"


def _range(weight: TokenWeight, factor: float = 1.0, form: str = ".3e") -> str:
    low, high = f"{weight.low * factor:{form}}", f"{weight.high * factor:{form}}"
    return low if low == high else f"{low} to {high}"


def rl_token_weight(config: Config, *, questions: int, demonstrations: int = 0, demo_tokens: int = 0) -> float:
    """Weight of one live rollout token, by the recipe's own reducer; every rollout has the most tokens it may.

    Args
      demonstrations, demo_tokens: questions gated to their demonstration, and the tokens of each.
    """
    from hptjax.build.token_weights import split_weights

    counts = {"questions": questions, "demonstrations": demonstrations, "demo_tokens": demo_tokens}
    return split_weights(config, **counts)["rl"].high


def sft_token_weight(config: Config, *, questions: int, demonstrations: int, demo_tokens: int) -> float:
    """Weight of one demonstration token, by the recipe's own reducer; the largest, where they differ."""
    from hptjax.build.token_weights import split_weights

    counts = {"questions": questions, "demonstrations": demonstrations, "demo_tokens": demo_tokens}
    return split_weights(config, **counts)["sft"].high


def _group_size(config: Config) -> int:
    return config.rollout.group_size - int(config.method in IN_A_GROUP)


def model_shape(config: Config) -> tuple[ShapeConfig, int]:
    """Sizes and vocabulary of the model: of its folder, of a preset, or `model.shape` with the tokenizer's vocabulary.

    Raises
      FileNotFoundError: the folder of model.path or model.tokenizer lacks its JSON file.
    """
    shape = folder_shape(config)
    names = [field.name for field in dataclasses.fields(ShapeConfig)]
    return ShapeConfig(**{name: getattr(shape, name) for name in names}), shape.vocab_size


def folder_shape(config: Config) -> DecoderConfig:
    """The decoder of `model_shape`, vocabulary included."""
    return decoder_shape(config, lambda: _vocabulary(pathlib.Path(config.model.tokenizer or "")))


def _vocabulary(folder: pathlib.Path) -> int:
    """Tokens of the tokenizer in a folder, read from its file alone."""
    path = folder / "tokenizer.json"
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"expected '{path}', found no such file; change model.tokenizer (Hugging Face folder layout)."
        )
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    return len(set(tokenizer["model"]["vocab"]) | {token["content"] for token in tokenizer.get("added_tokens", [])})


def human_bytes(size: int | float) -> str:
    """For example `3.4 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size *= 1 / 1024
    return f"{size:.1f} TiB"
