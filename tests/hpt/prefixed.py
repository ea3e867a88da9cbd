"""Groups whose rollouts continue prefixes, with a bigram policy: what tests of the prefix methods learn from.

The gradient of the package's route: recipe from a config, route, assembler, packed rows, token losses, in float64.
`slow_gradient` shares no code with it: it adds c x grad log pi over tokens, one by one, in NumPy.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hptjax.build.method import build_recipe
from hptjax.config import Config, DataConfig, HptConfig, RolloutConfig, TrainConfig
from hptjax.config_methods import MethodsConfig
from hptjax.hpt.assemble import assemble
from hptjax.hpt.gate import group_rollouts, solved_counts
from hptjax.hpt.route import Judged
from hptjax.losses.logprobs import TokenStats
from hptjax.records import Example, Question, Sample, SampleId, Source
from hptjax.train.objective import make_losses

VOCAB, STOP, QUESTIONS, MAX_TOKENS = 7, 2, 4, 20
TABLE, OLD, REFERENCE = (np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)) for seed in (0, 1, 2))
OLD = TABLE + 0.5 * OLD  # ratios on both sides of a clip of 0.2
SHAPES = [{"rows": 2, "row_tokens": 110, "max_segments": 8}, {"rows": 2, "row_tokens": 110, "max_segments": 3}]


def questions():
    rng = np.random.default_rng(5)
    return [
        Question(
            example=Example(question_id=number, prompt="", demonstration="", answer={}, canonical=str(number)),
            prompt_tokens=rng.integers(3, VOCAB, 2 + number).astype(np.int32),
            demonstration_tokens=np.append(rng.integers(3, VOCAB, length), STOP).astype(np.int32),
        )
        for number, length in enumerate([10, 5, 17, 13])
    ]


def config_of(method, *, group_size=4, constants=None, updates=2, **hpt):
    """Two updates per rollout batch, so that the old policy is another one; group statistics are the same."""
    return Config(
        method=method,
        data=DataConfig(questions_per_step=QUESTIONS * updates),
        rollout=RolloutConfig(group_size=group_size, max_completion_tokens=MAX_TOKENS),
        hpt=dataclasses.replace(HptConfig(), **hpt),
        methods=dataclasses.replace(MethodsConfig(), **(constants or {})),
        train=TrainConfig(updates_per_rollout_batch=updates),
    )


def build(config):
    return build_recipe(config, config.method, config.data.questions_per_step)


def sampled(plan, rewards_of, *, step=0, seed=0):
    """Judged groups of a plan, asked until it asks for nothing new; what is sampled and rewarded is made up."""
    groups = []
    for question in questions():
        rng = np.random.default_rng([seed, question.question_id])
        rewards = rewards_of(question.question_id)
        samples: list[Sample] = []
        while True:
            prefixes = plan(question, 0, {i: float(rewards[i]) for i in range(len(samples))}, step)
            if len(prefixes) == len(samples):
                break
            for index in range(len(samples), len(prefixes)):
                samples.append(continued(question, index, prefixes[index], rng, rewards[index]))
        groups += samples
    return groups


def continued(question, index, prefix, rng, reward):
    whole = len(prefix) == len(question.demonstration_tokens)
    tokens = rng.integers(3, VOCAB, 0 if whole else int(rng.integers(1, MAX_TOKENS + 1 - len(prefix))))
    completion = np.concatenate([prefix, tokens]).astype(np.int32)
    return Sample(
        SampleId(question.question_id, 0, index),
        group_id=question.question_id,
        source=Source.PREFIX if len(prefix) else Source.ROLLOUT,
        prompt_tokens=question.prompt_tokens,
        completion_tokens=completion,
        sampler_logprobs=np.zeros(len(completion), np.float32),
        prefix_len=len(prefix),
        reward=float(reward),
        solved=reward > 0,
    )


def route(recipe, samples):
    asked = [q for q in questions() if any(s.group_id == q.question_id for s in samples)]
    groups = group_rollouts(samples)
    solved = solved_counts([q.question_id for q in asked], groups)
    return recipe.method.route(Judged(asked, groups, solved, 0))


def packed(recipe, samples, *, shape=None, step=0):
    """The update of the method's route and terms."""
    routed = route(recipe, samples)
    return assemble(
        routed.live,
        recipe.terms(step),
        max_micro_batches=40,
        scales=routed.scales,
        advantages=routed.advantages,
        **(SHAPES[0] if shape is None else shape),
    )


def bigram(params, batch):
    everything = jax.nn.log_softmax(params[batch.input_tokens], axis=-1)
    logprobs = jnp.take_along_axis(everything, batch.target_tokens[:, :, None], axis=2)[:, :, 0]
    return TokenStats(logprobs, -jnp.sum(jnp.exp(everything) * everything, axis=-1))


def wide(batch):
    """Micro-batch in float64, with the log-probs of the old policy and of the reference; NaN in padding."""

    def scored(table):
        every = table - np.log(np.exp(table).sum(1, keepdims=True))
        return np.where(batch.segment_ids > 0, every[batch.input_tokens, batch.target_tokens], np.nan)

    batch = jax.tree.map(lambda x: np.asarray(x, np.float64) if x.dtype == np.float32 else x, batch)
    return dataclasses.replace(batch, rollout_logprobs=scored(OLD), reference_logprobs=scored(REFERENCE))


def gradients(recipe, update):
    """Gradient of every plane in the bigram's logits, by name."""
    losses = make_losses(bigram, recipe.token_losses, scored=recipe.scores)
    total = {name: np.zeros((VOCAB, VOCAB)) for name in recipe.token_losses}
    for batch in map(wide, update.micro_batches):
        named, pull = jax.vjp(lambda p, batch=batch: losses({"policy": p}, batch)[0], jnp.asarray(TABLE))
        for name in named:
            (found,) = pull({other: jnp.asarray(float(other == name)) for other in named})
            total[name] += np.asarray(found)
    return total


def slow_gradient(samples, coefficient):
    """- sum of c x grad log pi over the completion tokens of all samples.

    Args
      coefficient: (sample, place in the completion, p, p under the old policy, entropy, p of the reference) -> c.
    """
    gradient = np.zeros((VOCAB, VOCAB))

    def probability(table, before):
        row = np.exp(table[before] - table[before].max())
        return row / row.sum()

    for sample in samples:
        tokens = [*sample.prompt_tokens.tolist(), *sample.completion_tokens.tolist()]
        for place in range(len(sample.completion_tokens)):
            at = len(sample.prompt_tokens) + place
            before, token = tokens[at - 1], tokens[at]
            p = probability(TABLE, before)
            entropy = -float((p * np.log(p)).sum())
            old, reference = probability(OLD, before)[token], probability(REFERENCE, before)[token]
            c = coefficient(sample, place, p[token], old, entropy, reference)
            pull = -p
            pull[token] += 1.0
            gradient[before] -= c * pull
    return gradient


def entropy_at(sample, place):
    """Of the policy's next-token distribution before the token at a place of the completion."""
    tokens = [*sample.prompt_tokens.tolist(), *sample.completion_tokens.tolist()]
    row = np.exp(TABLE[tokens[len(sample.prompt_tokens) + place - 1]])
    p = row / row.sum()
    return -float((p * np.log(p)).sum())
