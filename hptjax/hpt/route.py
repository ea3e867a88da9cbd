"""Which samples of a step learn, and by which terms: the routes of the methods, on judged rollouts, on the host.

    route              a question leaves                                                      methods
    by_gate            its demonstration if at most `threshold` solved, else its rollouts     HPT, SFT (all), RL (none)
    by_band            likewise, with a middle band: the demonstration as an off-policy rollout    hpt_off_band
    by_chance          as many demonstrations as the gate would leave, of random questions    random_gate
    together           its rollouts and its demonstration                                     LUFFY, SRFT, CHORD
    by_table           both, weighted by how many solved                                      hpt_soft
    in_pairs           pairs of a solved and an unsolved rollout                              DPO
    corrected_where    its rollouts; the teacher's term only where the policy fails           KDRL
    varied             its rollouts, if some are solved and some are not                      DAPO
    with_buffer        its rollouts; demonstrations of failed questions wait for an update of their own    ReLIFT

A route says nothing of tokens, reducers or gradients: those are the method's parts (`methods.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int

from hptjax.hpt.digest import UNDRAWN_INDEX, sample_hashes
from hptjax.hpt.gate import demonstration_sample, gate, select_live
from hptjax.hpt.terms import GivenAdvantage
from hptjax.losses.words import said
from hptjax.records import Objective, Question, Sample, SampleId, Source

Waiting = tuple[int, int]
"""A question id, and the visit at which nobody solved it."""

Scales = Mapping[str, Mapping[SampleId, float]]
"""Term name -> sample -> factor of its weights; 0 makes it no member of the term. Terms without an entry take all."""


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
    """What a step knows before anyone learns.

    Args
      groups: question id -> its judged rollouts, sorted by id; empty where nothing is rolled out.
      solved: rollouts solved per question; [P].
      visit: of the sample ids. demonstrations: judged ones by question id, for the methods that ask for their rewards.
      waiting: questions in the buffer, and the visit that put them there; the newest last.
      bank: all training questions by id. wanted: questions of a step, where a route drops some and more were drawn.
    """

    questions: Sequence[Question]
    groups: Mapping[int, Sequence[Sample]]
    solved: Int[np.ndarray, " P"]
    visit: int
    demonstrations: Mapping[int, Sample] = dataclasses.field(default_factory=dict)
    waiting: Sequence[Waiting] = ()
    bank: Mapping[int, Question] = dataclasses.field(default_factory=dict)
    wanted: int = 0

    def demonstration(self, question: Question) -> Sample:
        """The question's demonstration, with its reward if it was judged."""
        judged = self.demonstrations.get(question.question_id)
        return demonstration_sample(question, visit=self.visit) if judged is None else judged

    def rollouts(self, question: Question) -> Sequence[Sample]:
        """The question's rollouts. Raises a question without any -> ValueError."""
        group = self.groups.get(question.question_id, ())
        if not group:
            raise ValueError(f"question {question.question_id} is to learn from its rollouts, but it has none")
        return group


@dataclasses.dataclass(frozen=True, eq=False)
class Routed:
    """What a route decided.

    Args
      objectives: one per question, in order. live: the samples that enter the update, whole groups.
      scales, advantages: by term and sample, where the route has a say in them.
      apart: samples of one more update, after the others, which the second optimizer takes.
      waiting: the buffer after this step.
    """

    objectives: list[Objective]
    live: list[Sample]
    scales: Scales = dataclasses.field(default_factory=dict)
    advantages: Mapping[str, Mapping[SampleId, GivenAdvantage]] = dataclasses.field(default_factory=dict)
    apart: list[Sample] = dataclasses.field(default_factory=list)
    waiting: Sequence[Waiting] = ()


Route = Callable[[Judged], Routed]


def by_gate(threshold: int, group_size: int) -> Route:
    """HPT: the demonstration iff at most `threshold` of the group solved. -1 is pure RL, `group_size` pure SFT."""

    everywhere = "its rollouts" if threshold < 0 else "its demonstration" if threshold == group_size else None

    @said(everywhere or f"its demonstration where at most {threshold} of {group_size} solved, else its rollouts")
    def route(judged: Judged) -> Routed:
        return _live(judged, gate(judged.solved, threshold=threshold, group_size=group_size))

    return route


