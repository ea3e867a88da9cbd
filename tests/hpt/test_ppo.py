"""PPO with a critic: both gradients on ragged packed rows, under any split and packing, against loops."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hptjax.build.method import build_recipe
from hptjax.hpt.assemble import assemble
from hptjax.hpt.route import Routed
from hptjax.losses.logprobs import TokenStats
from hptjax.models import value_head
from hptjax.records import FinishReason, Sample, SampleId, Source
from hptjax.train.ledger import AccumulationError
from hptjax.train.objective import make_losses
from hptjax.train.phases import Gated, assemble_updates
from hptjax.train.second_look import SecondLook, look_again
from tests import tiny

V, D = 7, 5
CLIP, VALUE_CLIP, GAMMA, LAMBDA, VALUE_COEFFICIENT = 0.2, 0.3, 0.9, 0.8, 0.25
SHAPES = {
    "two rows": {"rows": 2, "row_tokens": 30, "max_segments": 5, "max_micro_batches": 8},
    "four short rows": {"rows": 4, "row_tokens": 12, "max_segments": 2, "max_micro_batches": 8},
    "one row": {"rows": 1, "row_tokens": 200, "max_segments": 16, "max_micro_batches": 1},
}
RNG = np.random.default_rng(5)
NOW = {
    "policy": {"logits": RNG.normal(size=(V, V)), "states": RNG.normal(size=(V, D))},
    "critic": {"weight": 0.3 * RNG.normal(size=D), "bias": np.asarray(0.1)},
}
BEFORE = jax.tree.map(lambda leaf: leaf + 0.25 * RNG.normal(size=leaf.shape), NOW)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The product's own PPO, as the second update of a rollout batch takes it."""
    config = tiny.as_off_policy(tiny.tiny_config(tmp_path_factory.mktemp("ppo"), method="ppo"))
    constants = {"gamma": GAMMA, "lambda": LAMBDA, "value_coefficient": VALUE_COEFFICIENT, "value_clip": VALUE_CLIP}
    methods = dataclasses.replace(config.methods, **{f"ppo_{name}": value for name, value in constants.items()})
    return build_recipe(dataclasses.replace(config, methods=methods), "ppo", 6)


def make_samples():
    """Twelve rollouts of 1 to 6 tokens; the last one met its limit."""
    rng = np.random.default_rng(2)
    samples = [
        Sample(
            SampleId(question, 0, index),
            group_id=question,
            source=Source.ROLLOUT,
            prompt_tokens=rng.integers(0, V, 2 + question),
            completion_tokens=rng.integers(0, V, n := int(rng.integers(1, 7))),
            sampler_logprobs=np.zeros(n, np.float32),
            reward=float(rng.normal()),
        )
        for question in range(3)
        for index in range(4)
    ]
    samples[-1] = dataclasses.replace(samples[-1], finish_reason=FinishReason.LENGTH)
    return samples


def bigram(policy, batch):
    """A policy that looks one token back; its hidden states are parameters, so that a leak into them would show."""
    everything = jax.nn.log_softmax(policy["logits"][batch.input_tokens], axis=-1)
    logprobs = jnp.take_along_axis(everything, batch.target_tokens[:, :, None], axis=2)[:, :, 0]
    hidden = jnp.where(batch.segment_ids[:, :, None] > 0, policy["states"][batch.input_tokens], jnp.nan)
    return TokenStats(logprobs, None, hidden)


def wide(batch):
    return jax.tree.map(lambda x: np.asarray(x, np.float64) if x.dtype == np.float32 else x, batch)


def score(params, batch):
    """What a score pass says, in the float32 in which it comes to the host."""
    found = bigram(params["policy"], batch)
    values = value_head.token_values(params["critic"], found.hidden, batch.completion_mask)
    scores = {"rollout_logprobs": found.logprobs, "rollout_values": values}
    return {name: np.asarray(value, np.float32) for name, value in scores.items()}


