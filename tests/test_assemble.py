"""Assembly: every live token once, with the target, weight and advantage that a slow second route gives it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hptjax.hpt.assemble import Update, assemble
from hptjax.hpt.digest import digest, sample_hashes
from hptjax.hpt.terms import Term, completion_span, prefix_span, whole_span
from hptjax.losses.advantages import centred, ones, standardised
from hptjax.losses.reducers import (
    constant,
    dr_grpo,
    legacy_micro_token_mean,
    prompt_mean,
    seq_mean_token_mean,
    seq_mean_token_sum,
    seq_sum_len,
    token_mean,
)
from hptjax.records import Sample, SampleId, Source

ROLLOUTS = frozenset({Source.ROLLOUT})
DEMONSTRATIONS = frozenset({Source.DEMONSTRATION})
LIMITS = {"rows": 2, "row_tokens": 24, "max_segments": 5, "max_micro_batches": 64}
MAX_TOKENS = 16

RL = Term("rl", ROLLOUTS, 1.0, dr_grpo(MAX_TOKENS), centred)
SFT = Term("sft", DEMONSTRATIONS, 0.3, token_mean, ones)
ENTROPY = Term("entropy", ROLLOUTS | DEMONSTRATIONS, 0.001, token_mean, ones)
TERMS = (RL, SFT, ENTROPY)


def make_sample(
    question: int,
    index: int,
    *,
    prompt: int = 3,
    completion: int = 4,
    source: Source = Source.ROLLOUT,
    reward: float | None = 0.0,
    **fields: Any,
) -> Sample:
    """A sample whose tokens and log-probs tell which sample and which place they came from."""
    mark = 1000 * (question + 1) + 50 * (index + 2)
    return Sample(
        SampleId(question, 0, index),
        group_id=question,
        source=source,
        prompt_tokens=np.arange(mark, mark + prompt, dtype=np.int32),
        completion_tokens=np.arange(mark + 25, mark + 25 + completion, dtype=np.int32),
        sampler_logprobs=-np.arange(1, completion + 1, dtype=np.float32) / np.float32(mark),
        reward=None if source == Source.DEMONSTRATION else reward,
        **fields,
    )


def make_batch(rng: np.random.Generator, groups: Sequence[int], demonstrations: int) -> list[Sample]:
    """Ragged groups of rollouts, then questions with one demonstration each."""
    samples = []
    for question, size in enumerate(groups):
        prompt = int(rng.integers(1, 6))
        for index in range(size):
            length, reward = int(rng.integers(1, 9)), float(rng.integers(0, 2))
            samples.append(make_sample(question, index, prompt=prompt, completion=length, reward=reward))
    for question in range(len(groups), len(groups) + demonstrations):
        prompt, length = int(rng.integers(1, 6)), int(rng.integers(1, 9))
        samples.append(make_sample(question, -1, prompt=prompt, completion=length, source=Source.DEMONSTRATION))
    return samples


def same_bits(left: Update, right: Update) -> bool:
    if len(left.micro_batches) != len(right.micro_batches):
        return False
    pairs = zip(jax.tree.leaves(left.micro_batches), jax.tree.leaves(right.micro_batches), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def unpacked(update: Update, terms: Sequence[Term]) -> dict[SampleId, list[dict[str, Any]]]:
    """What the arrays say about each sample, position by position: a slow walk over micro-batches, rows and columns."""
    found: dict[SampleId, list[dict[str, Any]]] = {}
    for m, batch in enumerate(update.micro_batches):
        assert int(batch.micro_index) == m
        rows, columns = batch.input_tokens.shape
        for b in range(rows):
            for t in range(columns):
                segment = int(batch.segment_ids[b, t])
                if segment == 0:
                    continue
                sample_id = update.sample_ids[batch.sample_index[b, segment - 1]]
                found.setdefault(sample_id, []).append(
                    {
                        "place": (m, b, segment),
                        "input": int(batch.input_tokens[b, t]),
                        "target": int(batch.target_tokens[b, t]),
                        "position": int(batch.positions[b, t]),
                        "live": bool(batch.completion_mask[b, t]),
                        "sampler": batch.sampler_logprobs[b, t],
                        "temperature": float(batch.temperature[b, segment - 1]),
                        "source": int(batch.source[b, segment - 1]),
                    }
                    | {
                        n: (batch.planes[n].weights[b, t], batch.planes[n].advantages[b, t])
                        for n in [x.name for x in terms]
                    }
                )
    return found


def expected(sample: Sample, weights: dict[str, float], advantages: dict[str, float]) -> list[dict[str, Any]]:
    """What the arrays must say about a sample, from the alignment rule alone (spans: default)."""
    tokens = [*sample.prompt_tokens.tolist(), *sample.completion_tokens.tolist()]
    entries = []
    for t in range(len(tokens) - 1):
        j = t - (len(sample.prompt_tokens) - 1)  # place of the target in the completion
        forced = 0 if sample.source == Source.DEMONSTRATION else sample.prefix_len
        live = j >= forced
        entry = {
            "input": tokens[t],
            "target": tokens[t + 1],
            "position": t,
            "live": live and bool(weights),
            "sampler": sample.sampler_logprobs[j] if j >= 0 else np.float32(0.0),
            "temperature": sample.temperature,
            "source": int(sample.source),
        }
        for name, weight in weights.items():
            entry[name] = (np.float32(weight), np.float32(advantages[name])) if live else (0.0, 0.0)
        entries.append(entry)
    return entries


def slow_values(samples: Sequence[Sample], dead: frozenset[SampleId]) -> dict[SampleId, tuple[dict, dict]]:
    """Weights and advantages of RL, SFT and ENTROPY by their formulas, one sample at a time."""
    alive = [s for s in samples if s.sample_id not in dead and len(s.completion_tokens) > s.prefix_len]
    rollouts = [s for s in alive if s.source == Source.ROLLOUT]
    demo_tokens = sum(len(s.completion_tokens) for s in alive if s.source == Source.DEMONSTRATION)
    all_tokens = sum(len(s.completion_tokens) - s.prefix_len for s in alive)
    answer = {}
    for s in alive:
        is_rollout = s.source == Source.ROLLOUT
        group = [o.reward for o in samples if o.group_id == s.group_id and o.source == Source.ROLLOUT]
        mean = sum(group) / len(group) if len(group) > 1 else 0.0
        weights = {
            "rl": 1.0 / (len(rollouts) * MAX_TOKENS) if is_rollout else 0.0,
            "sft": 0.0 if is_rollout else 0.3 / demo_tokens,
            "entropy": 0.001 / all_tokens,
        }
        advantages = {"rl": s.reward - mean if is_rollout else 0.0, "sft": 0.0 if is_rollout else 1.0, "entropy": 1.0}
        answer[s.sample_id] = (weights, advantages)
    return answer


def check_update(update: Update, samples: Sequence[Sample], dead: frozenset[SampleId]) -> None:
    """Every sample that is alive occurs exactly once, and each of its positions carries what the slow route says."""
    values = slow_values(samples, dead)
    by_id = {s.sample_id: s for s in samples}
    found = unpacked(update, TERMS)
    assert set(found) == set(values) == set(update.sample_ids)
    for sample_id, entries in found.items():
        assert len({entry.pop("place") for entry in entries}) == 1  # one segment, so no token twice
        for got, want in zip(entries, expected(by_id[sample_id], *values[sample_id]), strict=True):
            for name in ("rl", "sft", "entropy"):
                np.testing.assert_allclose(got.pop(name), want.pop(name), rtol=2e-7, atol=0.0)
            assert got == want


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    groups=st.lists(st.integers(1, 7), max_size=4),
    demonstrations=st.integers(0, 4),
    dead_share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_assemble_places_every_live_token_once(
    seed: int, groups: list[int], demonstrations: int, dead_share: float
) -> None:
    """Ragged groups, groups of one, all dead, all demonstrations, nothing at all."""
    rng = np.random.default_rng(seed)
    samples = make_batch(rng, groups, demonstrations)
    dead = frozenset(s.sample_id for s in samples if rng.random() < dead_share)
    update = assemble(samples, TERMS, dead=dead, **LIMITS)
    check_update(update, samples, dead)
    assert update.left_out == len(samples) - len(update.sample_ids)
    live = [int(batch.completion_mask.sum()) for batch in update.micro_batches]
    assert update.planned_tokens.tolist() == live + [0] * (64 - len(live))
    assert sum(live) == sum(len(s.completion_tokens) for s in samples if s.sample_id not in dead)
    assert sum(c.tokens for c in update.sources.values()) == sum(live)
    check_padding(update)


def check_padding(update: Update) -> None:
    """Property 25, the arrays' half: padding has neither tokens, weight, advantage nor a place in any count."""
    for batch in update.micro_batches:
        padding = batch.segment_ids == 0
        arrays = [batch.input_tokens, batch.target_tokens, batch.positions, batch.sampler_logprobs]
        arrays += [batch.rollout_logprobs, batch.reference_logprobs]
        arrays += [array for plane in batch.planes.values() for array in (plane.weights, plane.advantages)]
        assert not any(array[padding].any() for array in arrays)
        assert not batch.completion_mask[padding].any()
        segments = batch.segment_ids.max(axis=1)
        for b, count in enumerate(segments):
            assert (batch.sample_index[b, :count] >= 0).all()
            assert (batch.sample_index[b, count:] == -1).all()
            assert (batch.source[b, count:] == -1).all()
            assert (batch.temperature[b, count:] == 1.0).all()


