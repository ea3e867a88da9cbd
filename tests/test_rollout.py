"""The sampler: what it draws, when it stops, what it refuses, how often it compiles and reads.

Oracle: a slow loop that knows no cache and no slot. For each token it runs the training forward over the
whole context, truncates in NumPy and adds the noise of that sample and position.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hptjax.models import decoder
from hptjax.models.shape import DecoderConfig
from hptjax.records import FinishReason, Request, SampleId, Source
from hptjax.rollout import running as running_module
from hptjax.rollout.admission import plan_prefills
from hptjax.rollout.engine import RolloutShardings, make_engine
from hptjax.rollout.requests import DecodeShape, truncates
from tests.test_sampling import textbook_allowed

CONFIG = DecoderConfig(
    vocab_size=19, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=24, qk_norm=True
)
CAPACITY, KEY = 24, jax.random.key(11)
SIZES = {
    "vocab_size": CONFIG.vocab_size,
    "slots": 6,
    "prefill_rows": 4,
    "prompt_buckets": (4, 8, 20),
    "cache_capacity": CAPACITY,
    "tokens_per_call": 5,
    "pad_id": 0,
}


def make_policy():
    bound = {"config": CONFIG, "compute_dtype": jnp.float32}
    return {
        "prefill": functools.partial(decoder.prefill, **bound),
        "decode_step": functools.partial(decoder.decode_step, **bound),
        "unembedding": functools.partial(decoder.unembedding, config=CONFIG),
    }


def make_params():
    """Random weights with an unembedding large enough for peaked, varied distributions."""
    params = decoder.init_params(jax.random.key(5), CONFIG)
    return params | {"unembedding": 3.0 * params["unembedding"]}


PARAMS = make_params()
SHAPE = DecodeShape(**{name: size for name, size in SIZES.items() if name != "pad_id"}, max_stop_ids=8)


@functools.cache
def shared_engine(**sizes):
    """One engine per compiled shape for the whole module."""
    sizes = SIZES | sizes
    return make_engine(**make_policy(), **sizes)


def request(question, index=0, visit=0, *, prompt=3, prefix=0, limit=8, stop=(1,), **settings):
    rng = np.random.default_rng([abs(question), prompt])
    tokens = rng.integers(2, CONFIG.vocab_size, prompt + prefix).astype(np.int32)
    return Request(
        sample_id=SampleId(question, visit, index),
        prompt_tokens=tokens[:prompt],
        prefix_tokens=tokens[prompt:],
        max_completion_tokens=limit,
        stop_ids=frozenset(stop),
        **settings,
    )


def mixed_requests():
    """Groups of odd sizes; every bucket; prefixes of 0, 1, many tokens; plain and truncated settings."""
    return [
        *(request(0, i) for i in range(5)),
        *(request(1, i, -2, prompt=6, limit=12, stop=(), temperature=0.7) for i in range(3)),
        *(request(2, i, prefix=1, prompt=3, stop=(2, 3, 4)) for i in range(2)),
        request(3, 0, prompt=11, prefix=8, limit=13, temperature=1.5),
        *(request(4, i, 1, prompt=8, top_k=3) for i in range(3)),
        *(request(-5, i, prompt=2, limit=16, stop=(), top_p=0.6, temperature=1.3) for i in range(3)),
        request(6, 0, prompt=1, limit=5, top_k=4, top_p=0.8, stop=(2,)),
    ]


@functools.cache
def mixed_samples():
    return shared_engine()(PARAMS, mixed_requests(), KEY)


@jax.jit
def forward_logits(tokens):
    ones = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
    hidden = decoder.forward(PARAMS, tokens, positions, ones, config=CONFIG, compute_dtype=jnp.float32)
    return hidden @ decoder.unembedding(PARAMS, CONFIG)


def next_scaled_logits(asked, completion):
    """logits / temperature after prompt + completion, by the training forward; [V] float32."""
    context = np.concatenate([asked.prompt_tokens, completion]).astype(np.int32)
    padded = np.zeros((1, CAPACITY), np.int32)
    padded[0, : len(context)] = context
    return np.asarray(forward_logits(padded))[0, len(context) - 1] / np.float32(asked.temperature)


def noise_of(asked, position, key=KEY):
    for part in (*asked.sample_id, position):
        key = jax.random.fold_in(key, np.uint32(part % 2**32))
    return np.asarray(jax.random.gumbel(key, (CONFIG.vocab_size,), jnp.float32, mode="low"))


def slow_sample(asked):
    """(completion tokens, log-probs) of one request, one token at a time."""
    completion, logprobs = list(asked.prefix_tokens), [0.0] * len(asked.prefix_tokens)
    while len(completion) < asked.max_completion_tokens and not (completion and completion[-1] in asked.stop_ids):
        scaled = next_scaled_logits(asked, completion)
        noise = noise_of(asked, len(completion))
        allowed = textbook_allowed(scaled, asked.top_k, asked.top_p)
        token = max(allowed, key=lambda one, scaled=scaled, noise=noise: scaled[one] + noise[one])
        wide = scaled.astype(np.float64)
        logprobs.append(wide[token] - np.log(np.exp(wide).sum()))
        completion.append(token)
    return np.array(completion), np.array(logprobs)


def by_id(samples):
    return {sample.sample_id: sample for sample in samples}


def assert_same_bits(got, expected):
    assert got.sample_id == expected.sample_id
    assert got.decode_shape == expected.decode_shape
    assert got.finish_reason == expected.finish_reason
    np.testing.assert_array_equal(got.completion_tokens, expected.completion_tokens)
    np.testing.assert_array_equal(got.sampler_logprobs.view(np.uint32), expected.sampler_logprobs.view(np.uint32))


def assert_same_up_to_near_ties(asked, got, expected):
    """Contract 4 for another compiled shape: log-probs within 1e-4, a first differing token only at a near tie."""
    shared = min(len(got.completion_tokens), len(expected.completion_tokens))
    differ = np.flatnonzero(got.completion_tokens[:shared] != expected.completion_tokens[:shared])
    until = differ[0] if len(differ) else shared
    np.testing.assert_allclose(got.sampler_logprobs[:until], expected.sampler_logprobs[:until], atol=1e-4, rtol=0)
    if len(differ) == 0:
        assert len(got.completion_tokens) == len(expected.completion_tokens)
        return
    completion = expected.completion_tokens[:until]
    scores = next_scaled_logits(asked, completion) + noise_of(asked, int(until))
    pair = sorted(int(sample.completion_tokens[until]) for sample in (got, expected))
    assert abs(scores[pair[0]] - scores[pair[1]]) < 1e-4


def test_rollout_equals_a_slow_loop_without_cache():
    samples = mixed_samples()
    assert [sample.sample_id for sample in samples] == [asked.sample_id for asked in mixed_requests()]
    for asked, sample in zip(mixed_requests(), samples, strict=True):
        tokens, logprobs = slow_sample(asked)
        np.testing.assert_array_equal(sample.completion_tokens, tokens)
        np.testing.assert_allclose(sample.sampler_logprobs, logprobs, atol=1e-4, rtol=0)
    assert len({tuple(sample.completion_tokens) for sample in samples[:5]}) == 5  # a group's rollouts differ
    assert {sample.finish_reason for sample in samples} == {FinishReason.STOP, FinishReason.LENGTH}


def test_rollout_sampler_logprobs_equal_rescoring_by_the_training_forward():
    for asked, sample in zip(mixed_requests(), mixed_samples(), strict=True):
        row = np.zeros((1, CAPACITY), np.int32)
        whole = np.concatenate([sample.prompt_tokens, sample.completion_tokens])
        row[0, : len(whole)] = whole
        scored = jax.nn.log_softmax(forward_logits(row)[0] / np.float32(asked.temperature))
        start, end = len(sample.prompt_tokens) - 1, len(whole) - 1
        expected = np.asarray(scored)[np.arange(start, end), whole[start + 1 :]]
        own = slice(sample.prefix_len, None)
        np.testing.assert_allclose(sample.sampler_logprobs[own], expected[own], atol=1e-4, rtol=0)
        np.testing.assert_array_equal(sample.sampler_logprobs[: sample.prefix_len], 0.0)


def test_rollout_samples_say_who_wrote_them_and_how():
    for asked, sample in zip(mixed_requests(), mixed_samples(), strict=True):
        assert sample.group_id == asked.sample_id.question
        assert sample.prefix_len == len(asked.prefix_tokens)
        assert sample.source == (Source.PREFIX if sample.prefix_len else Source.ROLLOUT)
        assert sample.temperature == asked.temperature
        assert sample.reward is None
        np.testing.assert_array_equal(sample.prompt_tokens, asked.prompt_tokens)
        stopped = int(sample.completion_tokens[-1]) in asked.stop_ids
        assert sample.finish_reason == (FinishReason.STOP if stopped else FinishReason.LENGTH)
        assert stopped or len(sample.completion_tokens) == asked.max_completion_tokens
        assert not asked.stop_ids & set(sample.completion_tokens[sample.prefix_len : -1].tolist())
        assert sample.completion_tokens.dtype == np.int32
        assert sample.sampler_logprobs.dtype == np.float32


def test_replay_alone_is_bitwise():
    for place in (0, 4, 6, 9, 10, 13, 15, 17):
        (alone,) = shared_engine()(PARAMS, [mixed_requests()[place]], KEY)
        assert_same_bits(alone, mixed_samples()[place])


def test_replay_in_another_order_with_other_neighbours_is_bitwise():
    expected = by_id(mixed_samples())
    others = [request(100 + q, prompt=1 + q % 8, limit=3 + q, stop=()) for q in range(9)]
    shuffled = [*mixed_requests(), *others]
    np.random.default_rng(0).shuffle(shuffled)
    for sample in shared_engine()(PARAMS, shuffled, KEY):
        if sample.sample_id in expected:
            assert_same_bits(sample, expected[sample.sample_id])


def test_replay_in_another_compiled_shape_agrees_up_to_near_ties():
    sizes = {"slots": 9, "prefill_rows": 1, "cache_capacity": 32, "prompt_buckets": (12, 24), "tokens_per_call": 64}
    samples = shared_engine(**sizes)(PARAMS, mixed_requests(), KEY)
    for asked, got, expected in zip(mixed_requests(), samples, mixed_samples(), strict=True):
        assert got.decode_shape != expected.decode_shape
        assert_same_up_to_near_ties(asked, got, expected)


def test_replay_on_a_sharded_mesh_agrees_up_to_near_ties(eight_devices):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=eight_devices[:2])
    placed = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    shardings = RolloutShardings(rows=placed("data"), cache=placed(None, "data"), replicated=placed())
    traced = Counter()
    policy = make_policy()

    def decode_step(*args):
        traced["decode"] += 1
        return policy["decode_step"](*args)

    sample = make_engine(**policy | {"decode_step": decode_step}, **SIZES, shardings=shardings)
    params = jax.device_put(PARAMS, placed())
    plain = [place for place, asked in enumerate(mixed_requests()) if not truncates(asked)]
    got = sample(params, [mixed_requests()[place] for place in plain], jax.device_put(KEY, placed()))
    for place, one in zip(plain, got, strict=True):
        assert_same_up_to_near_ties(mixed_requests()[place], one, mixed_samples()[place])
    again = sample(params, [mixed_requests()[0]], jax.device_put(KEY, placed()))
    assert_same_bits(again[0], got[0])
    assert traced["decode"] == 1


def test_replay_shape_is_the_samples_own():
    short, long = request(0), request(1, prompt=11, prefix=8, limit=13)
    for asked in ([short], [short, long], [long, short]):
        calls = {call.tokens.shape[1]: call for call in plan_prefills(asked, range(len(asked)), SHAPE, 0)}
        assert set(calls) == ({4} if long not in asked else {4, 20})
        ((place, row),) = calls[4].entries
        assert asked[place] is short
        np.testing.assert_array_equal(calls[4].tokens[row], [*short.prompt_tokens, 0])
        assert calls[4].lengths[row] == 3
    assert "4x4 " in SHAPE.describe(short)
    assert "4x20 " in SHAPE.describe(long)


def test_replay_key_and_id_parts_each_change_the_sample():
    """The same prompt under another run key, question, round or index gives other tokens."""
    base = request(0, limit=16, stop=())
    ids = [SampleId(0, 0, 0), SampleId(1, 0, 0), SampleId(0, 1, 0), SampleId(0, -1, 0), SampleId(0, 0, 1)]
    samples = shared_engine()(PARAMS, [dataclasses.replace(base, sample_id=one) for one in ids], KEY)
    samples += shared_engine()(PARAMS, [base], jax.random.key(12))
    assert len({tuple(sample.completion_tokens) for sample in samples}) == 6


def test_rollout_prefills_each_context_once():
    asked = [*(request(0, i) for i in range(4)), request(1, 0), request(0, 9, prefix=1)]
    (call,) = plan_prefills(asked, range(6), SHAPE, 0)
    assert call.entries == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 1), (5, 2)]
    np.testing.assert_array_equal(call.lengths, [3, 3, 4, 1])
    np.testing.assert_array_equal(call.tokens[2], [*asked[5].prompt_tokens, *asked[5].prefix_tokens])
    many = [request(q % 6, q) for q in range(13)]
    # four contexts of six at a time; request 1 is not asked for
    first, second = plan_prefills(many, [0, *range(2, 13)], SHAPE, 0)
    assert first.entries == [(0, 0), (6, 0), (12, 0), (7, 1), (2, 2), (8, 2), (3, 3), (9, 3)]
    assert second.entries == [(4, 0), (10, 0), (5, 1), (11, 1)]


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 13])
def test_rollout_serves_ragged_numbers_of_requests(count):
    asked = [request(q % 3, q) for q in range(13)][:count]
    seen = []
    samples = shared_engine()(PARAMS, asked, KEY, on_finished=seen.append)
    assert [sample.sample_id for sample in samples] == [one.sample_id for one in asked]
    assert sorted(one.sample_id for samples in seen for one in samples) == sorted(one.sample_id for one in asked)
    assert all(seen)
    whole = shared_engine()(PARAMS, [request(q % 3, q) for q in range(13)], KEY)
    for got, expected in zip(samples, whole, strict=False):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}])
def test_rollout_continues_its_own_prefix_as_if_it_had_sampled_it(settings):
    """Noise is keyed by the completion position, so forcing a sample's own first tokens changes nothing after them."""
    base = request(21, limit=12, stop=(), **settings)
    (whole,) = shared_engine()(PARAMS, [base], KEY)
    for length in (0, 1, 5, 11, 12):
        forced = dataclasses.replace(base, prefix_tokens=whole.completion_tokens[:length])
        (sample,) = shared_engine()(PARAMS, [forced], KEY)
        np.testing.assert_array_equal(sample.completion_tokens, whole.completion_tokens)
        np.testing.assert_allclose(sample.sampler_logprobs[length:], whole.sampler_logprobs[length:], atol=1e-4)
        assert sample.prefix_len == length
        assert not sample.sampler_logprobs[:length].any()
        assert sample.finish_reason == FinishReason.LENGTH


