"""The critic's regression as a token loss; it is no coefficient form, its gradient runs through the values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from hptjax.types import Array


def value_token_loss(
    values: Float[Array, "B T"],
    rollout_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    live: Bool[Array, "B T"],
    *,
    clip: float,
) -> Float[Array, "B T"]:
    """`max((V - return)^2, (clip(V, V_rollout - e, V_rollout + e) - return)^2) / 2`; 0 where not live.

    Args
      values: current critic; [B T]; reward units; carries the gradient. rollout_values: at sampling weights.
      returns: what the critic is fitted to, from `returns.gae`. live: True on tokens that count.
      clip: e >= 0; `math.inf` is the plain square.
    Gradient flows through `values`; 0 where the clipped branch is the larger, and where not live.
    Source PPO's value clipping as in verl (`spec/methods.md` 2.2).
    """
    values, centre, returns = (jnp.where(live, x, 0) for x in (values, rollout_values, returns))
    centre, returns = jax.lax.stop_gradient((centre, returns))
    held = jnp.clip(values, centre - clip, centre + clip)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(held - returns))