def test_assemble_shapes_and_dtypes_never_vary() -> None:
    """Contract 1: the number of micro-batches varies, their shapes do not."""
    seen = set()
    for groups, demonstrations in [([], 0), ([], 3), ([8, 8], 0), ([3, 1], 2)]:
        update = assemble(make_batch(np.random.default_rng(0), groups, demonstrations), TERMS, **LIMITS)
        assert len(update.micro_batches) >= 1
        for batch in update.micro_batches:
            leaves, tree = jax.tree.flatten(batch)
            seen.add((tuple((a.shape, str(a.dtype)) for a in leaves), tree))
    (shapes, _) = next(iter(seen))
    assert len(seen) == 1
    assert {d for _, d in shapes} == {"int32", "uint32", "float32", "bool"}
    assert {s for s, _ in shapes} == {(2, 24), (2, 5), (2, 5, 2), (), (64,), (64, 2)}


def test_assemble_of_nothing_is_one_empty_micro_batch() -> None:
    """An update without live tokens (Z = 0) still reaches the flush, where it is counted."""
    samples = make_batch(np.random.default_rng(0), [3], 1)
    update = assemble(samples, TERMS, dead=frozenset(s.sample_id for s in samples), **LIMITS)
    assert len(update.micro_batches) == 1
    assert not update.planned_tokens.any()
    assert not update.micro_batches[0].segment_ids.any()
    assert update.terms["rl"] == dataclasses.replace(update.terms["sft"])
    assert (update.terms["rl"].tokens, update.terms["rl"].normaliser, update.terms["rl"].weight_sum) == (0, 0.0, 0.0)
    assert (update.sample_ids, update.left_out, update.digest.tolist(), update.fill) == ((), 4, [0, 0], 0.0)
    assert update.sources == {}


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31))
def test_assemble_does_not_depend_on_order(seed: int) -> None:
    """Property 22, the arrays' half, with float rewards whose sums round differently in another order."""
    rng = np.random.default_rng(seed)
    samples = [
        dataclasses.replace(s, reward=float(rng.normal()), pair_id=s.group_id if s.group_id == 1 else -1)
        if s.source == Source.ROLLOUT
        else s
        for s in make_batch(rng, [5, 2, 1, 7], 3)
    ]
    terms = (dataclasses.replace(RL, advantage=standardised), SFT, ENTROPY)
    dead = frozenset({samples[3].sample_id})
    update = assemble(samples, terms, dead=dead, **LIMITS)
    shuffled = assemble([samples[i] for i in rng.permutation(len(samples))], terms, dead=dead, **LIMITS)
    assert same_bits(update, shuffled)
    assert (update.sample_ids, update.digest.tolist()) == (shuffled.sample_ids, shuffled.digest.tolist())


