"""A critic on top of the decoder: one linear map from the final hidden state of a position to a number.

The value at a target position is that of the state before the token is written: prompt and completion up to it.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Bool, Float

from hptjax.types import Array, Params


def param_shapes(hidden_size: int) -> dict[str, tuple[int, ...]]:
    """The parameter tree with a shape tuple in the place of each array."""
    return {"weight": (hidden_size,), "bias": ()}


def init_params(hidden_size: int) -> Params:
    """Zeros, float32: a fresh critic expects nothing, and its first advantages are those without a critic."""
    return {name: jnp.zeros(shape, jnp.float32) for name, shape in param_shapes(hidden_size).items()}


def token_values(params: Params, hidden: Float[Array, "B T D"], live: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """`hidden . weight + bias` in the weight's type; reward units; 0 where not live, whatever the state is there.

    Gradient flows through parameters and hidden states; exactly 0 where not live.
    """
    kept = jnp.where(live[:, :, None], hidden, 0).astype(params["weight"].dtype)  # [B T D]
    values = jnp.einsum("btd,d->bt", kept, params["weight"]) + params["bias"]
    return jnp.where(live, values, 0)
