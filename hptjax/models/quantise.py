"""Symmetric int8 for what rollouts hold: matrices with a scale per output, keys and values with one per head.

    scale = max |x| / 127      q = round(x 127 / max |x|)      x is read as scale q, so |x - scale q| <= scale / 2

and a hair more by float32's rounding. Ties go to the even number; of zeros alone the scale is 0. Where x holds
something that is not finite the scale is not finite either, so that what is read tells of it.

Norms, biases and embeddings stay as they are: they are small, or every logit is made of them. A product is scaled after
the sum, in float32 (`layers.product`), so int8 costs no rounding but its own.
Source: per-channel symmetric weights as in Jacob et al. 2017, 1712.05877, section 2.1 with zero-point 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float, Float32, Int8

from hptjax.models.lora_config import TARGETS
from hptjax.types import Array

LARGEST = 127.0  # -128 is left out, so that the two signs are alike
SCALE = "_scale"  # a matrix's name with this behind it is its scale's
MATRICES: Mapping[str, int] = dict(TARGETS.values())  # name of a matrix -> its input axes, behind that of the layers


def quantised(x: Float[Array, "..."], axes: tuple[int, ...]) -> tuple[Int8[Array, "..."], Float32[Array, "..."]]:
    """(q, scale): one scale for all entries along `axes`, which it does not have."""
    wide = x.astype(jnp.float32)
    top = jnp.max(jnp.abs(wide), axis=axes, keepdims=True)
    # a product and no quotient of each entry: what is compiled twice must give the same words (`sharding.reshard`)
    whole = jnp.clip(jnp.round(wide * jnp.where(top > 0, LARGEST / top, 0.0)), -LARGEST, LARGEST)
    return whole.astype(jnp.int8), jnp.squeeze(top * jnp.float32(1 / LARGEST), axes)


def quantised_matrices(layers: Mapping[str, Array]) -> dict[str, Array]:
    """The matrices of stacked layers as int8, and their scales: query_scale [L H E], ..., output_scale [L D], ..."""
    found = {}
    for name, inputs in MATRICES.items():
        found[name], found[name + SCALE] = quantised(layers[name], tuple(range(1, 1 + inputs)))
    return found


def with_scales(tree: dict[str, Any]) -> dict[str, Any]:
    """Of what is said of every parameter per axis (sizes, logical names), the same with the scales of its matrices."""
    layers = dict(tree["layers"])
    for name, inputs in MATRICES.items():
        of_layers, *sides = layers[name]
        layers[name + SCALE] = (of_layers, *sides[inputs:])
    return {**tree, "layers": layers}