REDUCERS = {
    "token_mean": (token_mean, lambda n, g, k: 1.0 / n.sum()),
    "seq_mean_token_mean": (seq_mean_token_mean, lambda n, g, k: 1.0 / (n[k] * (n > 0).sum())),
    "seq_mean_token_sum": (seq_mean_token_sum, lambda n, g, k: 1.0 / (n > 0).sum()),
    "dr_grpo": (dr_grpo(MAX_TOKENS), lambda n, g, k: 1.0 / ((n > 0).sum() * MAX_TOKENS)),
    "prompt_mean": (prompt_mean, lambda n, g, k: 1.0 / (n[g == g[k]].sum() * len(set(g[n > 0])))),
    "seq_sum_len": (seq_sum_len, lambda n, g, k: n[k] / (n > 0).sum()),
    "constant": (constant(100.0), lambda n, g, k: 0.01),
}


@pytest.mark.parametrize("name", sorted(REDUCERS))
def test_assemble_weight_sums_follow_the_reducer_under_any_split(name: str) -> None:
    """Sum of a plane's weights = coefficient x sum of the formula's, and no weight moves with the batch's shape."""
    reducer, formula = REDUCERS[name]
    samples = make_batch(np.random.default_rng(3), [4, 1, 3, 5], 2)
    dead = frozenset({SampleId(0, 0, 1), SampleId(1, 0, 0)})
    members = [s for s in samples if s.source == Source.ROLLOUT]
    tokens = np.array([0 if s.sample_id in dead else len(s.completion_tokens) for s in members])
    groups = np.array([s.group_id for s in members])
    total = 0.7 * sum(tokens[k] * formula(tokens, groups, k) for k in range(len(members)) if tokens[k])
    terms = (Term("rl", ROLLOUTS, 0.7, reducer, centred), SFT)
    weights = []
    for rows, row_tokens, max_segments in [(1, 14, 1), (2, 24, 5), (3, 64, 8), (16, 200, 20)]:
        limits = {"rows": rows, "row_tokens": row_tokens, "max_segments": max_segments, "max_micro_batches": 40}
        update = assemble(samples, terms, dead=dead, **limits)
        assert update.terms["rl"].weight_sum == pytest.approx(total, rel=1e-12)
        packed = sum(float(b.planes["rl"].weights.astype(np.float64).sum()) for b in update.micro_batches)
        assert packed == pytest.approx(total, rel=1e-6)
        found = unpacked(update, terms)
        weights.append({key: [entry["rl"] for entry in found[key]] for key in found})
    assert all(each == weights[0] for each in weights)


