"""Rows whose samples share a prompt: the same log-probs, gradients and updates as rows in which each brings its own."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hptjax.build.policy import build_policy
from hptjax.build.stages import build_stages
from hptjax.config_batch import micro_batches_needed, row_room
from hptjax.config_check import check
from hptjax.hpt.assemble import assemble
from hptjax.hpt.pack_shared import pack_by_prompt
from hptjax.hpt.terms import Term, whole_span
from hptjax.hpt.unpack import by_sample
from hptjax.losses.advantages import centred, ones
from hptjax.losses.logprobs import token_logprobs
from hptjax.losses.reducers import seq_mean_token_mean, token_mean
from hptjax.models import decoder
from hptjax.models.attention_shared import SharedPrompt, shared_attention
from hptjax.models.shape import DecoderConfig
from hptjax.records import Sample, SampleId, Source
from hptjax.sharding.host import to_host
from hptjax.sharding.mesh import put_micro_batch
from hptjax.train.jsonl import read_rows
from tests import recorded, tiny

VOCAB = 31
SHAPE = DecoderConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_size=24,
    max_positions=64,
    attention_bias=True,
    qk_norm=True,
)
TERMS = (
    Term("rl", frozenset({Source.ROLLOUT}), 1.0, token_mean, centred),
    Term("sft", frozenset({Source.DEMONSTRATION}), 0.5, seq_mean_token_mean, ones),
)
OWN = {"rows": 2, "row_tokens": 40, "max_segments": 6, "max_micro_batches": 64}
SHARED = {"rows": 2, "row_tokens": 36, "max_segments": 6, "max_micro_batches": 64, "shared_tokens": 9}
LONGEST_PROMPT, LONGEST = 10, 12


@pytest.fixture(scope="module")
def params():
    return decoder.init_params(jax.random.key(0), SHAPE)


def a_batch(seed: int, groups: tuple[int, ...] = (1, 2, 5, 4, 7)) -> list[Sample]:
    """Groups of these sizes, the first prompt one token long and the second the longest; and some demonstrations."""
    rng = np.random.default_rng(seed)
    samples = []
    for question, size in enumerate(groups):
        tokens = {0: 1, 1: LONGEST_PROMPT}.get(question, int(rng.integers(1, LONGEST_PROMPT + 1)))
        prompt = rng.integers(0, VOCAB, tokens).astype(np.int32)
        for index in range(size):
            written = int(rng.integers(1, LONGEST + 1))
            demonstrated = index == 0 and question % 2 == 0
            samples.append(
                Sample(
                    sample_id=SampleId(question, 0, index),
                    group_id=question,
                    source=Source.DEMONSTRATION if demonstrated else Source.ROLLOUT,
                    prompt_tokens=prompt,
                    completion_tokens=rng.integers(0, VOCAB, written).astype(np.int32),
                    sampler_logprobs=rng.normal(size=written).astype(np.float32),
                    reward=None if demonstrated else float(rng.integers(0, 2)),
                    temperature=1.0 if demonstrated else 0.7,
                )
            )
    return samples


@functools.partial(jax.jit, static_argnames="lanes")
def logprobs_of(params, micro_batch, lanes):
    shared = None
    if micro_batch.shared_tokens is not None:
        shared = SharedPrompt(jnp.asarray(micro_batch.shared_tokens), jnp.asarray(micro_batch.shared_mask), lanes)
    hidden = decoder.forward(
        params,
        micro_batch.input_tokens,
        micro_batch.positions,
        micro_batch.segment_ids,
        config=SHAPE,
        compute_dtype=jnp.float32,
        shared=shared,
    )
    return token_logprobs(
        hidden,
        decoder.unembedding(params, SHAPE),
        micro_batch.target_tokens,
        jnp.ones(micro_batch.target_tokens.shape),
        chunk_tokens=1024,
        want_entropy=False,
        live=micro_batch.completion_mask,
    ).logprobs


def loss_of(params, micro_batch, lanes):
    logprobs = logprobs_of(params, micro_batch, lanes)
    return sum(jnp.sum(plane.weights * plane.advantages * logprobs) for plane in micro_batch.planes.values())


def summed(params, update, lanes):
    gradient = jax.jit(jax.grad(loss_of), static_argnames="lanes")
    parts = [gradient(params, micro_batch, lanes=lanes) for micro_batch in update.micro_batches]
    return jax.tree.map(lambda *leaves: sum(np.asarray(leaf, np.float64) for leaf in leaves), *parts)


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_shared_attention_sees_what_a_loop_says(lanes):
    """Values are unit vectors, so the result of a query is its weights; zero queries give every seen key the same."""
    rng = np.random.default_rng(lanes)
    rows, room, after = 3, 5, 12
    prompts = np.array([5, 0, 2])
    segments = np.zeros((rows, after), np.int32)
    for row in range(rows):
        for lane in range(lanes):
            start, size = lane * after // lanes, after // lanes
            ends = np.sort(rng.integers(0, size + 1, 2))
            segments[row, start : start + ends[0]] = 2 * lane + 1
            segments[row, start + ends[0] : start + ends[1]] = 2 * lane + 2
    mask = np.arange(room)[None, :] < prompts[:, None]
    total = room + after
    value = np.broadcast_to(np.eye(total, dtype=np.float32)[None, :, None, :], (rows, total, 1, total))
    zeros = jnp.zeros((rows, total, 1, total))
    attend = shared_attention(
        jnp.asarray(segments), SharedPrompt(jnp.zeros((rows, room), int), jnp.asarray(mask), lanes)
    )
    seen = np.asarray(attend(zeros, zeros, jnp.asarray(value)))[:, :, 0, :] > 0
    for row in range(rows):
        for query in range(total):
            if query < room:
                expected = {key for key in range(query + 1) if mask[row, key] == mask[row, query]}
            else:
                own = segments[row, query - room]
                lane = (query - room) // (after // lanes)
                same = {
                    room + place
                    for place in range(query - room + 1)
                    if segments[row, place] == own and place // (after // lanes) == lane
                }
                expected = same | ({key for key in range(room) if mask[row, key]} if own else set())
            assert set(np.flatnonzero(seen[row, query]).tolist()) == expected, (row, query)


def alone(params, sample):
    """Log-probs of a sample's completion from a row of its own, filled up to one length so that one program will do."""
    tokens = np.concatenate([sample.prompt_tokens, sample.completion_tokens])
    count = len(tokens) - 1
    padded = np.pad(tokens, (0, LONGEST_PROMPT + LONGEST - len(tokens)))
    places = np.arange(len(padded), dtype=np.int32)
    hidden = one_row(params, padded[None, :], places[None, :], (places < count).astype(np.int32)[None, :])
    logits = np.asarray(hidden[0, :count], np.float64) @ np.asarray(decoder.unembedding(params, SHAPE), np.float64)
    logprobs = logits[np.arange(count), tokens[1:]] - np.log(np.exp(logits).sum(axis=1))
    logprobs[: len(sample.prompt_tokens) - 1] = 0.0  # rows that share a prompt do not look at it
    return logprobs


