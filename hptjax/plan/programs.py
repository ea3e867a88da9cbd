"""The programs of a run, lowered from shapes alone: train step with update, score pass and those of rollouts.

They are the functions that `hptjax train` compiles (`build.policy.build_functions`, `build.step.build_step`,
`rollout.programs.make_programs`), on a mesh whose devices need not exist.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from hptjax.build.adapters import BASE, Adapters, Frozen, as_used, place_adapters, seeing
from hptjax.build.frozen import make_score
from hptjax.build.policy import Functions, build_functions
from hptjax.build.sampler import decode_shape
from hptjax.build.step import Step, build_step
from hptjax.config import Config, StageConfig
from hptjax.losses.estimator import Need
from hptjax.model_shape import asked_adapter
from hptjax.models import decoder
from hptjax.models.shape import DecoderConfig
from hptjax.rollout.admission import copy_table, entry_table
from hptjax.rollout.programs import make_programs, rows_shardings
from hptjax.sharding.mesh import REPLICATED_FIELDS, SEGMENT_FIELDS
from hptjax.sharding.rules import Rules, partition_spec, replicated
from hptjax.train.state import TrainState
from hptjax.types import MicroBatch


@dataclasses.dataclass(frozen=True, eq=False)
class RunPrograms:
    """Shapes with their places, and the lowering of each program.

    Args
      state: the train state; frozen: the model beside it, where adapters are trained; micro_batch; decode_params: the
        weights that rollouts use; cache: the KV cache; rows: the contexts of one prefill call.
      lower: program name -> its lowering; nothing is traced before the call.
      scores: whether the method scores its micro-batches before it trains on them. copies_weights: whether rollouts
        have weights of their own.
    """

    state: TrainState
    frozen: Any
    micro_batch: MicroBatch
    decode_params: Any
    cache: Any
    rows: Any
    lower: dict[str, Callable[[], jax.stages.Lowered]]
    scores: bool
    copies_weights: bool


def run_programs(config: Config, stage: StageConfig, shape: DecoderConfig, mesh: Mesh) -> RunPrograms:
    """The programs of one stage of a config, for a model of this shape, on this mesh."""
    model = build_functions(config, shape, mesh)
    params = _params(shape, model.shardings, jnp.float32)
    adapters = _adapters(config, shape, mesh, model, params)
    frozen = Frozen() if adapters is None else adapters.frozen
    trained, places = (params, model.shardings) if adapters is None else (adapters.params, adapters.shardings)
    step = build_step(config, stage, model.token_stats, trained, places, mesh, frozen=frozen)
    state = _state(step)
    micro_batch = _micro_batch(step.empty, mesh, model.rules)
    is_last = jax.ShapeDtypeStruct((), jnp.bool_, sharding=replicated(mesh))
    score, beside = make_score(model.token_stats), (dict(frozen.trees),) if adapters is not None else ()
    scored = jax.jit(seeing(lambda trees, micro_batch: score(frozen.policy_of(trees), micro_batch)))
    lower: dict[str, Callable[[], jax.stages.Lowered]] = {
        "train step": lambda: step.micro_step.__wrapped__.lower(state, micro_batch, is_last, *beside),  # type: ignore[attr-defined]
        "score": lambda: scored.lower(dict(frozen.trees), {"policy": trained}, micro_batch),
    }
    decode_params, cache, rows, rollout = _rollout(config, shape, mesh, model, params, adapters)
    return RunPrograms(
        state=state,
        frozen=dict(frozen.trees),
        micro_batch=micro_batch,
        decode_params=decode_params,
        cache=cache,
        rows=rows,
        lower=lower | rollout,
        scores=bool(step.recipe.looks) or Need.REFERENCE_LOGPROBS in step.recipe.needs,
        copies_weights=model.decode_weights is not None or adapters is not None,
    )


def _adapters(config: Config, shape: DecoderConfig, mesh: Mesh, model: Functions, params: Any) -> Adapters | None:
    """The shapes of adapters and of the model beside them; None where the model is trained."""
    lora, dtype = asked_adapter(config), jnp.dtype(config.model.compute_dtype)
    if lora is None:
        return None
    base = _with_places(jax.eval_shape(functools.partial(as_used, dtype=dtype), params), model.shardings)
    return place_adapters(shape, lora, base, mesh, model.rules, model.shardings, dtype)


def _params(shape: DecoderConfig, shardings: Any, dtype: Any) -> Any:
    shapes = decoder.param_shapes(shape)
    return jax.tree.map(
        lambda sizes, place: jax.ShapeDtypeStruct(sizes, dtype, sharding=place),
        shapes,
        shardings,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def _state(step: Step) -> TrainState:
    leaves, treedef = jax.tree.flatten(step.state)
    placed = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        for leaf, place in zip(leaves, step.places, strict=True)
    ]
    return jax.tree.unflatten(treedef, placed)


def _micro_batch(empty: MicroBatch, mesh: Mesh, rules: Rules) -> MicroBatch:
    """The shapes of a micro-batch, where `put_micro_batch` puts it."""

    def put(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
        names = () if name in REPLICATED_FIELDS else ("batch", None if name in SEGMENT_FIELDS else "time")[: leaf.ndim]
        axes = (*names, *[None] * (leaf.ndim - len(names)))
        sharding = NamedSharding(mesh, partition_spec(mesh, axes, leaf.shape, rules))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return MicroBatch(
        **{
            name: jax.tree.map(functools.partial(put, name), getattr(empty, name))
            for name in MicroBatch.__dataclass_fields__
        }
    )


def _rollout(
    config: Config, shape: DecoderConfig, mesh: Mesh, model: Functions, params: Any, adapters: Adapters | None
) -> tuple[Any, Any, Any, dict[str, Callable[[], jax.stages.Lowered]]]:
    """The weights of rollouts, their cache and prefilled rows, and the lowering of prefill, entry and decode."""
    rollout = config.rollout
    sizes = decode_shape(config, shape.vocab_size, model.rollout_parts)
    programs = make_programs(
        sizes,
        **model.sampler,
        shardings=model.rollout_shardings,
    )
    weights = params
    lower: dict[str, Callable[[], jax.stages.Lowered]] = {}
    if adapters is not None:
        weights = adapters.frozen.trees[BASE]  # merged, of the same types and places
        lower["merge"] = lambda: adapters.merge.lower(adapters.frozen.trees[BASE], adapters.params)  # type: ignore[attr-defined]
    if model.decode_weights is not None:
        move, moved = jax.jit(model.decode_weights, out_shardings=model.decode_shardings), weights
        weights = _with_places(jax.eval_shape(model.decode_weights, moved), model.decode_shardings)
        lower["reshard"] = lambda: move.lower(moved)
    places = model.rollout_shardings
    cache, settings, progress = jax.eval_shape(programs.empty, weights)
    key = jax.eval_shape(lambda: jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((rollout.prefill_rows, rollout.prompt_buckets[-1]), jnp.int32)
    lengths = jax.ShapeDtypeStruct((rollout.prefill_rows,), jnp.int32)
    rows = jax.eval_shape(programs.prefill, weights, tokens, lengths)
    entries, copies = jax.eval_shape(lambda: (jnp.asarray(entry_table({}, sizes)), jnp.asarray(copy_table([], sizes))))
    pages = None
    if sizes.pages:
        pages = jax.ShapeDtypeStruct((sizes.slots, sizes.pages_per_slot), jnp.int32)
    if places is not None:
        cache, rows = (
            _with_places(cache, places.cache),
            _with_places(rows, rows_shardings(places.cache, model.sampler["position_axis"])),
        )
        settings, progress = (_with_places(tree, places.rows) for tree in (settings, progress))
    truncated = rollout.top_k > 0 or rollout.top_p < 1
    lower["prefill"] = lambda: programs.prefill.lower(weights, tokens, lengths)  # type: ignore[attr-defined]
    lower["enter"] = lambda: programs.enter.lower(cache, settings, progress, rows, entries, copies)  # type: ignore[attr-defined]
    lower["decode"] = lambda: programs.decode.lower(  # type: ignore[attr-defined]
        weights, key, cache, settings, progress, pages, truncated=truncated
    )
    return weights, cache, rows, lower


def _with_places(shapes: Any, places: Any) -> Any:
    """A tree of shapes with the shardings of a tree, or with one for all."""
    leaves, treedef = jax.tree.flatten(shapes)
    each = [places] * len(leaves) if isinstance(places, NamedSharding) else jax.tree.leaves(places)
    placed = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for leaf, place in zip(leaves, each, strict=True)
    ]
    return jax.tree.unflatten(treedef, placed)


def rollouts_per_step(config: Config, stage: StageConfig) -> tuple[int, int]:
    """(how often every slot is filled, prefill calls) in a step of this stage, one context per question."""
    questions = stage.questions_per_step or config.data.questions_per_step
    fills = math.ceil(questions * config.rollout.group_size / config.rollout.slots)
    return fills, math.ceil(questions / config.rollout.prefill_rows)
