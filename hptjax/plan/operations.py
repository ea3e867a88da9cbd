"""How many operations each program of a run carries out, and how often its data-dependent loops are taken to turn."""

from __future__ import annotations

from hptjax.build.attention import cache_block, training_implementation
from hptjax.config import Config
from hptjax.models.attention import Implementation
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
        kind = training_implementation(config, shape, config.mesh.sequence, "tpu")
        pairs = packed_pairs(config, kind)
        forward = forward_flops(shape, tokens=positions, pairs=pairs, logits=positions)
        if name == "score":
            return forward
        return train_flops(forward, recomputed_layers=recomputed(config), flash=kind != "reference")
    bucket = rollout.prompt_buckets[-1]
    if name == "prefill":
        pairs = float(rollout.prefill_rows * bucket * bucket)
        return forward_flops(shape, tokens=rollout.prefill_rows * bucket, pairs=pairs, logits=0)
    if name == "decode":
        tokens = rollout.slots * rollout.tokens_per_call
        return forward_flops(shape, tokens=tokens, pairs=float(tokens * cached_positions(config)), logits=tokens)
    return NOTHING


def program_turns(config: Config, name: str) -> tuple[int, ...]:
    """Turns of a program's loops whose length depends on data, the outermost first: tokens of a call, then the blocks
    of the cache where it is read in blocks."""
    if name != "decode":
        return ()
    block = cache_block(config)
    blocks = () if block is None else (-(-cached_positions(config) // block),)
    return (config.rollout.tokens_per_call, *blocks)


def packed_pairs(config: Config, kind: Implementation) -> float:
    """Pairs of queries and keys that the attention of the train step multiplies: all, or the tiles below the diagonal.

    With the time axis cut, attention in tiles computes all of them, because every device runs the same program.
    """
    rows, tokens, block = config.batch.rows, config.batch.row_tokens, config.model.attention_block
    if kind == "reference" or (kind == "chunked" and config.mesh.sequence > 1):
        return float(rows * tokens * tokens)
    return rows * tokens * (tokens + min(block, tokens)) / 2


def cached_positions(config: Config) -> int:
    """Positions of the cache that a decode step reads per slot: all, or the blocks that hold what is cached halfway."""
    rollout, block = config.rollout, cache_block(config)
    if block is None:
        return rollout.cache_capacity
    halfway = rollout.prompt_buckets[-1] + rollout.max_completion_tokens // 2
    return min(-(-halfway // block) * block, rollout.cache_capacity)


def recomputed(config: Config) -> float:
    """Share of the layers' forward pass that the backward pass does again; of the matmuls, which dominate it."""
    return 0.0 if config.model.remat in ("none", "dots", "dots_no_batch") else 1.0
