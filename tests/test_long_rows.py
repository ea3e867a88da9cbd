"""Demonstrations of 8,192 tokens share a packed row with rollouts, and no token of one sees the other."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hptjax.build.policy import build_policy
from hptjax.build.prompts import build_prompts
from hptjax.data.importers import verl
from hptjax.hpt.assemble import assemble
from hptjax.hpt.gate import demonstration_sample
from hptjax.hpt.terms import Term
from hptjax.hpt.unpack import by_sample
from hptjax.losses.advantages import ones
from hptjax.losses.reducers import token_mean
from hptjax.records import Sample, SampleId, Source
from hptjax.sharding.host import to_host
from hptjax.sharding.mesh import put_micro_batch
from tests.openr1 import verl_row
from tests.test_files import on_files

pytestmark = pytest.mark.slow

ROW, LIMIT = 9600, 8192
EVERYTHING = Term("all", frozenset(Source), 1.0, token_mean, ones)


@pytest.fixture(scope="module")
def policy_and_encode(tmp_path_factory):
    config = on_files(
        tmp_path_factory.mktemp("long"),
        batch__row_tokens=ROW,
        batch__rows=1,
        data__max_prompt_tokens=256,
        rollout__max_completion_tokens=LIMIT,
        rollout__prompt_buckets=(256,),
        rollout__cache_capacity=256 + LIMIT,
        model__shape__num_layers=1,
        model__shape__max_positions=ROW,
    )
    policy = build_policy(config)
    return policy, build_prompts(config, policy.tokenizer, policy.stop_ids).encode


def long_demonstration(encode):
    """A reasoning trace of exactly 8,192 tokens, stop token included, in verl's columns."""

    def question(fill):
        trace = f"<think>\n{'4 9 ' * (LIMIT // 8)}{'7' * fill}\n</think>\n\n\\boxed{{5}}"
        row = {**verl_row(3), "target": [{"role": "assistant", "content": trace}]}
        return encode([dataclasses.replace(verl(row), question_id=1)])[0]

    return question(1 + LIMIT - len(question(1).demonstration_tokens))  # a digit is a token


def samples(question, vocabulary, *, seed=0):
    rng = np.random.default_rng(seed)
    found = [demonstration_sample(question)]
    for index, length in enumerate((700, 250, 90)):
        tokens = rng.integers(5, vocabulary, length).astype(np.int32)
        found.append(
            Sample(
                sample_id=SampleId(2, 0, index),
                group_id=2,
                source=Source.ROLLOUT,
                prompt_tokens=tokens[:40],
                completion_tokens=tokens[40:],
                sampler_logprobs=np.zeros(length - 40, np.float32),
                reward=1.0,
            )
        )
    return found


def packed(chosen):
    return assemble(chosen, [EVERYTHING], rows=1, row_tokens=ROW, max_segments=4, max_micro_batches=4)


def logprobs(policy, chosen):
    score = jax.jit(lambda params, batch: policy.token_stats(False)(params, batch).logprobs)
    update = packed(chosen)
    values = [
        np.asarray(to_host(score(policy.params, put_micro_batch(policy.mesh, b, policy.rules))))
        for b in update.micro_batches
    ]
    return update, by_sample(update, values)


def test_long_demonstration_and_rollouts_share_a_row_and_do_not_see_each_other(policy_and_encode):
    policy, encode = policy_and_encode
    question = long_demonstration(encode)
    assert len(question.demonstration_tokens) == LIMIT
    assert question.demonstration_tokens[-1] == 4
    together = samples(question, policy.config.vocab_size)
    update, values = logprobs(policy, together)
    assert len(update.micro_batches) == 1
    assert np.unique(update.micro_batches[0].segment_ids).tolist() == [0, 1, 2, 3, 4]
    # alone in its row every sample scores the same, within the rounding of another place in the row
    for sample in together:
        alone = logprobs(policy, [sample])[1][sample.sample_id]
        np.testing.assert_allclose(values[sample.sample_id], alone, atol=1e-4)
    # other tokens in one sample change no bit of the others
    for place in (0, 1):
        changed = list(together)
        tokens = np.asarray(changed[place].completion_tokens)
        changed[place] = dataclasses.replace(changed[place], completion_tokens=(tokens[::-1].copy() + 1) % 300)
        after = logprobs(policy, changed)[1]
        for sample in together:
            same = np.array_equal(after[sample.sample_id], values[sample.sample_id])
            assert same == (sample.sample_id != together[place].sample_id)


def test_long_demonstration_gives_the_gradient_of_its_own_row(policy_and_encode):
    """The sum over one packed row is the sum over rows of one sample each."""
    policy, encode = policy_and_encode
    together = samples(long_demonstration(encode), policy.config.vocab_size)[:3]

    @jax.jit
    def gradient(params, batch):
        def loss(params):
            said = policy.token_stats(False)(params, batch).logprobs
            return -jnp.sum(jnp.where(batch.completion_mask, said, 0.0))

        return jax.grad(loss)(params)

    def summed(groups):
        total = None
        for group in groups:
            for batch in packed(group).micro_batches:
                mine = to_host(gradient(policy.params, put_micro_batch(policy.mesh, batch, policy.rules)))
                total = mine if total is None else jax.tree.map(np.add, total, mine)
        return total

    one, apart = summed([together]), summed([[sample] for sample in together])
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(apart), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * max(np.linalg.norm(b), 1e-6)
