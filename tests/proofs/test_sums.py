"""The summed gradient under everything that must not change it, and what notices the rest.

T4, T8 to T10, T12, T13, T15 and T28 of accumulation spec 4.4, and P7: outside routes to the same sum.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hptjax.hpt.assemble as assemble_module
from hptjax.hpt.assemble import assemble
from hptjax.hpt.digest import sample_hashes
from hptjax.hpt.terms import Term
from hptjax.losses.advantages import ones
from hptjax.losses.reducers import constant
from hptjax.records import Source
from hptjax.train.accumulate import Status
from hptjax.train.ledger import AccumulationError, check, check_totals, ledger_row
from hptjax.train.noise import token_noise_keys
from hptjax.types import SumCount
from tests import recorded, test_properties, toys
from tests.proofs import test_normalisers as normalisers
from tests.test_accumulate import cuts_of, integer_gradient

made = test_properties.made  # the real tiny decoder, as a fixture
plain = test_properties.plain
EVERYONE = frozenset(Source)


@pytest.fixture(scope="module")
def linear():
    return toys.sgd_setup(toys.linear_losses, toys.linear_params())


@pytest.fixture(scope="module")
def tanh():
    return toys.sgd_setup(toys.tanh_losses, toys.tanh_params())


def rows_and_weights(seed, rows, width=5):
    """Rows with at least one live token each, and integer weights."""
    rng = np.random.default_rng(seed)
    tokens, mask = toys.rows_of(rng, rows, width)
    mask[:, 0] = True
    return tokens, mask, rng.integers(1, 3, mask.shape)


def unchanged(before, after):
    kept = (before.params, before.chains["policy"].optimizer), (after.params, after.chains["policy"].optimizer)
    return all(map(np.array_equal, *map(jax.tree.leaves, kept)))


def theta_of(sums):
    return np.asarray(sums["theta"]).astype(np.int64)


@pytest.mark.parametrize("k", [3, 4, 5])
def test_t4_every_permutation_of_the_micro_batches_is_bitwise_the_same(linear, k):
    step, state = linear
    tokens, mask, weights = rows_and_weights(1, 8)
    cuts = cuts_of({3: [3, 1, 4], 4: [3, 1, 2, 2], 5: [2, 1, 3, 1, 1]}[k])
    batches = toys.window(tokens, mask, weights, cuts, pad_rows=8)
    expected = integer_gradient(tokens, mask, weights)
    for order in itertools.permutations(range(k)):
        got = normalisers.sums_of(step, state, [batches[place] for place in order])
        assert np.array_equal(theta_of(got), expected), order


@pytest.mark.parametrize("again", range(4))
def test_t8_a_duplicated_micro_batch_shows_twice_and_is_named(linear, again):
    step, state = linear
    tokens, mask, weights = rows_and_weights(2, 4)
    batches = toys.window(tokens, mask, weights, cuts_of([1] * 4), pad_rows=1)
    after = toys.run_window(step, state, [*batches[: again + 1], batches[again], *batches[again + 1 :]])
    assert int(after.report.status) == Status.WITNESS_MISMATCH
    assert int(after.report.bad_micro_batch) == again
    assert int(after.report.witness[again]) == 2 * mask[again].sum()
    assert unchanged(state, after)


def test_t8_a_sample_that_takes_anothers_place_is_seen_by_the_digest_alone(linear):
    """Equal lengths: the witness and every count agree, and one sample was trained on twice."""
    step, state = linear
    tokens, mask, weights = rows_and_weights(3, 4)
    mask[:] = np.arange(5)[None, :] < 3
    batches = toys.window(tokens, mask, weights, cuts_of([1] * 4), pad_rows=1)
    names = ("input_tokens", "target_tokens", "planes", "sample_hash")
    batches[2] = dataclasses.replace(batches[2], **{name: getattr(batches[1], name) for name in names})
    after = toys.run_window(step, state, batches)
    assert int(after.report.status) == Status.DIGEST_MISMATCH
    assert int(after.report.bad_micro_batch) == 2
    assert int(after.report.tokens) == mask.sum()
    assert unchanged(state, after)


@pytest.mark.parametrize("poisoned", [0, 1, 3])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_t9_no_trace_of_a_bad_micro_batch_before_the_flush_and_policy_raise_names_it(poisoned, value):
    recipe = normalisers.recipe_of()
    samples = recorded.mixed(4, 6)
    update = normalisers.plan(recipe, samples)
    step, state = normalisers.bigram_setup()
    batches = list(update.micro_batches)
    assert len(batches) == 4
    plane = batches[poisoned].planes["rl"]
    spoilt = np.where(plane.weights > 0, np.float32(value), plane.weights)
    batches[poisoned] = batches[poisoned].replace(
        planes=batches[poisoned].planes | {"rl": plane.replace(weights=spoilt)}
    )
    now = state
    for batch in batches[:-1]:
        now = step(now, batch, jnp.asarray(False))
        assert unchanged(state, now)
    after = step(now, batches[-1], jnp.asarray(True))
    assert int(after.report.status) == Status.NONFINITE
    assert unchanged(state, after)
    settings = {"learning_rate": 1.0, "schedule_step": 0, "clip_norm": None}
    row = ledger_row(after.report, update, step=3, place=0, window=int(after.report.windows), **settings)
    check(row, nonfinite="skip_window")
    with pytest.raises(AccumulationError, match=rf"step 3, update 0: the gradient of micro-batch {poisoned} is not"):
        check(row, nonfinite="raise")


def test_t10_windows_around_skipped_and_empty_ones_are_independent(linear):
    step, state = linear
    expected = np.asarray(state.params["policy"]["theta"]).astype(np.int64)
    after, statuses = state, []
    for seed, what in enumerate(["good", "nan", "good", "empty", "lost", "good", "nan", "nan", "good"]):
        tokens, mask, weights = rows_and_weights(seed, 6)
        weights = weights.astype(np.float64)
        if what == "empty":
            mask[:] = False
        if what == "nan":
            weights[3, 0] = np.nan
        batches = toys.window(tokens, mask, weights, cuts_of([2, 1, 3]), pad_rows=8)
        after = toys.run_window(step, after, batches[1:] if what == "lost" else batches)
        statuses.append(Status(int(after.report.status)))
        if what == "good":
            expected = expected - integer_gradient(tokens, mask, weights)
        assert np.array_equal(np.asarray(after.params["policy"]["theta"]), expected.astype(np.float32)), seed
        assert not np.any(after.chains["policy"].sums.gradients["theta"])
    kinds = {"good": Status.UPDATED, "nan": Status.NONFINITE, "empty": Status.EMPTY, "lost": Status.WITNESS_MISMATCH}
    assert statuses == [kinds[what] for what in "good nan good empty lost good nan nan good".split()]


@pytest.mark.parametrize(
    ("width", "side", "token", "rows", "empties"),
    [(5, "right", 0, 8, ()), (9, "right", 10, 8, ()), (9, "left", 3, 8, ()), (5, "right", 7, 8, (0, 2, 2, 5))],
    ids=["as it is", "wider, other pad id", "left padded", "with empty micro-batches"],
)
def test_t12_padding_and_empty_micro_batches_change_no_bit(linear, width, side, token, rows, empties):
    step, state = linear
    tokens, mask, weights = rows_and_weights(12, 7)
    expected = integer_gradient(tokens, mask, weights)
    room = (0, width - 5) if side == "right" else (width - 5, 0)
    wide_mask = np.pad(mask, ((0, 0), room))
    wide_tokens = np.where(wide_mask, np.pad(tokens, ((0, 0), room)), token).astype(np.int32)
    wide_weights = np.pad(weights, ((0, 0), room), constant_values=5)
    cuts = cuts_of([2, 3, 1, 1])
    for place in empties:
        cuts.insert(place, [])
    batches = toys.window(wide_tokens, wide_mask, wide_weights, cuts, pad_rows=rows)
    assert np.array_equal(theta_of(normalisers.sums_of(step, state, batches)), expected)
    report = toys.run_window(step, state, batches).report
    assert int(report.status) == Status.UPDATED
    assert (int(report.tokens), int(report.empty_micro_batches)) == (mask.sum(), len(empties))


def test_t12_a_pad_token_with_a_weight_would_be_seen(linear):
    """The other side of the test above: the same pad tokens, once the mask lets them through, change the sum."""
    step, state = linear
    tokens, mask, weights = rows_and_weights(12, 7)
    tokens = np.where(mask, tokens, 7).astype(np.int32)
    (batch,) = toys.window(tokens, mask, weights, [range(7)], pad_rows=8)
    (leaky,) = toys.window(tokens, np.ones_like(mask), weights, [range(7)], pad_rows=8)
    clean, wrong = (theta_of(normalisers.sums_of(step, state, [b])) for b in (batch, leaky))
    assert not np.array_equal(clean, wrong)
    assert int(
        toys.run_window(step, state, [dataclasses.replace(leaky, planned_tokens=batch.planned_tokens)]).report.status
    )


# Packing. `CONSTANT` weighs every live token by exactly 1.

CONSTANT = (Term("toy", EVERYONE, 1.0, constant(1), ones),)
PACKED = {"rows": 2, "row_tokens": 48, "max_segments": 4, "max_micro_batches": 32}
FEATURES = np.random.default_rng(13).integers(-8, 9, (recorded.VOCAB, toys.FEATURES)).astype(np.float32)


def unpacked(update, segments):
    """An update assembled with one segment per row, in the shape of one with `segments` per row."""

    def widened(batch):
        room = ((0, 0), (0, segments - 1))
        return dataclasses.replace(
            batch,
            temperature=np.pad(batch.temperature, room, constant_values=1),
            sample_index=np.pad(batch.sample_index, room, constant_values=-1),
            sample_hash=np.pad(batch.sample_hash, (*room, (0, 0))),
            source=np.pad(batch.source, room, constant_values=-1),
            pair_ids=np.pad(batch.pair_ids, room),
            first_written=np.pad(batch.first_written, room),
        )

    return [widened(batch) for batch in update.micro_batches]


def shuffled_pack(monkeypatch, seed):
    """Rows in another order, their segments too: what the packer could as well have done."""
    right, rng = assemble_module.pack, np.random.default_rng(seed)

    def pack(*args, **options):
        rows = right(*args, **options)
        return [[rows[place][i] for i in rng.permutation(len(rows[place]))] for place in rng.permutation(len(rows))]

    monkeypatch.setattr(assemble_module, "pack", pack)


def keep_linear(params, batch, keep=None):
    """x . theta of every target token with a weight, x integer; `keep` [B T] switches tokens off."""
    scores = jnp.einsum("btf,f->bt", jnp.asarray(FEATURES)[batch.target_tokens], params["policy"]["theta"])
    scores = scores if keep is None else jnp.where(keep, scores, 0.0)
    loss = jnp.sum(scores * batch.planes["toy"].weights)
    return {"toy": loss}, {"loss/toy": SumCount(total=loss, count=jnp.ones((), jnp.float32))}


@functools.cache
def packed_setup(losses):
    empty = assemble([], CONSTANT, **PACKED).micro_batches[0]
    return normalisers.setup(losses, toys.linear_params(), empty, max_micro=32)


def layouts(samples, terms, monkeypatch):
    """Name -> micro-batches of one compiled shape: packed, one sample per row, and packed in another order."""
    found = {
        "packed": list(assemble(samples, terms, **PACKED).micro_batches),
        "unpacked": unpacked(assemble(samples, terms, **PACKED | {"max_segments": 1}), PACKED["max_segments"]),
    }
    shuffled_pack(monkeypatch, 5)
    found["shuffled"] = list(assemble(samples, terms, **PACKED).micro_batches)
    assert len(found["unpacked"]) > len(found["packed"]) >= 3
    pairs = list(zip(found["shuffled"], found["packed"], strict=True))
    assert not any(np.array_equal(a.input_tokens, b.input_tokens) for a, b in pairs)
    return found


def test_t13_packing_and_its_order_change_no_bit_of_an_integer_sum(monkeypatch):
    samples = recorded.mixed(4, 5)
    step, state = packed_setup(keep_linear)
    expected = sum(FEATURES[sample.completion_tokens].astype(np.int64).sum(0) for sample in samples)
    for name, batches in layouts(samples, CONSTANT, monkeypatch).items():
        assert np.array_equal(theta_of(normalisers.sums_of(step, state, batches)), expected), name
        assert int(toys.run_window(step, state, batches).report.status) == Status.UPDATED


def test_t13_packing_and_its_order_leave_the_decoders_gradient_within_the_bound(made, plain, monkeypatch):
    """A real decoder with attention: segment mask and positions keep every sample to itself."""
    samples = recorded.mixed(4, 5)
    terms = normalisers.recipe_of("separate", kl_coefficient=0.0, entropy_coefficient=0.0).terms(0)
    batch = made.config.batch
    assert (batch.rows, batch.row_tokens, batch.max_segments) == tuple(PACKED.values())[:3]
    found = layouts(samples, terms, monkeypatch)
    expected = test_properties.gradient(made, plain, found["unpacked"])
    tolerances = test_properties.bounds(made, plain, found["unpacked"])
    for name in ("packed", "shuffled"):
        test_properties.assert_within(test_properties.gradient(made, plain, found[name]), expected, tolerances)
    # one leak: the second segment of every row reads the first
    leaky = [b.replace(segment_ids=np.minimum(b.segment_ids, 1)) for b in found["packed"]]
    test_properties.assert_far(test_properties.gradient(made, plain, leaky), expected, tolerances)


# Noise


def noisy_losses(keep_of):
    return lambda params, batch: keep_linear(params, batch, keep_of(batch))


def by_sample(batch):
    keys = token_noise_keys(jax.random.key(28), batch)
    return jax.vmap(jax.vmap(lambda key: jax.random.bernoulli(key, 0.5)))(keys)


def by_place(batch):
    key = jax.random.fold_in(jax.random.key(28), batch.micro_index)
    return jax.random.bernoulli(key, 0.5, batch.target_tokens.shape)


NOISE = {"by sample": noisy_losses(by_sample), "by place": noisy_losses(by_place)}


def test_t28_masks_keyed_by_the_sample_are_the_same_for_every_split_packing_and_order(monkeypatch):
    samples = recorded.mixed(4, 5)
    found = layouts(samples, CONSTANT, monkeypatch)
    sums = {
        kind: [theta_of(normalisers.sums_of(*packed_setup(losses), batches)) for batches in found.values()]
        for kind, losses in NOISE.items()
    }
    expected = np.zeros(toys.FEATURES, np.int64)
    kept = 0
    keep = jax.jit(lambda a, b, place: jax.random.bernoulli(fold(fold(fold(jax.random.key(28), a), b), place), 0.5))
    fold = jax.random.fold_in
    for sample, (a, b) in zip(samples, sample_hashes([s.sample_id for s in samples]), strict=True):
        first = len(sample.prompt_tokens) - 1
        for place, token in enumerate(sample.completion_tokens.tolist(), start=first):
            if keep(a, b, np.int32(place)):
                expected, kept = expected + FEATURES[token].astype(np.int64), kept + 1
    tokens = sum(len(s.completion_tokens) for s in samples)
    assert 0.4 * tokens < kept < 0.6 * tokens
    assert all(np.array_equal(got, expected) for got in sums["by sample"])
    assert not np.array_equal(sums["by place"][0], sums["by place"][1])


def test_t28_keys_differ_between_tokens_samples_and_base_keys():
    samples = recorded.mixed(4, 5)
    data = {}
    for seed in (0, 1):
        for batch in assemble(samples, CONSTANT, **PACKED).micro_batches:
            keys = jax.random.key_data(token_noise_keys(jax.random.key(seed), jax.tree.map(jnp.asarray, batch)))
            for row, position in zip(*np.nonzero(batch.segment_ids), strict=True):
                place = (seed, int(batch.micro_index), int(row), int(position))
                data[place] = tuple(np.asarray(keys[row, position]).tolist())
    assert len(set(data.values())) == len(data) > 500


# Counters


def test_t15_counters_equal_a_numpy_count_over_ragged_windows():
    step, state = normalisers.bigram_setup()
    recipe = normalisers.recipe_of()
    rows, expected = [], {"windows": 0, "micro_batches": 0, "tokens": 0}
    for visit, (gated, rolled) in enumerate([(3, 5), (0, 0), (5, 0), (0, 6), (2, 7)]):
        samples = recorded.mixed(gated, rolled, visit=visit)
        update = normalisers.plan(recipe, samples)
        state = toys.run_window(step, state, update.micro_batches)
        tokens, sequences = sum(len(s.completion_tokens) for s in samples), len(samples)
        settings = {"learning_rate": 1.0, "schedule_step": 0, "clip_norm": None}
        row = ledger_row(state.report, update, step=visit, place=0, window=int(state.report.windows), **settings)
        check(row, nonfinite="raise")
        assert (row["tokens"], row["tokens_planned"], row["sequences"]) == (tokens, tokens, sequences)
        assert row["micro_batches"] == len(update.micro_batches)
        assert row["empty_micro_batches"] == (not samples)
        assert row["tokens_by_term"]["sft"] == sum(
            len(s.completion_tokens) for s in samples if s.source == Source.DEMONSTRATION
        )
        rows.append(row)
        expected["windows"] += 1
        expected["micro_batches"] += len(update.micro_batches)
        expected["tokens"] += tokens
        totals = state.totals
        assert {
            "windows": int(totals.windows),
            "micro_batches": int(totals.micro_batches),
            "tokens": int(totals.tokens_high) * 2**31 + int(totals.tokens_low),
        } == expected
    assert (int(state.totals.optimizer_steps), int(state.totals.skipped_windows)) == (4, 1)
    check_totals(rows, jax.device_get(state.totals))
    with pytest.raises(AccumulationError, match="missing"):
        check_totals(rows[:-1], jax.device_get(state.totals))


# P7: outside routes to the same sum


def reference_tanh(params, tokens, mask, weights):
    """float64, one token at a time: gradient of weight * (w2 . tanh(x w1 / 8))^2, by the chain rule on paper."""
    w1, w2 = (np.asarray(params["policy"][name], np.float64) for name in ("w1", "w2"))
    total = {"w1": np.zeros_like(w1), "w2": np.zeros_like(w2)}
    for row, position in zip(*np.nonzero(mask), strict=True):
        x = toys.FEATURE_TABLE[tokens[row, position]].astype(np.float64)
        hidden = np.tanh(x @ w1 / 8.0)
        outer = 2.0 * float(np.float32(weights[row, position])) * (hidden @ w2)
        total["w2"] += outer * hidden
        total["w1"] += np.outer(x / 8.0, outer * w2 * (1.0 - hidden**2))
    return total


@pytest.mark.parametrize("k", [1, 3, 4, 7, 16])
def test_p7_float64_loop_unrolled_loop_and_optax_agree_with_the_sum(k):
    """Up to 1024 tokens with uneven masks. Dropping any micro-batch is 100 tolerances away."""
    rows, width = 64, 16
    step, state = p7_setup()
    rng = np.random.default_rng(k)
    tokens, mask = toys.rows_of(rng, rows, width)
    if k == 16:
        mask[:] = True  # T = 1024
    weights = rng.uniform(0.1, 1.0, mask.shape)
    cuts = [np.flatnonzero(np.arange(rows) % k == place).tolist() for place in range(k)]
    batches = toys.window(tokens, mask, weights, cuts, pad_rows=rows)
    got = normalisers.sums_of(step, state, batches)
    expected = reference_tanh(state.params, tokens, mask, weights)
    unrolled = jax.jit(jax.grad(lambda params, batch: toys.tanh_losses(params, batch)[0]["toy"]))
    parts = [jax.tree.map(np.asarray, unrolled(state.params, batch)["policy"]) for batch in batches]
    limits = normalisers.bounds(parts, mask.sum())
    normalisers.assert_within(got, expected, limits)
    total = jax.tree.map(np.zeros_like, parts[0])
    for part in parts:
        total = jax.tree.map(np.add, total, part)
    normalisers.assert_within(got, total, limits)
    outside = optax.MultiSteps(optax.sgd(1.0), k, use_grad_mean=False)
    outside_state, params = outside.init(state.params["policy"]), state.params["policy"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for part in parts:
            updates, outside_state = outside.update(part, outside_state, params)
    normalisers.assert_within(got, jax.tree.map(lambda leaf: -np.asarray(leaf), updates), limits)
    for lost in range(k):
        short = jax.tree.map(lambda whole, part: whole - part, got, parts[lost])
        normalisers.assert_far(short, expected, limits)


@functools.cache
def p7_setup():
    return toys.sgd_setup(toys.tanh_losses, toys.tanh_params())