def test_assemble_constant_weight_ignores_length_and_row_count() -> None:
    """Property 20: a token of a short and of a long row weighs 1/8192; a second copy of a row doubles its share."""
    rl = Term("rl", ROLLOUTS, 1.0, constant(8192.0), centred)
    limits = {"rows": 1, "row_tokens": 1100, "max_segments": 8, "max_micro_batches": 4}
    short, long = make_sample(0, 0, completion=10, reward=1.0), make_sample(0, 1, completion=1000)
    update = assemble([short, long], [rl], **limits)
    plane = update.micro_batches[0].planes["rl"]
    live = update.micro_batches[0].completion_mask
    assert np.unique(plane.weights[live]).tolist() == [np.float32(1 / 8192)]
    assert sorted(np.unique(plane.advantages[live]).tolist()) == [-0.5, 0.5]
    again = dataclasses.replace(short, sample_id=SampleId(0, 0, 2))
    given_values = {"rl": {s.sample_id: 0.5 for s in (short, long, again)}}
    single = assemble([short], [rl], advantages=given_values, **limits).micro_batches[0].planes["rl"]
    double = assemble([short, again], [rl], advantages=given_values, **limits).micro_batches[0].planes["rl"]
    assert float((double.weights * double.advantages).sum()) == 2.0 * float((single.weights * single.advantages).sum())


def test_assemble_dead_samples_keep_their_groups_baseline() -> None:
    """By hand: rewards 1, 0, 0, 0 with the last dead: mean 1/4, not 1/3; token mean over 3 x 4 tokens."""
    samples = [make_sample(0, i, reward=float(i == 0)) for i in range(4)]
    rl = Term("rl", ROLLOUTS, 1.0, token_mean, centred)
    update = assemble(samples, [rl], dead=frozenset({SampleId(0, 0, 3)}), **LIMITS)
    found = unpacked(update, [rl])
    assert sorted(found) == [SampleId(0, 0, i) for i in range(3)]
    third = np.float32(1 / 12)
    assert found[SampleId(0, 0, 0)][-1]["rl"] == (third, np.float32(0.75))
    assert found[SampleId(0, 0, 1)][-1]["rl"] == (third, np.float32(-0.25))


