"""HPT's properties (hpt spec, section 6) end to end: samples -> assemble -> micro_step -> summed gradient.

The gradient is read from the chain's sums before the flush, so no optimizer stands between. Tolerances on it are those
of accumulation spec 3.6. Stages that differ only in coefficients or reducers share one compiled step: both are data.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hptjax.build.policy import build_policy
from hptjax.build.stages import build_stages
from hptjax.config_model import ShapeConfig
from hptjax.hpt.gate import group_rollouts, solved_counts
from hptjax.hpt.route import Judged
from hptjax.models import decoder
from hptjax.records import Source, Verdict
from hptjax.sharding.host import to_host
from hptjax.train.accumulate import Status
from hptjax.train.loop import Cadence, Progress, World, run
from hptjax.train.optimizer import decay_mask, make_optimizer, make_schedule
from tests import recorded, tiny

SHAPE = ShapeConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=32, qk_norm=False)
UNIT_ROUNDOFF = 2.0**-24
GROUP, QUESTIONS = 4, 8
CLIP = 0.2


class Made:
    """A policy, and the stages that were asked of it; each compiles at most once per module."""

    def __init__(self, folder):
        config = tiny.tiny_config(folder)
        self.config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, shape=SHAPE),
            data=dataclasses.replace(config.data, questions_per_step=QUESTIONS),
        )
        self.policy = build_policy(self.config)
        self.stages = {}

    def stage(self, method="hpt", *, hpt=(), batch=(), train=(), optimizer=()):
        key = (method, *map(tuple, (hpt, batch, train, optimizer)))
        if key not in self.stages:
            config = dataclasses.replace(self.config, method=method)
            sections = {"hpt": hpt, "batch": batch, "train": train, "optimizer": optimizer}
            for name, fields in sections.items():
                section = dataclasses.replace(getattr(config, name), **dict(fields))
                config = dataclasses.replace(config, **{name: section})
            self.stages[key] = build_stages(config, self.policy, recorded.questions())[-1]
        return self.stages[key]

    def start(self, stage):
        return stage.start({"policy": self.policy.params}, None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("properties"))


@pytest.fixture(scope="module")
def plain(made):
    return made.stage()


ENTROPY = (("entropy_coefficient", 0.5),)
CLIPPED = {
    "hpt": (("clip_low", CLIP), ("clip_high", CLIP)),
    "train": (("updates_per_rollout_batch", 2),),
    "optimizer": (("learning_rate", 0.05),),
}
PURE_RL = {"hpt": (("gate", -1),), "train": (("updates_per_rollout_batch", 2),)}  # with the score pass, no clip


def put(micro_batch):
    return jax.tree.map(jnp.asarray, micro_batch)


def window(made, stage, micro_batches, *, flush=False):
    """The state after these micro-batches; every one of them on the device it would be on."""
    state = made.start(stage)
    for index, micro_batch in enumerate(micro_batches):
        last = flush and index == len(micro_batches) - 1
        state = stage.micro_step(state, put(micro_batch), jnp.asarray(last))
    return state


def leaves_of(state):
    return to_host(jax.tree.leaves(state.chains["policy"].sums.gradients))


def gradient(made, stage, micro_batches):
    return leaves_of(window(made, stage, micro_batches))


def bounds(made, stage, micro_batches):
    """Accumulation spec 3.6, per leaf: 16 (k + sqrt(T)) u sum of the micro-batches' norms."""
    parts = [gradient(made, stage, [micro_batch]) for micro_batch in micro_batches]
    tokens = sum(int(micro_batch.completion_mask.sum()) for micro_batch in micro_batches)
    factor = 16 * (len(parts) + math.sqrt(tokens)) * UNIT_ROUNDOFF
    return [factor * sum(np.linalg.norm(np.ravel(part[leaf])) for part in parts) for leaf in range(len(parts[0]))]


def assert_within(left, right, tolerances):
    for a, b, tolerance in zip(left, right, tolerances, strict=True):
        assert np.linalg.norm(np.ravel(a).astype(np.float64) - np.ravel(b)) <= tolerance


