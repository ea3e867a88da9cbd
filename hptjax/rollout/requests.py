"""What the sampler is asked for and what it gives back: compiled sizes, checks of requests, finished samples.

Dims: S slots, R prefill rows, P prompt bucket, W stop ids of a slot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from hptjax.records import FinishReason, Request, Sample, Source
from hptjax.types import Array


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """Every size that is compiled in; the values come from the config.

    Args
      slots: rows that decode together. prefill_rows: contexts that are prefilled together.
      prompt_buckets: lengths of compiled prefills, rising; a context (prompt and prefix) takes the first that holds it.
      cache_capacity: positions of a slot's cache: prompt and completion.
      tokens_per_call: tokens that one call to the device decodes at most.
      max_stop_ids: size of a slot's stop set.
      cache_positions: of all slots together, in pages of cache_page that slots take as their samples grow; None is
        the whole capacity for each slot. cache_parts: equal shares of slots and pages, one per device that slots are
        cut over; a sample takes pages of its slot's share.
      precision: says what the policy holds in another type than it computes with, if anything; stands in `describe`.
    """

    vocab_size: int
    slots: int
    prefill_rows: int
    prompt_buckets: tuple[int, ...]
    cache_capacity: int
    tokens_per_call: int
    max_stop_ids: int
    cache_positions: int | None = None
    cache_page: int = 64
    cache_parts: int = 1
    precision: str = ""

    def __post_init__(self) -> None:
        for name in ("slots", "prefill_rows", "cache_capacity", "tokens_per_call", "cache_page"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("vocab_size", "max_stop_ids"):  # not in the config
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        buckets = self.prompt_buckets
        if not buckets or buckets[0] < 1 or list(buckets) != sorted(set(buckets)):
            raise ValueError(f"rollout.prompt_buckets: expected rising positive lengths, got {buckets}")
        if buckets[-1] > self.cache_capacity:
            raise ValueError(
                f"rollout.prompt_buckets: the largest, {buckets[-1]}, does not fit in rollout.cache_capacity "
                f"{self.cache_capacity}; lower the one or raise the other"
            )

        if self.cache_positions is not None and self.pages < self.cache_parts * self.pages_per_slot:
            fewest = self.cache_parts * self.pages_per_slot * self.cache_page
            raise ValueError(
                f"rollout.cache_positions: expected at least {fewest}, "
                f"room for one sample (rollout.cache_capacity in pages of rollout.cache_page) on each of "
                f"{self.cache_parts} device(s) that slots are cut over, got {self.cache_positions}; raise it"
            )

    @property
    def pages(self) -> int:
        """Pages of all slots together; 0 where each slot has its own row."""
        return (self.cache_positions or 0) // (self.cache_page * self.cache_parts) * self.cache_parts

    @property
    def pages_per_slot(self) -> int:
        """Pages that a sample may have."""
        return -(-self.cache_capacity // self.cache_page)

    @property
    def cache_sizes(self) -> tuple[int, int]:
        """Rows and positions of the cache's arrays: pages and their size, or slots and their capacity."""
        in_pages = self.cache_positions is not None
        return (self.pages, self.cache_page) if in_pages else (self.slots, self.cache_capacity)

    @property
    def most_copies(self) -> int:
        """Pages that are filled when a sample enters every slot."""
        blocks = 1 if self.cache_positions is None else -(-self.prompt_buckets[-1] // self.cache_page)
        return self.slots * blocks

    def bucket(self, context_tokens: int) -> int:
        """The compiled prefill length of a context of this many tokens."""
        return next(bucket for bucket in self.prompt_buckets if bucket >= context_tokens)

    def describe(self, request: Request) -> str:
        """The compiled shape that samples this request; equal strings promise bitwise replay."""
        bucket = self.bucket(context_tokens(request))
        path = "truncated" if truncates(request) else "plain"
        cache = f"{self.cache_capacity}" + (f"({self.pages}x{self.cache_page})" if self.pages else "")
        return (
            f"slots={self.slots} prefill={self.prefill_rows}x{bucket} cache={cache} "
            f"call={self.tokens_per_call} stops={self.max_stop_ids} {path}"
        ) + (f" {self.precision}" if self.precision else "")


def truncates(request: Request) -> bool:
    """True where top-k or top-p cut the distribution: these requests run the path that sorts."""
    return request.top_k > 0 or request.top_p < 1.0


def needs_sampling(request: Request) -> bool:
    """False where the forced prefix is the whole completion: as long as the limit, or ended by a stop id."""
    prefix = request.prefix_tokens
    return len(prefix) < request.max_completion_tokens and not (len(prefix) and int(prefix[-1]) in request.stop_ids)


def new_tokens(request: Request) -> int:
    """How many tokens may be sampled: the limit, less the forced prefix."""
    return request.max_completion_tokens - len(request.prefix_tokens)


def context_tokens(request: Request) -> int:
    """Tokens of prompt and forced prefix."""
    return len(request.prompt_tokens) + len(request.prefix_tokens)


def context_of(request: Request) -> Int[np.ndarray, " c"]:
    """Prompt and forced prefix: what the cache must hold before the first token is sampled."""
    return np.concatenate([np.asarray(request.prompt_tokens), np.asarray(request.prefix_tokens)]).astype(np.int32)


def check_requests(requests: Sequence[Request], shape: DecodeShape) -> None:
    """Refuses what cannot be sampled, before anything runs.

    Raises ValueError naming the sample and the config field: an id twice or beyond int32, an empty prompt, a token or
    stop id outside the vocab, a limit below 1 or below the prefix, a temperature or top-k/top-p out of range, too
    many stop ids, a context beyond the largest bucket, a completion beyond the cache.
    """
    seen = set()
    for request in requests:
        problem = _problem(request, shape)
        if request.sample_id in seen:
            problem = "its id came twice; expected a different (question, round, index) for each request"
        seen.add(request.sample_id)
        if problem:
            raise ValueError(f"request {request.sample_id}: {problem}")


def _problem(request: Request, shape: DecodeShape) -> str | None:
    prompt, prefix = len(request.prompt_tokens), len(request.prefix_tokens)
    limit, vocab = request.max_completion_tokens, shape.vocab_size
    if prompt == 0:
        return "empty prompt; expected at least 1 token (a begin token will do)"
    if limit < 1 or prefix > limit:
        return (
            f"max_completion_tokens {limit} with a forced prefix of {prefix} tokens; expected a limit of at least 1 "
            f"that holds the prefix: raise rollout.max_completion_tokens"
        )
    if prompt + prefix > shape.prompt_buckets[-1] and needs_sampling(request):
        return (
            f"its context has {prompt} prompt + {prefix} prefix tokens, more than the largest bucket "
            f"{shape.prompt_buckets[-1]}; add a larger one to rollout.prompt_buckets"
        )
    if prompt + limit > shape.cache_capacity:
        return (
            f"{prompt} prompt tokens + a limit of {limit} do not fit in {shape.cache_capacity} cache positions; "
            f"raise rollout.cache_capacity"
        )
    if not 0.0 < request.temperature < float("inf"):
        return f"rollout.temperature {request.temperature}; expected > 0 (greedy decoding is rollout.top_k = 1)"
    if request.top_k < 0:
        return f"rollout.top_k {request.top_k}; expected 0 (off) or more"
    if not 0.0 < request.top_p <= 1.0:
        return f"rollout.top_p {request.top_p}; expected in (0, 1], 1 being off"
    if len(request.stop_ids) > shape.max_stop_ids:
        return f"{len(request.stop_ids)} stop ids; expected at most {shape.max_stop_ids}, the engine's max_stop_ids"
    if any(not 0 <= stop < vocab for stop in request.stop_ids):
        return f"stop ids {sorted(request.stop_ids)}; expected each in [0, {vocab})"
    if any(not -(2**31) <= part < 2**31 for part in request.sample_id):
        return "expected question, round and index in the range of int32"
    for tokens in (request.prompt_tokens, request.prefix_tokens):
        if len(tokens) and (tokens.min() < 0 or tokens.max() >= vocab):
            return f"tokens from {tokens.min()} to {tokens.max()}; expected each in [0, {vocab}): wrong tokenizer?"
    return None


def finished_sample(
    request: Request, new_tokens: Int[Array, " n"], new_logprobs: Float[Array, " n"], shape: DecodeShape
) -> Sample:
    """`sample_of` for what the engine has sampled with these sizes.

    Raises FloatingPointError where a log-prob is not finite: the weights or the activations have diverged.
    """
    if not np.isfinite(new_logprobs).all():
        raise FloatingPointError(
            f"request {request.sample_id}: expected finite sampler log-probs, got {new_logprobs}; the policy has "
            f"diverged: go back to an earlier checkpoint with a lower optimizer.learning_rate"
        )
    decode_shape = shape.describe(request) if needs_sampling(request) else ""
    return sample_of(request, new_tokens, new_logprobs, decode_shape=decode_shape)


def sample_of(
    request: Request, new_tokens: Int[Array, " n"], new_logprobs: Float[Array, " n"], *, decode_shape: str
) -> Sample:
    """The sample of a request and of what was sampled for it; the forced prefix carries log-prob 0.

    Args
      decode_shape: what has sampled it; "" where the forced prefix is all of it.
    """
    prefix = np.asarray(request.prefix_tokens).astype(np.int32)
    completion = np.concatenate([prefix, new_tokens])
    stopped = len(completion) > 0 and int(completion[-1]) in request.stop_ids
    return Sample(
        sample_id=request.sample_id,
        group_id=request.sample_id.question,
        source=Source.PREFIX if len(prefix) else Source.ROLLOUT,
        prompt_tokens=request.prompt_tokens,
        completion_tokens=completion,
        sampler_logprobs=np.concatenate([np.zeros(len(prefix), np.float32), new_logprobs]),
        finish_reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
        prefix_len=len(prefix),
        temperature=request.temperature,
        decode_shape=decode_shape,
    )
