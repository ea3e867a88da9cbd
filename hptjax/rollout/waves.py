"""The host side of rollout: which requests share a wave, and the fixed-shape arrays that a wave sends to the device.

A wave fills up to `slots` places of the compiled decode shape. What shares a wave is a matter of speed only: prefill
bucket, noise and compiled path of a sample follow from its own request (contract 4).

Dims: S slots, R prefill rows, P prompt bucket, W stop ids of a slot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int, Int32, UInt32

from hptjax.records import FinishReason, Request, Sample, Source
from hptjax.types import Array

NO_ROW = -1  # a slot that a prefill call leaves alone


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """Every size that is compiled in; the values come from the config.

    Args
      slots: rows that decode together. prefill_rows: contexts that are prefilled together.
      prompt_buckets: lengths of compiled prefills, rising; a context (prompt and prefix) takes the first that holds it.
      cache_capacity: positions of a slot's cache: prompt and completion.
      tokens_per_call: tokens that one call to the device decodes at most.
      max_stop_ids: size of a slot's stop set.
    """

    vocab_size: int
    slots: int
    prefill_rows: int
    prompt_buckets: tuple[int, ...]
    cache_capacity: int
    tokens_per_call: int
    max_stop_ids: int

    def __post_init__(self) -> None:
        for name in ("slots", "prefill_rows", "cache_capacity", "tokens_per_call"):
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

    def bucket(self, context_tokens: int) -> int:
        """The compiled prefill length of a context of this many tokens."""
        return next(bucket for bucket in self.prompt_buckets if bucket >= context_tokens)

    def describe(self, request: Request) -> str:
        """The compiled shape that samples this request; equal strings promise bitwise replay."""
        bucket = self.bucket(len(request.prompt_tokens) + len(request.prefix_tokens))
        path = "truncated" if truncates(request) else "plain"
        return (
            f"slots={self.slots} prefill={self.prefill_rows}x{bucket} cache={self.cache_capacity} "
            f"call={self.tokens_per_call} stops={self.max_stop_ids} {path}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Prefill:
    """One prefill call: R contexts, and for each slot the row it copies (NO_ROW: the slot keeps what it has)."""

    tokens: Int32[np.ndarray, "R P"]
    lengths: Int32[np.ndarray, " R"]
    row_of_slot: Int32[np.ndarray, " S"]


@dataclasses.dataclass(frozen=True, eq=False)
class WaveRows:
    """What the slots of one wave need, as arrays, so that no setting is compiled in. Empty slots have new_tokens 0.

    Args
      ids: question, round, index of each sample as uint32 (see sampling.sample_keys).
      last_token, last_position: the final token of the context and its place in the cache.
      prefix_lens: completion position of the first sampled token. new_tokens: how many may be sampled.
    """

    ids: UInt32[np.ndarray, "S 3"]
    last_token: Int32[np.ndarray, " S"]
    last_position: Int32[np.ndarray, " S"]
    prefix_lens: Int32[np.ndarray, " S"]
    new_tokens: Int32[np.ndarray, " S"]
    temperature: Float[np.ndarray, " S"]
    top_k: Int32[np.ndarray, " S"]
    top_p: Float[np.ndarray, " S"]
    stop_ids: Int32[np.ndarray, "S W"]


def truncates(request: Request) -> bool:
    """True where top-k or top-p cut the distribution: these requests run the path that sorts."""
    return request.top_k > 0 or request.top_p < 1.0


def needs_sampling(request: Request) -> bool:
    """False where the forced prefix is the whole completion: as long as the limit, or ended by a stop id."""
    prefix = request.prefix_tokens
    return len(prefix) < request.max_completion_tokens and not (len(prefix) and int(prefix[-1]) in request.stop_ids)


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


def plan_waves(requests: Sequence[Request], shape: DecodeShape) -> Iterator[list[int]]:
    """Places in `requests`, at most `slots` at a time, in an order that follows from the requests alone.

    Requests that truncate never share a wave with plain ones, so each runs the path that its own settings ask for.
    Then by bucket and limit, so that a wave's rows end together, then by id, so that a group shares its prefill.
    """

    def order(place: int):
        request = requests[place]
        bucket = shape.bucket(len(request.prompt_tokens) + len(request.prefix_tokens))
        limit = request.max_completion_tokens - len(request.prefix_tokens)
        return bucket, limit, request.sample_id

    ordered = sorted((place for place in range(len(requests)) if needs_sampling(requests[place])), key=order)
    for path in (False, True):
        places = [place for place in ordered if truncates(requests[place]) == path]
        for start in range(0, len(places), shape.slots):
            yield places[start : start + shape.slots]


def plan_prefills(wave: Sequence[Request], shape: DecodeShape, pad_id: int) -> Iterator[Prefill]:
    """The prefill calls of a wave: each different context once, in the bucket of its own length."""
    slots_of_context: dict[int, dict[bytes, list[int]]] = {}
    contexts = [context_of(request) for request in wave]
    for slot, context in enumerate(contexts):
        in_bucket = slots_of_context.setdefault(shape.bucket(len(context)), {})
        in_bucket.setdefault(context.tobytes(), []).append(slot)
    for bucket in sorted(slots_of_context):
        groups = list(slots_of_context[bucket].values())
        for start in range(0, len(groups), shape.prefill_rows):
            tokens = np.full((shape.prefill_rows, bucket), pad_id, np.int32)
            lengths = np.ones(shape.prefill_rows, np.int32)  # an unused row is one pad token: its attention is defined
            row_of_slot = np.full(shape.slots, NO_ROW, np.int32)
            for row, slots in enumerate(groups[start : start + shape.prefill_rows]):
                context = contexts[slots[0]]
                tokens[row, : len(context)] = context
                lengths[row] = len(context)
                row_of_slot[slots] = row
            yield Prefill(tokens, lengths, row_of_slot)


def wave_rows(wave: Sequence[Request], shape: DecodeShape, pad_id: int) -> WaveRows:
    """The wave's requests as arrays over the slots; slots past the last request are empty."""
    slots = shape.slots
    rows = WaveRows(
        ids=np.zeros((slots, 3), np.uint32),
        last_token=np.full(slots, pad_id, np.int32),
        last_position=np.zeros(slots, np.int32),
        prefix_lens=np.zeros(slots, np.int32),
        new_tokens=np.zeros(slots, np.int32),
        temperature=np.ones(slots, np.float32),
        top_k=np.zeros(slots, np.int32),
        top_p=np.ones(slots, np.float32),
        stop_ids=np.full((slots, shape.max_stop_ids), -1, np.int32),
    )
    for slot, request in enumerate(wave):
        prompt, prefix = request.prompt_tokens, request.prefix_tokens
        rows.ids[slot] = np.array(request.sample_id, np.int32).view(np.uint32)
        rows.last_token[slot] = prefix[-1] if len(prefix) else prompt[-1]
        rows.last_position[slot] = len(prompt) + len(prefix) - 1
        rows.prefix_lens[slot] = len(prefix)
        rows.new_tokens[slot] = request.max_completion_tokens - len(prefix)
        rows.temperature[slot] = request.temperature
        rows.top_k[slot] = request.top_k
        rows.top_p[slot] = request.top_p
        rows.stop_ids[slot, : len(request.stop_ids)] = sorted(request.stop_ids)
    return rows


def finished_sample(
    request: Request, new_tokens: Int[Array, " n"], new_logprobs: Float[Array, " n"], shape: DecodeShape
) -> Sample:
    """The sample of a request and of what was sampled for it; the forced prefix carries log-prob 0.

    Raises FloatingPointError where a log-prob is not finite: the weights or the activations have diverged.
    """
    if not np.isfinite(new_logprobs).all():
        raise FloatingPointError(
            f"request {request.sample_id}: expected finite sampler log-probs, got {new_logprobs}; the policy has "
            f"diverged: go back to an earlier checkpoint with a lower optimizer.learning_rate"
        )
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
        decode_shape=shape.describe(request) if needs_sampling(request) else "",
    )