def test_assemble_equal_rewards_stay_live() -> None:
    """Weights carry no advantage: a group of equal rewards is trained on with advantage 0, and its tokens count."""
    update = assemble([make_sample(0, i, reward=1.0) for i in range(3)], [RL], **LIMITS)
    assert update.planned_tokens.sum() == 12
    assert update.terms["rl"].weight_sum == pytest.approx(12 / (3 * MAX_TOKENS))
    assert not any(batch.planes["rl"].advantages.any() for batch in update.micro_batches)


def test_assemble_zero_coefficient_makes_no_token_live() -> None:
    samples = [make_sample(0, i, reward=float(i)) for i in range(3)]
    samples += [make_sample(1, -1, source=Source.DEMONSTRATION)]
    update = assemble(samples, [RL, dataclasses.replace(SFT, coefficient=0.0)], **LIMITS)
    assert [s.source for s in update.samples] == [Source.ROLLOUT] * 3
    assert not update.micro_batches[0].planes["sft"].weights.any()
    assert update.planned_tokens.sum() == 12
    assert update.terms["sft"].tokens == 0


def test_assemble_counts_all_sft_and_all_rl_steps() -> None:
    """Property 26, the counts: all SFT is plain cross-entropy's token mean, all RL has no SFT weight."""
    rng = np.random.default_rng(1)
    sft = assemble(make_batch(rng, [], 6), [RL, dataclasses.replace(SFT, coefficient=1.0)], **LIMITS)
    count = sft.terms["sft"]
    assert (count.sequences, count.groups, count.weight_sum) == (6, 6, pytest.approx(1.0))
    assert count.normaliser == pytest.approx(count.tokens)
    assert count.token_weight_min == count.token_weight_max == pytest.approx(1 / count.tokens)
    assert sft.terms["rl"].tokens == 0
    assert list(sft.sources) == [Source.DEMONSTRATION]
    rl = assemble(make_batch(rng, [8, 8], 0), TERMS, **LIMITS)
    assert (rl.terms["rl"].sequences, rl.terms["rl"].groups, rl.terms["sft"].sequences) == (16, 2, 0)
    assert rl.terms["rl"].normaliser == pytest.approx(16 * MAX_TOKENS)
    assert rl.terms["entropy"].tokens == rl.terms["rl"].tokens == rl.sources[Source.ROLLOUT].tokens
    assert rl.sources[Source.ROLLOUT].sequences == 16


def test_assemble_coefficient_scales_only_its_own_plane() -> None:
    """Property 27, the weights' half."""
    samples = make_batch(np.random.default_rng(2), [4, 2], 3)
    updates = [assemble(samples, [RL, dataclasses.replace(SFT, coefficient=c)], **LIMITS) for c in (0.5, 1.0)]
    for half, full in zip(updates[0].micro_batches, updates[1].micro_batches, strict=True):
        assert np.array_equal(half.planes["rl"].weights, full.planes["rl"].weights)
        assert np.array_equal(2 * half.planes["sft"].weights, full.planes["sft"].weights)


def test_assemble_prefix_tokens_belong_to_whom_the_span_says() -> None:
    """By hand: prompt 2, completion 5 with 2 forced, so targets 0 | 1 2 | 3 4 5 are prompt, prefix, written."""
    sample = make_sample(0, 0, prompt=2, completion=5, source=Source.PREFIX, reward=1.0, prefix_len=2)
    kind = frozenset({Source.PREFIX})
    terms = [
        Term("written", kind, 1.0, constant(2.0), ones),
        Term("forced", kind, 1.0, constant(4.0), ones, span=prefix_span),
        Term("both", kind, 1.0, constant(8.0), ones, span=completion_span),
        Term("all", kind, 0.0, constant(1.0), ones, span=whole_span),
    ]
    update = assemble([sample], terms, **LIMITS)
    (batch,) = update.micro_batches
    weights = {name: plane.weights[0, :7].tolist() for name, plane in batch.planes.items()}
    assert weights["written"] == [0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.0]
    assert weights["forced"] == [0.0, 0.25, 0.25, 0.0, 0.0, 0.0, 0.0]
    assert weights["both"] == [0.0] + [0.125] * 5 + [0.0]
    assert update.terms["all"].tokens == 6
    assert batch.completion_mask[0, :7].tolist() == [False, True, True, True, True, True, False]
    assert update.planned_tokens[0] == 5
    only_forced = assemble([sample], terms[:2], **LIMITS)
    assert only_forced.planned_tokens[0] == 5  # a union of two runs that touch
    assert assemble([sample], terms[:1], **LIMITS).planned_tokens[0] == 3
    whole = [dataclasses.replace(terms[3], coefficient=1.0)]
    assert assemble([sample], whole, **LIMITS).planned_tokens[0] == 6


