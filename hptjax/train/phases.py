"""The host's phases of a step, each a function of the open step: roll out, judge, gate and assemble.

Every phase can be entered again after a stop: it does only what is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hptjax.hpt.assemble import Update
from hptjax.hpt.gate import gate, group_rollouts, select_live, solved_counts, split_questions
from hptjax.records import FinishReason, Objective, Question, Request, Sample, SampleId, Verdict
from hptjax.train.open_step import OpenStep
from hptjax.types import Params

MakeRequests = Callable[[Sequence[Question], int], list[Request]]
"""Questions and the round of their visit -> the requests of their groups."""

SampleRollouts = Callable[..., list[Sample]]
"""(params, requests, *, should_stop, on_wave) -> samples; shorter than the requests only if it was told to stop."""

Judge = Callable[[Sequence[Sample], Mapping[int, Question]], list[tuple[Sample, list[Verdict]]]]
"""Samples and their questions -> the samples with reward and solved, each with its verdicts."""

Assemble = Callable[[Sequence[Sample], frozenset[SampleId]], Update]
"""Live samples and the ids that carry no weight -> one packed update."""


@dataclasses.dataclass(frozen=True)
class Gated:
    """What the gate made of a step: per question the solved count and the objective, and the live samples."""

    solved: np.ndarray
    objectives: list[Objective]
    live: list[Sample]


def roll_out(
    step: OpenStep,
    params: Params,
    *,
    make_requests: MakeRequests,
    sample: SampleRollouts,
    should_stop: Callable[[], bool],
) -> bool:
    """Samples what the step still lacks; False if it was stopped before it had everything."""
    missing = [r for r in make_requests(step.questions, step.round) if r.sample_id not in step.samples]
    if not missing:
        return True

    def keep(samples: Sequence[Sample]) -> None:
        step.samples.update({entry.sample_id: entry for entry in samples})

    keep(sample(params, missing, should_stop=should_stop, on_wave=keep))
    return all(request.sample_id in step.samples for request in missing)


def judge_rollouts(step: OpenStep, judge: Judge) -> None:
    """Asks the verifiers about the samples that have no verdict yet."""
    waiting = [entry for key, entry in step.samples.items() if key not in step.verdicts]
    questions = {question.question_id: question for question in step.questions}
    for judged, verdicts in judge(waiting, questions) if waiting else ():
        step.samples[judged.sample_id] = judged
        step.verdicts[judged.sample_id] = verdicts


def gate_step(step: OpenStep, *, threshold: int, group_size: int) -> Gated:
    """Counts what was solved, decides per question, and keeps the live samples."""
    rollouts = group_rollouts(list(step.samples.values()))
    solved = solved_counts([question.question_id for question in step.questions], rollouts)
    objectives = gate(solved, threshold=threshold, group_size=group_size)
    visits = {question.question_id: step.round for question in step.questions}
    return Gated(solved, objectives, select_live(step.questions, rollouts, objectives, visits=visits))


def assemble_updates(gated: Gated, *, updates: int, mask_overlong: bool, assemble: Assemble) -> list[Update]:
    """The packed updates of a step: whole questions, in stream order, each update with its own normalisers.

    Args
      mask_overlong: truncated rollouts count in their group's statistics and carry no weight.
    """
    dead = frozenset(
        sample.sample_id for sample in gated.live if mask_overlong and sample.finish_reason == FinishReason.LENGTH
    )
    order = list(dict.fromkeys(sample.sample_id.question for sample in gated.live))
    packed = []
    for part in split_questions(order, updates):
        chosen = frozenset(part)
        packed.append(assemble([sample for sample in gated.live if sample.sample_id.question in chosen], dead))
    return packed


def rollout_metrics(step: OpenStep, gated: Gated, updates: Sequence[Update], *, group_size: int) -> dict[str, Any]:
    """What the host knows of a step before its updates: rewards, lengths, the gate, the packing.

    Values are as `diagnostics.metrics` declares their reduction: (total, count) pairs, counts per bin, or numbers.
    """
    rollouts = list(step.samples.values())
    demonstrations = sum(1 for sample in gated.live if sample.sample_id not in step.samples)
    batches = sum(len(update.micro_batches) for update in updates)
    row: dict[str, Any] = {
        "hpt/gate_sft_frac": (sum(o == Objective.SFT for o in gated.objectives), len(step.questions)),
        "on_off_metrics/off_example_ratio": (demonstrations, len(gated.live)),
        "batch/live_rows": sum(len(update.samples) for update in updates),
        "batch/rollouts": len(rollouts),
        "batch/micro_batches": batches,
        "batch/fill": (sum(update.fill * len(update.micro_batches) for update in updates), batches),
    }
    if not rollouts:
        return row
    rewards = np.asarray([sample.reward for sample in rollouts], np.float64)
    lengths = np.asarray([len(sample.completion_tokens) for sample in rollouts], np.float64)
    groups = group_rollouts(rollouts).values()
    reasons = [verdict.reason for verdicts in step.verdicts.values() for verdict in verdicts]
    return row | {
        "critic/score/mean": (rewards.sum(), rewards.size),
        "critic/score/max": rewards.max(),
        "critic/score/min": rewards.min(),
        "batch/solve_none": np.sum(gated.solved == 0),
        "batch/solve_all": np.sum(gated.solved == group_size),
        "batch/solved": np.sum(gated.solved > 0),
        "group/zero_std_frac": (sum(len({sample.reward for sample in group}) == 1 for group in groups), len(groups)),
        "response_length/mean": (lengths.sum(), lengths.size),
        "response_length/max": lengths.max(),
        "response_length/min": lengths.min(),
        "response_length/clip_ratio": (
            sum(sample.finish_reason == FinishReason.LENGTH for sample in rollouts),
            len(rollouts),
        ),
        "verifier/timeouts": sum(reason == "timeout" for reason in reasons),
        "verifier/failures": sum(reason == "crashed" or reason.startswith("raised") for reason in reasons),
        "hpt/rate_hist": np.bincount(np.asarray(gated.solved, np.int64), minlength=group_size + 1).tolist(),
    }


def visit_metrics(gated: Gated, questions: Sequence[Question], history: dict[str, list[int]]) -> dict[str, int]:
    """Questions whose gate decision changed since their last visit, and those that left rate 0; updates `history`.

    Args
      history: question id (text, for JSON) -> [objective, solved] of its last visit.
    """
    flips = first_solved = 0
    for question, objective, solved in zip(questions, gated.objectives, gated.solved, strict=True):
        last = history.get(str(question.question_id))
        if last is not None:
            flips += int(last[0] != int(objective))
            first_solved += int(last[1] == 0 and solved > 0)
        history[str(question.question_id)] = [int(objective), int(solved)]
    return {"hpt/flips": flips, "hpt/first_solved": first_solved}
