"""From the config's stage list to stages of the loop: recipes bound to compiled functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from hptjax.build.adapters import BASE, Frozen, with_frozen
from hptjax.build.data import build_requests
from hptjax.build.frozen import add_frozen, make_looks, make_score
from hptjax.build.method import Recipe, build_recipe, stability_mask
from hptjax.build.policy import Policy
from hptjax.config import Config, StageConfig
from hptjax.config_batch import schedule_of, stage_list
from hptjax.data.stream import QuestionStream
from hptjax.hpt.assemble import Update, assemble
from hptjax.hpt.control import Controls
from hptjax.hpt.route import Routed
from hptjax.losses.advantages import overlong_penalty
from hptjax.losses.estimator import Need
from hptjax.models import value_head
from hptjax.records import Question, Sample, SampleId
from hptjax.sharding.host import to_host
from hptjax.sharding.mesh import one_at_a_time
from hptjax.sharding.peers import several
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
from hptjax.train.second_look import ScorePass, SecondLook
from hptjax.train.stage import Stage
from hptjax.train.state import MicroStep, TrainState, init_state, jit_step, placed, state_shardings
from hptjax.train.step import Losses, make_micro_step, make_named_gradients
from hptjax.types import MicroBatch, Params

ALL_TRAINED = Frozen()
STAGE_SEED_STRIDE = 1_000_003  # so that stages of runs with neighbouring seeds do not share an order
ROUNDS_PER_STAGE = 1 << 16  # more passes over the data than a stage makes, so that rounds of stages never meet


def build_stages(config: Config, policy: Policy, questions: Sequence[Question]) -> list[Stage]:
    """All stages in order, each with its own stream over the training questions.

    Raises ValueError where several processes would roll out ahead: what threads of theirs exchange has no order.
    """
    if config.train.rollouts_ahead and several():
        raise ValueError(
            f"expected one process for train.rollouts_ahead, got {jax.process_count()} (distributed.mode "
            f"{config.distributed.mode}); set train.rollouts_ahead to false"
        )
    return [
        build_stage(config, stage, policy, questions, index=index) for index, stage in enumerate(stage_list(config))
    ]


def build_stage(config: Config, stage: StageConfig, policy: Policy, train: Sequence[Question], *, index: int) -> Stage:
    """One stage of the loop: its recipe, compiled for the policy's mesh. Nothing is traced before it is first used."""
    questions = stage.questions_per_step or config.data.questions_per_step
    step = build_step(
        config, stage, policy.token_stats, policy.params, policy.shardings, policy.mesh, frozen=policy.frozen
    )
    recipe = step.recipe

    def start(params: Mapping[str, Params], totals: Any) -> TrainState:
        trees = {"policy": params["policy"]}
        if recipe.has_critic:  # another stage's critic goes on, and ends with the last stage that trains it
            trees["critic"] = params["critic"] if "critic" in params else _critic(policy.config.hidden_size)
        state = step.fresh(jax.tree.map(jnp.copy, trees))
        state = state if totals is None else dataclasses.replace(state, totals=totals)
        return placed(state, step.places)

    score, policy_of = make_score(policy.token_stats), policy.frozen.policy_of
    scored = with_frozen(policy.frozen, lambda trees, micro_batch: score(policy_of(trees), micro_batch))
    scorer = one_at_a_time(policy.mesh, lambda params, micro_batch: scored({"policy": params}, micro_batch))

    return Stage(
        name=stage.method,
        steps=stage.steps,
        # every process sees all questions of a step: together they run one program on them
        stream=QuestionStream(train, questions_per_step=questions, seed=config.seed + index * STAGE_SEED_STRIDE),
        first_round=index * ROUNDS_PER_STAGE,
        route=recipe.method.route,
        group_size=recipe.method.rollouts,
        rolls_out=recipe.method.rollouts > 0,
        rewards_demonstrations=recipe.method.rewards_demonstrations,
        updates_per_step=config.train.updates_per_rollout_batch,
        mask_overlong=config.hpt.mask_overlong or recipe.method.mask_overlong,
        nonfinite=config.optimizer.nonfinite,
        clip_norm=config.optimizer.clip_norm,
        apart_clip_norm=config.methods.relift_clip_norm,
        questions_per_step=questions,
        draws=config.methods.dapo_draws if recipe.method.refills else 1,
        penalty=_overlong_penalty(config) if recipe.method.refills else None,
        start=start,
        micro_step=step.micro_step,
        plan=build_requests(config, policy.stop_ids, recipe.method.sampled()),
        assemble=_assembler(config, recipe),
        learning_rate=lambda optimizer_step: float(to_host(step.schedule(optimizer_step))),
        score=_score_pass(policy, recipe, scorer),
        second_look=SecondLook(recipe.refine, recipe.control) if recipe.refine or recipe.control else None,
        add_frozen=add_frozen(config, policy, scorer, recipe.needs),
        probe=_probe(policy.mesh, step.losses, policy.frozen),
        rollouts_ahead=config.train.rollouts_ahead,
    )


