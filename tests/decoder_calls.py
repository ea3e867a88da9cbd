"""Our decoder asked what the reference is asked (`tests/oracles/cases.py`), by what training and rollouts call."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from hptjax.losses.logprobs import token_logprobs
from hptjax.models import decoder
from hptjax.models.folder import stored_names
from hptjax.models.folder_config import family
from hptjax.models.shape import DecoderConfig
from hptjax.records import Request, Sample, SampleId
from hptjax.rollout.engine import make_engine

CHUNK_TOKENS = 16  # fewer than a row, so that the vocabulary is looked at in several chunks


def padded_and_packed(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each part alone in a row that is filled up, then all of them in one row; as `packed`, [P + 1, T]."""
    total = sum(map(len, parts)) + 4
    rows = [packed([part], room=total - len(part)) for part in parts] + [packed(parts, room=4)]
    tokens, positions, segments = (np.concatenate(each) for each in zip(*rows, strict=True))
    return tokens, positions, segments


def packed(parts: list[np.ndarray], room: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, positions and segment ids of one row that holds all parts, and `room` padding; [1 T] each."""
    tokens = np.concatenate([*parts, np.full(room, 3, np.int32)])[None]
    positions = np.concatenate([*(np.arange(len(part)) for part in parts), np.zeros(room)])[None]
    numbers = [np.full(len(part), number) for number, part in enumerate(parts, start=1)]
    return tokens, positions.astype(np.int32), np.concatenate([*numbers, np.zeros(room)])[None].astype(np.int32)


def apart(row: np.ndarray, parts: list[np.ndarray]) -> list[np.ndarray]:
    """A packed row's values, cut into its parts."""
    return np.split(row[: sum(map(len, parts))], np.cumsum([len(part) for part in parts])[:-1])


@functools.cache
def _programs(config: DecoderConfig) -> tuple[Any, Any, Any]:
    bound = {"config": config, "compute_dtype": jnp.float32}

    def logits(params: Any, tokens: Any, positions: Any, segments: Any) -> Any:
        hidden = decoder.forward(params, tokens, positions, segments, **bound)
        return hidden @ decoder.unembedding(params, config)

    def logits_of(hidden: Any, params: Any) -> Any:
        return hidden @ decoder.unembedding(params, config)

    def prefill(params: Any, tokens: Any, lengths: Any, capacity: int) -> Any:
        hidden, cache = decoder.prefill(params, tokens, lengths, capacity=capacity, **bound)
        return logits_of(hidden, params), cache

    def decode(params: Any, cache: Any, tokens: Any, lengths: Any) -> Any:
        hidden, cache = decoder.decode_step(params, cache, tokens, lengths, **bound)
        return logits_of(hidden, params), cache

    return jax.jit(logits), jax.jit(prefill, static_argnames="capacity"), jax.jit(decode)


def forward_logits(params: Any, config: DecoderConfig, tokens: Any, positions: Any, segments: Any) -> np.ndarray:
    """[B T V] of packed rows."""
    return np.asarray(_programs(config)[0](params, tokens, positions, segments))


def cached_logits(params: Any, config: DecoderConfig, rows: np.ndarray, lengths: Any, prompts: Any) -> list[np.ndarray]:
    """Per row [T - P + 1, V]: the prompt's last position, then token after token through the cache, rows together."""
    _, prefill, decode = _programs(config)
    at, number = np.array(prompts, np.int32), np.arange(len(rows))
    logits, cache = prefill(params, rows[:, : at.max()], at, capacity=rows.shape[1])
    found = [np.asarray(logits)[number, at - 1]]
    while np.any(at < lengths):
        logits, cache = decode(params, cache, rows[number, np.minimum(at, rows.shape[1] - 1)], at)
        found.append(np.asarray(logits))
        at = at + 1
    steps = np.stack(found, axis=1)
    return [
        steps[row, : length - prompt + 1] for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True))
    ]


def completion_logprobs(
    params: Any, config: DecoderConfig, parts: list[np.ndarray], prompts: Any, temperature: float
) -> list[np.ndarray]:
    """log pi of each part's tokens after its prompt, by the packed forward that training scores with."""
    tokens, positions, segments = packed(parts, room=3)

    def logprobs(params: Any) -> Any:
        return _token_logprobs(params, config, tokens, positions, segments, temperature)

    row = np.asarray(jax.jit(logprobs)(params))[0]
    return [part[prompt - 1 : -1] for part, prompt in zip(apart(row, parts), prompts, strict=True)]


def loss_and_gradients(
    params: Any, config: DecoderConfig, parts: list[np.ndarray], prompts: Any
) -> tuple[float, dict[str, np.ndarray]]:
    """Mean negative log-prob of the completion tokens of a packed row, and its gradient in the checkpoint's layout."""
    tokens, positions, segments = packed(parts, room=5)
    live = np.zeros(tokens.shape, np.float32)
    start = 0
    for part, prompt in zip(parts, prompts, strict=True):
        live[0, start + prompt - 1 : start + len(part) - 1] = 1.0
        start += len(part)

    def loss(params: Any) -> Any:
        logprobs = _token_logprobs(params, config, tokens, positions, segments, 1.0)
        return -jnp.sum(logprobs * live) / live.sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    flat = traverse_util.flatten_dict(jax.tree.map(np.asarray, gradient))
    return float(value), {
        name: entry.to_stored(flat[entry.path] if layer is None else flat[entry.path][layer])
        for name, (entry, layer) in stored_names(family(config)[1], config).items()
    }


def _token_logprobs(
    params: Any, config: DecoderConfig, tokens: Any, positions: Any, segments: Any, temperature: float
) -> Any:
    hidden = decoder.forward(
        params, tokens, positions, segments, config=config, compute_dtype=jnp.float32, remat="full"
    )
    targets = np.roll(tokens, -1, axis=1)
    return token_logprobs(
        hidden,
        decoder.unembedding(params, config),
        targets,
        np.full(targets.shape, temperature, np.float32),
        chunk_tokens=CHUNK_TOKENS,
        want_entropy=False,
    ).logprobs


def sample(
    params: Any, config: DecoderConfig, prompts: list[np.ndarray], tokens: int, *, temperature: float, top_k: int = 0
) -> list[Sample]:
    """Completions of exactly so many tokens by the rollout engine; top_k 1 is greedy."""
    longest = max(map(len, prompts))
    bound = {"config": config, "compute_dtype": jnp.float32}
    engine = make_engine(
        prefill=functools.partial(decoder.prefill, capacity=longest + tokens, **bound),
        decode_step=functools.partial(decoder.decode_step, **bound),
        unembedding=functools.partial(decoder.unembedding, config=config),
        vocab_size=config.vocab_size,
        slots=len(prompts),
        prompt_buckets=(longest,),
        cache_capacity=longest + tokens,
        tokens_per_call=tokens,
        pad_id=0,
    )
    requests = [
        Request(SampleId(number, 0, 0), prompt, tokens, frozenset(), temperature=temperature, top_k=top_k)
        for number, prompt in enumerate(prompts)
    ]
    return engine(params, requests, jax.random.key(0))