def test_assemble_population_narrows_a_term() -> None:
    samples = [make_sample(0, i, reward=float(i > 1)) for i in range(4)]
    won = Term("won", ROLLOUTS, 1.0, token_mean, ones, population=lambda s: s.reward == 1.0)
    update = assemble(samples, [won], **LIMITS)
    assert update.sample_ids == (SampleId(0, 0, 2), SampleId(0, 0, 3))
    assert (update.terms["won"].tokens, update.left_out) == (8, 2)


def test_assemble_temperature_is_per_segment() -> None:
    samples = [make_sample(0, 0, temperature=0.7), make_sample(1, -1, source=Source.DEMONSTRATION, temperature=0.7)]
    update = assemble(samples, [RL, SFT], **LIMITS)
    batch = update.micro_batches[0]
    for b, s in zip(*np.nonzero(batch.sample_index >= 0), strict=True):
        rollout = batch.source[b, s] == int(Source.ROLLOUT)
        assert batch.temperature[b, s] == (np.float32(0.7) if rollout else 1.0)


def test_assemble_bundles_stay_in_one_row_with_their_dead_mates() -> None:
    """A pair shares a row; its dead half stays as context, without a live token or a weight."""
    samples = [make_sample(q, i, reward=float(i), pair_id=q) for q in range(5) for i in range(2)]
    dead = frozenset({SampleId(2, 0, 1), SampleId(4, 0, 0), SampleId(4, 0, 1)})
    update = assemble(samples, [RL], dead=dead, **LIMITS)
    assert {i.question for i in update.sample_ids} == {0, 1, 2, 3}
    places = {key: {entry["place"][:2] for entry in entries} for key, entries in unpacked(update, [RL]).items()}
    for q in range(4):
        assert len(places[SampleId(q, 0, 0)] | places[SampleId(q, 0, 1)]) == 1
    mate = unpacked(update, [RL])[SampleId(2, 0, 1)]
    assert not any(entry["live"] or entry["rl"][0] for entry in mate)
    assert update.planned_tokens.sum() == 7 * 4
    assert update.sources[Source.ROLLOUT].sequences == 7


def test_assemble_partition_is_data_not_layout() -> None:
    """By hand: 4 and 8 demonstration tokens in two logical micro-batches: 1/4/2 and 1/8/2, in one row or two."""
    samples = [make_sample(q, -1, completion=4 * (q + 1), source=Source.DEMONSTRATION) for q in range(2)]
    legacy = Term("sft", DEMONSTRATIONS, 1.0, legacy_micro_token_mean, ones)
    partition = {samples[0].sample_id: 0, samples[1].sample_id: 1}
    for row_tokens in (12, 40):
        update = assemble(samples, [legacy], partition=partition, **{**LIMITS, "row_tokens": row_tokens})
        assert (update.terms["sft"].token_weight_min, update.terms["sft"].token_weight_max) == (0.0625, 0.125)


def test_assemble_digest_sees_repeats_and_losses_but_no_order() -> None:
    """Second route: the hash in Python integers."""

    def slow_hash(sample_id: SampleId) -> int:
        state, word = 0, 2**64 - 1
        for field in sample_id:
            x = (state + (field & word) + 0x9E3779B97F4A7C15) & word
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
            state = x ^ (x >> 31)
        return state

    def digest_of(ids: list[SampleId]) -> tuple[int, int]:
        high, low = digest(sample_hashes(ids)).tolist()
        return high, low

    ids = [SampleId(q, r, i) for q in range(7) for r in range(2) for i in range(-1, 3)]
    high = sum(slow_hash(i) >> 32 for i in ids) % 2**32
    low = sum(slow_hash(i) % 2**32 for i in ids) % 2**32
    assert digest_of(ids) == (high, low)
    assert digest_of(ids[::-1]) == digest_of(ids)
    assert digest_of(ids[:-1]) != digest_of(ids)
    assert digest_of([*ids, ids[0], ids[0]]) != digest_of(ids)  # where an xor of the pair would cancel
    assert digest_of([*ids[:-1], ids[0]]) != digest_of(ids)  # one lost, one repeated
    assert len({digest_of([i]) for i in ids}) == len(ids)


