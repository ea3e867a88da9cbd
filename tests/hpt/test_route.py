"""Routes by hand: which samples of judged rollouts learn, by which terms, and what a route may not do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hptjax.hpt.assemble import assemble
from hptjax.hpt.gate import demonstration_sample, group_rollouts, solved_counts
from hptjax.hpt.method import ROLLOUTS
from hptjax.hpt.route import (
    Judged,
    by_band,
    by_chance,
    by_gate,
    by_table,
    corrected_where,
    in_pairs,
    together,
    varied,
    with_buffer,
)
from hptjax.hpt.terms import Term
from hptjax.losses.advantages import ones
from hptjax.losses.reducers import token_mean
from hptjax.records import FinishReason, Objective, Source
from hptjax.train.phases import Gated, assemble_updates
from tests import recorded

SOLVED = [0, 1, 2, 4, 3, 0]  # of four rollouts each


def judged(solved=SOLVED, **fields):
    questions = recorded.questions()[: len(solved)]
    rng = np.random.default_rng(0)
    rollouts = []
    for question, count in zip(questions, solved, strict=True):
        for place, sample in enumerate(recorded.group(question, rng)):
            rollouts.append(dataclasses.replace(sample, solved=place < count, reward=float(place < count)))
    groups = group_rollouts(rollouts)
    counts = solved_counts([q.question_id for q in questions], groups)
    return Judged(questions, groups, counts, 0, **fields)


def sources(routed, step):
    """Per question: live demonstrations and rollouts."""
    of = {q.question_id: [0, 0] for q in step.questions}
    for sample in routed.live:
        of[sample.sample_id.question][sample.source != Source.DEMONSTRATION] += 1
    return [tuple(counts) for counts in of.values()]


def test_route_by_gate_leaves_a_demonstration_or_a_group():
    step = judged()
    assert sources(by_gate(1, 4)(step), step) == [(1, 0), (1, 0), (0, 4), (0, 4), (0, 4), (1, 0)]
    assert sources(by_gate(-1, 4)(step), step) == [(0, 4)] * 6
    assert sources(by_gate(4, 4)(dataclasses.replace(step, groups={})), step) == [(1, 0)] * 6


def test_route_by_band_gives_each_demonstration_to_one_term():
    step = judged()
    routed = by_band(0, 2, 4, off_term="off", sft_term="sft")(step)
    names = [objective.name for objective in routed.objectives]
    assert names == ["SFT", "OFF_POLICY", "OFF_POLICY", "RL", "RL", "SFT"]
    assert sources(routed, step) == [(1, 0), (1, 0), (1, 0), (0, 4), (0, 4), (1, 0)]
    assert list(routed.scales["off"].values()) == [0.0, 1.0, 1.0, 0.0]
    assert list(routed.scales["sft"].values()) == [1.0, 0.0, 0.0, 1.0]
    with pytest.raises(ValueError, match=r"methods\.gate_off"):
        by_band(2, 1, 4, off_term="off", sft_term="sft")


def test_route_by_chance_takes_as_many_as_the_gate_and_replays():
    step = judged()
    first, again = by_chance(0, 4, seed=3)(step), by_chance(0, 4, seed=3)(step)
    assert first.objectives == again.objectives
    chosen = []
    for seed in range(40):
        objectives = by_chance(0, 4, seed=seed)(step).objectives
        assert sum(o == Objective.SFT for o in objectives) == 2
        chosen.append([o == Objective.SFT for o in objectives])
    share = np.asarray(chosen).mean(axis=0)
    assert share.min() > 0.1  # every question is drawn by some seed, each about a third of the time
    assert share.max() < 0.6
    turned = dataclasses.replace(step, questions=step.questions[::-1], solved=step.solved[::-1])
    assert by_chance(0, 4, seed=3)(turned).objectives == first.objectives[::-1]


def test_route_together_keeps_everything_and_the_judged_demonstration():
    step = judged()
    rewarded = {
        q.question_id: dataclasses.replace(demonstration_sample(q), reward=1.0, solved=True) for q in step.questions
    }
    routed = together(dataclasses.replace(step, demonstrations=rewarded))
    assert sources(routed, step) == [(1, 4)] * 6
    assert all(s.reward == 1.0 for s in routed.live if s.source == Source.DEMONSTRATION)
    with pytest.raises(ValueError, match="it has none"):
        together(dataclasses.replace(step, groups={}))


def test_route_by_table_scales_by_the_number_solved():
    step = judged()
    table = [(0.0, 0.0, 1.0), (0.25, 0.5, 0.75), (0.5, 0.5, 0.5), (0.75, 0.0, 0.25), (1.0, 0.0, 0.0)]
    routed = by_table(table, terms=("rl", "off", "sft"))(step)
    assert [o.name for o in routed.objectives] == ["SFT", "BOTH", "BOTH", "RL", "BOTH", "SFT"]
    for question, solved in zip(step.questions, SOLVED, strict=True):
        rl = {v for k, v in routed.scales["rl"].items() if k.question == question.question_id}
        others = [
            next(v for k, v in routed.scales[term].items() if k.question == question.question_id)
            for term in ("off", "sft")
        ]
        assert (rl, *others) == ({table[solved][0]}, *table[solved][1:])


def test_route_in_pairs_matches_solved_with_unsolved():
    step = judged()
    routed = in_pairs("rl")(step)
    assert len(routed.live) == 2 * (0 + 1 + 2 + 0 + 1 + 0)
    for pair in range(4):
        chosen, rejected = [s for s in routed.live if s.pair_id == pair]
        assert chosen.sample_id.question == rejected.sample_id.question
        assert (chosen.solved, rejected.solved) == (True, False)
        assert [routed.advantages["rl"][s.sample_id] for s in (chosen, rejected)] == [1.0, -1.0]


def test_a_truncated_sample_takes_its_pair_along():
    """Half a pair has no margin; without pairs the others of the group stay."""
    step = judged()
    seen = []

    def packed(samples, dead, *_):
        seen.append(dead)
        rl = Term("rl", ROLLOUTS, 1.0, token_mean, ones)
        return assemble(samples, [rl], rows=8, row_tokens=80, max_segments=4, max_micro_batches=4, dead=dead)

    for route, lost in ((in_pairs("rl"), 2), (by_gate(-1, 4), 1)):
        routed = route(step)
        place = next(n for n, s in enumerate(routed.live) if s.sample_id.question == 2 and not s.solved)
        cut = dataclasses.replace(routed.live[place], finish_reason=FinishReason.LENGTH)
        live = [*routed.live[:place], cut, *routed.live[place + 1 :]]
        gated = Gated(step.solved, dataclasses.replace(routed, live=live))
        for mask_overlong in (True, False):
            assemble_updates(gated, updates=1, mask_overlong=mask_overlong, assemble=packed)
        assert len(seen[-2]) == lost
        assert {cut.sample_id} <= seen[-2]
        assert len({s.pair_id for s in live if s.sample_id in seen[-2]}) == 1
        assert not seen[-1]


@pytest.mark.parametrize(
    ("where", "taught"), [("always", [4] * 6), ("unsolved", [4, 3, 2, 0, 1, 4]), ("unsolved_group", [4, 0, 0, 0, 0, 4])]
)
def test_route_corrects_where_the_policy_fails(where, taught):
    step = judged()
    scales = corrected_where("kd", where)(step).scales["kd"]
    counted = [sum(v for k, v in scales.items() if k.question == q.question_id) for q in step.questions]
    assert counted == taught


def test_route_varied_keeps_the_first_groups_that_say_something():
    step = judged(wanted=2)
    routed = varied(step)
    assert [o.name for o in routed.objectives] == ["NOTHING", "RL", "RL", "NOTHING", "NOTHING", "NOTHING"]
    assert sources(routed, step) == [(0, 0), (0, 4), (0, 4), (0, 0), (0, 0), (0, 0)]
    assert varied(judged(solved=[0, 4], wanted=2)).live == []


def test_route_with_buffer_collects_failed_questions_and_lets_the_newest_go():
    step = judged(waiting=((99, 5), (98, 6)), bank={q.question_id: q for q in recorded.questions()})
    failed = [q.question_id for q, n in zip(step.questions, SOLVED, strict=True) if n == 0]
    routed = with_buffer(5)(step)
    assert (routed.waiting, routed.apart) == (((99, 5), (98, 6), (failed[0], 0), (failed[1], 0)), [])
    routed = with_buffer(2)(step)
    assert [s.sample_id.question for s in routed.apart] == failed
    assert routed.waiting == ((99, 5), (98, 6))
    assert all(s.source == Source.DEMONSTRATION for s in routed.apart)
    assert sources(routed, step) == [(0, 4)] * 6
    again = with_buffer(9)(dataclasses.replace(step, waiting=((failed[0], 7),)))
    assert again.waiting == ((failed[0], 0), (failed[1], 0))  # once each, by the latest visit
    formal = {question: [dataclasses.replace(s, reward=0.1) for s in group] for question, group in step.groups.items()}
    assert with_buffer(9)(dataclasses.replace(step, groups=formal, waiting=())).waiting == ()
    with pytest.raises(ValueError, match="relift_buffer"):
        with_buffer(0)