def assert_far(left, right, tolerances):
    """The gap rule: what must differ does so by 100 tolerances in every leaf."""
    for a, b, tolerance in zip(left, right, tolerances, strict=True):
        assert np.linalg.norm(np.ravel(a) - np.ravel(b)) > 100 * tolerance


def same_bits(left, right):
    return all(map(np.array_equal, left, right))


def norm(leaves):
    return math.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in leaves))


def combined(*pairs):
    """sum of factor * leaves, in float64."""
    return [
        sum(factor * leaf.astype(np.float64) for factor, leaf in zip(*parts, strict=True)) for parts in _by_leaf(pairs)
    ]


def _by_leaf(pairs):
    factors = [factor for factor, _ in pairs]
    return [(factors, leaves) for leaves in zip(*(leaves for _, leaves in pairs), strict=True)]


def batches(stage, samples):
    return stage.assemble(samples, frozenset()).micro_batches


# A stand-alone trainer: unpacked rows, one sample each, log-softmax over all logits, jax.grad. Nothing of it is shared
# with the product but the decoder.


def unpacked(samples, width=40):
    """(inputs, targets, live) [N width] of one sample per row."""
    inputs, targets = (np.zeros((len(samples), width), np.int32) for _ in range(2))
    live = np.zeros((len(samples), width), bool)
    for row, sample in enumerate(samples):
        tokens = np.concatenate([sample.prompt_tokens, sample.completion_tokens])
        inputs[row, : len(tokens) - 1], targets[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
        live[row, len(sample.prompt_tokens) - 1 : len(tokens) - 1] = True
    return inputs, targets, live


@pytest.fixture(scope="module")
def by_hand(made):
    """(params, inputs, targets, a, e) -> (gradient of sum(a * -logp + e * -H), logp [N T], H [N T])."""
    config = made.policy.config

    def loss(params, inputs, targets, a, e):
        positions = jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32)[None, :], inputs.shape)
        segments = jnp.ones(inputs.shape, jnp.int32)  # causal: what stands right of a token does not reach it
        hidden = decoder.forward(params, inputs, positions, segments, config=config, compute_dtype=jnp.float32)
        all_logprobs = jax.nn.log_softmax(hidden @ decoder.unembedding(params, config), axis=-1)
        logprobs = jnp.take_along_axis(all_logprobs, targets[:, :, None], axis=2)[:, :, 0]
        entropy = -jnp.sum(jnp.exp(all_logprobs) * all_logprobs, axis=2)
        return -jnp.sum(a * logprobs) - jnp.sum(e * entropy), (logprobs, entropy)

    compiled = jax.jit(jax.grad(loss, has_aux=True))
    rows = 32  # one compilation for every number of samples

    def call(params, samples, a, e):
        inputs, targets, live = unpacked(samples)
        room = ((0, rows - len(samples)), (0, 0))
        arrays = [jnp.asarray(np.pad(x, room)) for x in (inputs, targets, np.float32(a * live), np.float32(e * live))]
        leaves, (logprobs, entropy) = compiled(params, *arrays)
        n = len(samples)
        return (
            jax.tree.leaves(jax.tree.map(np.asarray, leaves)),
            np.asarray(logprobs)[:n],
            np.asarray(entropy)[:n],
            live,
        )

    return call


# 20


def test_duplicating_a_row_doubles_its_contribution_property_20(made, plain):
    """Each rollout is a group of its own here, so its advantage is its reward and a copy changes no statistics."""
    rng = np.random.default_rng(20)
    rows = [
        recorded.rollout(question, 0, rng, reward=1.0 + place)
        for place, question in enumerate(recorded.questions()[:4])
    ]
    copy = dataclasses.replace(rows[1], sample_id=rows[1].sample_id._replace(index=7), group_id=1000)
    with_copy = batches(plain, [*rows, copy])
    doubled = gradient(made, plain, with_copy)
    single, alone = gradient(made, plain, batches(plain, rows)), gradient(made, plain, batches(plain, [rows[1]]))
    tolerances = bounds(made, plain, with_copy)
    assert_within(doubled, combined((1, single), (1, alone)), tolerances)
    assert_far(doubled, single, tolerances)
    whole = recorded.mixed(0, 2)
    copies = [
        dataclasses.replace(s, sample_id=s.sample_id._replace(round=5), group_id=s.group_id + 1000) for s in whole
    ]
    twice = batches(plain, [*whole, *copies])
    assert_within(
        gradient(made, plain, twice),
        combined((2, gradient(made, plain, batches(plain, whole)))),
        bounds(made, plain, twice),
    )


