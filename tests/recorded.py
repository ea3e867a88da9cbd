"""Recorded questions and samples, made from seeds: what tests of whole updates train on, without sampling anything."""

from __future__ import annotations

import numpy as np

from hptjax.hpt.gate import demonstration_sample
from hptjax.records import Example, Question, Sample, SampleId, Source

STOP, FIRST_SYMBOL, VOCAB = 2, 3, 20  # of the tokenizer of tests/tiny.py
MAX_COMPLETION = 20


def questions(count: int = 40, seed: int = 11) -> list[Question]:
    """Questions with prompts of 4 to 14 tokens and demonstrations of 4 to 19 that end with the stop token."""
    rng = np.random.default_rng(seed)
    return [
        Question(
            example=Example(question_id=place, prompt="", demonstration="", answer={}, canonical=str(place)),
            prompt_tokens=symbols(rng, rng.integers(4, 15)),
            demonstration_tokens=np.append(symbols(rng, rng.integers(3, 19)), np.int32(STOP)).astype(np.int32),
        )
        for place in range(count)
    ]


def symbols(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(FIRST_SYMBOL, VOCAB, count).astype(np.int32)


def rollout(question: Question, index: int, rng: np.random.Generator, *, reward: float, visit: int = 0) -> Sample:
    """A completion of 1 to 20 random tokens with a reward; log-probs of the sampler are made up."""
    tokens = symbols(rng, rng.integers(1, MAX_COMPLETION + 1))
    return Sample(
        sample_id=SampleId(question.question_id, visit, index),
        group_id=question.question_id,
        source=Source.ROLLOUT,
        prompt_tokens=question.prompt_tokens,
        completion_tokens=tokens,
        sampler_logprobs=np.full(len(tokens), -3.0, np.float32),
        reward=reward,
        solved=reward > 0,
    )


def group(question: Question, rng: np.random.Generator, *, size: int = 4, visit: int = 0) -> list[Sample]:
    """A group whose first two rewards are 0 and 1 and whose others are drawn."""
    rewards = [0.0, 1.0, *rng.integers(0, 2, size - 2).astype(float)]
    return [rollout(question, i, rng, reward=float(reward), visit=visit) for i, reward in enumerate(rewards)]


def mixed(gated: int, rolled: int, *, visit: int = 0) -> list[Sample]:
    """`gated` questions as demonstrations and `rolled` others as whole groups; other questions for every visit."""
    rng = np.random.default_rng(visit)
    everything = questions()
    chosen = [everything[place] for place in rng.permutation(len(everything))[: gated + rolled]]
    samples = [demonstration_sample(question, visit=visit) for question in chosen[:gated]]
    for question in chosen[gated:]:
        samples.extend(group(question, rng, visit=visit))
    return samples
