"""What a run says before its first step: what is about to run, on what, and which choices of its config to know of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hptjax.build.parts import Parts
from hptjax.build.sampler import int8_parts
from hptjax.build.unread import unread_choices
from hptjax.config import Config
from hptjax.config_batch import stage_list
from hptjax.masked import mean
from hptjax.train.stage import Progress, Stage


def opening_line(parts: Parts, folder: Path, stages: Sequence[Stage], progress: Progress) -> str:
    """What is about to run, on what, and what was dropped of the data."""
    record = data_record(parts)
    plan = " then ".join(f"{stage.steps} steps of {stage.name}" for stage in stages)
    sizes = ", ".join(f"{count} {name}" for name, count in record["questions"].items())
    dropped = [
        f"{count} {split} ({reason.replace('_', ' ')})"
        for split, reasons in record["dropped"].items()
        for reason, count in reasons.items()
        if count
    ]
    parameters = f"{record['parameters']:,} parameters"
    if record["frozen_parameters"]:
        parameters += f" of adapters beside {record['frozen_parameters']:,} that stay"
    return "\n".join(
        [
            f"{folder}: {plan}, from step {progress.step}; {parameters} on "
            f"{parts.policy.mesh.size} {jax.default_backend()} device(s)"
            + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else "")
            + _idle_devices(parts.policy.mesh.size),
            f"questions: {sizes}" + (f"; dropped: {', '.join(dropped)}" if dropped else ""),
        ]
    )


def _idle_devices(used: int) -> str:
    idle = jax.device_count() - used
    return f" ({idle} more stand idle: --mesh.fsdp or --mesh.data uses them)" if idle else ""


def truncates_sampling(config: Config) -> bool:
    """Whether rollouts are drawn from a part of the policy's distribution only."""
    return config.rollout.top_k > 0 or config.rollout.top_p < 1.0


def notes(config: Config, stages: Sequence[Stage]) -> Iterator[str]:
    """What the config asks for that may not be what was meant: truncated or int8 sampling, choices without effect."""
    rolls_out = any(stage.rolls_out for stage in stages)
    if truncates_sampling(config) and rolls_out:
        yield (
            f"warning: training on truncated sampling (rollout.top_k {config.rollout.top_k}, rollout.top_p "
            f"{config.rollout.top_p}): log-probs are those before truncation, so the policy that learns is "
            "not the one that sampled; 0 and 1 turn it off"
        )
    for method in dict.fromkeys(stage.method for stage in stage_list(config)):
        if unread := unread_choices(config, method):
            yield f"note: without effect with method {method!r}: {', '.join(unread)}"
    if int8_parts(config):
        yield _of_int8(config, own=config.rollout.engine == "own" and rolls_out)


def _of_int8(config: Config, *, own: bool) -> str:
    parts, correction = int8_parts(config), config.hpt.sampler_correction
    text = (
        f"{'rollouts and evaluations' if own else 'evaluations'} hold {' and '.join(parts)} as int8 "
        f"({', '.join(f'rollout.{name}_dtype' for name in parts)}): what samples is a little off the policy that learns"
    )
    if own:
        text += f"; hpt.sampler_correction is {correction!r}" + (
            ", so nothing corrects for it: 'token_tis' would" if correction == "none" else ", which corrects for it"
        )
    return text


def data_record(parts: Parts) -> dict[str, Any]:
    """What a run trains on, as JSON values: the data's own record, its counts, mean lengths in tokens, parameters."""
    questions = parts.questions
    prompts = np.asarray([len(question.prompt_tokens) for question in questions.train])
    demonstrations = np.asarray([len(question.demonstration_tokens) for question in questions.train])
    return {
        **questions.record,
        "questions": {name: len(getattr(questions, name)) for name in ("train", "validation", "test")},
        "dropped": questions.dropped,
        "mean_prompt_tokens": mean(prompts),
        "mean_demonstration_tokens": mean(demonstrations),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(parts.policy.params)),  # those that are trained
        "frozen_parameters": sum(leaf.size for leaf in jax.tree.leaves(dict(parts.policy.frozen.trees))),
    }