# 21


def scored(made, stage, micro_batches, params=None):
    """The micro-batches with the stage's own score pass at these parameters."""
    params = made.policy.params if params is None else params
    return [
        dataclasses.replace(put(micro_batch), **stage.score({"policy": params}, put(micro_batch)))
        for micro_batch in micro_batches
    ]


def test_first_update_has_ratio_one_property_21(made, plain):
    clipped = made.stage(**CLIPPED)
    samples = recorded.mixed(2, 4)
    state = window(made, clipped, scored(made, clipped, batches(clipped, samples)))
    stats = to_host(state.window.stats)
    rollout_tokens = sum(len(sample.completion_tokens) for sample in samples if sample.source == Source.ROLLOUT)
    assert stats["actor/ppo_kl"].count == stats["actor/pg_clipfrac"].count == rollout_tokens
    assert abs(stats["actor/ppo_kl"].total) <= 1e-5 * rollout_tokens
    assert stats["actor/pg_clipfrac"].total == 0
    # the same planes without a score pass, where the ratio is 1 by construction
    plan = batches(plain, samples)
    assert plain.score is None
    assert_within(
        gradient(made, clipped, scored(made, clipped, plan)), gradient(made, plain, plan), bounds(made, plain, plan)
    )


def test_unclipped_loss_is_linear_in_the_ratio_property_21(made):
    stage = made.stage(**PURE_RL)
    plan = scored(made, stage, batches(stage, recorded.mixed(0, 4)))
    rng = np.random.default_rng(21)
    ratios = [[rng.uniform(0.1, 9.0, batch.rollout_logprobs.shape) for batch in plan] for _ in range(2)]

    def at(values):
        """Stored log-probs such that the ratio is `values`."""
        return [
            dataclasses.replace(
                batch, rollout_logprobs=jnp.asarray(np.asarray(batch.rollout_logprobs) - np.log(ratio), jnp.float32)
            )
            for batch, ratio in zip(plan, values, strict=True)
        ]

    first, second = (gradient(made, stage, at(values)) for values in ratios)
    both = at([a + b for a, b in zip(*ratios, strict=True)])
    tolerances = bounds(made, stage, both)
    assert_within(gradient(made, stage, both), combined((1, first), (1, second)), tolerances)
    one = gradient(made, stage, plan)
    for ratio in (0.25, 7.0):  # far outside any clip
        values = at([np.full(batch.rollout_logprobs.shape, ratio) for batch in plan])
        assert_within(gradient(made, stage, values), combined((ratio, one)), bounds(made, stage, values))


# 22


def test_permuting_the_samples_changes_no_bit_property_22(made, plain):
    samples = recorded.mixed(3, 4)
    expected = gradient(made, plain, batches(plain, samples))
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(samples))
        assert same_bits(gradient(made, plain, batches(plain, [samples[place] for place in order])), expected)
    rollouts = [sample for sample in samples if sample.source == Source.ROLLOUT]
    swapped = {rollouts[0].sample_id: rollouts[1], rollouts[1].sample_id: rollouts[0]}
    moved = [
        dataclasses.replace(s, reward=swapped[s.sample_id].reward) if s.sample_id in swapped else s for s in samples
    ]
    assert not same_bits(gradient(made, plain, batches(plain, moved)), expected)  # rewards belong to samples, not seats


# 24


