"""Gradients of several objectives at the same parameters, put together by a rule that no sum of losses can say.

All methods of the table add their terms before one backward pass and never come here. What needs a gradient per
objective would: `train.step.make_named_gradients` gives them, by name. Pure functions, tested, not wired to the loop.

    rule               direction                                                    method
    total              sum of all                                                   (what one backward pass gives)
    weighted           sum of weight x gradient                                     AMFT
    drop_if_conflict   the sum, or one objective alone where the rest opposes it    GTA
    bridge_directions  three directions for base weights, shadow and adapter        BRIDGE

A gradient is a tree of arrays; all trees of a call have one structure. Nothing here says whether they are of losses or
of objectives: the rules are the same for both.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from hptjax.types import Array, Params


def inner(left: Params, right: Params) -> Float[Array, ""]:
    """The inner product of two gradients over all their entries."""
    products = jax.tree.map(lambda a, b: jnp.vdot(a, b), left, right)
    return functools.reduce(jnp.add, jax.tree.leaves(products))


def norm(gradient: Params) -> Float[Array, ""]:
    """The length of a gradient. SASR chooses by it."""
    return jnp.sqrt(inner(gradient, gradient))


def total(gradients: Mapping[str, Params]) -> Params:
    """The sum over the objectives. Raises no objective -> ValueError."""
    return weighted(gradients, dict.fromkeys(gradients, 1.0))


def weighted(gradients: Mapping[str, Params], weights: Mapping[str, float | Float[Array, ""]]) -> Params:
    """`sum of weights[name] x gradients[name]`.

    Raises names that differ, no objective -> ValueError.
    """
    if not gradients or gradients.keys() != weights.keys():
        raise ValueError(f"expected one weight for each of {sorted(gradients)}, got {sorted(weights)}")
    scaled = [jax.tree.map(lambda leaf, w=weights[name]: w * leaf, tree) for name, tree in gradients.items()]
    return functools.reduce(lambda left, right: jax.tree.map(jnp.add, left, right), scaled)


def drop_if_conflict(gradients: Mapping[str, Params], *, kept: str) -> Params:
    """The sum of all, or `gradients[kept]` alone where the others together point against it.

    The inner product with `gradients[kept]` is never negative: it is |kept|^2 + <others, kept> where that second part
    is not negative, and |kept|^2 elsewhere.
    Source GTA: arXiv 2509.12108, `spec/methods.md` 4.13 (second-hand): with cos(SFT, RL) < 0 RL alone is used.
    """
    mine = gradients[kept]
    others = total({name: tree for name, tree in gradients.items() if name != kept})
    agrees = inner(others, mine) >= 0
    return jax.tree.map(lambda own, other: jnp.where(agrees, own + other, own), mine, others)


def meta_gradient(outer: Params, *, sft: Params, rl: Params, rate: float) -> Float[Array, ""]:
    """dU / dmu of one step `theta' = theta - rate [(1 - mu) rl + mu sft]`: `-rate <grad U(theta'), sft - rl>`.

    Args
      outer: grad U at theta'. sft, rl: gradients of the two losses at theta. rate: of the inner step, plain SGD; under
        another optimizer this is an approximation.
    Source AMFT: arXiv 2508.06944 (withdrawn), from first principles; its code ascends a loss here (`spec/methods.md`
      4.9).
    """
    return -rate * inner(outer, jax.tree.map(jnp.subtract, sft, rl))


class BridgeDirections(NamedTuple):
    """Where one meta-step of BRIDGE goes, uphill: the base weights, their RL-only shadow, and the adapter."""

    base: Params
    shadow: Params
    adapter: Params


def bridge_directions(
    *, sft: tuple[Params, Params], rl: tuple[Params, Params], rl_at_shadow: tuple[Params, Params], share: float
) -> BridgeDirections:
    """The three directions of a meta-step, from gradients of the objectives J_SFT and J_RL.

        base     (1 - share) grad_theta J_SFT + share grad_theta J_RL           at (theta, w)
        shadow   grad J_RL                                                      at (theta^, w)
        adapter  (1 - share) grad_w J_SFT + share (grad_w J_RL at (theta, w) - grad_w J_RL at (theta^, w))

    The adapter's bracket is the gradient of the cooperative gain: what base and adapter win together over RL alone.

    Args
      sft, rl, rl_at_shadow: (with respect to the base weights or the shadow, with respect to the adapter). Where both
        RL gradients are taken on the rollouts of (theta, w), the shadow's needs the ratio of the two policies.
      share: the paper's lambda, 0..1; robust in 0.3 to 0.7 there.
    Raises share outside 0..1 -> ValueError.
    Source BRIDGE: arXiv 2509.06948 as `spec/methods.md` 4.11 reads digests of it; rank, rates, group size unverified.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a number in 0..1, got {share}")
    mix: dict[str, Any] = {"sft": 1.0 - share, "rl": share}
    gain = jax.tree.map(jnp.subtract, rl[1], rl_at_shadow[1])
    return BridgeDirections(
        base=weighted({"sft": sft[0], "rl": rl[0]}, mix),
        shadow=rl_at_shadow[0],
        adapter=weighted({"sft": sft[1], "rl": gain}, mix),
    )
