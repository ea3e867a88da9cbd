"""The method with a critic: what the policy's row lacks comes from a score pass of the whole update."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from hptjax.hpt.method import ROLLOUTS, Method, Part
from hptjax.hpt.options import Options
from hptjax.hpt.refine import critic_gae
from hptjax.hpt.route import by_gate
from hptjax.losses import table
from hptjax.losses.advantages import raw_reward
from hptjax.losses.words import said


def ppo(options: Options) -> Method:
    """PPO: the clipped surrogate with GAE's advantages, and a critic that is fitted to its returns."""
    row = dataclasses.replace(
        table.PPO(options.clip or (0.2, 0.2)),
        advantage=_until_refined,
        formula="1_clip A_t grad pi / pi_rollout, A_t = whitened sum over k of (gamma lambda)^k (r + gamma V' - V)_t+k",
        difference="",
    )
    value = Part(
        name="value",
        row=table.VALUE(options.ppo_value_clip),
        sources=ROLLOUTS,
        kind="beside",
        reducer=row.reducer,
        coefficient=options.ppo_value_coefficient,
    )
    return Method(
        name="ppo",
        parts=(Part(name="rl", row=row, sources=ROLLOUTS, kind="rl", reducer=row.reducer), value),
        route=by_gate(-1, options.group_size),
        rollouts=options.group_size,
        most_samples=options.group_size,
        refine=critic_gae(gamma=options.ppo_gamma, smoothing=options.ppo_lambda),
        source="arXiv 1707.06347, arXiv 1506.02438; critic and whitening as in verl",
        difference="The critic is a linear map on the policy's hidden states and does not train them. Whitened over"
        " each update; verl over all updates of a rollout batch. After a truncated completion the value is 0, too.",
    )


@said("GAE, whitened")
def _until_refined(rewards: Float[np.ndarray, " N"], group_ids: Int[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """The reward, with which an update is packed and scored before it has GAE's advantages."""
    return raw_reward(rewards, group_ids)