def test_one_kind_alone_and_micro_batches_without_a_kind_property_24(made, plain):
    """All gated and none gated run; a mixed update is the sum of the two; a missing kind contributes exactly 0."""
    samples = recorded.mixed(8, 6)
    kinds = {
        kind: [sample for sample in samples if sample.source == kind] for kind in (Source.DEMONSTRATION, Source.ROLLOUT)
    }
    alone = {}
    for kind, other in ((Source.DEMONSTRATION, "rl"), (Source.ROLLOUT, "sft")):
        state = window(made, plain, batches(plain, kinds[kind]), flush=True)
        report = to_host(state.report)
        assert report.status == Status.UPDATED
        assert report.stats[f"loss/{other}"].total == 0
        assert all(np.isfinite(leaf).all() for leaf in to_host(jax.tree.leaves(state.params)))
        alone[kind] = gradient(made, plain, batches(plain, kinds[kind]))
    plan = batches(plain, samples)
    tolerances = bounds(made, plain, plan)
    assert_within(gradient(made, plain, plan), combined(*((1, leaves) for leaves in alone.values())), tolerances)
    missing = {"sft": 0, "rl": 0}
    one_kind = [*batches(plain, kinds[Source.DEMONSTRATION]), *batches(plain, kinds[Source.ROLLOUT]), *plan]
    for micro_batch in one_kind:
        stats = to_host(window(made, plain, [micro_batch]).window.stats)
        for name in missing:
            if not micro_batch.planes[name].weights.any():
                missing[name] += 1
                assert stats[f"loss/{name}"].total == 0
    assert missing["sft"] > 1
    assert missing["rl"] > 1


def test_an_update_of_nothing_moves_nothing_property_24(made, plain):
    state = window(made, plain, batches(plain, []), flush=True)
    assert int(state.report.status) == Status.EMPTY
    assert same_bits(to_host(jax.tree.leaves(state.params)), to_host(jax.tree.leaves({"policy": made.policy.params})))


# 25


def with_garbage(micro_batch, rng):
    """NaN, infinities, foreign tokens and ids wherever no live token is; NaN temperatures of empty segments."""
    dead = ~np.asarray(micro_batch.completion_mask)
    padding = np.asarray(micro_batch.segment_ids) == 0

    def spoilt(values, where):
        values = np.array(values)
        junk = rng.choice([np.nan, np.inf, -np.inf, 1e30], values.shape).astype(values.dtype)
        return np.where(where, junk, values)

    def foreign(values, where, low, high):
        values = np.array(values)
        return np.where(where, rng.integers(low, high, values.shape), values).astype(values.dtype)

    return dataclasses.replace(
        micro_batch,
        input_tokens=foreign(micro_batch.input_tokens, padding, -5, 1000),
        target_tokens=foreign(micro_batch.target_tokens, dead, -5, 1000),
        positions=foreign(micro_batch.positions, padding, 0, 10_000),
        planes={
            name: dataclasses.replace(plane, advantages=spoilt(plane.advantages, np.asarray(plane.weights) == 0))
            for name, plane in micro_batch.planes.items()
        },
        sampler_logprobs=spoilt(micro_batch.sampler_logprobs, dead),
        rollout_logprobs=spoilt(micro_batch.rollout_logprobs, dead),
        reference_logprobs=spoilt(micro_batch.reference_logprobs, dead),
        temperature=spoilt(micro_batch.temperature, np.asarray(micro_batch.sample_index) < 0),
    )


@pytest.mark.parametrize("which", ["entropy", "clipped"])
def test_garbage_in_padding_changes_no_bit_of_gradient_or_metrics_property_25(made, which):
    stage = made.stage(hpt=ENTROPY) if which == "entropy" else made.stage(**CLIPPED)
    plan = batches(stage, recorded.mixed(3, 3))
    plan = plan if stage.score is None else scored(made, stage, plan)
    assert any((np.asarray(batch.segment_ids) == 0).any() for batch in plan)
    rng = np.random.default_rng(25)
    clean, dirty = window(made, stage, plan), window(made, stage, [with_garbage(batch, rng) for batch in plan])
    assert same_bits(leaves_of(clean), leaves_of(dirty))
    assert norm(leaves_of(clean)) > 0
    before, after = to_host(clean.window), to_host(dirty.window)
    assert before.stats.keys() == after.stats.keys()
    for name in before.stats:
        assert same_bits(jax.tree.leaves(before.stats[name]), jax.tree.leaves(after.stats[name])), name
    assert int(after.first_nonfinite) == -1


