"""Near-equal sums by Karmarkar and Karp, and the published script's micro-batches that are made with it."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from hptjax.build.logical import logical_partition
from hptjax.hpt.balance import balanced_sets
from hptjax.losses.reducers import Population, official_sft
from tests import recorded


def sums(sizes, sets):
    return [sum(sizes[place] for place in members) for members in sets]


def test_balance_by_hand():
    """8, 7, 6, 5, 4: 8-7 leaves 1, 6-5 leaves 1, 4-1 leaves 3, 3-1 leaves 2: sums 16 and 14, as in the literature."""
    sets = balanced_sets([8, 7, 6, 5, 4], 2, equal_counts=False)
    assert sorted(sums([8, 7, 6, 5, 4], sets)) == [14, 16]
    assert balanced_sets([], 3, equal_counts=False) == [[], [], []]
    assert balanced_sets([5], 2, equal_counts=True) == [[0], []]
    with pytest.raises(ValueError, match="at least 1 set"):
        balanced_sets([1], 0, equal_counts=False)


@pytest.mark.parametrize("equal", [True, False])
def test_balance_is_a_partition_not_far_from_the_best(equal):
    rng = np.random.default_rng(0)
    for _ in range(40):
        sizes, count = rng.integers(1, 100, rng.integers(4, 9)).tolist(), int(rng.integers(2, 4))
        sets = balanced_sets(sizes, count, equal_counts=equal)
        assert sorted(itertools.chain(*sets)) == list(range(len(sizes)))
        assert len(sets) == count
        if equal:
            assert max(map(len, sets)) - min(map(len, sets)) <= 1
            continue
        spreads = []
        for labels in itertools.product(range(count), repeat=len(sizes)):
            totals = np.bincount(labels, weights=sizes, minlength=count)
            spreads.append(totals.max() - totals.min())
        found = sums(sizes, sets)
        assert max(found) - min(found) <= min(spreads) + max(sizes) / 2


def test_logical_micro_batches_are_balanced_and_within_the_budget():
    samples = recorded.mixed(3, 5)
    lengths = {s.sample_id: len(s.prompt_tokens) + len(s.completion_tokens) for s in samples}
    ranks, budget = 4, 60
    places = logical_partition(ranks, budget)(samples)
    assert set(places) == set(lengths)
    assert logical_partition(ranks, budget)(samples[::-1]) == places
    per_rank = -(-(max(places.values()) + 1) // ranks)
    by_rank = [[lengths[i] for i, place in places.items() if place // per_rank == rank] for rank in range(ranks)]
    assert max(map(len, by_rank)) - min(map(len, by_rank)) <= 1
    assert max(map(sum, by_rank)) - min(map(sum, by_rank)) <= max(lengths.values())
    needed = max(-(-sum(rank) // budget) for rank in by_rank)
    assert per_rank == needed


@pytest.mark.parametrize(("budget", "weights"), [(10_000, {1 / 400}), (400, {1 / 100, 1 / 300})])
def test_official_sft_weights_by_the_scripts_micro_batches_property_23(budget, weights):
    """Demonstrations of 100 and 300 tokens, NLL sums 100 and 900: 1000 / 400 in one micro-batch, 1 + 3 in two."""
    template = recorded.mixed(2, 0)
    samples = [
        dataclasses.replace(
            sample,
            prompt_tokens=np.zeros(10, np.int32),
            completion_tokens=np.zeros(tokens, np.int32),
            sampler_logprobs=np.zeros(tokens, np.float32),
        )
        for sample, tokens in zip(template, (100, 300), strict=True)
    ]
    places = logical_partition(1, budget)(samples)
    population = Population(
        token_counts=np.array([100, 300]),
        group_ids=np.array([0, 1]),
        partition=np.array([places[sample.sample_id] for sample in samples]),
    )
    shares = official_sft(1)(population)
    assert set(shares.tolist()) == weights
    assert shares @ np.array([100.0, 900.0]) == pytest.approx(2.5 if budget == 10_000 else 4.0, rel=1e-12)
