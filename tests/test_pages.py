"""The KV cache in pages: who has which, and that neither pages, neighbours nor evictions are seen in a sample.

Oracle of the samples: the cache with a row for each slot, which knows no page (near ties), and the same request alone
in the same pages (bit for bit). Oracle of the book-keeping: every page is counted again after every call.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hptjax.models.attention_cache import attention_step_in_blocks, attention_step_in_pages
from hptjax.rollout import running as running_module
from hptjax.rollout.admission import plan_prefills
from hptjax.rollout.engine import RolloutShardings, make_engine
from hptjax.rollout.pages import Copy, SharedPages
from hptjax.rollout.programs import make_programs
from hptjax.rollout.requests import truncates
from tests.test_attention import cache_case
from tests.test_continuous import most_exchanged
from tests.test_rollout import (
    KEY,
    PARAMS,
    SHAPE,
    SIZES,
    assert_same_bits,
    assert_same_up_to_near_ties,
    by_id,
    make_policy,
    mixed_requests,
    mixed_samples,
    request,
    shared_engine,
)

PAGE = 4  # of a capacity of 24: six pages at most for a sample
AMPLE, TIGHT = 6 * 24, 2 * 24  # positions: a whole sample for each of the six slots, and for two of them
PAGED = dataclasses.replace(SHAPE, cache_positions=TIGHT, cache_page=PAGE)


# the step


def paged(cached, order):
    """[L B C K E] as shuffled pages [L N PAGE K E], with garbage in those that nobody has, and the table [B M]."""
    layers, batch, capacity = cached.shape[:3]
    blocks = -(-capacity // PAGE)
    filled = np.pad(cached, [(0, 0), (0, 0), (0, blocks * PAGE - capacity), (0, 0), (0, 0)], constant_values=30.0)
    pages = filled.reshape(layers, batch * blocks, PAGE, *cached.shape[3:])
    pool = np.full((layers, batch * blocks + 3, *pages.shape[2:]), 50.0, np.float32)
    pool[:, order[: batch * blocks]] = pages
    return pool, order[: batch * blocks].reshape(batch, blocks).astype(np.int32)


def test_attention_step_in_pages_equals_blocks_whatever_pages_a_row_has():
    query, key, value, keys, values = cache_case()
    lengths = np.array([0, 5, 36, 37], np.int32)
    blocks = jax.jit(functools.partial(attention_step_in_blocks, block=PAGE))
    step = jax.jit(attention_step_in_pages)
    seen = []
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(4 * 10 + 3)
        (pool_keys, table), (pool_values, _) = paged(keys, order), paged(values, order)
        used = np.arange(10)[None, :] * PAGE < lengths[:, None]
        table = np.where(used, table, 4 * 10 + 3 + seed).astype(np.int32)  # past the last page: has none
        seen.append(np.asarray(step(query, key, value, pool_keys, pool_values, jnp.asarray(1), lengths, table)))
    whole = blocks(query, key, value, keys, values, jnp.asarray(1), lengths)
    np.testing.assert_allclose(seen[0], whole, rtol=0, atol=2e-6)
    assert all(np.array_equal(seen[0], other) for other in seen[1:])


# samples


@pytest.mark.parametrize("positions", [AMPLE, TIGHT])
def test_rollout_in_pages_is_the_rollout_up_to_near_ties(positions):
    samples = shared_engine(cache_positions=positions, cache_page=PAGE)(PARAMS, mixed_requests(), KEY)
    for asked, got, expected in zip(mixed_requests(), samples, mixed_samples(), strict=True):
        assert f"cache=24({positions // PAGE}x{PAGE})" in got.decode_shape
        assert_same_up_to_near_ties(asked, got, expected)


def crowd(seed):
    """The mixed requests among others that take many pages for long, in some order."""
    rng = np.random.default_rng(seed)
    others = [request(100 + q, prompt=1 + q % 9, limit=15, stop=()) for q in range(9)]
    others += [request(200, i, prompt=19, limit=5, stop=()) for i in range(5)]
    asked = [*mixed_requests(), *others]
    rng.shuffle(asked)
    return asked


def test_replay_in_pages_ignores_neighbours_pages_and_evictions(monkeypatch):
    """Twelve pages for six slots whose samples want up to six: many lose theirs, and come again to the same bits."""
    planned = Counter()

    def spied(requests, places, shape, pad_id):
        planned[shape.pages] += len(places)
        return plan_prefills(requests, places, shape, pad_id)

    monkeypatch.setattr(running_module, "plan_prefills", spied)
    for positions in (AMPLE, TIGHT):
        sample = shared_engine(cache_positions=positions, cache_page=PAGE)
        alone = {one.sample_id: sample(PARAMS, [one], KEY)[0] for one in mixed_requests()}
        for seed in range(3):
            asked = crowd(seed)
            samples = sample(PARAMS, asked, KEY)
            assert [one.sample_id for one in samples] == [one.sample_id for one in asked]
            for sample_id, expected in alone.items():
                assert_same_bits(by_id(samples)[sample_id], expected)
    entered = 3 * len(crowd(0)) + len(mixed_requests())
    assert planned[36] == entered
    assert planned[12] > entered + 10  # those that were sent back come twice


def test_rollout_in_pages_stops_and_goes_on():
    sample = shared_engine(cache_positions=TIGHT, cache_page=PAGE)
    asked = crowd(1)
    whole = by_id(sample(PARAMS, asked, KEY))
    for stop_at in (3, 9, 17, 25):
        answers = iter(range(1000))
        first = sample(PARAMS, asked, KEY, should_stop=lambda answers=answers, at=stop_at: next(answers) >= at)
        assert len(first) < len(asked)
        rest = [one for one in asked if one.sample_id not in by_id(first)]
        for got in [*first, *sample(PARAMS, rest, KEY)]:
            assert_same_bits(got, whole[got.sample_id])


def test_pages_hold_what_was_asked_for_and_no_more():
    for positions, sizes in ((AMPLE, (36, PAGE)), (TIGHT + 3, (12, PAGE)), (None, (6, 24))):
        shape = dataclasses.replace(SHAPE, cache_positions=positions, cache_page=PAGE)
        cache, _, _ = jax.eval_shape(make_programs(shape, **make_policy(), shardings=None).empty, PARAMS)
        assert {leaf.shape[1:3] for leaf in jax.tree.leaves(cache)} == {sizes}
    with pytest.raises(ValueError, match=r"rollout.cache_positions: expected at least 24, .* got 23"):
        dataclasses.replace(SHAPE, cache_positions=23, cache_page=PAGE)


def test_pages_on_two_devices_are_each_devices_own(eight_devices):
    """Two shares of slots and pages: bits do not depend on neighbours, and no device asks another for its pages."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=eight_devices[:2])
    placed = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    shardings = RolloutShardings(rows=placed("data"), cache=placed(None, "data"), replicated=placed())
    sizes = {"cache_positions": 2 * TIGHT, "cache_page": PAGE, "cache_parts": 2}
    policy = make_policy()
    policy["decode_step"] = functools.partial(policy["decode_step"], parts=2)
    sample = make_engine(**policy, **SIZES, **sizes, shardings=shardings)
    params, key = jax.device_put(PARAMS, placed()), jax.device_put(KEY, placed())
    plain = [place for place, asked in enumerate(mixed_requests()) if not truncates(asked)]
    crowded = by_id(sample(params, [asked for asked in crowd(0) if not truncates(asked)], key))
    for place in plain:
        asked = mixed_requests()[place]
        (alone,) = sample(params, [asked], key)
        assert_same_bits(crowded[asked.sample_id], alone)
        assert_same_up_to_near_ties(asked, alone, mixed_samples()[place])

    shape = dataclasses.replace(SHAPE, **sizes)
    programs = make_programs(shape, **policy, shardings=shardings)
    cache, settings, progress = programs.empty(params)
    pages = jax.ShapeDtypeStruct((6, 6), np.int32)
    decode = programs.decode.lower(params, key, cache, settings, progress, pages, truncated=False).compile()
    assert most_exchanged(decode.as_text()) <= shape.slots * (2 * shape.tokens_per_call + 2)