# 26, second half


def test_gate_minus_one_is_the_stand_alone_dr_grpo_gradient_property_26(made, by_hand):
    """loss = -sum_i (R_i - mean R of i's group) sum_t exp(logp - sg(logp)) / (20 * rows / 64), written out below."""
    stage = made.stage(**PURE_RL)
    questions = recorded.questions()[:4]
    rng = np.random.default_rng(26)
    rollouts = [sample for question in questions for sample in recorded.group(question, rng)]
    unsolved = {sample.sample_id for sample in rollouts[:GROUP]}  # a question that HPT would gate
    rollouts = [dataclasses.replace(s, solved=False) if s.sample_id in unsolved else s for s in rollouts]
    groups = group_rollouts(rollouts)
    counts = solved_counts([question.question_id for question in questions], groups)
    live = stage.route(Judged(questions, groups, counts, visit=0)).live
    assert len(live) == 16
    plan = scored(made, stage, batches(stage, live))
    advantages = np.zeros(len(live))
    for i, sample in enumerate(live):
        rewards = [other.reward for other in live if other.sample_id.question == sample.sample_id.question]
        advantages[i] = sample.reward - sum(rewards) / len(rewards)
    rows = QUESTIONS * GROUP // 2  # per update, of two
    weights = advantages[:, None] / (recorded.MAX_COMPLETION * rows / 64)
    expected, _, _, _ = by_hand(made.policy.params, live, weights, 0 * weights)
    tolerances = bounds(made, stage, plan)
    assert_within(gradient(made, stage, plan), expected, tolerances)
    # the gap: forgetting the smallest row is seen
    without, _, _, _ = by_hand(made.policy.params, live[1:], weights[1:], 0 * weights[1:])
    assert_far(without, expected, tolerances)


# 27


def test_sft_coefficient_scales_the_demonstrations_gradient_only_property_27(made, plain):
    """gradient(0.3) - gradient(0) = 0.3 (gradient(1) - gradient(0)). A coefficient is data: one compiled step."""
    samples = recorded.mixed(4, 4)
    plans = {c: batches(made.stage(hpt=(("sft_coefficient", c),)), samples) for c in (0.0, 0.3, 1.0)}
    got = {c: gradient(made, plain, plan) for c, plan in plans.items()}
    tolerances = [2 * tolerance for tolerance in bounds(made, plain, plans[1.0])]
    assert_within(combined((1, got[0.3]), (-1, got[0.0])), combined((0.3, got[1.0]), (-0.3, got[0.0])), tolerances)
    assert_far(got[0.3], got[0.0], tolerances)
    rollouts_only = [sample for sample in samples if sample.source == Source.ROLLOUT]
    assert_within(got[0.0], gradient(made, plain, batches(plain, rollouts_only)), tolerances)


# 28


def test_entropy_is_the_mean_over_rollout_and_demonstration_tokens_property_28(made, plain, by_hand):
    samples = recorded.mixed(4, 5)
    stage = made.stage(hpt=ENTROPY)
    plan = batches(stage, samples)
    state = window(made, stage, plan)
    tokens = sum(len(sample.completion_tokens) for sample in samples)
    weights = np.full((len(samples), 1), 0.5 / tokens)
    expected, _, entropy, live = by_hand(made.policy.params, samples, 0 * weights, weights)
    assert live.sum() == tokens
    stats = to_host(state.window.stats)
    mean = entropy[live].astype(np.float64).sum() / tokens
    np.testing.assert_allclose(stats["loss/entropy"].total, -0.5 * mean, rtol=1e-5)
    np.testing.assert_allclose(stats["actor/entropy"].total, mean * tokens, rtol=1e-5)
    assert stats["actor/entropy"].count == tokens
    tolerances = bounds(made, stage, plan)
    added = combined((1, leaves_of(state)), (-1, gradient(made, plain, batches(plain, samples))))
    assert_within(added, expected, tolerances)
    # the gap, which an entropy near its maximum makes narrow: the term itself is far above the tolerance
    assert norm(expected) > 10 * math.sqrt(sum(tolerance**2 for tolerance in tolerances))