def test_assemble_plans_the_digest_of_every_micro_batch_from_the_ids() -> None:
    samples = make_batch(np.random.default_rng(3), [6, 5, 1, 4], 5)
    update = assemble(samples, TERMS, dead=frozenset({samples[1].sample_id}), **LIMITS)
    assert len(update.micro_batches) >= 3
    total = np.zeros(2, np.uint32)
    for index, micro_batch in enumerate(update.micro_batches):
        ids = [update.sample_ids[place] for place in micro_batch.sample_index.ravel() if place >= 0]
        assert np.array_equal(micro_batch.planned_digest[index], digest(sample_hashes(ids)))
        assert np.array_equal(micro_batch.sample_hash[micro_batch.sample_index >= 0], sample_hashes(ids))
        assert not micro_batch.sample_hash[micro_batch.sample_index < 0].any()
        total += micro_batch.planned_digest[index]
    assert np.array_equal(total, update.digest)


@pytest.mark.parametrize("kind", ["quickstart", "long tail"])
def test_assemble_fills_a_mixed_batch(kind: str) -> None:
    """Issue 2, part 6: at least 85 % of the positions hold a token, all micro-batches included."""
    rng = np.random.default_rng(5)
    samples = []
    for q in range(120):
        gated = q % 3 == 0
        for i in [-1] if gated else range(8):
            source = Source.DEMONSTRATION if gated else Source.ROLLOUT
            if kind == "quickstart":
                prompt, completion = int(rng.integers(10, 16)), int(rng.integers(5, 25))
            else:
                prompt, completion = 8, int(min(240, 10 + rng.lognormal(3.5, 0.9)))
            samples.append(make_sample(q, i, prompt=prompt, completion=completion, source=source))
    limits = {"rows": 8, "row_tokens": 256, "max_segments": 16, "max_micro_batches": 64}
    update = assemble(samples, [RL, SFT], **limits)
    positions = sum(batch.segment_ids.size for batch in update.micro_batches)
    used = sum(len(s.prompt_tokens) + len(s.completion_tokens) - 1 for s in samples)
    assert update.fill == used / positions
    assert update.fill >= 0.85
    planned = update.planned_tokens[: len(update.micro_batches)]
    assert planned.min() >= 0.7 * planned.max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_tokens": 5}, r"sample 0/0/0 has 6 target positions, but a row holds 5.*batch\.row_tokens"),
        ({"max_micro_batches": 1}, r"needs 2 micro-batches of 2 rows x 24 tokens, but batch\.max_micro_batches is 1"),
        ({"rows": 0}, r"batch\.rows >= 1, got 0"),
        ({"max_segments": 0}, r"batch\.max_segments >= 1, got 0"),
    ],
)
def test_assemble_names_the_limit_that_is_too_small(change: dict[str, int], message: str) -> None:
    samples = [make_sample(0, i, reward=1.0) for i in range(12)]
    with pytest.raises(ValueError, match=message):
        assemble(samples, [RL], **{**LIMITS, **change})


def test_assemble_names_the_sample_that_is_malformed() -> None:
    good = make_sample(3, 1)
    for fields, message in [
        ({"prompt_tokens": np.zeros(0, np.int32)}, "sample 3/0/1 has an empty prompt"),
        ({"sampler_logprobs": np.zeros(2, np.float32)}, "sample 3/0/1: 2 sampler_logprobs for 4 completion tokens"),
        ({"prefix_len": 5}, r"sample 3/0/1: expected prefix_len in 0\.\.4, got 5"),
        ({"reward": None}, r"term 'rl': no finite reward for the samples \['3/0/1'\]"),
        ({"reward": float("nan")}, r"term 'rl': no finite reward for the samples \['3/0/1'\]"),
    ]:
        bad = dataclasses.replace(good)
        for name, value in fields.items():
            object.__setattr__(bad, name, value)  # past the shape checks, which only tests run with
        with pytest.raises(ValueError, match=message):
            assemble([bad, make_sample(3, 0)], [RL], **LIMITS)
    with pytest.raises(ValueError, match="sample 3/0/1 appears twice"):
        assemble([good, good], [RL], **LIMITS)