def test_rollout_samples_nothing_after_a_prefix_that_is_complete(monkeypatch):
    full = request(0, prefix=4, limit=4, stop=())
    ended = dataclasses.replace(request(1), prefix_tokens=np.array([7, 1], np.int32))
    inside = dataclasses.replace(request(2), prefix_tokens=np.array([1, 7], np.int32))  # a stop id, but not at the end
    seen = []
    beyond = request(3, prompt=17, prefix=5, limit=5, stop=())  # no bucket holds 22 tokens, and none is needed
    samples = shared_engine()(PARAMS, [inside, full, ended, beyond], KEY, on_finished=seen.append)
    assert len(samples[0].completion_tokens) > 2
    assert [len(sample.completion_tokens) for sample in samples[1:]] == [4, 2, 5]
    assert [sample.finish_reason for sample in samples[1:3]] == [FinishReason.LENGTH, FinishReason.STOP]
    assert [sample.decode_shape == "" for sample in samples] == [False, True, True, True]
    assert [len(samples) for samples in seen] == [3, 1]


def test_rollout_stops_at_any_id_of_its_own_set():
    base = request(30, limit=16, stop=())
    (free,) = shared_engine()(PARAMS, [base], KEY)
    tokens = free.completion_tokens.tolist()
    for stop in ({tokens[3]}, {tokens[3], tokens[6]}, set(range(8))):
        first = next((place for place, token in enumerate(tokens) if token in stop), None)
        (sample,) = shared_engine()(PARAMS, [dataclasses.replace(base, stop_ids=frozenset(stop))], KEY)
        assert sample.completion_tokens.tolist() == tokens[: None if first is None else first + 1]
        assert sample.finish_reason == (FinishReason.LENGTH if first is None else FinishReason.STOP)


