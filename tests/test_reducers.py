"""Reducers against slow loops over the definitions, and against hand-worked figures."""

from __future__ import annotations

import numpy as np
import pytest

from hptjax.losses.reducers import (
    Population,
    constant,
    dr_grpo,
    legacy_micro_token_mean,
    official_fixed_rl,
    official_fixed_sft,
    official_rl,
    official_sft,
    paper_rl,
    paper_sft,
    prompt_mean,
    seq_mean_token_mean,
    seq_mean_token_sum,
    seq_sum_len,
    token_mean,
)

COUNTS = np.array([3, 5, 0, 1, 7, 2, 0])
GROUPS = np.array([9, 9, 9, 4, 4, 1, 6])
PARTITION = np.array([0, 1, 1, 0, 2, 2, 3])
POPULATION = Population(COUNTS, GROUPS, PARTITION)

ALL = {
    "token_mean": token_mean,
    "seq_mean_token_mean": seq_mean_token_mean,
    "seq_mean_token_sum": seq_mean_token_sum,
    "seq_sum_len": seq_sum_len,
    "prompt_mean": prompt_mean,
    "dr_grpo": dr_grpo(11),
    "constant": constant(13.0),
    "legacy_micro_token_mean": legacy_micro_token_mean,
    "official_fixed_rl": official_fixed_rl(11, 128),
    "official_fixed_sft": official_fixed_sft,
    "official_rl": official_rl(11, 4),
    "official_sft": official_sft(4),
    "paper_rl": paper_rl(6),
    "paper_rl_scaled": paper_rl(6, 11),
    "paper_sft": paper_sft(6),
}
PARTITION_BOUND = ("legacy_micro_token_mean", "official_sft")


def reduced(name, losses):
    """The definition of each mode as nested means and sums over ragged lists, sample by sample."""
    live = [i for i in range(len(losses)) if len(losses[i])]
    tokens = sum(len(losses[i]) for i in live)
    total = sum(sum(x) for x in losses)
    by_group = {g: [i for i in live if GROUPS[i] == g] for g in {GROUPS[i] for i in live}}
    by_micro = {m: [i for i in live if PARTITION[i] == m] for m in {PARTITION[i] for i in live}}

    def token_mean_of(members):
        return sum(sum(losses[i]) for i in members) / sum(len(losses[i]) for i in members)

    return {
        "token_mean": lambda: total / tokens,
        "seq_mean_token_mean": lambda: sum(sum(losses[i]) / len(losses[i]) for i in live) / len(live),
        "seq_mean_token_sum": lambda: sum(sum(losses[i]) for i in live) / len(live),
        "seq_sum_len": lambda: sum(len(losses[i]) * sum(losses[i]) for i in live) / len(live),
        "prompt_mean": lambda: sum(token_mean_of(g) for g in by_group.values()) / len(by_group),
        "dr_grpo": lambda: sum(sum(losses[i]) / 11 for i in live) / len(live),
        "constant": lambda: total / 13,
        "legacy_micro_token_mean": lambda: sum(token_mean_of(m) for m in by_micro.values()) / len(by_micro),
        "official_fixed_rl": lambda: total / (11 * 2),
        "official_fixed_sft": lambda: total / tokens,
        "official_rl": lambda: total / 11 / 4,
        "official_sft": lambda: sum(token_mean_of(m) for m in by_micro.values()) / 4,
        "paper_rl": lambda: sum(sum(sum(losses[i]) for i in g) / len(g) for g in by_group.values()) / 6,
        "paper_rl_scaled": lambda: sum(sum(sum(losses[i]) for i in g) / len(g) for g in by_group.values()) / 66,
        "paper_sft": lambda: (
            sum(sum(sum(losses[i]) / len(losses[i]) for i in g) / len(g) for g in by_group.values()) / 6
        ),
    }[name]()


