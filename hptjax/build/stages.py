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

from hptjax.build.adapters import Frozen, with_frozen
from hptjax.build.data import build_requests
from hptjax.build.frozen import add_frozen, make_looks, make_score
from hptjax.build.method import Recipe
from hptjax.build.policy import Policy
from hptjax.build.step import build_step, make_assembler
from hptjax.config import Config, StageConfig
from hptjax.config_batch import stage_list
from hptjax.data.stream import QuestionStream
from hptjax.losses.advantages import overlong_penalty
from hptjax.models import value_head
from hptjax.records import Question, Sample
from hptjax.sharding.host import to_host
from hptjax.sharding.mesh import one_at_a_time
from hptjax.sharding.peers import several
from hptjax.train.second_look import ScorePass, SecondLook
from hptjax.train.stage import Stage
from hptjax.train.state import TrainState, placed
from hptjax.train.step import Losses, make_named_gradients
from hptjax.types import MicroBatch, Params

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
            trees["critic"] = (
                params["critic"] if "critic" in params else value_head.init_params(policy.config.hidden_size)
            )
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
        assemble=make_assembler(config, recipe),
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
