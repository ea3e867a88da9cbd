"""Every loss mode and preset against float64 loops, normalisers included: T1, T2, T25 to T27 of the accumulation spec.

Two small models stand in for the decoder. A token's score is linear or a tanh net of its features, one parameter tree
per mode, so that one window proves all modes at once. A *bigram* policy, a table of logits by input token, has
gradients that a few NumPy lines give in float64, whatever the packing; it goes through the product's own terms,
assembly, token losses and step.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hptjax.build.method import build_recipe
from hptjax.config import Config
from hptjax.hpt.assemble import assemble
from hptjax.hpt.gate import demonstration_sample
from hptjax.hpt.route import Routed
from hptjax.hpt.terms import Term
from hptjax.losses import reducers
from hptjax.losses.advantages import ones
from hptjax.losses.logprobs import TokenStats
from hptjax.records import Source
from hptjax.sharding.mesh import make_mesh, put_micro_batch
from hptjax.train.accumulate import Status
from hptjax.train.objective import make_losses
from hptjax.train.phases import Gated, assemble_updates
from hptjax.train.state import init_state
from hptjax.train.step import make_micro_step
from hptjax.types import SumCount, TermPlane
from tests import recorded, toys
from tests.test_accumulate import UNIT_ROUNDOFF, compositions, cuts_of

ROLLOUTS, DEMONSTRATIONS = frozenset({Source.ROLLOUT, Source.PREFIX}), frozenset({Source.DEMONSTRATION})
LIMIT = 16  # max_tokens of the modes with a constant length
MODES = {
    "token_mean": reducers.token_mean,
    "seq_mean_token_mean": reducers.seq_mean_token_mean,
    "seq_mean_token_sum": reducers.seq_mean_token_sum,
    "seq_sum_len": reducers.seq_sum_len,
    "prompt_mean": reducers.prompt_mean,
    "dr_grpo": reducers.dr_grpo(LIMIT),
    "constant": reducers.constant(8),
    "official_fixed_rl": reducers.official_fixed_rl(LIMIT, 128),
    "official_rl": reducers.official_rl(LIMIT, 2),
    "official_sft": reducers.official_sft(2),
    "paper_rl": reducers.paper_rl(4),
    "paper_sft": reducers.paper_sft(4),
}  # all that do not depend on the physical split: every one but `legacy_micro_token_mean`


def exact_weights(mode, lengths, groups, partition):
    """What one token of each sample weighs, as fractions, from the table of accumulation spec 3.1."""
    live = [i for i, n in enumerate(lengths) if n]

    def tokens_beside(i, keys):
        return sum(int(lengths[j]) for j in live if keys[j] == keys[i])

    def one(i):
        tokens, total, count = int(lengths[i]), sum(int(lengths[j]) for j in live), len(live)
        mates = sum(groups[j] == groups[i] for j in live)
        return {
            "token_mean": lambda: Fraction(1, total),
            "seq_mean_token_mean": lambda: Fraction(1, tokens * count),
            "seq_mean_token_sum": lambda: Fraction(1, count),
            "seq_sum_len": lambda: Fraction(tokens, count),
            "prompt_mean": lambda: Fraction(1, tokens_beside(i, groups) * len({groups[j] for j in live})),
            "dr_grpo": lambda: Fraction(1, count * LIMIT),
            "constant": lambda: Fraction(1, 8),
            "official_fixed_rl": lambda: Fraction(64, LIMIT * 128),
            "official_rl": lambda: Fraction(1, LIMIT * 2),
            "official_sft": lambda: Fraction(1, tokens_beside(i, partition) * 2),
            "paper_rl": lambda: Fraction(1, int(mates) * 4),
            "paper_sft": lambda: Fraction(1, tokens * int(mates) * 4),
        }[mode]()

    return [one(i) if lengths[i] else Fraction(0) for i in range(len(lengths))]


# All modes at once: one plane and one parameter tree each


def by_mode(losses):
    """The toy's loss once per mode, on the mode's own plane and parameters."""

    def many(params, batch):
        named = {}
        for mode in MODES:
            single = dataclasses.replace(batch, planes={"toy": batch.planes[mode]})
            named[mode] = losses({"policy": params["policy"][mode]}, single)[0]["toy"]
        return named, {"loss": SumCount(total=sum(named.values()), count=jnp.ones((), jnp.float32))}

    return many


def mode_window(tokens, mask, row_weights, cuts, *, pad_rows):
    """The micro-batches of `toys.window`, with one plane per mode; `row_weights[mode]` [N] is for one token."""
    batches = []
    plain = toys.window(tokens, mask, np.ones(mask.shape), cuts, pad_rows=pad_rows)
    for batch, rows in zip(plain, cuts, strict=True):
        planes = {}
        for mode, weights in row_weights.items():
            column = np.zeros((pad_rows, 1), np.float32)
            column[: len(rows), 0] = np.asarray(weights, np.float64)[list(rows)]
            live = column * batch.completion_mask.astype(np.float32)
            planes[mode] = TermPlane(weights=live, advantages=np.zeros_like(live))
        batches.append(dataclasses.replace(batch, planes=planes))
    return batches


def setup(losses, params, batch, optimizer=None, *, max_micro=toys.MAX_MICRO, **options):
    """A jitted micro_step and a fresh state for these losses; SGD with rate 1 unless told otherwise."""
    optimizers = {"policy": optimizer or optax.sgd(1.0)}
    stats = jax.eval_shape(losses, params, batch)[1]
    step = jax.jit(make_micro_step(losses, optimizers, **options))
    return step, init_state(params, optimizers, stats, max_micro)


@functools.cache
def mode_setup(toy, rows, width):
    """`setup` for all modes of a toy: "linear" or "tanh"."""
    losses, params = {
        "linear": (toys.linear_losses, toys.linear_params()),
        "tanh": (toys.tanh_losses, toys.tanh_params()),
    }[toy]
    tokens, mask = np.zeros((1, width), np.int32), np.ones((1, width), bool)
    batch = mode_window(tokens, mask, dict.fromkeys(MODES, np.ones(1)), [[0]], pad_rows=rows)[0]
    return setup(by_mode(losses), {"policy": dict.fromkeys(MODES, params["policy"])}, batch)


def sums_of(step, state, batches):
    """The chain's gradient sums after these micro-batches, before any flush."""
    for batch in batches:
        state = step(state, batch, jnp.asarray(False))
    return jax.tree.map(np.asarray, state.chains["policy"].sums.gradients)


