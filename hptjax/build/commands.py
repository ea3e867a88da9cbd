"""`eval` and `sample`: a model of a run, asked questions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax

from hptjax.build.data import request_maker
from hptjax.build.parts import Parts, open_parts
from hptjax.build.weights import load_weights
from hptjax.config import Config
from hptjax.data import tokenizer as text
from hptjax.records import Question

SAMPLE_KEY = 2  # beside the keys of training and evaluation


def evaluate(config: Config, *, checkpoint: str = "last", split: str = "test") -> dict[str, Any]:
    """Pass@k of a model on a split, with 95 % intervals.

    Args
      checkpoint: "base", "last" or "best". split: "train", "validation" or "test".
    """
    with open_parts(config) as parts:
        result = parts.evaluator.measure(split, load_weights(parts, checkpoint))
        return {"checkpoint": checkpoint, "split": split} | result


def sample(config: Config, prompt: str | None, *, count: int, checkpoint: str = "last") -> Iterator[str]:
    """Completions of a prompt, or of a test question with the verifier's word, one line each.

    Raises ValueError for a prompt that the tokenizer cannot represent, or one that is too long.
    """
    with open_parts(config) as parts:
        params = load_weights(parts, checkpoint)
        question = parts.questions.test[0] if prompt is None else _asked(parts, prompt)
        make_requests = request_maker(
            count=count,
            max_completion_tokens=config.rollout.max_completion_tokens,
            stop_ids=parts.policy.stop_ids,
            temperature=config.rollout.temperature,
            top_k=config.rollout.top_k,
            top_p=config.rollout.top_p,
        )
        key = jax.random.fold_in(parts.key, SAMPLE_KEY)
        samples = parts.policy.sample(params, make_requests([question], 0), key)
        verdicts = parts.judge(samples, {question.question_id: question}) if prompt is None else None
        for index, entry in enumerate(samples):
            line = question.example.prompt + text.decode(parts.policy.tokenizer, entry.completion_tokens)
            yield line if verdicts is None else f"{line}  [{verdicts[index][1][0].reason}]"


def _asked(parts: Parts, prompt: str) -> Question:
    (question,) = parts.questions.prompts.encode([parts.questions.prompts.ask(prompt)])
    if isinstance(question, str):
        text.encode_prompt(parts.policy.tokenizer, prompt)  # says which character it is
        raise ValueError(
            f"expected a prompt that can be put to the model, got one that is {question!r}; change --prompt"
        )
    tokens = question.prompt_tokens
    limit = parts.config.rollout.prompt_buckets[-1]
    if len(tokens) > limit:
        raise ValueError(
            f"expected a prompt of at most {limit} tokens (rollout.prompt_buckets), got {len(tokens)}; "
            "shorten it or change rollout.prompt_buckets"
        )
    return question