def test_assemble_names_the_term_that_is_wrong() -> None:
    samples = [make_sample(0, i, reward=1.0) for i in range(2)]
    with pytest.raises(ValueError, match=r"term 'rl': expected a finite coefficient >= 0, got -1"):
        assemble(samples, [dataclasses.replace(RL, coefficient=-1.0)], **LIMITS)
    with pytest.raises(ValueError, match=r"terms with different names, got \['rl', 'rl'\]"):
        assemble(samples, [RL, RL], **LIMITS)
    with pytest.raises(ValueError, match=r"advantages were given for \['lr'\], but the terms are \['rl'\]"):
        assemble(samples, [RL], advantages={"lr": {}}, **LIMITS)
    with pytest.raises(ValueError, match=r"term 'rl': advantages were given, but none for the samples \['0/0/1'\]"):
        assemble(samples, [RL], advantages={"rl": {samples[0].sample_id: 1.0}}, **LIMITS)
    bad = dataclasses.replace(RL, reducer=lambda population: np.full(2, np.inf))
    with pytest.raises(ValueError, match=r"term 'rl': sample 0/0/0 has token weight inf"):
        assemble(samples, [bad], **LIMITS)


# Advantages per token


def advantages_of(update: Update, sample_id: SampleId, term: str = "rl") -> list[float]:
    """The advantages on the live tokens of one packed sample, in order."""
    index = update.sample_ids.index(sample_id)
    for batch in update.micro_batches:
        for row, seat in np.argwhere(np.asarray(batch.sample_index) == index).tolist():
            here = (batch.segment_ids[row] == seat + 1) & batch.completion_mask[row]
            return batch.planes[term].advantages[row][here].tolist()
    raise AssertionError(f"{sample_id} is in no micro-batch")


def by_place(rewards: np.ndarray, group_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The reward plus a tenth of the token's place in its completion."""
    return np.concatenate([r + 0.1 * np.arange(n) for r, n in zip(rewards, lengths, strict=True)])


RAGGED = [make_sample(q, i, completion=1 + (2 * q + 3 * i) % 5, reward=float(i)) for q in range(3) for i in range(4)]


def test_assemble_token_advantages_reach_their_tokens_and_the_dead_have_none():
    dead = frozenset({RAGGED[2].sample_id})
    term = dataclasses.replace(RL, token_advantage=by_place)
    update = assemble(RAGGED, [term], dead=dead, **LIMITS)
    for sample in RAGGED:
        if sample.sample_id not in dead:
            want = sample.reward + 0.1 * np.arange(len(sample.completion_tokens))
            np.testing.assert_allclose(advantages_of(update, sample.sample_id), want, rtol=1e-6)
    assert not dead & set(update.sample_ids)


def test_assemble_given_advantages_may_be_arrays_and_numbers_mixed():
    given = {
        s.sample_id: 0.5 if s.sample_id.index == 0 else -np.arange(len(s.completion_tokens), dtype=float)
        for s in RAGGED
    }
    update = assemble(RAGGED, [RL, SFT], advantages={"rl": given}, **LIMITS)
    for sample in RAGGED:
        want = np.broadcast_to(given[sample.sample_id], len(sample.completion_tokens))
        np.testing.assert_array_equal(advantages_of(update, sample.sample_id), want)
    # one number for every token is what one number for the sample is
    alike = {s.sample_id: np.full(len(s.completion_tokens), s.reward) for s in RAGGED}
    scalar = {s.sample_id: s.reward for s in RAGGED}
    first, second = (assemble(RAGGED, [RL], advantages={"rl": g}, **LIMITS).micro_batches for g in (alike, scalar))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.planes["rl"].advantages, b.planes["rl"].advantages)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(np.zeros(9), r"0/0/1.*9 advantages for 4 tokens"), (np.full(4, np.nan), r"0/0/1.*not finite")],
)
def test_assemble_refuses_malformed_token_advantages(wrong, message):
    given = {s.sample_id: wrong if s is RAGGED[1] else 0.0 for s in RAGGED}
    with pytest.raises(ValueError, match=message):
        assemble(RAGGED, [RL], advantages={"rl": given}, **LIMITS)
