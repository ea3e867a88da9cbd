"""What is asked of `POST /v1/completions` for one sample, and what its answer must be to become one.

The fields are those of OpenAI's API, and some that both vLLM and SGLang add (`FIELDS`). Token ids go in and come out:
text would have to be read into tokens again, and those may be others than were sampled.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from hptjax.records import Request, SampleId
from hptjax.rollout.post import Passing, Refused, shown
from hptjax.rollout.requests import context_of, new_tokens

SEED_BITS = 31  # what every server takes
ROUNDING = 1e-4  # nats by which a server's log-prob may lie above 0; it then counts as 0
LEAST_LOGPROB = -1000.0  # nats; what is sampled is never so unlikely. vLLM writes -9999 for minus infinity
BYTES_PER_TOKEN, BYTES_BESIDE = 512, 1 << 16  # of an answer: ids, log-probs and text of a token, and all the rest
PROBE_LOGPROBS = 5
TELLING = 0.02  # nats between what the two kinds of log-probs predict, for a probe to tell them apart


def seed_of(run_seed: int, sample_id: SampleId) -> int:
    """The seed of a request: a function of the run's seed and the sample's id, 31 bits.

    (first 31 bits of SHA-256 of "run seed/question/round" + index) mod 2^31: no two samples of a group share one.
    """
    digest = hashlib.sha256(f"{run_seed}/{sample_id.question}/{sample_id.round}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") + sample_id.index) % 2**SEED_BITS


def completion_body(request: Request, *, model: str, run_seed: int) -> dict[str, Any]:
    """The JSON that asks for one sample.

    Every setting is written out: servers take what is left out from the model's generation_config.json.
    """
    return {
        "model": model,
        "prompt": context_of(request).tolist(),
        "max_tokens": new_tokens(request),
        "n": 1,
        "stream": False,
        "echo": False,
        "temperature": float(request.temperature),
        "top_p": float(request.top_p),
        "top_k": request.top_k or -1,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": seed_of(run_seed, request.sample_id),
        "stop_token_ids": sorted(request.stop_ids),
        "logprobs": 1,
        "return_token_ids": True,
        "skip_special_tokens": False,
    }


FIELDS = frozenset(
    """model prompt max_tokens n stream echo temperature top_p top_k min_p presence_penalty frequency_penalty
    repetition_penalty seed stop_token_ids logprobs return_token_ids skip_special_tokens""".split()
)
"""The fields of `completion_body`."""


def longest_answer(request: Request) -> int:
    """The most bytes that an answer may have."""
    return BYTES_BESIDE + BYTES_PER_TOKEN * (len(context_of(request)) + new_tokens(request))


def read_completion(
    answer: Any, request: Request, *, vocab_size: int, version: str, versioned: bool
) -> tuple[list[int], list[float]]:
    """The tokens that were sampled, and the log-prob of each, of an answer that is what was asked for.

    Args
      version: of the weights that the server was given. versioned: it was told that name, so where an answer names its
        weights (SGLang's metadata.weight_version) it must be this one.

    Raises Passing: the answer is not one to this request. Refused: it comes of a server that is set up otherwise than
      the protocol asks, so that the next one would be no better.
    """
    choice = _only_choice(answer)
    weights = answer.get("metadata", {}).get("weight_version") if isinstance(answer.get("metadata"), dict) else None
    if versioned and weights is not None and weights != version:
        raise Refused(
            f"expected a completion by the weights {version}, got one by {shown(repr(weights))}: the server has not "
            "taken the new weights; check rollout.server.updates"
        )
    finish = choice.get("finish_reason")
    if finish not in ("stop", "length"):
        raise Passing(f"expected finish_reason 'stop' or 'length', got {shown(repr(finish))}")
    if choice.get("token_ids") is None or choice.get("prompt_token_ids") is None:
        raise Refused(
            "expected token_ids and prompt_token_ids beside the text, got none: the server does not know "
            "return_token_ids; use one that does (docs/outside_engine.md), or rollout.engine 'own'"
        )
    if choice["prompt_token_ids"] != context_of(request).tolist():
        raise Refused(
            "expected the prompt as it was sent, got other tokens in prompt_token_ids: the server adds or cuts some; "
            "start it without a prompt template and with a context that holds data.max_prompt_tokens + "
            "rollout.max_completion_tokens"
        )
    tokens = _tokens(choice["token_ids"], new_tokens(request), vocab_size)
    logprobs = _logprobs(choice.get("logprobs"), len(tokens))
    _check_end(tokens, finish, request)
    return tokens, logprobs


def _only_choice(answer: Any) -> Mapping[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        got = shown(answer) if isinstance(answer, str) else _kind(answer if choices is None else choices)
        raise Passing(f"expected a JSON object with one entry in choices, got {got}")
    return choices[0]


def _tokens(found: Any, limit: int, vocab_size: int) -> list[int]:
    if not isinstance(found, list) or not all(type(token) is int for token in found):
        raise Passing(f"expected token_ids as a list of whole numbers, got {_kind(found)}")
    if not 1 <= len(found) <= limit:
        raise Passing(f"expected 1 to {limit} token_ids, got {len(found)}")
    outside = [token for token in found if not 0 <= token < vocab_size]
    if outside:
        raise Refused(
            f"expected token_ids below the vocabulary of {vocab_size}, got {shown(str(outside[:3]))}: another model is "
            "served; change rollout.server.model"
        )
    return found


def _logprobs(found: Any, count: int) -> list[float]:
    values = found.get("token_logprobs") if isinstance(found, dict) else None
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise Passing(f"expected logprobs.token_logprobs as a list of numbers, got {_kind(values)}")
    if len(values) != count:
        raise Passing(f"expected a log-prob for each of {count} token_ids, got {len(values)}")
    for value in values:
        if not LEAST_LOGPROB <= value <= ROUNDING:  # NaN is neither
            raise Passing(f"expected log-probs of sampled tokens in [{LEAST_LOGPROB:g}, 0], got {shown(str(value))}")
    return [min(float(value), 0.0) for value in values]


def _check_end(tokens: Sequence[int], finish: str, request: Request) -> None:
    """The completion ends with its first stop token, or at its limit, as the server says."""
    early = next((place for place, token in enumerate(tokens[:-1]) if token in request.stop_ids), None)
    if early is not None:
        raise Refused(
            f"expected the completion to end with stop token {tokens[early]}, got {len(tokens) - early - 1} tokens "
            "after it: the server does not know stop_token_ids"
        )
    stopped = tokens[-1] in request.stop_ids
    if finish == "stop" and not stopped:
        raise Refused(
            f"expected a completion that the server calls stopped to end with one of {sorted(request.stop_ids)}, got "
            f"token {tokens[-1]}: add the token to rollout.stop_ids, or start the server so that it returns the stop "
            "token"
        )
    if finish == "length" and not stopped and len(tokens) < new_tokens(request):
        raise Refused(
            f"expected {new_tokens(request)} tokens of a completion that met its limit, got {len(tokens)}: the "
            "server's context is shorter; start it with one that holds data.max_prompt_tokens + "
            "rollout.max_completion_tokens"
        )


def _kind(found: Any) -> str:
    if isinstance(found, list):
        return f"a list of {len(found)}"
    return "nothing" if found is None else type(found).__name__


def probe_body(request: Request, temperature: float, *, model: str) -> dict[str, Any]:
    """The JSON that asks for the likeliest first tokens at a temperature."""
    body = completion_body(request, model=model, run_seed=0)
    changes = {"max_tokens": 1, "temperature": temperature, "top_p": 1.0, "top_k": -1, "logprobs": PROBE_LOGPROBS}
    return body | changes


def kind_of_logprobs(at_one: Any, at_other: Any, temperature: float) -> Literal["after", "before", "unknown"]:
    """Whether a server's log-probs are those after or before temperature, of two answers to `probe_body`.

    The distance d between the likeliest tokens' log-probs at temperature 1 is d / temperature after it, and d before.

    Args
      at_one, at_other: the answers at temperature 1 and at `temperature`.
    """
    one, other = _spread(at_one), _spread(at_other)
    if one is None or other is None or abs(one / temperature - one) < TELLING:
        return "unknown"
    return "after" if abs(other - one / temperature) < abs(other - one) else "before"


def _spread(answer: Any) -> float | None:
    """How far the likeliest tokens' log-probs lie apart; None where the answer does not say."""
    try:
        (first,) = answer["choices"][0]["logprobs"]["top_logprobs"]
        values = sorted((float(value) for value in first.values()), reverse=True)[:PROBE_LOGPROBS]
        spread = values[0] - values[PROBE_LOGPROBS - 1]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None
    return spread if math.isfinite(spread) else None