def by_band(threshold: int, off_threshold: int, group_size: int, *, off_term: str, sft_term: str) -> Route:
    """HPT with its middle band: at most `threshold` solved is SFT, at most `off_threshold` off-policy RL, else RL.

    The demonstration of the middle band is alone in its group, so its advantage is its reward (`spec/hpt.md` 2.4, 10).

    Args
      off_term, sft_term: the terms of demonstrations, of which each demonstration is a member of one.
    Raises threshold > off_threshold -> ValueError.
    """
    if threshold > off_threshold:
        raise ValueError(
            f"expected hpt.gate <= methods.gate_off, got {threshold} and {off_threshold}; change methods.gate_off"
        )

    @said(
        f"its demonstration where at most {threshold} of {group_size} solved, the same as an off-policy rollout where "
        f"at most {off_threshold}, else its rollouts"
    )
    def route(judged: Judged) -> Routed:
        low = gate(judged.solved, threshold=threshold, group_size=group_size)
        high = gate(judged.solved, threshold=off_threshold, group_size=group_size)
        objectives = [
            Objective.OFF_POLICY if below == Objective.RL and within == Objective.SFT else below
            for below, within in zip(low, high, strict=True)
        ]
        routed = _live(judged, objectives)
        decided = {q.question_id: o for q, o in zip(judged.questions, objectives, strict=True)}
        demonstrations = [s for s in routed.live if s.source == Source.DEMONSTRATION]

        def members(objective: Objective) -> dict[SampleId, float]:
            return {s.sample_id: float(decided[s.sample_id.question] == objective) for s in demonstrations}

        scales = {off_term: members(Objective.OFF_POLICY), sft_term: members(Objective.SFT)}
        return dataclasses.replace(routed, scales=scales)

    return route


def by_chance(threshold: int, group_size: int, *, seed: int) -> Route:
    """HPT's control: in every step as many questions as its gate would choose, but which ones is drawn.

    The draw is keyed by seed, question and visit, so it does not depend on order and a run replays.
    """

    @said(
        f"its demonstration or its rollouts by chance; as many demonstrations as questions with at most {threshold} of "
        f"{group_size} solved"
    )
    def route(judged: Judged) -> Routed:
        chosen = sum(o == Objective.SFT for o in gate(judged.solved, threshold=threshold, group_size=group_size))
        order = np.argsort(_draws([q.question_id for q in judged.questions], judged.visit, seed), kind="stable")
        to_sft = set(order[:chosen].tolist())
        return _live(
            judged, [Objective.SFT if place in to_sft else Objective.RL for place in range(len(judged.questions))]
        )

    return route


@said("its rollouts and its demonstration")
def together(judged: Judged) -> Routed:
    """Every question leaves its rollouts and its demonstration. LUFFY, SRFT, CHORD."""
    live = [
        sample
        for question in judged.questions
        for sample in (*judged.rollouts(question), judged.demonstration(question))
    ]
    return Routed([Objective.BOTH] * len(judged.questions), live)


def by_table(table: Sequence[tuple[float, float, float]], *, terms: tuple[str, str, str]) -> Route:
    """Everything learns, with coefficients that the number of solved rollouts looks up.

    Args
      table: for 0, 1, .. group_size solved: coefficients of the rollouts, of the demonstration as an off-policy
        rollout, of the demonstration as SFT; >= 0.
      terms: the names of these three terms.
    """

    @said("its rollouts and its demonstration, with coefficients by how many rollouts solved")
    def route(judged: Judged) -> Routed:
        scales: dict[str, dict[SampleId, float]] = {name: {} for name in terms}
        live, objectives = [], []
        for question, solved in zip(judged.questions, judged.solved.tolist(), strict=True):
            on, off, sft = table[solved]
            group, demonstration = judged.rollouts(question), judged.demonstration(question)
            scales[terms[0]] |= {sample.sample_id: on for sample in group}
            scales[terms[1]][demonstration.sample_id] = off
            scales[terms[2]][demonstration.sample_id] = sft
            live += [*group, demonstration]
            only_rollouts, only_demonstration = off == sft == 0, on == 0
            objectives.append(
                Objective.RL if only_rollouts else Objective.SFT if only_demonstration else Objective.BOTH
            )
        return Routed(objectives, live, scales)

    return route


def in_pairs(term: str) -> Route:
    """The n-th solved rollout of a question beside its n-th unsolved one, as long as both last: +1 and -1.

    A question where all or none are solved leaves nothing. Pairs are numbered over the step.
    """

    @said("pairs of a solved and an unsolved rollout")
    def route(judged: Judged) -> Routed:
        live: list[Sample] = []
        advantages: dict[SampleId, GivenAdvantage] = {}
        for question in judged.questions:
            group = judged.rollouts(question)
            solved, unsolved = [s for s in group if s.solved], [s for s in group if not s.solved]
            for chosen, rejected in zip(solved, unsolved, strict=False):
                number = len(live) // 2
                live += [dataclasses.replace(s, pair_id=number) for s in (chosen, rejected)]
                advantages |= {chosen.sample_id: 1.0, rejected.sample_id: -1.0}
        return Routed([Objective.RL] * len(judged.questions), live, advantages={term: advantages})

    return route


