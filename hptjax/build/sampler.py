"""What the rollout engine is made of for a config: compiled sizes, the policy's functions, where its arrays live."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from hptjax.build.attention import cache_block, prefill_attention
from hptjax.config import Config
from hptjax.models import decoder, decoder_apart
from hptjax.models.cache import cache_axes, cache_shapes
from hptjax.models.shape import DecoderConfig
from hptjax.rollout.programs import RolloutShardings, as_they_are
from hptjax.rollout.requests import DecodeShape
from hptjax.sharding.mesh import row_sharding
from hptjax.sharding.rules import Rules, make_constrain, named_shardings, parts, replicated

MAX_STOP_IDS = 8  # of a request
FEW_LAYERS = 16  # so many are written out one after the other for the CPU, which copies what a loop over layers reads


def decode_shape(config: Config, vocab_size: int, parts: int) -> DecodeShape:
    """The compiled sizes of rollouts, slots cut over so many devices. Raises ValueError for sizes that cannot work."""
    rollout = config.rollout
    return DecodeShape(
        vocab_size=vocab_size,
        slots=rollout.slots,
        prefill_rows=rollout.prefill_rows,
        prompt_buckets=rollout.prompt_buckets,
        cache_capacity=rollout.cache_capacity,
        tokens_per_call=rollout.tokens_per_call,
        max_stop_ids=MAX_STOP_IDS,
        cache_positions=rollout.cache_positions,
        cache_page=rollout.cache_page,
        cache_parts=parts,
        precision=" ".join(f"{what}=int8" for what in int8_parts(config)),
    )


def int8_parts(config: Config) -> list[str]:
    """What rollouts hold as int8: weights, cache, both or neither."""
    rollout = config.rollout
    held = {"weights": rollout.weights_dtype, "cache": rollout.cache_dtype}
    return [name for name, dtype in held.items() if dtype == "int8"]


def is_written_out(shape: DecoderConfig, mesh: jax.sharding.Mesh) -> bool:
    """Whether programs of this decoder have its layers one after the other, where a loop over them is the default."""
    return mesh.devices.flat[0].platform == "cpu" and shape.num_layers <= FEW_LAYERS


def has_layers_apart(config: Config, shape: DecoderConfig, mesh: jax.sharding.Mesh) -> bool:
    """Whether rollouts have a cache for each layer: where layers are written out and the cache is read whole."""
    rollout = config.rollout
    whole = cache_block(config, mesh.devices.flat[0].platform) is None and rollout.cache_positions is None
    return whole and rollout.cache_dtype != "int8" and is_written_out(shape, mesh)


def sampler_functions(config: Config, shape: DecoderConfig, mesh: jax.sharding.Mesh, rules: Rules) -> dict[str, Any]:
    """What `rollout.engine` asks of a policy, by the names of its arguments; `rules`: the table of rollouts."""
    dtype = jnp.dtype(config.model.compute_dtype)
    bound: dict[str, Any] = {"config": shape, "compute_dtype": dtype, "constrain": make_constrain(mesh, rules)}
    attention = prefill_attention(config, shape, mesh, rules)
    shared = {"unembedding": lambda params: decoder.unembedding(params, shape).astype(dtype)}
    if has_layers_apart(config, shape, mesh):
        return shared | {
            "prefill": partial(decoder_apart.prefill_apart, **bound, attention=attention),
            "decode_step": partial(decoder_apart.decode_step_apart, **bound),
            "prepare": decoder_apart.layers_apart,
            "position_axis": decoder_apart.POSITION_AXIS,
        }
    int8, block = config.rollout.cache_dtype == "int8", cache_block(config, mesh.devices.flat[0].platform)
    cut = parts(mesh.shape, "batch", rules)
    return shared | {
        "prefill": partial(decoder.prefill, **bound, attention=attention, int8_cache=int8),
        "decode_step": partial(decoder.decode_step, **bound, cache_block=block, parts=cut),
        "prepare": as_they_are,
        "position_axis": cache_axes().keys.index("cache"),
    }


def rollout_shardings(config: Config, shape: DecoderConfig, mesh: jax.sharding.Mesh, rules: Rules) -> RolloutShardings:
    """Slots as the rows of a micro-batch; the cache by its logical axes (few kv heads are copied)."""
    int8 = config.rollout.cache_dtype == "int8"
    sizes = decode_shape(config, shape.vocab_size, parts(mesh.shape, "batch", rules))
    axes, shapes = cache_axes(int8=int8), cache_shapes(shape, *sizes.cache_sizes, int8=int8)
    apart = has_layers_apart(config, shape, mesh)
    if apart:
        axes, shapes = decoder_apart.of_one_layer(axes), decoder_apart.of_one_layer(shapes)
    cache = named_shardings(mesh, axes, shapes, rules)
    return RolloutShardings(
        rows=row_sharding(mesh, rules),
        cache=(cache,) * shape.num_layers if apart else cache,
        replicated=replicated(mesh),
    )