def _score_pass(policy: Policy, recipe: Recipe, scorer: Callable[[Params, MicroBatch], Any]) -> ScorePass | None:
    """What the recipe looks at, by name; where that is log-probs alone, by the program that scores frozen models."""
    if not recipe.looks:
        return None
    if recipe.looks == {"rollout_logprobs"}:
        return lambda params, micro_batch: {"rollout_logprobs": scorer(params["policy"], micro_batch)}
    looks = make_looks(policy.token_stats, recipe.looks, value_head.token_values, policy.frozen.policy_of)
    return one_at_a_time(policy.mesh, with_frozen(policy.frozen, looks))


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
        trees["critic"] = jax.eval_shape(lambda: _critic(norm.shape[0]))
        tree_places["critic"] = {"weight": place, "bias": replicated(mesh)}
    empty = _assembler(config, recipe)([], frozenset()).micro_batches[0]
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


def _critic(hidden_size: int) -> Params:
    """A fresh critic for a policy; its weight is as long as the scale of the final norm, and lives beside it."""
    return value_head.init_params(hidden_size)


def _final_norm(params: Params, shardings: Any, frozen: Frozen) -> tuple[Any, Any]:
    """The scale of the final norm, trained or not, and where it lives."""
    if "final_norm" in params:
        return params["final_norm"], shardings["final_norm"]
    norm = frozen.trees[BASE]["final_norm"]
    return norm, norm.sharding


def _assembler(config: Config, recipe: Recipe) -> Callable[..., Update]:
    batch = config.batch

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
            rows=batch.rows,
            row_tokens=batch.row_tokens,
            max_segments=batch.max_segments,
            max_micro_batches=batch.max_micro_batches,
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


def _overlong_penalty(config: Config) -> Callable[[Sample], float] | None:
    """DAPO's soft penalty over the last part of the length limit."""
    limit = config.rollout.max_completion_tokens
    cushion = round(config.methods.dapo_cushion_frac * limit)
    if not cushion:
        return None
    return lambda sample: float(overlong_penalty(np.asarray([len(sample.completion_tokens)]), limit, cushion)[0])


def _probe(
    mesh: Mesh, losses: Losses, frozen: Frozen
) -> Callable[[Mapping[str, Params], Sequence[MicroBatch]], dict[str, float]]:
    """Norms of each objective's summed gradient over an update, and the cosine of SFT and RL."""
    named = jax.jit(make_named_gradients(losses))
    beside = (dict(frozen.trees),) if frozen.trees else ()
    gradients = one_at_a_time(mesh, lambda params, micro_batch: named(params, micro_batch, *beside))
    add = jax.jit(lambda left, right: jax.tree.map(jnp.add, left, right), donate_argnums=0)

    @jax.jit
    def summary(total: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        norms = {name: optax.tree.norm(tree) for name, tree in total.items()}
        both = "sft" in total and "rl" in total
        return norms, optax.tree.vdot(total["sft"], total["rl"]) if both else jnp.zeros(())

    def probe(params: Mapping[str, Params], micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        total = gradients(params, micro_batches[0])
        for micro_batch in micro_batches[1:]:
            total = add(total, gradients(params, micro_batch))
        norms, product = to_host(summary(total))
        row = {f"grad/norm_{name}": float(norm) for name, norm in norms.items()}
        scale = row.get("grad/norm_sft", 0.0) * row.get("grad/norm_rl", 0.0)
        return row | ({"grad/cos_sft_rl": float(np.float64(product) / scale)} if scale > 0 else {})

    return probe