def test_a_slot_without_pages_is_not_there():
    """A sample that lost its pages wants no more tokens, and its neighbour's are what they would be."""
    policy = make_policy()
    programs = make_programs(PAGED, **policy, shardings=None)
    cache, settings, progress = programs.empty(PARAMS)
    progress = dataclasses.replace(progress, active=np.array([True, True, *[False] * 4]))
    settings = dataclasses.replace(settings, limit=np.full(6, 9, np.int32))
    pages = np.full((6, 6), 12, np.int32)
    pages[1, :2] = 3, 4
    _, progress, report = programs.decode(PARAMS, KEY, cache, settings, progress, pages, truncated=False)
    assert np.asarray(report)[:, -2:].tolist() == [[0, 0], [5, 1], *[[0, 0]] * 4]
    assert np.asarray(progress.active).tolist() == [False, True, *[False] * 4]


# book-keeping


def test_pages_of_a_prompt_are_shared_and_the_last_is_copied():
    """By hand: pages of 4, 12 in all. A context of 9 fills two and ends in a third; 8 ends in the second."""
    pages = SharedPages(PAGED)
    assert pages.enter(3, 0, 9) == [Copy(0, 0, 0), Copy(0, 1, 1), Copy(0, 2, 2)]
    assert pages.enter(5, 0, 9) == [Copy(0, 2, 3)]
    assert pages.enter(1, 1, 8) == [Copy(1, 0, 4), Copy(1, 1, 5)]
    assert pages.table()[[3, 5, 1, 0]].tolist() == [
        [0, 1, 2, 12, 12, 12],
        [0, 1, 3, 12, 12, 12],
        [4, 5, 12, 12, 12, 12],
        [12] * 6,
    ]
    assert pages.cover(3, 12)
    assert pages.cover(3, 13)
    assert pages.table()[3].tolist() == [0, 1, 2, 6, 12, 12]
    assert pages.enter(0, 2, 9) is None  # five are free: three to begin with, and one more for each of three others
    assert pages.enter(0, 2, 8) == [Copy(2, 0, 7), Copy(2, 1, 8)]
    pages.leave(3)
    pages.forget_rows()
    assert pages.enter(4, 0, 9) is None
    assert pages.cover(5, 24)  # 6, 2 and 9 beside the shared two and its own
    assert not pages.cover(1, 24)  # four wanted, two left
    pages.leave(5)
    assert sorted(set(pages.table().ravel().tolist())) == [4, 5, 7, 8, 10, 11, 12]


