"""Models that only score: the reference of a penalty, a teacher, and the author of the demonstrations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hptjax.build.adapters import BASE
from hptjax.build.method import chosen_method, needs_of
from hptjax.build.policy import Policy, build_functions
from hptjax.config import Config
from hptjax.config_batch import row_room, stage_list
from hptjax.hpt.assemble import assemble
from hptjax.hpt.gate import demonstration_sample
from hptjax.hpt.terms import Term
from hptjax.hpt.unpack import by_sample
from hptjax.losses.advantages import ones
from hptjax.losses.estimator import Need
from hptjax.losses.reducers import token_mean
from hptjax.models.folder_slices import folder_shape, load_placed
from hptjax.records import Question, Source
from hptjax.sharding.host import to_host
from hptjax.sharding.mesh import one_at_a_time, put_micro_batch
from hptjax.train.objective import PolicyOf, TokenStatsFn, ValueHead
from hptjax.types import MicroBatch, Params

Scorer = Callable[[MicroBatch], Any]
"""A micro-batch -> log-probs of its target tokens by one frozen model, [B T]."""


def make_score(token_stats: Callable[[bool], TokenStatsFn]) -> Callable[[Params, MicroBatch], Any]:
    """The score pass: parameters and a micro-batch -> log-probs of its target tokens."""
    stats = token_stats(False)

    def score(params: Params, micro_batch: MicroBatch) -> Any:
        return stats(params, micro_batch).logprobs

    return score


def make_looks(
    token_stats: Callable[[bool], TokenStatsFn], names: frozenset[str], value_head: ValueHead, policy_of: PolicyOf
) -> Callable[[Mapping[str, Params], MicroBatch], dict[str, Any]]:
    """A score pass that says more: named parameters and a micro-batch -> name -> [B T].

    Args
      names: of "rollout_logprobs", "entropy" and "rollout_values"; what is not asked for is not computed.
    """
    stats = token_stats("entropy" in names)

    def looks(params: Mapping[str, Params], micro_batch: MicroBatch) -> dict[str, Any]:
        found = stats(policy_of(params), micro_batch)
        every = {"rollout_logprobs": found.logprobs, "entropy": found.entropy}
        if "rollout_values" in names:
            every["rollout_values"] = value_head(params["critic"], found.hidden, micro_batch.completion_mask)
        return {name: every[name] for name in sorted(names)}

    return looks


def frozen_scorer(config: Config, policy: Policy, folder: str, field: str) -> Scorer:
    """A model of a folder on the policy's mesh, compiled when it is first used.

    Args
      field: the config field that names the folder, for messages.
    Raises a folder that is no model, or one with another vocabulary -> ValueError.
    """
    shape = folder_shape(Path(folder))
    if shape.vocab_size != policy.config.vocab_size:
        raise ValueError(
            f"expected {field} to have the policy's vocabulary of {policy.config.vocab_size} tokens, got "
            f"{shape.vocab_size} in '{folder}': log-probs can only be compared token by token; change {field}"
        )
    functions = build_functions(config, shape, policy.mesh)
    params = load_placed(Path(folder), functions.shardings)
    score = one_at_a_time(policy.mesh, jax.jit(make_score(functions.token_stats)))
    return lambda micro_batch: score(params, micro_batch)


def add_frozen(
    config: Config, policy: Policy, own_score: Callable[[Params, MicroBatch], Any], needs: frozenset[Need]
) -> Callable[[MicroBatch], MicroBatch] | None:
    """Makes what fills in `reference_logprobs` and `teacher_logprobs`, where a method needs them; else None."""
    scorers: dict[str, Scorer] = {}
    reference, teacher = config.model.reference, config.model.teacher
    if Need.REFERENCE_LOGPROBS in needs and reference is not None:
        scorers["reference_logprobs"] = _reference(config, policy, reference, own_score)
    if Need.TEACHER_LOGPROBS in needs and teacher is not None:
        scorers["teacher_logprobs"] = frozen_scorer(config, policy, teacher, "model.teacher")
    if not scorers:
        return None
    return lambda micro_batch: dataclasses.replace(
        micro_batch, **{name: scorer(micro_batch) for name, scorer in scorers.items()}
    )


def reads_start(config: Config) -> bool:
    """Whether a stage reads log-probs of the policy as the run starts, so that those weights must stay."""
    return config.model.reference == "start" and any(
        Need.REFERENCE_LOGPROBS in needs_of(config, chosen_method(config, stage.method)) for stage in stage_list(config)
    )


def let_go_of_start(config: Config, policy: Policy) -> None:
    """Frees the weights as the run starts, once the state has its own copy, where no stage reads them."""
    if not reads_start(config):
        jax.tree.map(lambda leaf: leaf.delete(), policy.params)


def _reference(
    config: Config, policy: Policy, reference: str, own_score: Callable[[Params, MicroBatch], Any]
) -> Scorer:
    """The policy as the run starts, the model without its adapters (both cost no weights), or that of a folder."""
    if reference == "start":
        return lambda micro_batch: own_score(policy.params, micro_batch)
    if reference == "base" and BASE in policy.frozen.trees:
        score = one_at_a_time(policy.mesh, jax.jit(make_score(policy.token_stats)))
        return lambda micro_batch: score(policy.frozen.trees[BASE], micro_batch)
    return frozen_scorer(config, policy, reference, "model.reference")


def with_author_logprobs(config: Config, policy: Policy, questions: Sequence[Question]) -> list[Question]:
    """The questions with `demonstration_logprobs`, scored once by `model.demonstration_author`, if they have any."""
    assert config.model.demonstration_author is not None
    scorer = frozen_scorer(config, policy, config.model.demonstration_author, "model.demonstration_author")
    batch = config.batch
    everything = Term("sft", frozenset({Source.DEMONSTRATION}), 1.0, token_mean, ones)
    at_once = batch.rows * batch.max_micro_batches  # a row holds one demonstration at the least
    scored: list[Question] = []
    for first in range(0, len(questions), at_once):
        part = questions[first : first + at_once]
        update = assemble(
            [demonstration_sample(question) for question in part if len(question.demonstration_tokens)],
            [everything],
            **row_room(config),
            max_micro_batches=batch.max_micro_batches,
        )
        values = [
            np.asarray(to_host(scorer(put_micro_batch(policy.mesh, b, policy.rules)))) for b in update.micro_batches
        ]
        logprobs = {sample_id.question: each for sample_id, each in by_sample(update, values).items()}
        scored += [
            dataclasses.replace(
                question,
                demonstration_logprobs=logprobs[question.question_id][len(question.prompt_tokens) - 1 :],
            )
            if question.question_id in logprobs
            else question
            for question in part
        ]
    return scored
