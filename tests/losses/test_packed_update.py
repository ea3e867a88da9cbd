"""A row with sequence statistics through assembler, packer and objective, against a loop over the samples."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hptjax.hpt.assemble import assemble
from hptjax.hpt.terms import Term, whole_span
from hptjax.losses.advantages import ones, standardised
from hptjax.losses.logprobs import TokenStats
from hptjax.losses.reducers import seq_mean_token_mean, token_mean
from hptjax.losses.table import GMPO, GSPO, SFT, policy_token_loss
from hptjax.records import Sample, SampleId, Source
from hptjax.train.objective import make_losses

VOCAB, ROLLOUTS = 7, frozenset({Source.ROLLOUT})
TABLE, OLD = (np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)) for seed in (0, 1))


def make_samples():
    rng = np.random.default_rng(2)
    return [
        Sample(
            SampleId(question, 0, index),
            group_id=question,
            source=Source.ROLLOUT,
            prompt_tokens=rng.integers(0, VOCAB, 2 + question),
            completion_tokens=rng.integers(0, VOCAB, n := int(rng.integers(1, 7))),
            sampler_logprobs=np.zeros(n, np.float32),
            reward=float(rng.normal()),
        )
        for question in range(3)
        for index in range(4)
    ]


def bigram(params, batch):
    everything = jax.nn.log_softmax(params[batch.input_tokens], axis=-1)
    logprobs = jnp.take_along_axis(everything, batch.target_tokens[:, :, None], axis=2)[:, :, 0]
    return TokenStats(logprobs, None)


def wide(batch):
    """Micro-batch in float64, its rollout log-probs those of the table OLD."""
    old = np.asarray(jax.nn.log_softmax(jnp.asarray(OLD)))[batch.input_tokens, batch.target_tokens]
    batch = dataclasses.replace(batch, rollout_logprobs=np.where(batch.segment_ids > 0, old, np.nan))
    return jax.tree.map(lambda x: np.asarray(x, np.float64) if x.dtype == np.float32 else x, batch)


def log_ratios(sample, table):
    """The log ratios of the sample's completion, token by token."""
    tokens = [*sample.prompt_tokens.tolist(), *sample.completion_tokens.tolist()]
    first = len(sample.prompt_tokens)

    def of(logits):
        every = jax.nn.log_softmax(logits)
        return jnp.stack([every[tokens[t - 1], tokens[t]] for t in range(first, len(tokens))])

    return of(table) - of(jnp.asarray(OLD))


@pytest.mark.parametrize("shape", [{"rows": 2, "row_tokens": 30}, {"rows": 4, "row_tokens": 12}], ids=str)
@pytest.mark.parametrize("row", [GSPO((0.1, 0.1)), GMPO((0.2, 0.2))], ids=lambda row: row.name)
def test_sequence_rows_survive_packing_beside_a_term_on_the_prompt(row, shape):
    samples = make_samples()
    terms = [
        Term("rl", ROLLOUTS, 1.0, seq_mean_token_mean, standardised),
        Term("hint", ROLLOUTS, 0.1, token_mean, ones, span=whole_span),  # makes the prompt live, and is no part of rl
    ]
    update = assemble(samples, terms, max_segments=5, max_micro_batches=8, **shape)
    losses = make_losses(
        bigram,
        {
            "rl": lambda view, advantages: policy_token_loss(row, view, advantages),
            "hint": lambda view, advantages: policy_token_loss(SFT, view, advantages),
        },
    )
    got = sum(
        np.asarray(jax.grad(lambda p, b=batch: losses({"policy": p}, wide(b))[0]["rl"])(jnp.asarray(TABLE)))
        for batch in update.micro_batches
    )
    rewards, groups = np.array([s.reward for s in samples]), np.array([s.group_id for s in samples])
    advantages = [
        float((r - rewards[groups == g].mean()) / (rewards[groups == g].std(ddof=1) + 1e-6))
        for r, g in zip(rewards, groups, strict=True)
    ]

    def literal(table):
        total = 0.0
        for sample, advantage in zip(samples, advantages, strict=True):
            d = log_ratios(sample, table)
            if row.name == "gspo":
                ratio = jnp.exp(jnp.mean(d))
                total -= jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.9, 1.1) * advantage)
            else:
                held = jnp.minimum(d, 0.2) if advantage > 0 else jnp.maximum(d, -0.2)
                total -= advantage * jnp.exp(jnp.mean(held))
        return total / len(samples)

    want = jax.grad(literal)(jnp.asarray(TABLE))
    assert np.abs(want).max() > 1e-3
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-7)  # weights and advantages travel in fp32
