"""Who decides SFT or RL: an integer rule on the number of solved rollouts, and the edit of the batch that follows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from hptjax.records import Objective, Question, Sample, SampleId, Source

DEMONSTRATION_INDEX = -1  # the rollout index of a demonstration: rollouts of the same visit count from 0


def gate(solved_counts: Int[np.ndarray, " P"] | Sequence[int], *, threshold: int, group_size: int) -> list[Objective]:
    """What each question learns from: SFT iff solved <= threshold, else RL. Integers only, so no rounding decides.

    Args
      solved_counts: solved rollouts per question; [P], each in 0..group_size.
      threshold: config `hpt.gate`; -1 is pure RL, group_size is pure SFT.
      group_size: rollouts per question (the largest group where groups are ragged); >= 1.
    Returns one objective per question, in the order given.
    Raises ValueError for a group size below 1, a threshold outside -1..group_size, a count outside 0..group_size.
    Source HPT (arXiv 2509.04419) eq. 10 with gamma = threshold / group_size, as the published code compares: on counts.
    Example
      >>> [o.name for o in gate([0, 1, 2, 3], threshold=1, group_size=8)]
      ['SFT', 'SFT', 'RL', 'RL']
    """
    if group_size < 1:
        raise ValueError(f"expected a group size of at least 1, got {group_size}: change rollout.group_size")
    if not -1 <= threshold <= group_size:
        raise ValueError(
            f"expected a gate threshold in -1..{group_size} (-1 to rollout.group_size), got {threshold}: "
            "change hpt.gate"
        )
    objectives = []
    for place, solved in enumerate(solved_counts):
        if not 0 <= solved <= group_size:
            raise ValueError(
                f"question at place {place} has {solved} solved rollouts, expected 0..{group_size}: "
                "rollout.group_size is not the size of the groups that were sampled"
            )
        objectives.append(Objective.SFT if solved <= threshold else Objective.RL)
    return objectives


def group_rollouts(samples: Sequence[Sample]) -> dict[int, list[Sample]]:
    """The samples by question id, each list sorted by sample id. Groups may be ragged."""
    groups: dict[int, list[Sample]] = {}
    for sample in sorted(samples, key=lambda s: s.sample_id):
        groups.setdefault(sample.sample_id.question, []).append(sample)
    return groups


def solved_counts(question_ids: Sequence[int], rollouts: Mapping[int, Sequence[Sample]]) -> Int[np.ndarray, " P"]:
    """Solved rollouts per question, in the order of `question_ids`; 0 for a question without rollouts.

    Raises ValueError for a rollout that no verifier has judged: it must not pass as unsolved.
    """
    counts = np.zeros(len(question_ids), np.int32)
    for place, question_id in enumerate(question_ids):
        for sample in rollouts.get(question_id, ()):
            if sample.reward is None:
                raise ValueError(f"sample {sample.sample_id} has no reward: verify every rollout before the gate")
            counts[place] += int(sample.solved)
    return counts


def demonstration_sample(question: Question, *, visit: int = 0) -> Sample:
    """The question's demonstration as a sample: prompt, demonstration, stop token; temperature 1; no sampler log-probs.

    Raises ValueError naming the question if its demonstration or prompt is empty.
    """
    if len(question.demonstration_tokens) == 0 or len(question.prompt_tokens) == 0:
        empty = "prompt" if len(question.prompt_tokens) == 0 else "demonstration"
        raise ValueError(
            f"question {question.question_id} is to learn from its demonstration, but its {empty} has no tokens: "
            "drop the question from the data, or lower hpt.gate (-1 never asks for a demonstration)"
        )
    return Sample(
        sample_id=SampleId(question.question_id, visit, DEMONSTRATION_INDEX),
        group_id=question.question_id,
        source=Source.DEMONSTRATION,
        prompt_tokens=question.prompt_tokens,
        completion_tokens=question.demonstration_tokens,
        sampler_logprobs=np.zeros(len(question.demonstration_tokens), np.float32),
        demonstration_logprobs=question.demonstration_logprobs,
    )


def select_live(
    questions: Sequence[Question],
    rollouts: Mapping[int, Sequence[Sample]],
    objectives: Sequence[Objective],
    *,
    visits: Mapping[int, int] | None = None,
) -> list[Sample]:
    """The samples of an update: a gated question leaves exactly its demonstration, another exactly its rollouts.

    Args
      rollouts: question id -> its group; groups may be ragged. Those of gated questions are left out.
      objectives: one per question, from `gate`.
      visits: question id -> which visit to it this is, for the demonstration's id; without it the visit of the
        question's rollouts, or 0.
    Raises ValueError naming the question: a gated one without a demonstration, another without rollouts, one that
      appears twice. It never falls back to the other objective.
    """
    if len(questions) != len(objectives):
        raise ValueError(
            f"expected one objective per question: {len(questions)} questions, {len(objectives)} objectives"
        )
    seen: set[int] = set()
    live: list[Sample] = []
    for question, objective in zip(questions, objectives, strict=True):
        question_id = question.question_id
        if question_id in seen:
            raise ValueError(f"question {question_id} appears twice in one rollout batch: its groups would be mixed")
        seen.add(question_id)
        group = rollouts.get(question_id, ())
        if objective == Objective.SFT:
            visit = group[0].sample_id.round if len(group) else 0
            if visits is not None:
                visit = visits[question_id]
            live.append(demonstration_sample(question, visit=visit))
        elif len(group) == 0:
            raise ValueError(f"question {question_id} is to learn from its rollouts, but it has none")
        else:
            live.extend(group)
    return live


def split_questions(question_ids: Sequence[int], updates: int) -> list[list[int]]:
    """The questions of one rollout batch cut into `updates` runs, in the order given; sizes differ by at most one.

    A question is never split, so each update holds whole groups.

    Raises ValueError if updates < 1 or there are fewer questions than updates.
    """
    if not 1 <= updates <= len(question_ids):
        raise ValueError(
            f"expected 1..{len(question_ids)} updates for {len(question_ids)} questions, got {updates}: "
            "change train.updates_per_rollout_batch or the number of questions per step"
        )
    edges = [len(question_ids) * u // updates for u in range(updates + 1)]
    return [list(question_ids[a:b]) for a, b in itertools.pairwise(edges)]
