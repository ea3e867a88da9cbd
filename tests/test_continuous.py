"""Continuous batching: who enters when, how many calls that takes, and that none of it is seen in a sample.

Oracle of the schedule: a simulation of free seats, token by token, that knows no device. Oracle of the samples: the
same request sampled alone.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import math
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hptjax.records import FinishReason
from hptjax.rollout import engine as engine_module
from hptjax.rollout import running as running_module
from hptjax.rollout.admission import FIELDS, NO_PAGE, copy_table, entry_table, plan_prefills
from hptjax.rollout.engine import RolloutShardings, make_engine
from hptjax.rollout.pages import Copy, make_room
from hptjax.rollout.programs import make_programs
from hptjax.rollout.seats import NOBODY, Seats
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


@pytest.fixture
def counted(monkeypatch):
    """An engine of its own whose device calls are written down: ("prefill", bucket), ("enter", slots), "decode"."""

    def build(**sizes):
        calls = []

        def spied(shape, **options):
            programs = make_programs(shape, **options)

            def prefill(params, tokens, lengths):
                calls.append(("prefill", tokens.shape[1]))
                return programs.prefill(params, tokens, lengths)

            def enter(cache, settings, progress, rows, entries, copies):
                calls.append(("enter", np.flatnonzero(entries[:, FIELDS.index("enters")]).tolist()))
                return programs.enter(cache, settings, progress, rows, entries, copies)

            def decode(*args, **keywords):
                calls.append("decode")
                return programs.decode(*args, **keywords)

            return programs._replace(prefill=prefill, enter=enter, decode=decode)

        monkeypatch.setattr(engine_module, "make_programs", spied)
        return make_engine(**make_policy(), **SIZES | sizes), calls

    return build


def most_exchanged(text):
    """Entries of the largest array that devices exchange in a compiled program; a report is one of them."""
    found = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-|collective-|reduce-scatter)", text)
    assert found
    return max(math.prod(map(int, sizes.split(","))) if sizes else 1 for sizes in found)


def simulated_calls(lengths, *, slots, per_call):
    """Calls that these completions need, in order of admission, where a call that frees a seat is read at once."""
    left, waiting, calls = [0] * slots, list(lengths), 0
    while waiting or any(left):
        for seat in range(slots):
            if left[seat] == 0 and waiting:
                left[seat] = waiting.pop(0)
        left = [max(0, wanted - per_call) for wanted in left]
        calls += 1
    return calls


def test_refill_takes_the_calls_that_a_simulation_takes(counted):
    """By hand too: two seats, one token per call; 8 tokens beside eight times 1 are 8 calls, in static pairs 12."""
    sample, calls = counted(slots=2, tokens_per_call=1)
    lengths = [8, *[1] * 8]
    samples = sample(PARAMS, [request(q, limit=length, stop=()) for q, length in enumerate(lengths)], KEY)
    assert [len(one.completion_tokens) for one in samples] == lengths
    assert calls.count("decode") == simulated_calls(lengths, slots=2, per_call=1) == 8
    static = [lengths[at : at + 2] for at in range(0, 9, 2)]
    assert sum(map(max, static)) == 12
    calls.clear()
    rng = np.random.default_rng(0)
    lengths = sorted(rng.integers(1, 16, 23).tolist(), reverse=True)
    sample(PARAMS, [request(q, limit=length, stop=()) for q, length in enumerate(lengths)], KEY)
    assert calls.count("decode") == simulated_calls(lengths, slots=2, per_call=1)


def test_refill_follows_what_was_sampled_and_not_only_limits(counted):
    """Rows that stop early set their seats free: about as many calls as a simulation of the real lengths, no more."""
    sample, calls = counted(slots=3, tokens_per_call=2)
    asked = [request(q, limit=16, stop=(1, 2, 3, 4)) for q in range(20)]
    lengths = [len(one.completion_tokens) for one in sample(PARAMS, asked, KEY)]
    assert len(set(lengths)) > 3
    extra = calls.count("decode") - simulated_calls(lengths, slots=3, per_call=2)
    assert 0 <= extra <= 1  # at the end, when nobody waits, one call may go out before the last news is read


def test_prefill_of_a_group_is_kept_until_its_last_member_has_entered(counted):
    sample, calls = counted(slots=2, prefill_rows=2, tokens_per_call=4)
    asked = [request(q, i, limit=4, stop=()) for q in range(3) for i in range(5)]
    samples = sample(PARAMS, asked, KEY)
    assert [one for one in calls if one[0] == "prefill"] == [("prefill", 4)] * 2  # rows for two of three questions
    assert sum(len(one[1]) for one in calls if one[0] == "enter") == 15
    between = calls[calls.index(("prefill", 4)) + 1 :]
    assert between[: between.index(("prefill", 4))].count("decode") == 5  # ten members, two at a time
    for one, asked_for in zip(samples, asked, strict=True):
        assert_same_bits(one, sample(PARAMS, [asked_for], KEY)[0])


def test_admission_begins_with_what_may_take_longest():
    limits = {0: 5, 1: 16, 2: 9, 3: 16}
    asked = [request(q, i, limit=limits[q], prompt=8 if q == 3 else 3) for q in range(4) for i in range(2)]
    calls = list(plan_prefills(asked, range(8), dataclasses.replace(SHAPE, prefill_rows=2), 0))
    assert [call.tokens.shape for call in calls] == [(2, 4), (2, 8), (2, 4)]
    order = [[asked[place].sample_id[::2] for place, _ in call.entries] for call in calls]
    assert order == [[(1, 0), (1, 1), (2, 0), (2, 1)], [(3, 0), (3, 1)], [(0, 0), (0, 1)]]


def test_replay_ignores_when_and_where_a_sample_entered():
    """The same eighteen requests behind, before and between others, so that they enter other slots at other times."""
    expected = by_id(mixed_samples())
    for seed in range(3):
        rng = np.random.default_rng(seed)
        others = [request(100 + q, prompt=1 + q % 8, limit=3 + q, stop=(2, 3)) for q in range(11)]
        lasting = {"limit": 20 - seed, "stop": ()}
        others += [request(200 + q, prompt=1 + q, **lasting) for q in range(4)]  # these come first and stay
        asked = [*mixed_requests(), *others]
        rng.shuffle(asked)
        for sample in shared_engine()(PARAMS, asked, KEY):
            if sample.sample_id in expected:
                assert_same_bits(sample, expected[sample.sample_id])


def test_replay_of_prompts_and_completions_that_fill_the_cache():
    """Contexts at and beside every bucket's end, completions up to the last position, in slots used before."""
    asked = [
        request(q, i, prompt=prompt, limit=limit, stop=())
        for q, (prompt, limit) in enumerate([(4, 20), (5, 19), (8, 16), (9, 15), (20, 4), (19, 5), (1, 23), (3, 1)])
        for i in range(2)
    ]
    samples = shared_engine()(PARAMS, asked, KEY)
    for asked_for, sample in zip(asked, samples, strict=True):
        assert len(sample.completion_tokens) == asked_for.max_completion_tokens
        assert sample.finish_reason == FinishReason.LENGTH
        assert_same_bits(sample, shared_engine()(PARAMS, [asked_for], KEY)[0])
    assert {one.split("prefill=")[1].split()[0] for one in (s.decode_shape for s in samples)} == {"4x4", "4x8", "4x20"}