def test_pages_of_a_prompt_whose_samples_have_left_are_free_for_the_next():
    """By hand: contexts of 20 fill four pages and end in a fifth; twelve hold two of them, and a page to grow."""
    pages = SharedPages(PAGED)
    assert len(pages.enter(0, 0, 20)) == 5
    pages.leave(0)
    assert pages.enter(0, 0, 20) == [Copy(0, 4, 4)]  # the other four were kept
    pages.leave(0)
    assert len(pages.enter(1, 1, 20)) == 5
    assert len(pages.enter(2, 2, 20)) == 5


ACTIONS = strategies.lists(
    strategies.tuples(
        strategies.sampled_from(["enter", "cover", "leave", "forget"]),
        strategies.integers(0, 5),
        strategies.integers(1, 20),
    ),
    max_size=60,
)


@hypothesis.settings(max_examples=60)
@hypothesis.given(ACTIONS)
def test_pages_are_never_two_samples_own_and_none_is_lost(actions):
    pages, contexts, covered = SharedPages(PAGED), {}, {}
    full = {}
    for action, slot, size in actions:
        if action == "enter" and slot not in contexts:
            copies = pages.enter(slot, size, size)  # the row is named by its context's length
            if copies is not None:
                contexts[slot], covered[slot] = size, size
                full.setdefault(size, []).append(slot)
        elif action == "cover" and slot in contexts and pages.cover(slot, size):
            covered[slot] = max(covered[slot], size)
        elif action == "leave" and slot in contexts:
            pages.leave(slot)
            del contexts[slot], covered[slot]
        elif action == "forget":
            pages.forget_rows()
        table = pages.table()
        owned = Counter()
        for held, context in contexts.items():
            own = [page for page in table[held] if page < 12]
            assert len(own) >= -(-covered[held] // PAGE)
            assert len(set(own)) == len(own)
            owned.update(own[(context - 1) // PAGE :])  # those that it writes
            for other, its_context in contexts.items():
                shared = set(own) & {page for page in table[other] if page < 12}
                assert other == held or not shared or its_context == context
        assert all(count == 1 for count in owned.values())
        assert (table[[s for s in range(6) if s not in contexts]] == 12).all()
    for slot in list(contexts):
        pages.leave(slot)
    pages.forget_rows()
    assert pages.enter(0, 0, 1) is not None
    assert pages.cover(0, 24)
    pages.leave(0)
    taken = [pages.enter(slot, 100 + slot, 5) for slot in range(2)]
    assert all(taken)


def test_pages_of_other_sizes_are_another_shape():
    plain = request(0)
    described = {
        dataclasses.replace(SHAPE, cache_positions=positions, cache_page=page).describe(plain)
        for positions, page in ((None, 4), (None, 8), (48, 4), (48, 8), (96, 4))
    }
    assert len(described) == 4