def test_rollout_top_k_one_is_greedy():
    base = request(31, limit=8, stop=(), top_k=1, temperature=1.7)
    (sample,) = shared_engine()(PARAMS, [base], KEY)
    completion = []
    for token in sample.completion_tokens:
        assert token == next_scaled_logits(base, completion).argmax()
        completion.append(token)


def test_rollout_compiles_once_for_all_settings_and_reads_one_array_per_call(monkeypatch):
    traced, reads = Counter(), []
    policy = make_policy()

    def counted(name):
        def call(*args):
            traced[name] += 1
            return policy[name](*args)

        return call

    def to_host(tree):
        reads.extend(leaf.shape for leaf in jax.tree.leaves(tree))
        return jax.device_get(tree)

    monkeypatch.setattr(running_module, "to_host", to_host)
    sample = make_engine(**{name: counted(name) for name in policy}, **SIZES | {"prompt_buckets": (8,)})
    sample(PARAMS, [request(0, limit=16, stop=())], KEY)
    assert reads == [(6, 2 * 5 + 2)] * 4  # 16 tokens are 4 calls of 5
    first = Counter(traced)
    for step in range(4):
        settings = {"temperature": 0.5 + step, "stop": tuple(range(step)), "limit": 4 + step, "prefix": step}
        sample(PARAMS, [request(q, visit=step, prompt=1 + q, **settings) for q in range(1 + 3 * step)][:5], KEY)
    assert traced == first
    assert traced["decode_step"] == 1
    for step in range(3):
        sample(PARAMS, [request(0, top_k=step, top_p=0.9 - 0.1 * step), request(1)], KEY)
    assert traced["decode_step"] == 2