one_row = jax.jit(functools.partial(decoder.forward, config=SHAPE, compute_dtype=jnp.float32))


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_shared_log_probs_are_those_of_each_sample_alone(params, lanes):
    samples = a_batch(lanes)
    update = assemble(samples, TERMS, lanes=lanes, **SHARED)
    found = by_sample(update, [np.asarray(logprobs_of(params, m, lanes)) for m in update.micro_batches])
    assert {sample.sample_id for sample in samples} == set(found)
    for sample in samples:
        wanted = alone(params, sample)
        assert found[sample.sample_id].shape == wanted.shape
        assert np.abs(found[sample.sample_id] - wanted).max() < 2e-5


@pytest.mark.parametrize("lanes", [3, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_shared_gradient_is_that_of_own_prompts(params, lanes):
    samples = a_batch(2)
    own, shared = assemble(samples, TERMS, **OWN), assemble(samples, TERMS, lanes=lanes, **SHARED)
    assert len(shared.micro_batches) > 2
    wanted, found = summed(params, own, 1), summed(params, shared, lanes)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    for left, right in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        assert np.abs(left - right).max() < 1e-5 * scale


def test_shared_assembly_keeps_weights_tokens_counts_and_digest():
    samples = a_batch(3)
    own, shared = assemble(samples, TERMS, **OWN), assemble(samples[::-1], TERMS, lanes=3, **SHARED)
    assert shared.sample_ids == own.sample_ids
    assert np.array_equal(shared.digest, own.digest)
    assert shared.planned_tokens.sum() == own.planned_tokens.sum()
    assert shared.terms == own.terms
    for term in own.terms:
        for field in ("weights", "advantages"):
            planes = [
                by_sample(update, [getattr(m.planes[term], field) for m in update.micro_batches])
                for update in (own, shared)
            ]
            assert all(np.array_equal(planes[0][key], planes[1][key]) for key in own.sample_ids)
    held = {sample.sample_id: sample for sample in samples}
    for micro_batch in shared.micro_batches:
        for row, seats in enumerate(micro_batch.sample_index):
            prompts = {held[shared.sample_ids[place]].prompt_tokens.tobytes() for place in seats if place >= 0}
            assert len(prompts) <= 1
            for seat, place in enumerate(seats):
                where = np.flatnonzero(micro_batch.segment_ids[row] == seat + 1)
                assert (len(where) > 0) == (place >= 0)
                if place < 0:
                    continue
                sample = held[shared.sample_ids[place]]
                assert where[0] // 12 == where[-1] // 12  # one lane
                assert np.array_equal(micro_batch.target_tokens[row, where], sample.completion_tokens)
                assert micro_batch.input_tokens[row, where[0]] == sample.prompt_tokens[-1]
                assert micro_batch.positions[row, where[0]] == len(sample.prompt_tokens) - 1
                before = micro_batch.shared_tokens[row][micro_batch.shared_mask[row]]
                assert np.array_equal(before, sample.prompt_tokens[:-1])


def test_shared_padding_changes_no_bit(params):
    update = assemble(a_batch(4), TERMS, lanes=3, **SHARED)
    rng = np.random.default_rng(0)
    for micro_batch in update.micro_batches:
        filled = dataclasses.replace(
            micro_batch,
            shared_tokens=np.where(micro_batch.shared_mask, micro_batch.shared_tokens, rng.integers(0, VOCAB, (2, 9))),
            input_tokens=np.where(
                micro_batch.segment_ids > 0, micro_batch.input_tokens, rng.integers(0, VOCAB, (2, 36))
            ),
        )
        assert np.array_equal(logprobs_of(params, micro_batch, 3), logprobs_of(params, filled, 3))


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6)), min_size=1, max_size=30),
    st.sampled_from([(12, 1, 3), (12, 2, 4), (24, 4, 4), (18, 3, 9)]),
)
@settings(max_examples=60, deadline=None)
def test_pack_by_prompt_fills_lanes_and_mixes_nothing(entries, room):
    (row_tokens, lanes, max_segments), (prompts, lengths) = room, map(list, zip(*entries, strict=True))
    rows, starts = pack_by_prompt(
        prompts,
        np.asarray(lengths),
        np.full(len(lengths), -1),
        row_tokens=row_tokens,
        lanes=lanes,
        max_segments=max_segments,
    )
    assert sorted(i for row in rows for i in row) == list(range(len(entries)))
    for row in rows:
        assert len({prompts[i] for i in row}) == 1
        taken = np.zeros(row_tokens, int)
        seats = np.zeros(lanes, int)
        for i in row:
            end = starts[i] + lengths[i]
            taken[starts[i] : end] += 1
            lane = starts[i] // (row_tokens // lanes)
            assert (end - 1) // (row_tokens // lanes) == lane
            seats[lane] += 1
        assert taken.max() == 1
        assert seats.max() <= max_segments // lanes


