"""Plans by hand: which prefix each rollout continues, round by round, and that draws follow their laws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hptjax.hpt.plan import (
    CODE_GROUPS,
    PAPER_GROUPS,
    MicroGroup,
    binomial_quantile,
    free_group,
    prefix_rft,
    to_delimiter,
    trapo,
    uft,
)
from hptjax.hpt.schedules import constant, rise_and_fall
from hptjax.records import Example, Question
from tests import recorded


def question(tokens=20, number=0):
    """A demonstration of the tokens 10, 11, 12 ..., the last of which is the stop token."""
    return Question(
        example=Example(question_id=number, prompt="", demonstration="", answer={}, canonical=str(number)),
        prompt_tokens=np.array([1, 2], np.int32),
        demonstration_tokens=np.array([*range(10, 9 + tokens), recorded.STOP], np.int32),
    )


def lengths(plan, asked, rewards, step=0, visit=0):
    prefixes = plan(asked, visit, dict(enumerate(map(float, rewards))), step)
    for prefix in prefixes:
        assert prefix.tolist() == asked.demonstration_tokens[: len(prefix)].tolist()
    return [len(prefix) for prefix in prefixes]


def test_plan_of_a_free_group_forces_nothing():
    assert lengths(free_group(3), question(), []) == [0, 0, 0]


FOUR, SIX, SEVEN = [0] * 4, [0] * 6, [0] * 7


@pytest.mark.parametrize(
    ("groups", "rewards", "known"),
    [
        (PAPER_GROUPS, [], FOUR),
        (PAPER_GROUPS, [1, 0, 0], FOUR),  # the round is not over
        (PAPER_GROUPS, [1, 0, 0, 0], [*FOUR, 4, 4]),  # 1/4 < 0.5: a fifth of 20
        (PAPER_GROUPS, [1, 0, 1, 0], [*FOUR, 0, 0]),  # 2/4 is not below 0.5
        (PAPER_GROUPS, [1, 0, 0, 0, 1, 1], [*FOUR, 4, 4, 10]),  # 3/6 < 0.7
        (PAPER_GROUPS, [1, 0, 0, 0, 1, 1, 1], [*FOUR, 4, 4, 10, 20]),  # 4/7 < 0.9: everything, with the stop token
        (PAPER_GROUPS, [1, 1, 1, 0, 1, 1], [*SIX, 0]),  # 5/6 > 0.7
        (PAPER_GROUPS, [1, 1, 1, 0, 1, 1, 1], [*SEVEN, 20]),  # 6/7 < 0.9
        (PAPER_GROUPS, [1] * 7, [0] * 8),
        (CODE_GROUPS, [1, 0, 0, 0], [*FOUR, 5, 5]),  # 1 < 2
        (CODE_GROUPS, [1, 1, 0, 0], [*FOUR, 0, 0]),
        (CODE_GROUPS, [1, 1, 0, 0, 1, 0], [*SIX, 10]),  # 3 < 4
        (CODE_GROUPS, [1, 1, 0, 0, 1, 1], [*SIX, 0]),  # 4 of 6
        (CODE_GROUPS, [1, 1, 0, 0, 1, 1, 1], [*SEVEN, 20]),  # 5 < 7
        (CODE_GROUPS, [1, 1, 1, 1, 1, 1, 0], [*SEVEN, 20]),  # 6 < 7
        (CODE_GROUPS, [1] * 7, [0] * 8),
    ],
)
def test_plan_of_trapo_round_by_round(groups, rewards, known):
    assert lengths(trapo(groups), question(), rewards) == known


def test_plan_of_trapo_without_thresholds_is_free():
    groups = [MicroGroup(group.count, group.ratio, -math.inf) for group in PAPER_GROUPS]
    assert lengths(trapo(groups), question(), [0] * 8) == [0] * 8


def test_plan_of_trapo_leaves_something_to_write_unless_it_gives_everything():
    """A prefix of less than the whole never holds the stop token, however short the demonstration."""
    groups = [MicroGroup(1, 0.0, 0.0), MicroGroup(1, 0.99, 1.0), MicroGroup(1, 1.0, 1.0)]
    assert lengths(trapo(groups, lambda tokens, share: len(tokens)), question(3), [0, 0]) == [0, 2, 3]
    assert lengths(trapo(groups), question(1), [0, 0]) == [0, 0, 1]


@pytest.mark.parametrize(
    ("delimiters", "tokens"),
    [
        ({16}, 7),  # place 6, the first after floor(0.25 x 20) = 5: the prefix ends with it
        ({15}, 5),  # place 5 is not after it
        ({20}, 11),  # place 10 < (0.25 + 0.3) x 20 = 11
        ({21}, 5),  # place 11 is out of reach
        ({12, 18, 19}, 9),
        (set(), 5),
    ],
)
def test_plan_runs_on_to_a_delimiter_in_reach(delimiters, tokens):
    assert to_delimiter(frozenset(delimiters))(question().demonstration_tokens, 0.25) == tokens


@pytest.mark.parametrize("chance", [0.0, 0.05, 0.3, 0.5, 0.95, 1.0])
def test_binomial_quantile_is_the_law_by_enumeration(chance):
    """Each of the 2^5 outcomes of five throws with its probability, against lengths of the intervals of u."""
    law = np.zeros(6)
    for outcome in range(32):
        heads = outcome.bit_count()
        law[heads] += chance**heads * (1 - chance) ** (5 - heads)
    edges = np.concatenate([[0.0], np.cumsum(law)])
    for successes in range(6):
        if law[successes] > 1e-12:
            inside = edges[successes] + law[successes] * np.array([1e-9, 0.5, 1 - 1e-9])
            assert [binomial_quantile(u, 5, chance) for u in inside] == [successes] * 3


def test_plan_of_uft_draws_one_hint_per_question_by_its_law():
    """Frequencies of 4000 questions within 4 standard errors of the binomial law; all of a group share the hint."""
    plan = uft(3, segments=5, chance=constant(0.3), steps=10, seed=3)
    drawn = [lengths(plan, question(21, number), []) for number in range(4000)]
    assert all(group == [group[0]] * 3 for group in drawn)
    counts = np.bincount([group[0] // 4 for group in drawn], minlength=6)  # 20 tokens and a stop: segments of 4
    assert {group[0] for group in drawn} <= {0, 4, 8, 12, 16, 20}
    for hinted in range(6):
        share = math.comb(5, hinted) * 0.3**hinted * 0.7 ** (5 - hinted)
        assert abs(counts[hinted] - 4000 * share) < 4 * math.sqrt(4000 * share * (1 - share)) + 1


def test_plan_of_uft_ends_its_hints_and_never_gives_the_stop_token():
    always = uft(2, segments=5, chance=constant(1.0), steps=7, seed=0)
    assert lengths(always, question(8), [], step=6) == [7, 7]
    assert lengths(always, question(8), [], step=7) == [0, 0]
    assert lengths(always, question(3), []) == [2, 2]  # fewer tokens than segments
    assert lengths(always, question(1), []) == [0, 0]


@pytest.mark.parametrize(("step", "chance"), [(0, 0.95), (150, 0.5), (300, 0.05), (75, 0.05 + 0.45 * (1 + 0.5**0.5))])
def test_uft_chance_falls_as_published(step, chance):
    """0.05 + 0.45 (1 + cos(pi t / 300))."""
    assert rise_and_fall(0.95, 0.05, 0, 300)(step) == pytest.approx(chance, abs=1e-12)


def test_plan_of_prefix_rft_continues_one_of_the_group():
    """floor(l n) with l even in [low, high]: here 0.25..0.75 of 40 tokens, each of 10..29 about equally often."""
    plan = prefix_rft(4, low=constant(0.25), high=0.75, seed=1)
    drawn = [lengths(plan, question(40, number), []) for number in range(2000)]
    assert all(group[:3] == [0, 0, 0] for group in drawn)
    counts = np.bincount([group[3] for group in drawn], minlength=40)
    assert counts[:10].sum() == counts[30:].sum() == 0
    assert np.abs(counts[10:30] - 100).max() < 45  # 4.5 standard errors


def test_plan_of_prefix_rft_starts_long_and_leaves_a_token():
    plan = prefix_rft(2, low=rise_and_fall(1.0, 0.0, 0, 10), high=1.0, seed=1)
    assert lengths(plan, question(9), [], step=0) == [0, 8]  # l = 1, but the last token is the policy's
    short = [lengths(plan, question(9, number), [], step=10)[1] for number in range(200)]
    assert (min(short), max(short)) == (0, 8)


@pytest.mark.parametrize("make", [lambda seed: uft(2, segments=5, chance=constant(0.5), steps=9, seed=seed),
                                  lambda seed: prefix_rft(2, low=constant(0.0), high=1.0, seed=seed)])  # fmt: skip
def test_plan_draws_are_keyed_by_question_visit_and_seed(make):
    def all_of(seed, visit):
        return [lengths(make(seed), question(30, number), [], visit=visit) for number in range(30)]

    assert all_of(0, 0) == all_of(0, 0)
    assert all_of(0, 0) != all_of(0, 1)
    assert all_of(0, 0) != all_of(1, 0)