def test_rollout_asks_should_stop_and_keeps_what_is_done():
    """Six slots and calls of five tokens; samples of 12, 8 and 4 tokens, two with top-k; stopped at every asking."""
    limits = [12, *[8] * 6, *[4] * 6]
    asked = [request(q, limit=limit, stop=()) for q, limit in enumerate(limits)]
    asked += [request(20, i, limit=6, stop=(), top_k=3) for i in range(2)]  # another path, after the first
    whole = shared_engine()(PARAMS, asked, KEY)
    answers = itertools.count()
    shared_engine()(PARAMS, asked, KEY, should_stop=lambda: next(answers) < 0)
    times = next(answers)
    finished = []
    for stop_at in range(times + 1):
        kept, answers = [], itertools.count()
        stopped = lambda answers=answers, stop_at=stop_at: next(answers) >= stop_at  # noqa: E731
        samples = shared_engine()(PARAMS, asked, KEY, should_stop=stopped, on_finished=kept.extend)
        assert next(answers) == min(stop_at + 1, times)  # asked no more after it said so
        assert by_id(kept) == by_id(samples)
        rest = [one for one in asked if one.sample_id not in by_id(samples)]
        again = by_id([*samples, *shared_engine()(PARAMS, rest, KEY)])
        for expected in whole:
            assert_same_bits(again[expected.sample_id], expected)
        finished.append(len(samples))
    assert finished == sorted(finished)
    assert finished[0] == 0
    assert finished[-1] == len(asked)
    assert len(set(finished)) > 3