def refined(recipe, samples, shape, *, mask_overlong=False):
    """The update as the loop makes it: assembled, scored, assembled again with the refined advantages."""

    def pack(part, dead, routed, step, **options):
        return assemble(part, recipe.terms(step), dead=dead, advantages=routed.advantages, **shape)

    def reassemble(**options):
        gated = Gated(np.zeros(3), Routed(objectives=[], live=list(samples)))
        return assemble_updates(gated, updates=1, stage_step=0, mask_overlong=mask_overlong, assemble=pack, **options)

    updates = reassemble()
    scores = [score(BEFORE, batch) for update in updates for batch in update.micro_batches]
    return look_again(updates, scores, SecondLook(recipe.refine, None), {}, reassemble=reassemble)


def gradients(recipe, micro_batches):
    losses = make_losses(bigram, recipe.token_losses, value_head=value_head.token_values)

    @jax.jit
    @jax.grad
    def total(params, batch):
        return sum(losses(params, batch)[0].values())

    parts = [total(jax.tree.map(jnp.asarray, NOW), wide(batch)) for batch in micro_batches]
    return jax.tree.map(lambda *leaves: np.asarray(sum(leaves)), *parts)


@dataclasses.dataclass
class Token:
    """What the textbook needs of one token: where it stands in the tables, and what is held fixed."""

    last: int
    token: int
    advantage: float
    target: float
    logprob_before: float
    value_before: float


def tokens_by_loops(samples):
    """GAE and whitening from the definitions: sample by sample, token by token, on plain numbers."""
    logits, states, critic = BEFORE["policy"]["logits"], BEFORE["policy"]["states"], BEFORE["critic"]
    found = []
    for sample in samples:
        ids, first = [*sample.prompt_tokens.tolist(), *sample.completion_tokens.tolist()], len(sample.prompt_tokens)
        places = range(first, len(ids))
        # a score pass gives float32
        held = [float(np.float32(sum(states[ids[t - 1]] * critic["weight"]) + critic["bias"])) for t in places]
        for t, place in enumerate(places):
            advantage = 0.0
            for k in range(t, len(held)):  # Eq. 16 as the sum, not as its recursion
                reward = sample.reward if k == len(held) - 1 else 0.0
                after = held[k + 1] if k + 1 < len(held) else 0.0
                advantage += (GAMMA * LAMBDA) ** (k - t) * (reward + GAMMA * after - held[k])
            row = logits[ids[place - 1]]
            before = row[ids[place]] - math.log(sum(math.exp(z) for z in row))
            found.append(Token(ids[place - 1], ids[place], advantage, advantage + held[t], before, held[t]))
    mean = sum(t.advantage for t in found) / len(found)
    variance = sum((t.advantage - mean) ** 2 for t in found) / (len(found) - 1)
    for token in found:
        token.advantage = (token.advantage - mean) / math.sqrt(variance + 1e-8)
    return found


def textbook(params, tokens):
    """Schulman 2017, Eq. 7 and 9 as token means, with the clipped value loss; nothing is stopped but what is data."""
    last, token, advantage, target, logprob_before, value_before = np.transpose(
        [dataclasses.astuple(t) for t in tokens]
    )
    last, token = last.astype(int), token.astype(int)
    rows = params["policy"]["logits"][last]
    ratio = jnp.exp(rows[np.arange(len(last)), token] - jnp.log(jnp.sum(jnp.exp(rows), axis=1)) - logprob_before)
    surrogate = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage)
    value = jnp.asarray(NOW["policy"]["states"])[last] @ params["critic"]["weight"] + params["critic"]["bias"]
    held = jnp.clip(value, value_before - VALUE_CLIP, value_before + VALUE_CLIP)
    square = jnp.maximum((value - target) ** 2, (held - target) ** 2)
    return jnp.sum(VALUE_COEFFICIENT * 0.5 * square - surrogate) / len(tokens)


def silent(tokens):
    """How many tokens the ratio's clip silences, and how many the value's, by the signs."""
    policy = critic = 0
    for t in tokens:
        row = NOW["policy"]["logits"][t.last]
        ratio = math.exp(row[t.token] - t.logprob_before) / sum(math.exp(z) for z in row)
        value = float(NOW["policy"]["states"][t.last] @ NOW["critic"]["weight"] + NOW["critic"]["bias"])
        policy += (ratio > 1 + CLIP and t.advantage > 0) or (ratio < 1 - CLIP and t.advantage < 0)
        above, below = value > t.value_before + VALUE_CLIP, value < t.value_before - VALUE_CLIP
        critic += (above and value < t.target) or (below and value > t.target)
    return policy, critic


