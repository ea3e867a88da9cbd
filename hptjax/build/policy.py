"""The policy of a run: decoder, parameters on their mesh, tokenizer, and the compiled functions that use them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from hptjax.build.adapters import BASE, Frozen, as_used, first_adapters, place_adapters
from hptjax.build.attention import training_attention
from hptjax.build.mesh import build_mesh, check_mesh, offer_cpu_devices, rollout_rules, training_rules
from hptjax.build.sampler import decode_shape, is_written_out, rollout_shardings, sampler_functions
from hptjax.config import Config
from hptjax.data.tokenizer import load_tokenizer, stop_ids, vocabulary_size
from hptjax.losses.logprobs import TokenStats, token_logprobs
from hptjax.model_shape import asked_adapter, decoder_shape
from hptjax.models import decoder
from hptjax.models.attention_shared import SharedPrompt
from hptjax.models.folder_config import read_eos_ids
from hptjax.models.folder_slices import load_placed
from hptjax.models.quantise import quantised_matrices, with_scales
from hptjax.models.shape import DecoderConfig
from hptjax.rollout.engine import make_engine
from hptjax.rollout.programs import RolloutShardings
from hptjax.sharding.reshard import make_reshard
from hptjax.sharding.rules import Rules, make_constrain, named_shardings, parts, shard_tree
from hptjax.train.objective import TokenStatsFn, per_token
from hptjax.types import MicroBatch, Params


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """A model in place: everything the run needs of it.

    Args
      params: what is trained, float32, sharded over `mesh` by `rules`: the model, or adapters of it.
      shardings: the same tree. frozen: the model, where adapters are trained.
      sample: the rollout engine, (params, requests, key, *, should_stop, on_finished) -> samples.
      token_stats: want_entropy -> the model call of the losses, on what `frozen.policy_of` makes.
      stop_ids: any of them ends a completion: the tokenizer's eos, those of the folder's generation_config.json, and
        `rollout.stop_ids`.
    """

    config: DecoderConfig
    params: Params
    shardings: Any
    mesh: jax.sharding.Mesh
    rules: Rules
    tokenizer: Any
    stop_ids: frozenset[int]
    sample: Callable[..., Any]
    token_stats: Callable[[bool], TokenStatsFn]
    frozen: Frozen = dataclasses.field(default_factory=Frozen)


@dataclasses.dataclass(frozen=True, eq=False)
class Functions:
    """The functions of a decoder on a mesh, and where their arrays live; no weights.

    Args
      rules: the table of training; shardings: of the parameters, by it. token_stats: want_entropy -> the model call of
        the losses.
      sampler: what `rollout.engine` asks of a policy, by its names. rollout_shardings: None on one device.
      rollout_parts: devices that slots are cut over.
      decode_shardings, decode_weights: layout of the weights while they sample, and what they become on the way there;
        None where rollouts use the weights of training.
    """

    rules: Rules
    shardings: Any
    token_stats: Callable[[bool], TokenStatsFn]
    sampler: dict[str, Any]
    rollout_shardings: RolloutShardings | None
    rollout_parts: int
    decode_shardings: Any
    decode_weights: Callable[[Params], Params] | None


def build_policy(config: Config) -> Policy:
    """Loads or makes the model that the config names, puts it on its mesh, and makes its functions."""
    check_mesh(config)
    offer_cpu_devices(config)
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.path or "")
    shape = decoder_shape(config, lambda: vocabulary_size(tokenizer))
    _check_lengths(config, shape, vocabulary_size(tokenizer))
    stops = _stop_ids(config, shape, tokenizer)
    mesh = build_mesh(config)
    model = build_functions(config, shape, mesh)
    lora, dtype = asked_adapter(config), jnp.dtype(config.model.compute_dtype)
    if config.model.path is not None:
        params = load_placed(Path(config.model.path), model.shardings, dtype=jnp.float32 if lora is None else dtype)
    else:
        params = shard_tree(decoder.init_params(jax.random.key(config.seed), shape), model.shardings)
    sample = make_engine(
        **vars(decode_shape(config, shape.vocab_size, model.rollout_parts)),
        **model.sampler,
        pad_id=0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        shardings=model.rollout_shardings,
    )
    reshard = None
    if model.decode_weights is not None:
        reshard = make_reshard(model.decode_shardings, model.decode_weights)
    policy = Policy(shape, params, model.shardings, mesh, model.rules, tokenizer, stops, sample, model.token_stats)
    if lora is None:
        return policy if reshard is None else dataclasses.replace(policy, sample=_on_a_copy(sample, reshard))
    start = first_adapters(config, shape, lora)
    adapters = place_adapters(shape, lora, params, mesh, model.rules, model.shardings, dtype, start)
    merge = partial(adapters.merge, adapters.frozen.trees[BASE])
    return dataclasses.replace(
        policy,
        params=adapters.params,
        shardings=adapters.shardings,
        frozen=adapters.frozen,
        sample=_on_a_copy(sample, merge if reshard is None else partial(_in_two_moves, merge, reshard)),
    )


def build_functions(config: Config, shape: DecoderConfig, mesh: jax.sharding.Mesh) -> Functions:
    """What a decoder of this shape does on this mesh, without weights: `hptjax plan` compiles the same functions."""
    rules = training_rules(config)
    axes, shapes = decoder.logical_axes(shape), decoder.param_shapes(shape)
    shardings = named_shardings(mesh, axes, shapes, rules)
    constrain = make_constrain(mesh, rules)
    dtype = jnp.dtype(config.model.compute_dtype)
    attention = training_attention(config, shape, mesh, rules)
    unroll = shape.num_layers if is_written_out(shape, mesh) and config.model.remat == "none" else 1

    def token_stats(want_entropy: bool) -> TokenStatsFn:
        def stats(params: Params, micro_batch: MicroBatch) -> TokenStats:
            shared = None
            if micro_batch.shared_tokens is not None and micro_batch.shared_mask is not None:
                shared = SharedPrompt(micro_batch.shared_tokens, micro_batch.shared_mask, config.batch.lanes)
            hidden = decoder.forward(
                params,
                micro_batch.input_tokens,
                micro_batch.positions,
                micro_batch.segment_ids,
                config=shape,
                compute_dtype=dtype,
                constrain=constrain,
                attention=attention,
                shared=shared,
                remat=config.model.remat,
                unroll=unroll,
            )
            looked = token_logprobs(
                hidden,
                decoder.unembedding(params, shape).astype(dtype),
                micro_batch.target_tokens,
                per_token(micro_batch.temperature, micro_batch, padding=1.0),
                chunk_tokens=config.model.logprob_chunk_tokens,
                want_entropy=want_entropy,
                live=micro_batch.completion_mask,
                time_parts=parts(mesh.shape, "time", rules),
            )
            return looked._replace(hidden=hidden)

        return stats

    decode_rules = rollout_rules(config)
    rollout_parts = parts(mesh.shape, "batch", decode_rules)
    int8 = config.rollout.weights_dtype == "int8"
    kept = (with_scales(axes), with_scales(shapes)) if int8 else (axes, shapes)
    decode_shardings = named_shardings(mesh, *kept, decode_rules)
    return Functions(
        rules=rules,
        shardings=shardings,
        token_stats=token_stats,
        sampler=sampler_functions(config, shape, mesh, decode_rules),
        rollout_shardings=rollout_shardings(config, shape, mesh, decode_rules) if mesh.size > 1 else None,
        rollout_parts=rollout_parts,
        decode_shardings=decode_shardings,
        decode_weights=None if decode_shardings == shardings else partial(_decode_weights, dtype=dtype, int8=int8),
    )


def _decode_weights(params: Params, *, dtype: Any, int8: bool) -> Params:
    """The weights as rollouts hold them; matrices become int8 from what they are and not from `dtype`."""
    used = as_used(params, dtype=dtype)
    return {**used, "layers": {**used["layers"], **quantised_matrices(params["layers"])}} if int8 else used


def _on_a_copy(sample: Callable[..., Any], reshard: Callable[[Params], Params]) -> Callable[..., Any]:
    """The engine, fed with weights in the layout of rollouts; the copy is gone before training goes on."""

    def sample_from(params: Params, *args: Any, **options: Any) -> Any:
        copy = reshard(params)
        try:
            return sample(copy, *args, **options)
        finally:
            jax.tree.map(lambda leaf: leaf.delete(), copy)

    return sample_from


def _in_two_moves(first: Callable[[Params], Params], second: Callable[[Params], Params], params: Params) -> Params:
    """`second(first(params))`; what lay between is deleted."""
    between = first(params)
    try:
        return second(between)
    finally:
        jax.tree.map(lambda leaf: leaf.delete(), between)


def _check_lengths(config: Config, shape: DecoderConfig, tokens: int) -> None:
    if tokens > shape.vocab_size:
        raise ValueError(
            f"expected a tokenizer with at most {shape.vocab_size} tokens, the model's vocabulary, got {tokens}; "
            "change model.tokenizer or model.path"
        )
    longest = config.data.max_prompt_tokens + config.rollout.max_completion_tokens
    if longest > shape.max_positions:
        raise ValueError(
            f"expected a model with a context of at least {longest} tokens (data.max_prompt_tokens + "
            f"rollout.max_completion_tokens), got max_position_embeddings {shape.max_positions}; change "
            "rollout.max_completion_tokens or model.max_positions (beside a larger model.rope_theta, as recipes do)"
        )


def _stop_ids(config: Config, shape: DecoderConfig, tokenizer: Any) -> frozenset[int]:
    of_folder = () if config.model.path is None else read_eos_ids(config.model.path)
    outside = sorted(token for token in of_folder if token >= shape.vocab_size)
    if outside:
        raise ValueError(
            f"expected the eos_token_id of {config.model.path} below the vocabulary of {shape.vocab_size} tokens, got "
            f"{outside}; correct its generation_config.json or change model.path"
        )
    unknown = sorted(token for token in config.rollout.stop_ids if token >= shape.vocab_size)
    if unknown:
        raise ValueError(
            f"expected rollout.stop_ids below the vocabulary of {shape.vocab_size} tokens, got {unknown}; change "
            "rollout.stop_ids"
        )
    return stop_ids(tokenizer, (*of_folder, *config.rollout.stop_ids))
