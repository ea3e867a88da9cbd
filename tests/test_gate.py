"""The gate's rule and the edit of the batch: properties 12 to 16 of spec/hpt.md section 6."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hptjax.hpt.assemble import Update, assemble
from hptjax.hpt.gate import (
    demonstration_sample,
    gate,
    group_rollouts,
    select_live,
    solved_counts,
    split_questions,
)
from hptjax.hpt.terms import Term
from hptjax.losses.advantages import centred, ones
from hptjax.losses.reducers import constant, token_mean
from hptjax.records import Example, Objective, Question, Sample, SampleId, Source

STOP = 1


def make_question(question_id: int, demonstration: Sequence[int] = (7, 8, STOP)) -> Question:
    example = Example(question_id, "p", "d", answer={}, canonical=str(question_id))
    return Question(example, np.asarray([10 + question_id, 3], np.int32), np.asarray(demonstration, np.int32))


def make_rollout(question_id: int, index: int, *, solved: bool, reward: float | None = 0.0, visit: int = 0) -> Sample:
    length = 1 + (question_id + index) % 4
    return Sample(
        SampleId(question_id, visit, index),
        group_id=question_id,
        source=Source.ROLLOUT,
        prompt_tokens=np.asarray([10 + question_id, 3], np.int32),
        completion_tokens=np.arange(20, 20 + length, dtype=np.int32),
        sampler_logprobs=np.full(length, -0.5, np.float32),
        reward=float(solved) if reward is not None else None,
        solved=solved,
    )


def make_groups(solved: Sequence[int], group_size: int) -> list[Sample]:
    return [make_rollout(q, i, solved=i < s) for q, s in enumerate(solved) for i in range(group_size)]


def make_update(samples: Sequence[Sample]) -> Update:
    terms = [
        Term("rl", frozenset({Source.ROLLOUT}), 1.0, constant(64.0), centred),
        Term("sft", frozenset({Source.DEMONSTRATION}), 1.0, token_mean, ones),
    ]
    return assemble(samples, terms, rows=2, row_tokens=16, max_segments=4, max_micro_batches=64)


def gated_update(questions: Sequence[Question], samples: Sequence[Sample], threshold: int, group_size: int) -> Update:
    rollouts = group_rollouts(samples)
    counts = solved_counts([q.question_id for q in questions], rollouts)
    objectives = gate(counts, threshold=threshold, group_size=group_size)
    return make_update(select_live(questions, rollouts, objectives))


@pytest.mark.parametrize(
    ("solved", "threshold", "group_size", "expected"),
    [
        (0, 0, 8, Objective.SFT),  # property 12, gamma = 0
        (1, 0, 8, Objective.RL),
        (2, 2, 8, Objective.SFT),  # gamma = 2/8
        (3, 2, 8, Objective.RL),
        (1, 1, 5, Objective.SFT),  # gamma = 1/5
        (2, 1, 5, Objective.RL),
        (0, -1, 8, Objective.RL),
        (8, 8, 8, Objective.SFT),
        (0, 0, 1, Objective.SFT),
        (1, 0, 1, Objective.RL),
    ],
)
def test_gate_compares_counts(solved: int, threshold: int, group_size: int, expected: Objective) -> None:
    assert gate([solved], threshold=threshold, group_size=group_size) == [expected]


def test_gate_agrees_with_exact_fractions() -> None:
    """Second route: P <= gamma in exact arithmetic, for every group size up to 12."""
    for group_size in range(1, 13):
        for threshold in range(-1, group_size + 1):
            counts = np.arange(group_size + 1)
            got = gate(counts, threshold=threshold, group_size=group_size)
            for solved, objective in zip(range(group_size + 1), got, strict=True):
                sft = Fraction(solved, group_size) <= Fraction(threshold, group_size)
                assert objective == (Objective.SFT if sft else Objective.RL)


def test_gate_extremes_are_pure() -> None:
    counts = np.arange(9)
    assert set(gate(counts, threshold=-1, group_size=8)) == {Objective.RL}
    assert set(gate(counts, threshold=8, group_size=8)) == {Objective.SFT}


@pytest.mark.parametrize(
    ("counts", "threshold", "group_size", "message"),
    [
        ([0], 9, 8, r"-1\.\.8.*got 9.*hpt\.gate"),
        ([0], -2, 8, r"-1\.\.8.*got -2.*hpt\.gate"),
        ([0], 0, 0, r"at least 1, got 0.*rollout\.group_size"),
        ([0, 9], 0, 8, r"place 1 has 9 solved"),
        ([-1], 0, 8, r"place 0 has -1 solved"),
    ],
)
def test_gate_refuses_what_cannot_be(counts: list[int], threshold: int, group_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gate(counts, threshold=threshold, group_size=group_size)


def test_gate_solved_counts_follow_question_order_and_refuse_unverified() -> None:
    samples = make_groups([3, 0, 2], group_size=4)
    rollouts = group_rollouts(samples[::-1])
    assert solved_counts([2, 0, 1, 99], rollouts).tolist() == [2, 3, 0, 0]
    unverified = make_rollout(5, 1, solved=False, reward=None)
    with pytest.raises(ValueError, match="sample 5/0/1 has no reward"):
        solved_counts([5], group_rollouts([unverified]))


@pytest.mark.parametrize(("gated", "ratio"), [(64, 0.1111), (0, 0.0), (128, 1.0)])
def test_gate_leaves_one_demonstration_or_all_rollouts(gated: int, ratio: float) -> None:
    """Property 13: rows = 8 (128 - k) + k, and the share of demonstration rows."""
    questions = [make_question(q) for q in range(128)]
    samples = make_groups([0] * gated + [3] * (128 - gated), group_size=8)
    rollouts = group_rollouts(samples)
    objectives = gate(solved_counts(range(128), rollouts), threshold=0, group_size=8)
    live = select_live(questions, rollouts, objectives)
    assert len(live) == 8 * (128 - gated) + gated
    for question, objective in zip(questions, objectives, strict=True):
        mine = [s for s in live if s.sample_id.question == question.question_id]
        if objective == Objective.SFT:
            assert [s.source for s in mine] == [Source.DEMONSTRATION]
            assert mine[0].completion_tokens.tolist() == question.demonstration_tokens.tolist()
        else:
            assert [s.sample_id for s in mine] == [SampleId(question.question_id, 0, i) for i in range(8)]
            assert {s.source for s in mine} == {Source.ROLLOUT}
    demonstrations = sum(s.source == Source.DEMONSTRATION for s in live)
    assert abs(demonstrations / len(live) - ratio) < 1e-4


def test_gate_keeps_ragged_groups_whole() -> None:
    samples = [make_rollout(0, i, solved=True) for i in range(3)] + [make_rollout(1, 0, solved=True)]
    live = select_live([make_question(0), make_question(1)], group_rollouts(samples), [Objective.RL, Objective.RL])
    assert [str(s.sample_id) for s in live] == ["0/0/0", "0/0/1", "0/0/2", "1/0/0"]


def same_bits(left: Update, right: Update) -> bool:
    pairs = zip(jax.tree.leaves(left.micro_batches), jax.tree.leaves(right.micro_batches), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def test_gate_discarded_tokens_change_nothing() -> None:
    """Property 14: a discarded rollout's tokens and an RL question's demonstration reach no array, bit for bit."""
    questions = [make_question(0), make_question(1)]
    samples = make_groups([0, 2], group_size=4)
    before = gated_update(questions, samples, 0, 4)

    def garbled(sample: Sample) -> Sample:
        if sample.group_id == 1:
            return sample
        tokens = np.full(9, 77, np.int32)
        return dataclasses.replace(sample, completion_tokens=tokens, sampler_logprobs=np.full(9, -9.0, np.float32))

    after = gated_update([questions[0], make_question(1, (50, 51, 52, STOP))], [garbled(s) for s in samples], 0, 4)
    assert same_bits(before, after)
    moved = [dataclasses.replace(s, completion_tokens=s.completion_tokens + s.group_id) for s in samples]
    assert not same_bits(before, gated_update(questions, moved, 0, 4))


def test_gate_refuses_a_missing_demonstration() -> None:
    """Property 15: never a silent RL row."""
    rollouts = group_rollouts(make_groups([0, 0], group_size=2))
    questions = [make_question(0), make_question(1, ())]
    with pytest.raises(ValueError, match=r"question 1 .*demonstration has no tokens.*hpt\.gate"):
        select_live(questions, rollouts, [Objective.SFT, Objective.SFT])
    live = select_live(questions, rollouts, [Objective.SFT, Objective.RL])
    assert [s.source.name for s in live] == ["DEMONSTRATION", "ROLLOUT", "ROLLOUT"]


def test_gate_refuses_missing_rollouts_and_repeated_questions() -> None:
    with pytest.raises(ValueError, match="question 3 is to learn from its rollouts, but it has none"):
        select_live([make_question(3)], {}, [Objective.RL])
    with pytest.raises(ValueError, match="question 3 appears twice"):
        select_live([make_question(3)] * 2, {}, [Objective.SFT] * 2)
    with pytest.raises(ValueError, match="1 questions, 2 objectives"):
        select_live([make_question(3)], {}, [Objective.SFT] * 2)


def test_gate_demonstration_row_is_prompt_demonstration_stop() -> None:
    """Property 16: the mask covers demonstration and stop token, and neither the prompt nor anything after."""
    update = make_update([demonstration_sample(make_question(4), visit=2)])
    (batch,) = update.micro_batches
    assert batch.input_tokens[0, :6].tolist() == [14, 3, 7, 8, 0, 0]
    assert batch.target_tokens[0, :6].tolist() == [3, 7, 8, STOP, 0, 0]
    assert batch.completion_mask[0, :6].tolist() == [False, True, True, True, False, False]
    assert int(batch.completion_mask.sum()) == 3
    assert update.sample_ids == (SampleId(4, 2, -1),)


def test_gate_demonstration_takes_the_visit_of_its_rollouts() -> None:
    rollouts = group_rollouts([make_rollout(2, 0, solved=False, visit=5)])
    (sample,) = select_live([make_question(2)], rollouts, [Objective.SFT])
    assert sample.sample_id == SampleId(2, 5, -1)
    (sample,) = select_live([make_question(2)], {}, [Objective.SFT], visits={2: 9})
    assert sample.sample_id == SampleId(2, 9, -1)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40, unique=True), st.integers(1, 40))
def test_gate_split_keeps_every_question_once(ids: list[int], updates: int) -> None:
    if updates > len(ids):
        with pytest.raises(ValueError, match="updates_per_rollout_batch"):
            split_questions(ids, updates)
        return
    parts = split_questions(ids, updates)
    assert [i for part in parts for i in part] == ids
    assert len(parts) == updates
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