# 30


def test_constant_rate_from_the_config_property_30(made):
    stage = made.stage(optimizer=(("learning_rate", 5e-6),))
    for step in (0, 1, 250, 499):
        assert stage.learning_rate(step) == np.float32(5e-6)


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("end", [0.0, 0.1])
def test_schedules_equal_their_formulas_property_30(warmup, end):
    rate, last = 3e-4, 40

    def expected(kind, step):
        if step < warmup:
            return rate * (step + 1) / warmup
        progress = min((step - warmup) / (last - warmup), 1.0)
        return {
            "constant": rate,
            "linear": rate * (1 - (1 - end) * progress),
            "cosine": rate * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))),
        }[kind]

    for kind in ("constant", "linear", "cosine"):
        schedule = make_schedule(kind, rate, warmup_steps=warmup, decay_steps=last, end_fraction=end)
        for step in range(last + 6):
            np.testing.assert_allclose(float(schedule(step)), expected(kind, step), rtol=2e-5, atol=rate * 1e-6)


def test_adamw_with_decoupled_decay_equals_a_float64_reference_property_30():
    """Three steps; decay 0.01 reaches the matrix and neither the norm nor the bias (Loshchilov 2019, algorithm 2)."""
    rng = np.random.default_rng(30)
    shapes = {"query": (3, 4), "attention_norm": (4,), "query_bias": (4,)}
    params = {name: jnp.asarray(rng.uniform(-0.2, 0.2, shape), jnp.float32) for name, shape in shapes.items()}
    rate, b1, b2, eps, decay = 1e-2, 0.9, 0.95, 1e-8, 0.01
    optimizer = make_optimizer(
        make_schedule("constant", rate, warmup_steps=0, decay_steps=3),
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=decay,
        clip_norm=None,
    )
    state = optimizer.init(params)
    reference = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    first, second = ({name: np.zeros(shape) for name, shape in shapes.items()} for _ in range(2))
    for step in range(1, 4):
        gradients = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(jax.tree.map(jnp.asarray, gradients), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for name, gradient_leaf in gradients.items():
            wide = gradient_leaf.astype(np.float64)
            first[name] = b1 * first[name] + (1 - b1) * wide
            second[name] = b2 * second[name] + (1 - b2) * wide**2
            direction = (first[name] / (1 - b1**step)) / (np.sqrt(second[name] / (1 - b2**step)) + eps)
            decayed = decay * reference[name] if name == "query" else 0.0
            reference[name] = reference[name] - rate * (direction + decayed)
    for name, leaf in params.items():
        np.testing.assert_allclose(np.asarray(leaf), reference[name], rtol=0, atol=1e-7)


def test_decay_mask_of_a_real_tree_leaves_norms_and_biases_alone_property_30(made):
    config = dataclasses.replace(made.policy.config, attention_bias=True, qk_norm=True, tie_embeddings=False)
    mask = decay_mask(
        jax.tree.map(lambda shape: np.zeros(shape), decoder.param_shapes(config), is_leaf=lambda x: type(x) is tuple)
    )
    layers = mask.pop("layers")
    decayed = {name for name, decays in (mask | layers).items() if decays}
    matrices = {"query", "key", "value", "output", "gate", "up", "down"}
    assert decayed == {"embedding", "unembedding"} | matrices
    spared = {"final_norm", "attention_norm", "mlp_norm", "query_norm", "key_norm"}
    assert {name for name, decays in (mask | layers).items() if not decays} == spared | {
        "query_bias",
        "key_bias",
        "value_bias",
    }


# reducers under other compiled shapes


@pytest.mark.parametrize("preset", ["official_fixed", "official", "paper", "separate", "joint"])
def test_gradient_does_not_depend_on_rows_or_row_tokens(made, plain, preset):
    """Contract 3: the same samples in 2 rows of 48 and in 5 rows of 64 tokens. The preset is data of the planes."""
    samples = recorded.mixed(4, 5)
    hpt = (("preset", preset), ("logical_micro_tokens", 60), ("ranks", 2))
    wide = (("rows", 5), ("row_tokens", 64), ("max_segments", 8))
    narrow_plan = batches(made.stage(hpt=hpt), samples)
    wide_plan = batches(made.stage(hpt=hpt, batch=wide), samples)
    assert len(narrow_plan) > len(wide_plan) >= 2
    tolerances = bounds(made, plain, narrow_plan)
    got = gradient(made, plain, narrow_plan)
    assert_within(gradient(made, plain, wide_plan), got, tolerances)
    assert_far(gradient(made, plain, narrow_plan[:-1]), got, tolerances)


# leakage


def test_a_silent_segment_between_others_changes_no_bit(made, plain):
    """Four unequal segments in a row; each in turn carries no weight, and then its tokens are replaced."""
    rng = np.random.default_rng(40)
    question = recorded.questions()[0]
    question = dataclasses.replace(question, prompt_tokens=question.prompt_tokens[:3])
    sizes = (17, 9, 6, 3)
    rollouts = [
        dataclasses.replace(
            recorded.rollout(question, index, rng, reward=float(index % 2)),
            completion_tokens=recorded.symbols(rng, size),
            sampler_logprobs=np.full(size, -3.0, np.float32),
        )
        for index, size in enumerate(sizes)
    ]
    (micro_batch,) = batches(plain, rollouts)
    row = int(np.argmax(micro_batch.segment_ids.max(axis=1)))
    segments = micro_batch.segment_ids[row]
    assert len(set(np.bincount(segments)[1:].tolist())) >= 3
    everything = gradient(made, plain, [micro_batch])
    for victim in range(1, segments.max() + 1):
        inside = np.zeros(micro_batch.segment_ids.shape, bool)
        inside[row] = segments == victim
        silent = dataclasses.replace(
            micro_batch,
            completion_mask=micro_batch.completion_mask & ~inside,
            planes={
                name: dataclasses.replace(plane, weights=np.where(inside, 0, plane.weights).astype(np.float32))
                for name, plane in micro_batch.planes.items()
            },
        )
        other = np.where(inside, rng.integers(3, 20, inside.shape), silent.input_tokens).astype(np.int32)
        expected = gradient(made, plain, [silent])
        assert same_bits(gradient(made, plain, [dataclasses.replace(silent, input_tokens=other)]), expected)
        assert not same_bits(expected, everything)


# two updates per rollout batch, through the loop itself


def test_second_update_is_clipped_by_the_ratio_to_the_score_pass(made, by_hand):
    """Both updates read log-probs at the sampling weights; clip fraction, ratio and the second gradient by hand."""
    stage = made.stage(**CLIPPED)
    seen, rows = [], []

    def spied_step(state, micro_batch, is_last):
        before = to_host(state.params["policy"])
        seen.append((before, to_host(micro_batch)))
        return stage.micro_step(state, micro_batch, is_last)

    def sample(params, requests, *, should_stop, on_finished):
        by_id = {question.question_id: question for question in recorded.questions()}
        done = [
            recorded.rollout(
                by_id[r.sample_id.question], r.sample_id.index, np.random.default_rng(list(r.sample_id)), reward=0.0
            )
            for r in requests
        ]
        return [dataclasses.replace(s, sample_id=r.sample_id) for s, r in zip(done, requests, strict=True)]

    def judge(samples, questions):
        solved = [(s.sample_id.question + s.sample_id.index) % 3 == 0 for s in samples]
        return [
            (dataclasses.replace(s, reward=float(yes), solved=yes), [Verdict(float(yes), yes, "test")])
            for s, yes in zip(samples, solved, strict=True)
        ]

    world = World(
        questions={question.question_id: question for question in recorded.questions()},
        sample=sample,
        judge=judge,
        reward_names=(),
        put=put,
        read=to_host,
        flag=jnp.asarray,
        log_step=lambda step, row: rows.append(row),
        log_ledger=lambda row: None,
        log_rollouts=lambda step, gated: None,
        evaluate=lambda step, params: {},
        save=lambda *arguments, **options: None,
        should_stop=lambda: False,
    )
    cadence = Cadence(evaluate=0, evaluate_also=frozenset(), probe=0, save=0, metric="validation/pass@1")
    spied = dataclasses.replace(stage, steps=1, micro_step=spied_step)
    run([spied], made.start(stage), Progress(), world, cadence)
    metrics = next(row for row in rows if "actor/pg_clipfrac" in row)

    start = to_host(made.policy.params)
    second = [seat for seat in seen if not same_bits(jax.tree.leaves(seat[0]), jax.tree.leaves(start))]
    assert 0 < len(second) < len(seen)
    clipped = log_ratios = tokens = 0.0
    for params, batch in seen:
        sampling = np.asarray(stage.score({"policy": made.policy.params}, put(batch))["rollout_logprobs"])
        assert np.array_equal(batch.rollout_logprobs, sampling)  # also in the second update
        now = stage.score({"policy": params}, put(batch))["rollout_logprobs"]
        log_ratio = np.asarray(now, np.float64) - sampling
        rl = batch.planes["rl"]
        counted = rl.weights > 0
        out = ((rl.advantages > 0) & (log_ratio > math.log(1 + CLIP))) | (
            (rl.advantages < 0) & (log_ratio < math.log(1 - CLIP))
        )
        clipped, tokens = clipped + (out & counted).sum(), tokens + counted.sum()
        log_ratios -= log_ratio[counted].sum()
    assert 0 < clipped < tokens
    np.testing.assert_allclose(metrics["actor/pg_clipfrac"], clipped / tokens, rtol=1e-6)
    np.testing.assert_allclose(metrics["actor/ppo_kl"], log_ratios / tokens, rtol=1e-4)
    check_clipped_gradient(made, stage, by_hand, *second[0])


def check_clipped_gradient(made, stage, by_hand, params, micro_batch):
    """The gradient of one micro-batch of the second update against mask * A * ratio, written out per sample."""
    state = stage.start({"policy": jax.tree.map(jnp.asarray, params)}, None)
    got = leaves_of(stage.micro_step(state, put(micro_batch), jnp.asarray(False)))
    rows, a = [], []
    for row, seat in zip(*np.nonzero(micro_batch.sample_index >= 0), strict=True):
        inside = micro_batch.segment_ids[row] == seat + 1
        tokens = np.append(micro_batch.input_tokens[row][inside], micro_batch.target_tokens[row][inside][-1])
        live = micro_batch.completion_mask[row][inside]
        prompt = int(np.argmax(live)) + 1
        sample = recorded.rollout(recorded.questions()[0], len(rows), np.random.default_rng(0), reward=0.0)
        parts = {"prompt_tokens": tokens[:prompt], "completion_tokens": tokens[prompt:]}
        unread = np.zeros(len(tokens) - prompt, np.float32)
        rows.append(dataclasses.replace(sample, **parts, sampler_logprobs=unread))
        values = [
            np.pad(x[row][inside], (0, 40 - inside.sum()))
            for x in (
                micro_batch.planes["sft"].weights,
                micro_batch.planes["rl"].weights * micro_batch.planes["rl"].advantages,
                micro_batch.rollout_logprobs,
            )
        ]
        a.append(values)
    sft, weighted, old = (np.stack(x) for x in zip(*a, strict=True))
    zeros = np.zeros_like(sft)
    tree = jax.tree.map(jnp.asarray, params)
    _, logprobs, _, live = by_hand(tree, rows, zeros, zeros)
    ratio = np.exp(np.where(live, logprobs - old, 0.0))
    kept = ~(((weighted > 0) & (ratio > 1 + CLIP)) | ((weighted < 0) & (ratio < 1 - CLIP)))
    assert not kept[live].all()
    expected, _, _, _ = by_hand(tree, rows, sft + kept * ratio * weighted, zeros)
    factor = 16 * (1 + math.sqrt(live.sum())) * UNIT_ROUNDOFF
    assert_within(got, expected, [factor * np.linalg.norm(np.ravel(leaf)) for leaf in got])
    unclipped, _, _, _ = by_hand(tree, rows, sft + ratio * weighted, zeros)
    assert norm(combined((1, unclipped), (-1, expected))) > 100 * factor * norm(expected)