def corrected_where(term: str, where: Literal["always", "unsolved", "unsolved_group"]) -> Route:
    """Every question leaves its rollouts; `term` covers all of them, the unsolved ones, or groups nobody solved."""

    covered = {"always": "all of them", "unsolved": "the unsolved ones", "unsolved_group": "groups that nobody solved"}

    @said(f"its rollouts; {term} on {covered[where]}")
    def route(judged: Judged) -> Routed:
        routed = _live(judged, [Objective.RL] * len(judged.questions))
        failed = {q.question_id for q, n in zip(judged.questions, judged.solved.tolist(), strict=True) if n == 0}
        taught = {
            "always": lambda sample: True,
            "unsolved": lambda sample: not sample.solved,
            "unsolved_group": lambda sample: sample.sample_id.question in failed,
        }[where]
        return dataclasses.replace(routed, scales={term: {s.sample_id: float(taught(s)) for s in routed.live}})

    return route


@said("its rollouts, if some are solved and some are not")
def varied(judged: Judged) -> Routed:
    """The rollouts of questions where some are solved and some are not, of the first `judged.wanted` of these."""
    learns = [varies(judged.rollouts(question)) for question in judged.questions]
    room = np.cumsum(learns) <= judged.wanted
    objectives = [
        Objective.RL if learn and fits else Objective.NOTHING for learn, fits in zip(learns, room.tolist(), strict=True)
    ]
    kept = zip(judged.questions, objectives, strict=True)
    live = [sample for q, objective in kept if objective == Objective.RL for sample in judged.rollouts(q)]
    return Routed(objectives, live)


def varies(group: Sequence[Sample]) -> bool:
    """Whether some of the group are solved and some are not. Source DAPO: arXiv 2503.14476, dynamic sampling."""
    return len({sample.solved for sample in group}) > 1


def with_buffer(size: int) -> Route:
    """Every question leaves its rollouts; one whose rollouts all got reward 0 puts its demonstration into the buffer.

    When the buffer holds `size` demonstrations or more, the newest `size` make an update of their own and leave it. A
    question is in the buffer once, by its latest visit. Groups with a reward for the form alone do not enter.

    Raises size < 1 -> ValueError.
    Source ReLIFT: arXiv 2506.07527, as `spec/methods.md` 4.5 reads its code.
    """
    if size < 1:
        raise ValueError(f"expected methods.relift_buffer of at least 1, got {size}; change methods.relift_buffer")

    @said(f"its rollouts; if none got a reward, its demonstration waits until {size} make an update of their own")
    def route(judged: Judged) -> Routed:
        routed = _live(judged, [Objective.RL] * len(judged.questions))
        failed = [q.question_id for q in judged.questions if all(s.reward == 0.0 for s in judged.rollouts(q))]
        waiting = [entry for entry in judged.waiting if entry[0] not in failed]
        waiting += [(question, judged.visit) for question in failed]
        if len(waiting) < size:
            return dataclasses.replace(routed, waiting=tuple(waiting))
        taken = waiting[-size:]
        apart = [demonstration_sample(judged.bank[question], visit=visit) for question, visit in taken]
        return dataclasses.replace(routed, apart=apart, waiting=tuple(waiting[:-size]))

    return route


def _live(judged: Judged, objectives: Sequence[Objective]) -> Routed:
    """Demonstrations of the questions whose objective is not RL, rollouts of the others."""
    kinds = [Objective.RL if objective == Objective.RL else Objective.SFT for objective in objectives]
    visits = {question.question_id: judged.visit for question in judged.questions}
    live = select_live(judged.questions, judged.groups, kinds, visits=visits)
    rewarded = {sample.sample_id: sample for sample in judged.demonstrations.values()}
    return Routed(list(objectives), [rewarded.get(sample.sample_id, sample) for sample in live])


def _draws(question_ids: Sequence[int], visit: int, seed: int) -> Int[np.ndarray, " P"]:
    """One number per question and visit, as good as random: the mixed bits of the id of a sample nobody draws."""
    hashes = sample_hashes([SampleId(question, visit, UNDRAWN_INDEX - seed) for question in question_ids])
    words = hashes.astype(np.uint64)
    return (words[:, 0] << np.uint64(32) | words[:, 1]).view(np.int64)
