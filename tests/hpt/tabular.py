"""A bigram policy on the product's own way: recipe -> route -> terms -> packed micro-batches -> losses, in float64.

And what a second route needs: the same samples one by one, and textbook losses on their log-probs.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hptjax.build.method import build_recipe
from hptjax.config import Config
from hptjax.hpt.assemble import assemble
from hptjax.hpt.route import Judged
from hptjax.losses.logprobs import TokenStats
from hptjax.train.objective import make_losses
from tests import recorded

TABLE, OLD = (
    np.random.default_rng(seed).normal(size=(recorded.VOCAB, recorded.VOCAB)) * (0.6 + 0.4 * seed) for seed in (0, 1)
)
OLD = TABLE + 0.25 * OLD  # the sampling policy: ratios on both sides of a clip at 0.2
SOLVED = (0, 2, 4, 0, 1, 3)  # of the four rollouts of each question: none, some, all
GROUP = 4


def judged():
    """Six questions with groups of four ragged rollouts, of which SOLVED are right."""
    rng = np.random.default_rng(5)
    questions = recorded.questions()[: len(SOLVED)]
    groups = {
        question.question_id: [
            recorded.rollout(question, i, rng, reward=float(i < solved)) for i in rng.permutation(GROUP).tolist()
        ]
        for question, solved in zip(questions, SOLVED, strict=True)
    }
    groups = {name: sorted(group, key=lambda s: s.sample_id) for name, group in groups.items()}
    return Judged(questions, groups, np.asarray(SOLVED), visit=0)


def config_of(**sections):
    """Clipped, off-policy, groups of four; `hpt={...}` and `methods={...}` change fields."""
    chosen = {
        "rollout": {"group_size": GROUP, "max_completion_tokens": recorded.MAX_COMPLETION},
        "train": {"updates_per_rollout_batch": 2},
        "hpt": {"clip_low": 0.2, "clip_high": 0.2, "kl_coefficient": 0.0, **sections.get("hpt", {})},
        "methods": sections.get("methods", {}),
    }
    config = Config()
    for name, fields in chosen.items():
        config = dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **fields)})
    return config


def bigram(params, batch):
    everything = jax.nn.log_softmax(params[batch.input_tokens], axis=-1)
    logprobs = jnp.take_along_axis(everything, batch.target_tokens[:, :, None], axis=2)[:, :, 0]
    return TokenStats(logprobs, -jnp.sum(jnp.exp(everything) * everything, axis=-1))


def wide(batch):
    """Micro-batch in float64, its rollout log-probs those of the table OLD, NaN in padding."""
    old = np.asarray(jax.nn.log_softmax(jnp.asarray(OLD)))[batch.input_tokens, batch.target_tokens]
    batch = dataclasses.replace(batch, rollout_logprobs=np.where(batch.segment_ids > 0, old, np.nan))
    return jax.tree.map(lambda x: np.asarray(x, np.float64) if x.dtype == np.float32 else x, batch)


def gradient(config, name, *, rows=4, row_tokens=60, step=0):
    """The summed gradient of a method's update on `judged()`, in the table's logits; and its micro-batches."""
    everything = judged()
    # two updates per rollout batch read the score pass; all questions are in this one of them
    recipe = build_recipe(config, name, 2 * len(everything.questions))
    routed = recipe.method.route(everything)
    update = assemble(
        routed.live,
        recipe.terms(step),
        rows=rows,
        row_tokens=row_tokens,
        max_segments=4,
        max_micro_batches=64,
        scales=routed.scales,
        advantages=routed.advantages,
    )
    losses = make_losses(bigram, recipe.token_losses, scored=recipe.scores)

    def loss(params, batch):
        return sum(losses({"policy": params}, batch)[0].values())

    compiled = jax.jit(jax.grad(loss))
    parts = [np.asarray(compiled(jnp.asarray(TABLE), wide(batch))) for batch in update.micro_batches]
    assert parts[0].dtype == np.float64
    return sum(parts), update


def literal_gradient(loss_of):
    """Gradient of `loss_of(table)` in the logits, by jax.grad over plain sums."""
    return np.asarray(jax.jit(jax.grad(loss_of))(jnp.asarray(TABLE)))


def flat(samples, value_of):
    """(inputs, targets, values) of the completions' tokens, one after the other; `value_of(sample)` on each of them."""
    inputs, targets, values = [], [], []
    for sample in samples:
        tokens = [*sample.prompt_tokens.tolist(), *sample.completion_tokens.tolist()]
        for place in range(len(sample.prompt_tokens), len(tokens)):
            inputs.append(tokens[place - 1])
            targets.append(tokens[place])
            values.append(value_of(sample))
    return np.array(inputs), np.array(targets), np.array(values)


def likelihood(table, samples, weight_of):
    """Sum over tokens of weight x log p."""
    inputs, targets, weights = flat(samples, weight_of)
    return jnp.sum(weights * jax.nn.log_softmax(table, axis=-1)[inputs, targets])


def clipped(table, samples, advantage_of, weight_of, width=0.2):
    """Sum over tokens of weight x PPO's surrogate, as the textbook has it."""
    inputs, targets, advantages = flat(samples, advantage_of)
    weights = flat(samples, weight_of)[2]
    log_ratio = jax.nn.log_softmax(table, axis=-1)[inputs, targets] - jax.nn.log_softmax(OLD, axis=-1)[inputs, targets]
    ratio = jnp.exp(log_ratio)
    held = jnp.clip(ratio, 1 - width, 1 + width)
    return jnp.sum(weights * jnp.minimum(ratio * advantages, held * advantages))
