"""The pieces of a decoder layer, and the one layer function that training, prefill and decoding share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Float

from hptjax.models.attention import Attend
from hptjax.models.rope import rotate
from hptjax.models.shape import DecoderConfig
from hptjax.types import Array

# constrain(x, logical axis names) -> x, placed on a mesh by whoever knows one
Constrain = Callable[[Array, tuple[str | None, ...]], Array]


@struct.dataclass
class Turned:
    """A matrix that lies with its outputs first: a CPU multiplies few rows by a large one faster so.

    Args
      kernel: W^T, [outputs, inputs] in as many output axes as it has.
    """

    kernel: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix, its inputs as one axis."""
        return (self.kernel.shape[-1], *self.kernel.shape[:-1])


@struct.dataclass
class Adapted:
    """A matrix with a low-rank addition that is trained in its stead: W + A B, never formed; see `models/lora.py`.

    Args
      kernel: W, [inputs, outputs] in as many axes as it has. down: A, [inputs, R]. up: B, [R, outputs], scaled.
    """

    kernel: Array
    down: Array
    up: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return self.kernel.shape


def linear(x: Float[Array, "B T I"], weight: Array | Adapted | Turned) -> Float[Array, "B T O"]:
    """x W, or x W + (x A) B; the weights in x's dtype, inputs and outputs flattened to an axis each."""
    if isinstance(weight, Adapted):
        return linear(x, weight.kernel) + linear(linear(x, weight.down), weight.up)
    if isinstance(weight, Turned):
        kernel = weight.kernel.astype(x.dtype).reshape(-1, x.shape[-1])
        # the matrix on the left, and turned only afterwards: the other way round the compiler turns all of it
        return jnp.moveaxis(jax.lax.optimization_barrier(jnp.einsum("oi,bti->obt", kernel, x)), 0, -1)
    return matmul(x, weight.astype(x.dtype).reshape(x.shape[-1], -1))


def product(x: Float[Array, "B T I"], weights: Mapping[str, Any], name: str) -> Float[Array, "B T O"]:
    """x W of the matrix of this name; one of int8 has a scale beside it, which the sums are multiplied by in float32.

    Gradient: none where it is int8.
    """
    weight, scale = weights[name], weights.get(f"{name}_scale")
    if scale is None:
        return linear(x, weight)
    sums = jnp.einsum(
        "btd,df->btf", x, weight.astype(x.dtype).reshape(x.shape[-1], -1), preferred_element_type=jnp.float32
    )
    return (sums * scale.reshape(1, 1, -1)).astype(x.dtype)


def unconstrained(x: Array, axes: tuple[str | None, ...]) -> Array:
    """The default `constrain`: one device, nothing to place."""
    return x


def rms_norm(x: Float[Array, "*shape D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*shape D"]:
    """x / sqrt(mean(x^2) + eps) * scale, in float32, returned in x's dtype."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (wide * inverse * scale).astype(x.dtype)


def layer(
    hidden: Float[Array, "B T D"],
    weights: dict[str, Any],
    turn: tuple[Float[Array, "B T E2"], Float[Array, "B T E2"]],
    attend: Attend,
    *,
    config: DecoderConfig,
    constrain: Constrain,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T K E"], Float[Array, "B T K E"]]:
    """One pre-norm decoder layer: x + attention(norm(x)), then x + swiglu(norm(x)).

    Args
      weights: one layer's slice of `params["layers"]`; cast to hidden's dtype where they are used. Matrices may be
        int8 with scales beside them, see `models/quantise.py`.
      turn: cosine and sine of the positions.
      attend: who may look at whom; the only thing in which training, prefill and decoding differ.

    Returns the new hidden states, and this layer's rotated keys and values for a cache.
    """
    eps = config.rms_norm_eps
    normed = rms_norm(hidden, weights["attention_norm"], eps)
    query, key, value = (_project(normed, weights, name) for name in ("query", "key", "value"))  # [B T heads E]
    if config.qk_norm:
        query = rms_norm(query, weights["query_norm"], eps)
        key = rms_norm(key, weights["key_norm"], eps)
    query = constrain(rotate(query, *turn), ("batch", "time", "heads", "head_dim"))
    key = constrain(rotate(key, *turn), ("batch", "time", "kv_heads", "head_dim"))
    value = constrain(value, ("batch", "time", "kv_heads", "head_dim"))
    mixed = attend(query, key, value)  # [B T H E]
    hidden = hidden + product(mixed.reshape(*mixed.shape[:2], -1), weights, "output")
    hidden = constrain(hidden, ("batch", "time", "features"))
    hidden = hidden + swiglu(rms_norm(hidden, weights["mlp_norm"], eps), weights, constrain)
    return constrain(hidden, ("batch", "time", "features")), key, value


@jax.custom_vjp
def matmul(x: Float[Array, "B T D"], kernel: Float[Array, "D F"]) -> Float[Array, "B T F"]:
    """x W, with its backward pass written out: dW = x^T g.

    JAX's own rule computes (g^T x)^T. On the CPU that makes a transposed copy of the wide g fused with the arithmetic
    that produced it; writing the product this way round halves the whole backward pass there and costs nothing
    elsewhere. Reverse mode only (also twice); `jax.jvp` through it is an error.
    """
    return jnp.einsum("btd,df->btf", x, kernel)


def _matmul_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return jnp.einsum("btd,df->btf", x, kernel), (x, kernel)


def _matmul_backward(saved: tuple[Array, Array], gradient: Float[Array, "B T F"]) -> tuple[Array, Array]:
    x, kernel = saved
    flat_x, flat_gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return jnp.einsum("btf,df->btd", gradient, kernel), jnp.einsum("nd,nf->df", flat_x, flat_gradient)


matmul.defvjp(_matmul_forward, _matmul_backward)


def swiglu(x: Float[Array, "B T D"], weights: dict[str, Any], constrain: Constrain) -> Float[Array, "B T D"]:
    """(silu(x W_gate) * x W_up) W_down."""
    gate, up = product(x, weights, "gate"), product(x, weights, "up")
    inner = constrain(jax.nn.silu(gate) * up, ("batch", "time", "mlp"))
    return product(inner, weights, "down")


def _project(x: Float[Array, "B T D"], weights: dict[str, Any], name: str) -> Float[Array, "B T N E"]:
    heads = product(x, weights, name).reshape(*x.shape[:2], *weights[name].shape[1:])
    if f"{name}_bias" not in weights:
        return heads
    return heads + weights[f"{name}_bias"].astype(x.dtype)[None, None, :, :]