def test_pack_by_prompt_keeps_pairs_in_one_lane():
    rows, starts = pack_by_prompt(
        "aaaa", np.array([3, 4, 3, 4]), np.array([5, 7, 5, 7]), row_tokens=16, lanes=2, max_segments=4
    )
    assert rows == [[1, 3, 0, 2]]
    assert starts.tolist() == [8, 0, 11, 4]


def test_shared_assembly_refuses_a_pair_of_two_prompts_and_a_term_over_a_prompt():
    samples = a_batch(0)
    pair = [dataclasses.replace(samples[place], pair_id=3) for place in (0, 2)]
    with pytest.raises(ValueError, match="sample 1/0/1 and another of its pair have different prompts"):
        assemble(pair, TERMS, **SHARED)
    everything = Term("all", frozenset(Source), 1.0, token_mean, ones, span=whole_span)
    with pytest.raises(ValueError, match=r"got one over its prompt: set batch\.share_prompts to false"):
        assemble(samples, [everything], **SHARED)


def test_shared_prompts_count_once_in_what_a_step_costs():
    samples = a_batch(5)
    own, shared = assemble(samples, TERMS, **OWN), assemble(samples, TERMS, lanes=3, **SHARED)
    written = sum(len(sample.completion_tokens) for sample in samples)
    assert own.packed_tokens == written + sum(len(sample.prompt_tokens) - 1 for sample in samples)
    assert own.fill == own.packed_tokens / (len(own.micro_batches) * 2 * 40)
    prompts = sum(int(micro_batch.shared_mask.sum()) for micro_batch in shared.micro_batches)
    assert shared.packed_tokens == written + prompts < own.packed_tokens
    assert shared.fill == shared.packed_tokens / (len(shared.micro_batches) * 2 * (9 + 36))