def scaled_integers(tokens, mask, groups, partition):
    """Per mode: integers L w_i, the product's reducer times L, and sum L w x in exact arithmetic.

    L is the least common denominator of the mode's weights, so that float32 must hold every product and sum exactly.
    """
    lengths = mask.sum(1)
    population = reducers.Population(lengths, groups, partition)
    row_weights, expected = {}, {}
    for mode, reducer in MODES.items():
        exact = exact_weights(mode, lengths, groups, partition)
        scale = math.lcm(*(weight.denominator for weight in exact))
        row_weights[mode] = scale * reducer(population)
        total = np.zeros(toys.FEATURES, object)
        largest = 0
        for row, position in zip(*np.nonzero(mask), strict=True):
            features = toys.FEATURE_TABLE[tokens[row, position]].astype(int).astype(object)
            total = total + int(exact[row] * scale) * features
            largest += int(exact[row] * scale) * int(np.abs(features).max())
        expected[mode] = (total, largest)
    return row_weights, expected


def test_t2_every_ragged_composition_is_bitwise_for_every_mode():
    step, state = mode_setup("linear", 8, 5)
    rng = np.random.default_rng(0)
    tokens, mask = toys.rows_of(rng, 8)
    groups, partition = np.array([0, 0, 0, 1, 1, 2, 2, 2]), np.array([0, 1, 0, 1, 1, 0, 2, 2])
    row_weights, expected = scaled_integers(tokens, mask, groups, partition)
    assert all(np.any(total != 0) and largest < 2**24 for total, largest in expected.values())
    for sizes in compositions(8):
        got = sums_of(step, state, mode_window(tokens, mask, row_weights, cuts_of(sizes), pad_rows=8))
        for mode, (total, _) in expected.items():
            assert np.array_equal(got[mode]["theta"].astype(np.int64), total.astype(np.int64)), (mode, sizes)


def leaf_norms(tree):
    return jax.tree.map(lambda leaf: np.linalg.norm(np.ravel(leaf).astype(np.float64)), tree)