@pytest.mark.parametrize(
    ("bad", "names"),
    [
        ({"prompt": 0}, "empty prompt"),
        ({"prompt": 20, "limit": 5}, "rollout.cache_capacity"),
        ({"prompt": 17, "prefix": 4, "limit": 5}, "rollout.prompt_buckets"),
        ({"prefix": 5, "limit": 4}, "rollout.max_completion_tokens"),
        ({"limit": 0}, "rollout.max_completion_tokens"),
        ({"temperature": 0.0}, "rollout.top_k = 1"),
        ({"temperature": float("nan")}, "rollout.temperature"),
        ({"top_k": -1}, "rollout.top_k"),
        ({"top_p": 0.0}, "rollout.top_p"),
        ({"top_p": 1.1}, "rollout.top_p"),
        ({"stop": range(9)}, "max_stop_ids"),
        ({"stop": (19,)}, "stop ids"),
        ({"visit": 2**31}, "int32"),
    ],
)
def test_rollout_refuses_what_it_cannot_sample_naming_sample_and_field(bad, names):
    with pytest.raises(ValueError, match=r"request 77/.*" + names.replace(".", r"\.")):
        shared_engine()(PARAMS, [request(0), request(77, **bad)], KEY)


def test_rollout_refuses_foreign_tokens_and_ids_that_come_twice():
    foreign = dataclasses.replace(request(77), prompt_tokens=np.array([3, 19], np.int32))
    with pytest.raises(ValueError, match=r"request 77/0/0.*tokenizer"):
        shared_engine()(PARAMS, [foreign], KEY)
    with pytest.raises(ValueError, match=r"request 77/0/3.*twice"):
        shared_engine()(PARAMS, [request(77, 3), request(77, 4), request(77, 3)], KEY)


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        ({"slots": 0}, "rollout.slots"),
        ({"prompt_buckets": ()}, "rollout.prompt_buckets"),
        ({"prompt_buckets": (8, 4)}, "rollout.prompt_buckets"),
        ({"prompt_buckets": (25,)}, "rollout.cache_capacity"),
        ({"tokens_per_call": 0}, "rollout.tokens_per_call"),
        ({"pad_id": 19}, "pad_id"),
    ],
)
def test_rollout_refuses_sizes_that_cannot_work(sizes, names):
    with pytest.raises(ValueError, match=names):
        make_engine(**make_policy(), **SIZES | sizes)


def test_rollout_refuses_a_policy_of_another_vocab_and_one_that_diverged():
    with pytest.raises(ValueError, match="unembedding has 19 columns"):
        make_engine(**make_policy(), **SIZES | {"vocab_size": 20})(PARAMS, [request(0)], KEY)
    broken = PARAMS | {"final_norm": PARAMS["final_norm"] * jnp.nan}
    with pytest.raises(FloatingPointError, match=r"request 0/0/0.*learning_rate"):
        shared_engine()(broken, [request(0)], KEY)
    assert_same_bits(shared_engine()(PARAMS, [mixed_requests()[0]], KEY)[0], mixed_samples()[0])