def test_shared_rows_of_relift_are_those_of_its_groups_or_of_its_buffer():
    config = tiny.Config()
    config = dataclasses.replace(
        config,
        method="relift",
        methods=dataclasses.replace(config.methods, relift_buffer=128),
        rollout=dataclasses.replace(config.rollout, group_size=8, max_completion_tokens=6),
        batch=dataclasses.replace(
            config.batch, rows=8, lanes=8, row_tokens=48, max_segments=8, max_micro_batches=16, share_prompts=True
        ),
    )
    assert micro_batches_needed(config, samples=64 * 8) == 16
    assert micro_batches_needed(config, samples=200 * 8) == 25


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shared_tokens": 8}, ["sample 1/0/0", "10 tokens", "room for 9", "data.max_prompt_tokens"]),
        ({"lanes": 5}, ["multiples of batch.lanes", "36", "5"]),
        ({"row_tokens": 30, "lanes": 3}, ["completion of 12 tokens, but a lane holds 10", "batch.lanes"]),
    ],
)
def test_shared_assembly_refuses(changes, words):
    with pytest.raises(ValueError, match=r".") as refused:
        assemble(a_batch(0), TERMS, **{"lanes": 1, **SHARED, **changes})
    assert all(word in str(refused.value) for word in words), refused.value


def in_run(folder, devices, **batch):
    """The tiny run's policy and its stage of HPT, on so many devices."""
    config = tiny.tiny_config(folder)
    config = dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, data=devices, devices=devices),
        data=dataclasses.replace(config.data, max_prompt_tokens=16),
        batch=dataclasses.replace(config.batch, **batch),
    )
    check(config)
    policy = build_policy(config)
    return policy, build_stages(config, policy, recorded.questions())[-1]


def sums_of(policy, stage, update):
    """The summed gradient of a window before its flush, and its witness of live tokens."""
    state = stage.start({"policy": policy.params}, None)
    for micro_batch in update.micro_batches:
        placed = put_micro_batch(policy.mesh, micro_batch, policy.rules)
        state = stage.micro_step(state, placed, jnp.asarray(False))
    return to_host(jax.tree.leaves(state.chains["policy"].sums.gradients)), int(to_host(state.window.tokens))


@pytest.mark.parametrize(("devices", "lanes"), [pytest.param(1, 2, marks=pytest.mark.slow), (4, 4)])
def test_shared_window_is_that_of_own_prompts(tmp_path, devices, lanes):
    """Through the product's own build: HPT's update of demonstrations and groups, with the evidence of accumulation."""
    samples = recorded.mixed(3, 4)
    found = {}
    for name, batch in {
        "own": {"rows": 4, "row_tokens": 48},
        "shared": {"rows": 4, "row_tokens": 24 * lanes, "share_prompts": True, "lanes": lanes},
    }.items():
        policy, stage = in_run(tmp_path, devices, **batch)
        update = stage.assemble(samples, frozenset())
        assert (update.micro_batches[0].shared_tokens is not None) == (name == "shared")
        found[name] = sums_of(policy, stage, update)
    assert found["own"][1] == found["shared"][1] > 0
    norm = np.sqrt(sum(np.sum(np.square(leaf.astype(np.float64))) for leaf in found["own"][0]))
    for own, shared in zip(found["own"][0], found["shared"][0], strict=True):
        assert np.abs(own.astype(np.float64) - shared).max() < 1e-5 * norm


