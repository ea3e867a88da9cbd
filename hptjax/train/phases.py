"""The host's phases of a step, each a function of the open step: roll out, judge, gate and assemble.

Every phase can be entered again after a stop: it does only what is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from hptjax.hpt.assemble import Update
from hptjax.hpt.gate import gate, group_rollouts, select_live, solved_counts, split_questions
from hptjax.records import FinishReason, Judge, MakeRequests, Objective, Sample, SampleId
from hptjax.train.ledger import AccumulationError
from hptjax.train.open_step import OpenStep
from hptjax.types import Params

SampleRollouts = Callable[..., list[Sample]]
"""(params, requests, *, should_stop, on_wave) -> samples; shorter than the requests only if it was told to stop."""

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

    Raises AccumulationError where a live sample is in no update, or in two.

    Args
      updates: fewer where there are fewer questions, in the last, smaller batch of a pass.
      mask_overlong: truncated rollouts count in their group's statistics and carry no weight.
    """
    dead = frozenset(
        sample.sample_id for sample in gated.live if mask_overlong and sample.finish_reason == FinishReason.LENGTH
    )
    order = list(dict.fromkeys(sample.sample_id.question for sample in gated.live))
    packed = []
    for part in split_questions(order, min(updates, len(order))):
        chosen = frozenset(part)
        packed.append(assemble([sample for sample in gated.live if sample.sample_id.question in chosen], dead))
    accounted = sum(len(update.samples) + update.left_out for update in packed)
    if accounted != len(gated.live):
        raise AccumulationError(
            f"the gate left {len(gated.live)} live samples, but the updates account for {accounted}: some were lost or "
            "repeated between gate and packing; nothing was trained on them"
        )
    return packed