@pytest.mark.parametrize("name", ALL)
def test_reducer_equals_its_definition(name):
    rng = np.random.default_rng(0)
    losses = [rng.normal(size=n).tolist() for n in COUNTS]
    weights = ALL[name](POPULATION)
    assert weights.dtype == np.float64
    got = sum(w * sum(x) for w, x in zip(weights, losses, strict=True))
    assert got == pytest.approx(reduced(name, losses), rel=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_reducer_gives_samples_without_tokens_no_weight_and_no_say_property_24(name):
    reducer = ALL[name]
    weights = reducer(POPULATION)
    assert (weights[COUNTS == 0] == 0).all()
    assert (weights[COUNTS > 0] > 0).all()
    alive = COUNTS > 0
    np.testing.assert_array_equal(reducer(Population(COUNTS[alive], GROUPS[alive], PARTITION[alive])), weights[alive])


@pytest.mark.parametrize("name", ALL)
def test_reducer_of_an_empty_population_is_zero_property_24(name):
    nobody = np.zeros(0, int)
    assert ALL[name](Population(nobody, nobody, nobody)).shape == (0,)
    silent = Population(np.zeros(3, int), np.arange(3), np.arange(3))
    np.testing.assert_array_equal(ALL[name](silent), [0, 0, 0])


@pytest.mark.parametrize("name", ALL)
def test_reducer_follows_the_sample_not_its_place_property_22(name):
    order = np.random.default_rng(3).permutation(len(COUNTS))
    moved = ALL[name](Population(COUNTS[order], GROUPS[order], PARTITION[order]))
    np.testing.assert_array_equal(moved, ALL[name](POPULATION)[order])


@pytest.mark.parametrize("name", ALL)
def test_reducer_reads_the_partition_only_if_its_name_says_so_property_23(name):
    elsewhere = Population(COUNTS, GROUPS, np.array([0, 0, 1, 1, 1, 0, 2]))
    same = np.array_equal(ALL[name](POPULATION), ALL[name](elsewhere))
    assert same == (name not in PARTITION_BOUND)
    if name in PARTITION_BOUND:
        with pytest.raises(ValueError, match=r"partition.*got None"):
            ALL[name](Population(COUNTS, GROUPS))
    else:
        np.testing.assert_array_equal(ALL[name](Population(COUNTS, GROUPS)), ALL[name](POPULATION))


def test_mean_of_means_is_not_the_mean():
    # n = (1, 3), micro-batch sums (4, 0): right 1.0, mean of means 2.0 (spec/accumulation.md 1.2)
    population = Population(np.array([1, 3]), np.array([0, 1]), np.array([0, 1]))
    sums = np.array([4.0, 0.0])
    assert token_mean(population) @ sums == pytest.approx(1.0, rel=1e-15)
    assert legacy_micro_token_mean(population) @ sums == pytest.approx(2.0, rel=1e-15)
    # a token of the shortest of (200, 8000, 4000, 3800) weighs 20 times what it should, of the longest half
    counts = np.array([200, 8000, 4000, 3800])
    alone = Population(counts, np.arange(4), np.arange(4))
    np.testing.assert_allclose(legacy_micro_token_mean(alone)[:2] / token_mean(alone)[:2], [20, 0.5], rtol=1e-12)


def test_official_presets_by_hand_property_23():
    # two demonstrations, (NLL sum, tokens) = (100, 100) and (900, 300)
    nll, counts = np.array([100.0, 900.0]), np.array([100, 300])
    together = Population(counts, np.arange(2), np.array([5, 5]))
    apart = Population(counts, np.arange(2), np.array([5, 6]))
    assert official_sft(1)(together) @ nll == pytest.approx(2.5, rel=1e-15)
    assert official_sft(1)(apart) @ nll == pytest.approx(4.0, rel=1e-15)
    assert official_sft(8)(apart) @ nll == pytest.approx(0.5, rel=1e-15)  # mean over 8 ranks
    for population in (together, apart):
        assert official_fixed_sft(population) @ nll == pytest.approx(2.5, rel=1e-15)


def test_official_fixed_constant_is_configured_not_counted():
    # the recipes: 8192 tokens, 512 rows per update, so C = 8, where the published mean over 8 ranks sits
    lengths = Population(np.array([10, 1000, 8192]), np.array([0, 0, 0]))
    np.testing.assert_array_equal(official_fixed_rl(8192, 512)(lengths), [1 / (8192 * 8)] * 3)
    np.testing.assert_array_equal(official_fixed_rl(8192, 512)(lengths), official_rl(8192, 8)(lengths))
    # one RL token at A = 0.875 weighs 1.07e-4 (the common 1/R left out), spec/hpt.md 2.2
    assert 0.875 * official_rl(8192, 1)(lengths)[0] == pytest.approx(1.07e-4, rel=2e-3)
    # a demonstration token 3.05e-5 in a full micro-batch of 32768, 2.4e-4 beside nothing but its own 4096
    full = Population(np.full(8, 4096), np.arange(8), np.zeros(8, int))
    assert official_sft(1)(full)[0] == pytest.approx(3.05e-5, rel=1e-3)
    assert official_sft(1)(Population(np.array([4096]), np.array([0]), np.array([0])))[0] == pytest.approx(
        2.4e-4, rel=2e-2
    )


def test_entropy_mean_with_and_without_demonstrations_property_28():
    # entropy sums 6 and 4 over rollouts of 3 and 2 tokens, 20 over a demonstration of 5
    counts, sums = np.array([3, 2, 5]), np.array([6.0, 4.0, 20.0])
    everybody = token_mean(Population(counts, np.array([0, 0, 1])))
    rollouts = token_mean(Population(counts[:2], np.array([0, 0])))
    assert everybody @ sums == pytest.approx(3.0, rel=1e-15)
    assert rollouts @ sums[:2] == pytest.approx(2.0, rel=1e-15)


def test_doubling_demonstration_length_moves_only_token_means():
    # spec/accumulation.md 3.3: each SFT token keeps its loss; the share of SFT in a joint token mean doubles with its
    # length, in a sequence mean it stays
    def share(reducer, demonstration_tokens):
        counts = np.array([10, demonstration_tokens])
        parts = reducer(Population(counts, np.arange(2))) * counts
        return parts[1] / parts[0]

    assert share(token_mean, 20) == pytest.approx(2 * share(token_mean, 10), rel=1e-12)
    assert share(seq_mean_token_mean, 20) == pytest.approx(share(seq_mean_token_mean, 10), rel=1e-12)


def test_paper_equations_by_hand():
    # one question of two rollouts (3 and 5 tokens) beside one demonstration of 4, 2 questions: 1/2 * 1/2 and 1/2 * 1/4
    np.testing.assert_array_equal(paper_rl(2)(Population(np.array([3, 5]), np.array([7, 7]))), [0.25, 0.25])
    np.testing.assert_array_equal(paper_sft(2)(Population(np.array([4]), np.array([8]))), [0.125])


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: constant(0.0), "constant"),
        (lambda: dr_grpo(0), "max_tokens"),
        (lambda: official_rl(8192, 0), "ranks"),
        (lambda: official_sft(-1), "ranks"),
        (lambda: official_fixed_rl(8192, 0), "rollout_rows"),
        (lambda: paper_rl(0), "questions"),
        (lambda: Population(np.array([-1]), np.array([0])), "token_counts"),
    ],
)
def test_reducer_settings_that_mean_nothing_raise(make, field):
    with pytest.raises(ValueError, match=field):
        make()