def assert_same(got, want, *, atol=3e-7):
    for path, leaf in jax.tree_util.tree_leaves_with_path(want):
        mine = got[path[0].key][path[1].key]
        np.testing.assert_allclose(mine, leaf, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("shape", SHAPES)
def test_ppo_gradients_of_policy_and_critic_are_the_textbooks(recipe, shape):
    """Weights, advantages and scores travel in float32; everything else is float64."""
    samples = make_samples()
    looked = refined(recipe, samples, SHAPES[shape])
    tokens = tokens_by_loops(samples)
    assert all(len(tokens) / 2 > count >= 3 for count in silent(tokens)), silent(tokens)  # both clips are at work
    want = jax.grad(textbook)(jax.tree.map(jnp.asarray, NOW), tokens)
    got = gradients(recipe, looked.micro_batches[0])
    assert_same(got, want)
    assert not got["policy"]["states"].any()  # the critic reads the hidden states, and does not train them
    assert min(np.abs(want["policy"]["logits"]).max(), np.abs(want["critic"]["weight"]).max()) > 1e-2
    returns = [t.target for t in tokens]
    assert looked.metrics["critic/returns/mean"] == pytest.approx((sum(returns), len(returns)), rel=1e-6)
    left = np.var([t.target - t.value_before for t in tokens])
    assert looked.metrics["critic/vf_explained_var"] == pytest.approx(1 - left / np.var(returns), rel=1e-6)


def test_ppo_leaves_a_masked_sample_out_of_whitening_and_of_both_losses(recipe):
    """It has no live token, so it is not scored; the others are what they would be without it."""
    samples = make_samples()
    got = gradients(recipe, refined(recipe, samples, SHAPES["two rows"], mask_overlong=True).micro_batches[0])
    assert_same(got, jax.grad(textbook)(jax.tree.map(jnp.asarray, NOW), tokens_by_loops(samples[:-1])))


def test_ppo_refuses_rows_that_are_not_those_that_were_scored(recipe):
    """An assembler that packs in another way the second time would train on values of other tokens."""
    samples, shapes = make_samples(), iter(("two rows", "four short rows"))

    def pack(part, dead, routed, step, **options):
        return assemble(part, recipe.terms(step), advantages=routed.advantages, **SHAPES[shape])

    def reassemble(**options):
        gated = Gated(np.zeros(3), Routed(objectives=[], live=samples))
        return assemble_updates(gated, updates=1, stage_step=0, mask_overlong=False, assemble=pack, **options)

    shape = next(shapes)
    updates = reassemble()
    scores = [score(BEFORE, batch) for batch in updates[0].micro_batches]
    shape = next(shapes)
    with pytest.raises(AccumulationError, match="update 0: expected the packed rows that were scored"):
        look_again(updates, scores, SecondLook(recipe.refine, None), {}, reassemble=reassemble)


def test_value_head_is_a_linear_map_that_starts_at_0_and_does_not_look_at_dead_tokens():
    params = value_head.init_params(D)
    live = jnp.asarray([[True, False, True]])
    hidden = jnp.asarray(RNG.normal(size=(1, 3, D))).at[0, 1].set(jnp.nan)
    assert not np.any(value_head.token_values(params, hidden, live))
    shifted = {"weight": jnp.asarray(np.arange(D) + 1.0), "bias": jnp.asarray(0.5)}
    values = value_head.token_values(shifted, hidden, live)
    np.testing.assert_allclose(values[0, 0], sum(float(hidden[0, 0, k]) * (k + 1) for k in range(D)) + 0.5, rtol=1e-12)
    assert values[0, 1] == 0.0
    back = jax.grad(lambda h: jnp.sum(value_head.token_values(shifted, h, live)))(hidden)
    assert np.array_equal(back[0], [[1, 2, 3, 4, 5], [0] * 5, [1, 2, 3, 4, 5]])
