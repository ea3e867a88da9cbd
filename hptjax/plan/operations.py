"""How many operations each program of a run carries out, and how often its data-dependent loops are taken to turn."""

from __future__ import annotations

import dataclasses

from hptjax.build.attention import cache_block, training_implementation
from hptjax.config import Config
from hptjax.config_batch import row_positions, shared_tokens
from hptjax.model_shape import adapter_count, asked_adapter
from hptjax.models.attention import Implementation
from hptjax.models.shape import DecoderConfig
from hptjax.plan.count import Flops, forward_flops, layer_weights, train_flops

NOTHING = Flops(0.0, 0.0, 0.0)
# Of the layers' forward pass, what each remat policy does again in the backward pass: (weights' matmuls, attention).
# The last matmul of a layer is not needed again, which the compiler sees; it is left out in `program_flops`.
DONE_AGAIN = {
    "none": (0.0, 0.0),
    "full": (1.0, 1.0),
    "offload": (1.0, 1.0),
    "attention": (1.0, 0.0),
    "dots": (0.0, 0.0),
    "dots_no_batch": (0.0, 1.0),
}


def program_flops(config: Config, shape: DecoderConfig, name: str, *, platform: str = "tpu") -> Flops:
    """Of one call of a program, on all devices together; of decode, one call's tokens.

    Decode is taken in the middle of its completions: half of the completion is cached beside the whole prompt.
    """
    batch, rollout = config.batch, config.rollout
    positions, own = batch.rows * row_positions(config), batch.rows * batch.row_tokens
    if name in ("train step", "score"):
        kind = training_implementation(config, shape, config.mesh.sequence, platform)
        pairs = batch.rows * multiplied_pairs(config, kind)
        forward = forward_flops(shape, tokens=positions, pairs=pairs, logits=own)
        adapters = adapter_flops(config, shape, positions)
        if name == "score":
            return dataclasses.replace(forward, matmuls=forward.matmuls + (adapters or 0.0))
        matmuls, attention = DONE_AGAIN[config.model.remat]
        if kind in ("reference", "cudnn") and config.model.remat == "attention":
            attention = 1.0  # these name nothing that could be kept
        down = shape.mlp_size * shape.hidden_size * shape.num_layers * 2.0 * positions
        again = matmuls * (forward.matmuls - down)
        flash = kind != "reference"
        return train_flops(forward, again_matmuls=again, again_attention=attention, flash=flash, adapters=adapters)
    if name == "prefill":
        bucket = rollout.prompt_buckets[-1]
        pairs = float(rollout.prefill_rows * bucket * bucket)
        return forward_flops(shape, tokens=rollout.prefill_rows * bucket, pairs=pairs, logits=0)
    lora = asked_adapter(config)
    if name == "merge" and lora is not None:
        return Flops(2.0 * lora.rank * layer_weights(shape), 0.0, 0.0)  # at most: of all seven matrices
    if name == "decode":
        tokens = rollout.slots * rollout.tokens_per_call
        return forward_flops(shape, tokens=tokens, pairs=float(tokens * cached_positions(config)), logits=tokens)
    return NOTHING


def adapter_flops(config: Config, shape: DecoderConfig, tokens: int) -> float | None:
    """Of a forward pass of so many tokens through the adapters; None where the model is trained."""
    lora = asked_adapter(config)
    return None if lora is None else 2.0 * tokens * adapter_count(shape, lora)


def program_turns(config: Config, name: str) -> tuple[int, ...]:
    """Turns of a program's loops whose length depends on data, the outermost first: tokens of a call, cache blocks;
    slots that are entered."""
    if name == "enter":
        return (config.rollout.slots,)
    if name != "decode":
        return ()
    block = cache_block(config, "tpu")
    blocks = () if block is None else (-(-cached_positions(config) // block),)
    return (config.rollout.tokens_per_call, *blocks)


def multiplied_pairs(config: Config, kind: Implementation) -> float:
    """Pairs of query and key that the attention of one row multiplies: all, or the tiles on and below the diagonal.

    With the time axis cut, attention in tiles computes all of them, because every device runs the same program.
    """
    tokens, block = config.batch.row_tokens, config.model.attention_block
    if config.batch.share_prompts:
        prompt, lane = shared_tokens(config), tokens // config.batch.lanes
        return float(prompt * prompt + tokens * (prompt + lane))
    if kind == "reference" or (kind == "chunked" and config.mesh.sequence > 1):
        return float(tokens * tokens)
    return tokens * (tokens + min(block, tokens)) / 2


def cached_positions(config: Config) -> int:
    """Positions of the cache that a decode step reads per slot: all, or the blocks that hold what is cached halfway."""
    rollout, block = config.rollout, cache_block(config, "tpu")
    if block is None:
        return rollout.cache_capacity
    halfway = rollout.prompt_buckets[-1] + rollout.max_completion_tokens // 2
    return min(-(-halfway // block) * block, rollout.cache_capacity)