def test_replay_says_another_shape_for_other_slots_calls_rows_or_capacity():
    shapes = {SHAPE.describe(request(0))}
    for change in ({"slots": 7}, {"prefill_rows": 3}, {"tokens_per_call": 6}, {"cache_capacity": 25}):
        shapes.add(dataclasses.replace(SHAPE, **change).describe(request(0)))
    shapes.add(SHAPE.describe(request(0, prompt=5)))
    shapes.add(SHAPE.describe(request(0, top_k=2)))
    assert len(shapes) == 7


@pytest.mark.parametrize("parts", [1, 2])
def test_replay_on_two_devices_ignores_neighbours(eight_devices, parts):
    """`parts`, as the product sets it, makes the shares of a cut cache known: then no keys and values travel."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=eight_devices[:2])
    placed = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    shardings = RolloutShardings(rows=placed("data"), cache=placed(None, "data"), replicated=placed())
    policy = make_policy()
    policy["decode_step"] = functools.partial(policy["decode_step"], parts=parts)
    sample = make_engine(**policy, **SIZES, shardings=shardings)
    params, key = jax.device_put(PARAMS, placed()), jax.device_put(KEY, placed())
    plain = [0, 4, 6, 9, 10]
    asked = [mixed_requests()[place] for place in plain]
    others = [request(100 + q, prompt=1 + q % 8, limit=3 + q, stop=()) for q in range(9)]
    crowd = by_id(sample(params, [*others, *asked], key))
    for place, asked_for in zip(plain, asked, strict=True):
        (alone,) = sample(params, [asked_for], key)
        assert_same_bits(crowd[asked_for.sample_id], alone)
        assert_same_up_to_near_ties(asked_for, alone, mixed_samples()[place])
    programs = make_programs(SHAPE, **policy, shardings=shardings)
    arguments = (params, key, *programs.empty(params), None)
    decode = programs.decode.lower(*arguments, truncated=False).compile()
    assert (most_exchanged(decode.as_text()) <= SHAPE.slots * (2 * SHAPE.tokens_per_call + 2)) == (parts == 2)


@pytest.mark.parametrize("sizes", [{}, {"cache_positions": 48, "cache_page": 4}])
def test_enter_and_decode_change_the_cache_in_place_and_prefilled_rows_are_short(sizes):
    """The cache they are given is the one that they give back, and no second one is made on the way."""
    shape = dataclasses.replace(SHAPE, **sizes)
    programs = make_programs(shape, **make_policy(), shardings=None)
    cache, settings, progress = jax.eval_shape(programs.empty, PARAMS)
    tokens = jax.ShapeDtypeStruct((shape.prefill_rows, 4), np.int32)
    lengths = jax.ShapeDtypeStruct((shape.prefill_rows,), np.int32)
    rows = jax.eval_shape(programs.prefill, PARAMS, tokens, lengths)
    assert {leaf.shape[1:3] for leaf in jax.tree.leaves(rows)} == {(4, 4)}
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    tables = entry_table({}, shape), copy_table([], shape)
    enter = programs.enter.lower(cache, settings, progress, rows, *tables).compile().memory_analysis()
    assert enter.alias_size_in_bytes >= cache_bytes
    assert enter.temp_size_in_bytes < cache_bytes
    pages = make_room(shape).table()
    decode = programs.decode.lower(PARAMS, KEY, cache, settings, progress, pages, truncated=False).compile()
    assert decode.memory_analysis().alias_size_in_bytes >= cache_bytes


def test_entry_table_holds_settings_exactly():
    asked = request(-7, 3, -2, prompt=3, prefix=2, limit=9, stop=(5, 1), temperature=0.7, top_k=4, top_p=0.3)
    table = entry_table({4: asked, 2: request(0)}, SHAPE)
    line = dict(zip(FIELDS, table[4].tolist(), strict=False))
    assert [line[name] for name in ("question", "round", "index")] == [-7, -2, 3]
    assert [line[name] for name in ("last_position", "prefix_len", "new_tokens", "top_k")] == [4, 2, 7, 4]
    assert line["last_token"] == asked.prefix_tokens[-1]
    reals = table[4, [FIELDS.index("temperature"), FIELDS.index("top_p")]].view(np.float32)
    np.testing.assert_array_equal(reals, np.array([0.7, 0.3], np.float32))
    assert table[4, len(FIELDS) :].tolist() == [1, 5, *[-1] * 6]
    assert table[:, FIELDS.index("enters")].tolist() == [0, 0, 1, 0, 1, 0]
    copies = copy_table([Copy(1, 0, 4), Copy(0, 0, 2)], SHAPE)
    np.testing.assert_array_equal(copies, [[1, 0, 4], [0, 0, 2], *[[NO_PAGE] * 3] * 4])


def report(tokens, counts, active):
    tokens = np.array(tokens, np.int32)
    bits = (-tokens / 8).astype(np.float32).view(np.int32)
    return np.concatenate([tokens, bits, np.array([counts, active], np.int32).T], axis=1)


def test_seats_finish_samples_and_forget_them():
    seats = Seats(dataclasses.replace(SHAPE, slots=3, tokens_per_call=2))
    asked = [request(q, limit=limit) for q, limit in enumerate([5, 2, 3])]
    seats.enter({2: 0, 0: 1}, asked)
    assert seats.free() == [1]
    assert seats.wanted.tolist() == [2, 0, 5]
    ((slot, done),) = seats.take(report([[1, 2], [9, 9], [3, 4]], [2, 0, 2], [0, 0, 1]))
    assert slot == 0
    assert (done.place, done.tokens.tolist(), done.logprobs.tolist()) == (1, [1, 2], [-0.125, -0.25])
    assert seats.wanted.tolist() == [0, 0, 3]
    seats.enter({0: 2}, asked)
    assert seats.take(report([[5, 6], [9, 9], [7, 8]], [2, 0, 2], [1, 0, 1])) == []
    both = seats.take(report([[7, 9], [9, 9], [5, 9]], [1, 0, 1], [0, 0, 0]))
    expected = [(2, 0, [3, 4, 7, 8, 5]), (0, 2, [5, 6, 7])]
    assert [(slot, one.place, one.tokens.tolist()) for slot, one in both] == expected
    assert (seats.places == NOBODY).all()
    assert seats.take(report([[1, 1]] * 3, [0, 0, 0], [0, 0, 0])) == []


def test_a_diverged_policy_is_told_after_the_call_that_shows_it(counted):
    sample, calls = counted(tokens_per_call=2)
    broken = PARAMS | {"final_norm": PARAMS["final_norm"] * np.float32("nan")}
    with pytest.raises(FloatingPointError, match=r"request 0/0/0.*learning_rate"):
        sample(broken, [request(q, limit=16, stop=()) for q in range(9)], KEY)
    assert calls.count("decode") == 1


def test_calls_go_out_before_the_last_one_is_read_only_when_nobody_waits(counted, monkeypatch):
    sample, calls = counted(slots=2, tokens_per_call=2)

    def to_host(tree):
        calls.append("read")
        return jax.device_get(tree)

    monkeypatch.setattr(running_module, "to_host", to_host)
    sample(PARAMS, [request(q, limit=limit, stop=()) for q, limit in enumerate([8, 2, 2])], KEY)
    order = [one for one in calls if one in ("decode", "read")]
    assert order == ["decode", "read", "decode", "decode", "read", "decode", "read", "read"]


COMPILED = []  # what XLA compiled in this process from the first soak on; a listener cannot be taken away again


def resident_kib():
    """The resident set of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("pages", [{}, {"cache_positions": 48 * 24 // 4, "cache_page": 4}], ids=["rows", "pages"])
def test_soak_of_20000_samples_leaves_memory_as_it_was(pages):
    """Groups of odd sizes, prefixes, both paths and stops; completions of 1 to 16 tokens. After a first share of them
    nothing is compiled any more, no array stays, and the resident set grows by less than 8 MiB."""
    if not COMPILED:
        COMPILED.append("the listener")
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, seconds, **_: COMPILED.append(event) if "backend_compile" in event else None
        )
    sample = shared_engine(slots=48, prefill_rows=8, tokens_per_call=4, **pages)
    sizes, limits, total = itertools.cycle([1, 3, 7, 16, 2]), itertools.cycle([16, 5, 9]), 0
    before = None
    for visit in itertools.count():
        asked = []
        for question in range(60):
            settings = {"prompt": 1 + question % 8, "prefix": question % 3, "limit": next(limits), "stop": (1, 2)}
            settings |= {"top_k": 5} if question % 10 == 0 else {}
            asked += [request(question, index, visit, **settings) for index in range(next(sizes))]
        samples = sample(PARAMS, asked, jax.random.fold_in(KEY, visit))
        assert [one.sample_id for one in samples] == [one.sample_id for one in asked]
        total += len(asked)
        del samples
        if total >= 4000 and before is None:
            before = resident_kib(), len(jax.live_arrays()), len(COMPILED)
        if total >= 20000:
            break
    kib, arrays, compiled = before
    assert len(jax.live_arrays()) == arrays
    assert len(COMPILED) == compiled > 1
    assert resident_kib() - kib < 8 * 1024