@pytest.mark.parametrize("method", [pytest.param("grpo", marks=pytest.mark.slow), "ppo"])
def test_shared_prompts_train_with_scores_and_a_critic(tmp_path, method):
    """A reference model, a critic's values and advantages by token: everything that goes back by sample."""
    config = tiny.tiny_config(tmp_path)
    config = dataclasses.replace(
        config,
        method=method,
        hpt=dataclasses.replace(config.hpt, kl_coefficient=0.05),
        train=dataclasses.replace(config.train, steps=2, eval_every=0),
        batch=dataclasses.replace(config.batch, row_tokens=40, lanes=2, share_prompts=True),
    )
    own = dataclasses.replace(config, name="own", batch=tiny.tiny_config(tmp_path).batch)
    first = []
    for each in (config, own):
        tiny.train(each)
        rows = read_rows(tmp_path / "runs" / each.name / "metrics.jsonl")
        first.append(next(row for row in rows if "witness/ok" in row))
    assert first[0]["witness/ok"]
    assert first[0]["batch/micro_batches"] != first[1]["batch/micro_batches"]
    compared = [name for name in first[0] if name.startswith(("loss/", "actor/", "critic/"))]
    assert {"loss/rl", "actor/grad_norm", "actor/kl_loss"} <= set(compared)
    for name in compared:
        assert first[0][name] == pytest.approx(first[1][name], rel=1e-3, abs=1e-5), name


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_shared_micro_batches_needed_is_enough(questions, rows, lanes, per_lane, seed):
    config = dataclasses.replace(
        tiny.Config(),
        method="grpo",
        rollout=dataclasses.replace(tiny.Config().rollout, group_size=5, max_completion_tokens=6),
        batch=dataclasses.replace(
            tiny.Config().batch,
            rows=rows,
            lanes=lanes,
            row_tokens=lanes * 6 * per_lane,
            max_segments=lanes * per_lane,
            share_prompts=True,
        ),
    )
    rng = np.random.default_rng(seed)
    prompts = np.repeat(np.arange(questions), 5)
    packed, _ = pack_by_prompt(
        prompts.tolist(),
        rng.integers(1, 7, prompts.size),
        np.full(prompts.size, -1),
        row_tokens=config.batch.row_tokens,
        lanes=lanes,
        max_segments=config.batch.max_segments,
    )
    assert -(-len(packed) // rows) <= micro_batches_needed(config, samples=prompts.size)
    assert row_room(config)["shared_tokens"] == config.data.max_prompt_tokens - 1


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"batch": {"lanes": 2}}, ["batch.lanes of 1", "batch.share_prompts"]),
        ({"batch": {"share_prompts": True, "lanes": 3}}, ["batch.max_segments to be a multiple of batch.lanes (3)"]),
        (
            {"batch": {"share_prompts": True, "lanes": 4}},
            ["batch.row_tokens of at least 80", "batch.lanes x rollout.max_completion_tokens"],
        ),
        (
            {"batch": {"share_prompts": True, "lanes": 2}, "mesh": {"sequence": 2}},
            ["mesh.sequence of 1 with batch.share_prompts"],
        ),
        ({"batch": {"share_prompts": True}, "model": {"attention": "chunked"}}, ["model.attention", "chunked"]),
        (
            {"batch": {"share_prompts": True, "lanes": 2, "row_tokens": 2020}},
            ["at most 1024 positions", "1033 positions", "batch.lanes"],
        ),
        ({"batch": {"lanes": 0}}, ["batch.lanes"]),
    ],
)
def test_shared_config_says_what_to_change(tmp_path, sections, words):
    config = tiny.tiny_config(tmp_path)
    for section, fields in sections.items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})
    with pytest.raises(ValueError, match=r".") as refused:
        check(config)
    assert all(word in str(refused.value) for word in words), refused.value
