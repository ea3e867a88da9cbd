"""The host's phases of a step, each a function of the open step: roll out, judge, gate and assemble.

Every phase can be entered again after a stop: it does only what is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hptjax.hpt.assemble import Update
from hptjax.hpt.control import Controls
from hptjax.hpt.gate import demonstration_sample, group_rollouts, solved_counts, split_questions
from hptjax.hpt.refine import Refined
from hptjax.hpt.route import Judged, Route, Routed, Waiting, varies
from hptjax.records import FinishReason, Judge, Objective, Question, RolloutPlan, Sample, SampleId
from hptjax.train.ledger import AccumulationError
from hptjax.train.open_step import OpenStep
from hptjax.types import Params

SampleRollouts = Callable[..., list[Sample]]
"""(params, requests, *, should_stop, on_finished) -> samples; shorter than the requests only if it was told to stop."""

Assemble = Callable[..., Update]
"""Live samples, the ids that carry no weight, the step's `Routed` and the steps done before it -> one packed update.

`optimizer`, a keyword, says which of several takes it; 0 without. `controls`, a keyword, are coefficients that were
steered; without it the terms have their own.
"""


@dataclasses.dataclass(frozen=True)
class Gated:
    """What the route made of a step, and the solved count of each question."""

    solved: np.ndarray
    routed: Routed

    @property
    def objectives(self) -> list[Objective]:
        """What each question learns from."""
        return self.routed.objectives

    @property
    def live(self) -> list[Sample]:
        """The samples that enter the updates."""
        return self.routed.live


def roll_out(
    step: OpenStep,
    params: Params,
    *,
    plan: RolloutPlan,
    stage_step: int,
    sample: SampleRollouts,
    should_stop: Callable[[], bool],
) -> bool:
    """Samples what the plan asks for by the verdicts so far; False if it was stopped before it had everything.

    The step has all its rollouts when every sample is judged and this finds nothing missing (`unjudged`).
    """
    judged = {key: entry for key, entry in step.samples.items() if key in step.verdicts}
    wanted = plan(step.questions, step.round, judged, stage_step)
    missing = [request for request in wanted if request.sample_id not in step.samples]
    if not missing:
        return True

    def keep(samples: Sequence[Sample]) -> None:
        step.samples.update({entry.sample_id: entry for entry in samples})

    keep(sample(params, missing, should_stop=should_stop, on_finished=keep))
    return all(request.sample_id in step.samples for request in missing)


def unjudged(step: OpenStep) -> list[Sample]:
    """The samples that have no verdict yet, in the order in which they were sampled."""
    return [entry for key, entry in step.samples.items() if key not in step.verdicts]


def judge_rollouts(step: OpenStep, judge: Judge, penalty: Callable[[Sample], float] | None = None) -> None:
    """Asks the verifiers about the samples that have no verdict yet; `penalty` is added to their rewards."""
    waiting = unjudged(step)
    questions = {question.question_id: question for question in step.questions}
    for judged, verdicts in judge(waiting, questions) if waiting else ():
        if penalty is not None and judged.reward is not None:
            judged = dataclasses.replace(judged, reward=judged.reward + penalty(judged))
        step.samples[judged.sample_id] = judged
        step.verdicts[judged.sample_id] = verdicts


def varied_questions(step: OpenStep) -> int:
    """Questions of the step whose rollouts are neither all solved nor all unsolved."""
    return sum(varies(group) for group in group_rollouts(list(step.samples.values())).values())


def judge_demonstrations(step: OpenStep, judge: Judge) -> dict[int, Sample]:
    """The demonstrations of the step's questions with their rewards, for methods whose baseline counts them."""
    questions = {question.question_id: question for question in step.questions}
    waiting = [demonstration_sample(question, visit=step.round) for question in step.questions]
    return {judged.sample_id.question: judged for judged, _ in judge(waiting, questions)}


def gate_step(
    step: OpenStep,
    *,
    route: Route,
    demonstrations: Mapping[int, Sample] | None = None,
    waiting: Sequence[Waiting] = (),
    bank: Mapping[int, Question] | None = None,
    wanted: int = 0,
) -> Gated:
    """Counts what was solved and lets the method's route decide what each question learns from.

    Args
      demonstrations, waiting, bank, wanted: of `route.Judged`, for the routes that read them.
    """
    rollouts = group_rollouts(list(step.samples.values()))
    solved = solved_counts([question.question_id for question in step.questions], rollouts)
    judged = Judged(step.questions, rollouts, solved, step.round, demonstrations or {}, waiting, bank or {}, wanted)
    return Gated(solved, route(judged))


def assemble_updates(
    gated: Gated,
    *,
    updates: int,
    stage_step: int = 0,
    mask_overlong: bool,
    assemble: Assemble,
    refined: Sequence[Refined] | None = None,
    controls: Controls | None = None,
) -> list[Update]:
    """The packed updates of a step: whole questions, in stream order, each update with its own normalisers.

    Raises AccumulationError where a live sample is in no update, or in two.

    Args
      updates: fewer where there are fewer questions, in the last, smaller batch of a pass.
      stage_step: steps of the stage that are done, for coefficients that change.
      mask_overlong: truncated rollouts count in their group's statistics and carry no weight, nor does a pair with one.
      refined: of each update, advantages instead of the terms' own. controls: coefficients instead of the terms' own.
    """
    steered: dict[str, Any] = {"controls": controls} if controls else {}

    def packed_update(samples: Sequence[Sample], **options: Any) -> Update:
        routed = gated.routed if refined is None else _given(gated.routed, refined[len(packed)], samples)
        return assemble(samples, dead, routed, stage_step, **steered, **options)

    dead = _truncated(gated.live) if mask_overlong else frozenset()
    order = list(dict.fromkeys(sample.sample_id.question for sample in gated.live))
    parts = split_questions(order, min(updates, len(order))) if order else [[]]  # nothing live: one empty update
    packed: list[Update] = []
    for part in parts:
        chosen = frozenset(part)
        samples = [sample for sample in gated.live if sample.sample_id.question in chosen]
        packed.append(packed_update(samples))
    apart = gated.routed.apart
    if apart:
        packed.append(packed_update(apart, optimizer=1))
    accounted = sum(len(update.samples) + update.left_out for update in packed)
    if accounted != len(gated.live) + len(apart):
        raise AccumulationError(
            f"the gate left {len(gated.live) + len(apart)} live samples, but the updates account for {accounted}: some "
            "were lost or repeated between gate and packing; nothing was trained on them"
        )
    return packed


def _truncated(samples: Sequence[Sample]) -> frozenset[SampleId]:
    """Samples that met their limit, and those that share a pair with one: half a pair has no margin."""
    cut = [sample for sample in samples if sample.finish_reason == FinishReason.LENGTH]
    pairs = {sample.pair_id for sample in cut if sample.pair_id >= 0}
    return frozenset(s.sample_id for s in (*cut, *(s for s in samples if s.pair_id in pairs)))


def _given(routed: Routed, refined: Refined, samples: Sequence[Sample]) -> Routed:
    """The route with refined advantages; samples without a live token, which were not scored, have none."""
    given = {term: {s.sample_id: found.get(s.sample_id, 0.0) for s in samples} for term, found in refined.items()}
    return dataclasses.replace(routed, advantages={**routed.advantages, **given})
