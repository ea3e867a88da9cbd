"""The train step of a stage: its recipe as losses, optimizers and one compiled program, from shapes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from hptjax.build.adapters import BASE, Frozen
from hptjax.build.method import Recipe, build_recipe, stability_mask
from hptjax.config import Config, StageConfig
from hptjax.config_batch import row_room, schedule_of
from hptjax.hpt.assemble import Update, assemble
from hptjax.hpt.control import Controls
from hptjax.hpt.route import Routed
from hptjax.losses.estimator import Need
from hptjax.models import value_head
from hptjax.records import Sample, SampleId
from hptjax.sharding.rules import replicated
from hptjax.train.objective import TokenStatsFn, make_losses
from hptjax.train.optimizer import (
    HOST_MEMORY,
    alternating,
    check_host_memory,
    in_host_memory,
    make_optimizer,
    make_schedule,
)
from hptjax.train.state import MicroStep, TrainState, init_state, jit_step, state_shardings
from hptjax.train.step import Losses, make_micro_step
from hptjax.types import MicroBatch, Params

ALL_TRAINED = Frozen()


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """The train step of a stage, compiled when it is first called; it needs shapes of parameters only.

    Args
      empty: a micro-batch without samples, on the host. fresh: named parameters -> a state with empty sums.
      state: the state's shapes. places: where its leaves live, in their order.
    """

    recipe: Recipe
    losses: Losses
    schedule: optax.Schedule
    empty: MicroBatch
    fresh: Callable[[Mapping[str, Params]], TrainState]
    state: TrainState
    places: list[jax.sharding.Sharding]
    micro_step: MicroStep


def build_step(
    config: Config,
    stage: StageConfig,
    token_stats: Callable[[bool], TokenStatsFn],
    params: Params,
    shardings: Any,
    mesh: Mesh,
    *,
    frozen: Frozen = ALL_TRAINED,
) -> Step:
    """The step of a stage on a mesh.

    Args
      params: what is trained, arrays or their shapes; nothing is read of them. shardings: where they live.
      frozen: of the model, what is not.
    """
    recipe = build_recipe(config, stage.method, stage.questions_per_step or config.data.questions_per_step)
    losses = make_losses(
        token_stats(Need.ENTROPY in recipe.needs),
        recipe.token_losses,
        policy_of=frozen.policy_of,
        scored=recipe.scores,
        stability_mask=stability_mask(recipe),
        value_head=value_head.token_values if recipe.has_critic else None,
    )
    schedule = _schedule(config, stage)
    clips = [config.optimizer.clip_norm, *([config.methods.relift_clip_norm] if recipe.method.apart else [])]
    optimizers = {"policy": _optimizer(config, schedule, clips)}
    trees, tree_places = {"policy": params}, {"policy": shardings}
    if recipe.has_critic:
        optimizers["critic"] = _optimizer(config, _schedule(config, stage, critic=True), [config.optimizer.clip_norm])
        norm, place = _final_norm(params, shardings, frozen)
        trees["critic"] = jax.eval_shape(lambda: value_head.init_params(norm.shape[0]))
        tree_places["critic"] = {"weight": place, "bias": replicated(mesh)}
    empty = make_assembler(config, recipe)([], frozenset()).micro_batches[0]
    stats = jax.eval_shape(losses, {**frozen.trees, **trees}, empty)[1]

    def fresh(params: Mapping[str, Params]) -> TrainState:
        return init_state(params, optimizers, stats, config.batch.max_micro_batches)

    state = jax.eval_shape(fresh, trees)
    memory = HOST_MEMORY if config.optimizer.host_memory else None
    if memory is not None:
        device = mesh.devices.flat[0]
        check_host_memory(device.platform, [memory.kind for memory in device.addressable_memories()])
    places = state_shardings(state, tree_places, replicated(mesh), optimizer_memory=memory)
    micro_step = make_micro_step(
        losses, optimizers, skip_norm=config.optimizer.skip_norm, checksum_every=config.train.checksum_every
    )
    return Step(
        recipe, losses, schedule, empty, fresh, state, places, jit_step(micro_step, places, frozen.trees or None)
    )


def _final_norm(params: Params, shardings: Any, frozen: Frozen) -> tuple[Any, Any]:
    """The scale of the final norm, trained or not, and where it lives: a critic is as long, and lives beside it."""
    if "final_norm" in params:
        return params["final_norm"], shardings["final_norm"]
    norm = frozen.trees[BASE]["final_norm"]
    return norm, norm.sharding


def make_assembler(config: Config, recipe: Recipe) -> Callable[..., Update]:
    """`hpt.assemble.assemble` for the terms of a recipe, with what else its micro-batches carry."""
    room, max_micro_batches = row_room(config), config.batch.max_micro_batches

    def assembler(
        samples: Sequence[Sample],
        dead: frozenset[SampleId],
        routed: Routed | None = None,
        step: int = 0,
        *,
        optimizer: int = 0,
        controls: Controls | None = None,
    ) -> Update:
        update = assemble(
            samples,
            recipe.terms(step, controls or {}),
            **room,
            max_micro_batches=max_micro_batches,
            dead=dead,
            scales=None if routed is None else routed.scales,
            advantages=None if routed is None else routed.advantages,
            partition=None if recipe.partition is None else recipe.partition(samples),
        )
        fields: dict[str, Any] = {}
        if recipe.method.apart:
            fields["optimizer"] = np.asarray(optimizer, np.int32)
        if recipe.has_critic:
            fields["rollout_values"] = np.zeros_like(update.micro_batches[0].rollout_logprobs)
        if not fields:
            return update
        return dataclasses.replace(
            update, micro_batches=tuple(dataclasses.replace(m, **fields) for m in update.micro_batches)
        )

    return assembler


def _schedule(config: Config, stage: StageConfig, *, critic: bool = False) -> optax.Schedule:
    chosen = schedule_of(config, stage)
    return make_schedule(
        chosen.kind,
        (critic and config.optimizer.critic_learning_rate) or chosen.learning_rate,
        warmup_steps=chosen.warmup_steps,
        end_fraction=chosen.end_fraction,
        decay_steps=chosen.decay_steps,
    )


def _optimizer(
    config: Config, schedule: optax.Schedule, clip_norms: Sequence[float | None]
) -> optax.GradientTransformation:
    """One chain per clip norm; with several, each update says which of them takes it."""
    optimizer = config.optimizer
    chains = [
        make_optimizer(
            schedule,
            b1=optimizer.b1,
            b2=optimizer.b2,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            clip_norm=clip_norm,
        )
        for clip_norm in clip_norms
    ]
    chain = chains[0] if len(chains) == 1 else alternating(*chains)
    return in_host_memory(chain) if optimizer.host_memory else chain