def bounds(parts, tokens):
    """Accumulation spec 3.6, per leaf: 16 (k + sqrt(T)) u sum of the parts' norms."""
    factor = 16 * (len(parts) + math.sqrt(tokens)) * UNIT_ROUNDOFF
    return jax.tree.map(lambda *norms: factor * sum(norms), *map(leaf_norms, parts))


def distances(left, right):
    return leaf_norms(jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), left, right))


def assert_within(left, right, limits):
    assert all(jax.tree.leaves(jax.tree.map(lambda d, limit: d <= limit, distances(left, right), limits)))


def assert_far(left, right, limits):
    """The gap rule: what is wrong must differ by 100 tolerances, in every leaf, or the test proves nothing."""
    assert all(jax.tree.leaves(jax.tree.map(lambda d, limit: d > 100 * limit, distances(left, right), limits)))


@pytest.mark.parametrize("k", [2, 3, 4, 6, 8, 12])
def test_t1_even_splits_give_the_full_batch_gradient_for_every_mode(k):
    step, state = mode_setup("tanh", 24, 5)
    tokens, mask = toys.rows_of(np.random.default_rng(k), 24)
    mask[:, :2] = True  # no micro-batch of two rows is nearly empty, or dropping it would prove nothing
    groups, partition = np.arange(24) // 4, np.arange(24) % 5
    population = reducers.Population(mask.sum(1), groups, partition)
    row_weights = {mode: reducer(population) for mode, reducer in MODES.items()}
    batches = mode_window(tokens, mask, row_weights, cuts_of([24 // k] * k), pad_rows=24)
    full = sums_of(step, state, mode_window(tokens, mask, row_weights, [range(24)], pad_rows=24))
    parts = [sums_of(step, state, [batch]) for batch in batches]
    limits = bounds(parts, mask.sum())
    assert_within(sums_of(step, state, batches), full, limits)
    for lost in range(k):
        assert_far(sums_of(step, state, batches[:lost] + batches[lost + 1 :]), full, limits)


# The bigram policy

PLANES = ("rl", "kl", "sft", "entropy")
PRESETS = ("official_fixed", "official", "paper", "separate", "joint")
COEFFICIENTS = {"rl": 1.0, "kl": 0.5, "sft": 0.3, "entropy": 0.5}
FAINT = COEFFICIENTS | {"rl": 0.05, "kl": 0.05}  # so that where rollouts weigh most a change of the others still shows
COEFFICIENTS_OF = {"official_fixed": FAINT, "official": FAINT, "paper": FAINT}
SHAPE = {"rows": 4, "row_tokens": 40, "max_segments": 3, "max_micro_batches": toys.MAX_MICRO}
WIDE = {"rows": 2, "row_tokens": 100, "max_segments": 6, "max_micro_batches": toys.MAX_MICRO}
TABLE, REFERENCE = (
    np.random.default_rng(seed).normal(size=(recorded.VOCAB, recorded.VOCAB)).astype(np.float32) for seed in (5, 6)
)


def bigram(params, batch):
    """Log-probs and entropies under a table of logits by input token."""
    everything = jax.nn.log_softmax(params["table"][batch.input_tokens], axis=-1)  # [B T V]
    logprobs = jnp.take_along_axis(everything, batch.target_tokens[:, :, None], axis=2)[:, :, 0]
    return TokenStats(logprobs=logprobs, entropy=-jnp.sum(jnp.exp(everything) * everything, axis=2))


def config_of(preset="joint", *, updates=1, questions=8, **hpt):
    """REINFORCE (A = +1 or -1), k3 and entropy, all with their coefficients; groups of 4."""
    config = Config()
    coefficients = COEFFICIENTS_OF.get(preset, COEFFICIENTS)
    fields = {f"{name}_coefficient": value for name, value in coefficients.items()} | hpt
    return dataclasses.replace(
        config,
        hpt=dataclasses.replace(
            config.hpt, preset=preset, rl_estimator="reinforce", ranks=2, logical_micro_tokens=60, **fields
        ),
        rollout=dataclasses.replace(config.rollout, group_size=4, max_completion_tokens=recorded.MAX_COMPLETION),
        data=dataclasses.replace(config.data, questions_per_step=questions),
        train=dataclasses.replace(config.train, updates_per_rollout_batch=updates),
    )


def recipe_of(preset="joint", **fields):
    config = config_of(preset, **fields)
    return build_recipe(config, "hpt", config.data.questions_per_step)


def plan(recipe, samples, shape=SHAPE):
    """The update, its micro-batches completed with the log-probs of the reference table."""
    places = None if recipe.partition is None else recipe.partition(samples)
    return with_reference(assemble(samples, recipe.terms(0), partition=places, **shape))


def with_reference(update):
    everything = np.asarray(jax.nn.log_softmax(REFERENCE, axis=-1))
    batches = tuple(
        dataclasses.replace(batch, reference_logprobs=everything[batch.input_tokens, batch.target_tokens])
        for batch in update.micro_batches
    )
    return dataclasses.replace(update, micro_batches=batches)


@functools.cache
def bigram_setup():
    """One step for every preset, mode and shape: they are data of the planes."""
    recipe = recipe_of()
    assert set(recipe.token_losses) == set(PLANES)
    losses = make_losses(bigram, recipe.token_losses)
    return setup(losses, {"policy": {"table": jnp.asarray(TABLE)}}, plan(recipe, []).micro_batches[0])


def gradient(batches):
    return sums_of(*bigram_setup(), batches)


def reference_gradient(samples, weights):
    """The float64 gradient, token by token; `weights(term, sample)` is what one token weighs, coefficient included."""
    table, reference = TABLE.astype(np.float64), REFERENCE.astype(np.float64)
    total = np.zeros_like(table)
    for sample in samples:
        tokens = [*sample.prompt_tokens.tolist(), *sample.completion_tokens.tolist()]
        factors = {term: weights(term, sample) for term in PLANES}
        advantage = 1.0 if sample.source == Source.DEMONSTRATION or sample.reward > 0 else -1.0
        for place in range(len(sample.prompt_tokens), len(tokens)):
            before, target = tokens[place - 1], tokens[place]
            logp = table[before] - np.log(np.sum(np.exp(table[before])))
            reference_logp = reference[before, target] - np.log(np.sum(np.exp(reference[before])))
            p = np.exp(logp)
            towards = np.eye(len(p))[target] - p
            total[before] -= (factors["rl"] * advantage + factors["sft"]) * towards
            total[before] += factors["kl"] * (1 - np.exp(reference_logp - logp[target])) * towards
            total[before] += factors["entropy"] * p * (logp - np.sum(p * logp))
    return {"table": total}


def preset_weights(preset, samples, partition, *, questions):
    """`weights` of `reference_gradient` for a preset, from the equations (hpt spec 2.2, accumulation spec 3.3)."""
    demonstrations = [s for s in samples if s.source == Source.DEMONSTRATION]
    longest, ranks, group = recorded.MAX_COMPLETION, 2, 4

    def tokens_of(some):
        return sum(len(s.completion_tokens) for s in some)

    def micro_mean(sample, population):
        mine = partition[sample.sample_id]
        return 1 / (ranks * tokens_of([s for s in population if partition[s.sample_id] == mine]))

    def one(term, sample):
        rolled = sample.source != Source.DEMONSTRATION
        if (term in ("rl", "kl") and not rolled) or (term == "sft" and rolled):
            return 0.0
        own = {"sft": demonstrations, "entropy": samples}.get(term, [s for s in samples if s not in demonstrations])
        count = tokens_of(own)
        rl = term in ("rl", "kl")
        return {
            "official_fixed": lambda: 64 / (longest * questions * group) if rl else 1 / count,
            "official": lambda: 1 / (longest * ranks) if rl else micro_mean(sample, own),
            "paper": lambda: {
                "sft": 1 / (len(sample.completion_tokens) * questions),
                "entropy": 1 / count,
            }.get(term, 1 / (group * questions)),
            "separate": lambda: 1 / count,
            "joint": lambda: 1 / tokens_of(samples),
        }[preset]()

    return lambda term, sample: COEFFICIENTS_OF.get(preset, COEFFICIENTS)[term] * one(term, sample)


@pytest.mark.parametrize("preset", PRESETS)
def test_t25_t26_a_preset_equals_its_equations_under_every_split_and_a_stray_k_does_not(preset):
    """Four terms with four normalisers. A term that lost or gained a division by k is 100 tolerances away."""
    samples = recorded.mixed(3, 5)
    recipe = recipe_of(preset)
    places = recipe.partition(samples) if recipe.partition else {}
    expected = reference_gradient(samples, preset_weights(preset, samples, places, questions=8))
    for shape in (SHAPE, WIDE):
        batches = plan(recipe, samples, shape).micro_batches
        assert len(batches) >= 3
        tokens = sum(len(s.completion_tokens) for s in samples)
        limits = bounds([gradient([batch]) for batch in batches], tokens)
        assert_within(gradient(batches), expected, limits)
    for term, factor in itertools.product(PLANES, (1 / len(batches), len(batches))):
        stray = [
            dataclasses.replace(
                batch,
                planes=batch.planes
                | {term: batch.planes[term].replace(weights=batch.planes[term].weights * np.float32(factor))},
            )
            for batch in batches
        ]
        assert_far(gradient(stray), expected, limits)


@pytest.mark.parametrize("mode", MODES)
def test_t25_a_loss_mode_equals_its_definition_through_assembly_and_step(mode):
    samples = recorded.mixed(3, 5)
    partition = {s.sample_id: place % 3 for place, s in enumerate(samples)}
    sources = {"rl": ROLLOUTS, "kl": ROLLOUTS, "sft": DEMONSTRATIONS, "entropy": ROLLOUTS | DEMONSTRATIONS}
    advantages = {term.name: term.advantage for term in recipe_of().terms(0)}
    terms = [Term(t, sources[t], COEFFICIENTS[t], MODES[mode], advantages.get(t, ones)) for t in PLANES]
    update = with_reference(assemble(samples, terms, partition=partition, **SHAPE))
    share = {}
    for term in PLANES:
        members = [s for s in samples if s.source in sources[term]]
        exact = exact_weights(
            mode,
            [len(s.completion_tokens) for s in members],
            [s.group_id for s in members],
            [partition[s.sample_id] for s in members],
        )
        share |= {(term, s.sample_id): COEFFICIENTS[term] * float(w) for s, w in zip(members, exact, strict=True)}
    expected = reference_gradient(samples, lambda term, sample: share.get((term, sample.sample_id), 0.0))
    tokens = sum(len(s.completion_tokens) for s in samples)
    limits = bounds([gradient([batch]) for batch in update.micro_batches], tokens)
    assert_within(gradient(update.micro_batches), expected, limits)
    assert_far(gradient(update.micro_batches[1:]), expected, limits)


SHARE_GROWS = {"joint": 2.0, "separate": 1.0, "official_fixed": 1.0, "paper": 1.0}


@pytest.mark.parametrize("preset", SHARE_GROWS)
def test_t25_doubling_only_the_demonstrations_doubles_the_sft_share_under_joint_alone(preset):
    """A demonstration that repeats one symbol touches one row of the table, which no rollout reads."""
    symbol, others = recorded.VOCAB - 1, recorded.VOCAB - 2
    rng = np.random.default_rng(0)
    questions = recorded.questions()[:3]
    rollouts = []
    for question in questions[1:]:
        question = dataclasses.replace(question, prompt_tokens=np.minimum(question.prompt_tokens, others))
        for sample in recorded.group(question, rng):
            tokens = np.minimum(sample.completion_tokens, others)
            rollouts.append(dataclasses.replace(sample, completion_tokens=tokens))

    def share(length):
        repeated = np.full(length, symbol, np.int32)
        question = dataclasses.replace(questions[0], prompt_tokens=repeated[:4], demonstration_tokens=repeated)
        samples = [demonstration_sample(question, visit=0), *rollouts]
        found = gradient(plan(recipe_of(preset, entropy_coefficient=1e-12), samples).micro_batches)["table"]
        return np.linalg.norm(found[symbol]) / np.linalg.norm(found[:symbol])

    np.testing.assert_allclose(share(18) / share(9), SHARE_GROWS[preset], rtol=1e-5)


@pytest.mark.parametrize("mode", [reducers.seq_mean_token_mean, reducers.seq_mean_token_sum])
def test_t25_sequence_modes_weigh_a_doubled_demonstration_by_sequences(mode):
    short = reducers.Population(np.array([10, 9]), np.arange(2))
    long = reducers.Population(np.array([10, 18]), np.arange(2))
    grows = (mode(long) * long.token_counts)[1] / (mode(short) * short.token_counts)[1]
    assert grows == pytest.approx(1.0 if mode is reducers.seq_mean_token_mean else 2.0, rel=1e-12)


@pytest.mark.parametrize("preset", ["separate", "joint"])
@pytest.mark.parametrize(("gated", "rolled"), [(3, 0), (0, 3), (0, 0)])
def test_one_population_without_tokens_contributes_nothing_and_no_nan(preset, gated, rolled):
    samples = recorded.mixed(gated, rolled)
    recipe = recipe_of(preset)
    update = plan(recipe, samples)
    weights = preset_weights(preset, samples, {}, questions=8)
    got = gradient(update.micro_batches)
    limits = bounds([gradient([batch]) for batch in update.micro_batches], max(1, update.planned_tokens.sum()))
    assert_within(got, reference_gradient(samples, weights), limits)
    absent = [name for name, there in (("sft", gated), ("rl", rolled), ("kl", rolled)) if not there]
    assert all(update.terms[name].weight_sum == update.terms[name].normaliser == 0.0 for name in absent)


def test_joint_and_separate_log_the_counts_that_they_divide_by():
    samples = recorded.mixed(3, 5)
    demonstrations = sum(len(s.completion_tokens) for s in samples if s.source == Source.DEMONSTRATION)
    everything = sum(len(s.completion_tokens) for s in samples)
    for preset, by_term in (
        ("joint", dict.fromkeys(PLANES, everything)),
        (
            "separate",
            {"sft": demonstrations, "entropy": everything} | dict.fromkeys(("rl", "kl"), everything - demonstrations),
        ),
    ):
        terms = plan(recipe_of(preset), samples).terms
        assert {name: count.normaliser for name, count in terms.items()} == pytest.approx(by_term, rel=1e-12)
        assert (terms["sft"].tokens, terms["rl"].tokens) == (demonstrations, everything - demonstrations)
    # a dead rollout is in nobody's count
    dead = next(s for s in samples if s.source == Source.ROLLOUT)
    update = assemble(samples, recipe_of("joint").terms(0), dead=frozenset({dead.sample_id}), **SHAPE)
    assert update.terms["sft"].normaliser == pytest.approx(everything - len(dead.completion_tokens), rel=1e-12)


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("preset", ["official_fixed", "joint"])
def test_t27_each_update_divides_by_its_own_counts_on_any_number_of_devices(eight_devices, preset, devices):
    """Two updates per rollout batch of 16 questions: the generation batch's normaliser would be another gradient."""
    samples = sorted(recorded.mixed(6, 10), key=lambda sample: sample.sample_id)
    recipe = recipe_of(preset, updates=2, questions=16)
    live = Gated(solved=np.zeros(16, np.int64), routed=Routed(objectives=[], live=samples))
    updates = assemble_updates(
        live, updates=2, stage_step=0, mask_overlong=False, assemble=lambda s, *_: plan(recipe, s)
    )
    generation = plan(recipe_of(preset, questions=16), samples)
    mesh = make_mesh(devices, 1, devices=eight_devices[:devices])
    step, state = bigram_setup()
    state = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    assert len(updates) == 2
    for update in updates:
        batches = [put_micro_batch(mesh, batch) for batch in update.micro_batches]
        assert len(batches) not in (1, 2)  # nor the number of updates
        expected = reference_gradient(update.samples, preset_weights(preset, list(update.samples), {}, questions=8))
        limits = bounds([gradient([batch]) for batch in update.micro_batches], update.planned_tokens.sum())
        assert_within(sums_of(step, state, batches), expected, limits)
        of_all = {
            name: np.float32(generation.terms[name].token_weight_max / update.terms[name].token_weight_max)
            for name in PLANES
        }
        wrong = [
            dataclasses.replace(
                batch,
                planes={n: p.replace(weights=p.weights * of_all[n]) for n, p in batch.planes.items()},
            )
            for batch in update.micro_batches
        ]
        assert_far(gradient(wrong), expected, limits)
        report = flushed(step, state, batches)
        assert int(report.status) == Status.UPDATED
        assert int(report.tokens) == sum(len(s.completion_tokens) for s in update.samples)


def flushed(step, state, batches):
    return toys.run_window(step, state, batches).report
