"""How many operations each program of a run carries out, and how often its data-dependent loops are taken to turn."""

from __future__ import annotations

from hptjax.config import Config
from hptjax.models.shape import DecoderConfig
from hptjax.plan.count import Flops, forward_flops, train_flops

NOTHING = Flops(0.0, 0.0, 0.0)


def program_flops(config: Config, shape: DecoderConfig, name: str) -> Flops:
    """Of one call of a program, on all devices together; of decode, one call's tokens.

    Decode is taken in the middle of its completions: half of the completion is cached beside the whole prompt.
    """
    batch, rollout = config.batch, config.rollout
    positions = batch.rows * batch.row_tokens
    if name in ("train step", "score"):
        pairs = packed_pairs(config, batch.rows, batch.row_tokens)
        forward = forward_flops(shape, tokens=positions, pairs=pairs, logits=positions)
        if name == "score":
            return forward
        return train_flops(forward, recomputed_layers=recomputed(config), flash=keeps_no_scores(config))
    bucket = rollout.prompt_buckets[-1]
    if name == "prefill":
        pairs = float(rollout.prefill_rows * bucket * bucket)
        return forward_flops(shape, tokens=rollout.prefill_rows * bucket, pairs=pairs, logits=0)
    if name == "decode":
        tokens = rollout.slots * rollout.tokens_per_call
        return forward_flops(shape, tokens=tokens, pairs=float(tokens * cached_positions(config)), logits=tokens)
    return NOTHING


def program_turns(config: Config, name: str) -> tuple[int, ...]:
    """Turns of a program's loops whose length depends on data, the outermost first: tokens of a call."""
    return (config.rollout.tokens_per_call,) if name == "decode" else ()


def packed_pairs(config: Config, rows: int, row_tokens: int) -> float:
    """Pairs of queries and keys that the attention of the train step multiplies."""
    return float(rows * row_tokens * row_tokens)


def cached_positions(config: Config) -> int:
    """Positions of the cache that a decode step reads per slot."""
    return config.rollout.cache_capacity


def recomputed(config: Config) -> float:
    """Share of the layers' forward pass that the backward pass does again."""
    return 1.0 if config.model.remat else 0.0


def keeps_no_scores(config: Config) -> bool:
    """Whether attention makes its scores again in the backward pass instead of keeping them."""
    return False
