"""Low-rank adapters of a decoder's matrices, as a plain tree beside its parameters: W + (alpha / rank) A B.

    layers: query {a [L D R], b [L R H E]}   key, value {a [L D R], b [L R K E]}   output {a [L H E R], b [L R D]}
            gate, up {a [L D R], b [L R F]}   down {a [L F R], b [L R D]}

Only the matrices that are targets have an entry. Training sees `adapted` parameters (the product is never formed);
rollouts and export see `merged` ones. R is the rank.
Source: Hu et al. 2021, 2106.09685, section 4.1, where A is the second factor; names of targets and the start of A as in
the PEFT library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hptjax.models.decoder import logical_axes, param_shapes
from hptjax.models.layers import Adapted
from hptjax.models.lora_config import TARGETS
from hptjax.models.shape import DecoderConfig
from hptjax.types import Array, Params


def adapter_shapes(config: DecoderConfig, rank: int, targets: Sequence[str]) -> dict[str, Any]:
    """The tree of adapters with a shape tuple in the place of each array. Raises a rank below 1 -> ValueError."""
    if rank < 1:
        raise ValueError(f"expected a rank of at least 1, got {rank}; change lora.rank")
    layers = param_shapes(config)["layers"]
    return {"layers": {name: _factors(layers[name], (rank,), inputs) for name, inputs in _matrices(targets)}}


def adapter_axes(config: DecoderConfig, targets: Sequence[str]) -> dict[str, Any]:
    """The tree of adapters with logical axis names: each factor lies as its side of the matrix; ranks are not cut."""
    layers = logical_axes(config)["layers"]
    return {"layers": {name: _factors(layers[name], (None,), inputs) for name, inputs in _matrices(targets)}}


def init_adapters(key: Array, config: DecoderConfig, rank: int, targets: Sequence[str]) -> Params:
    """Fresh float32 adapters that change nothing yet: A uniform within 1 / sqrt(fan in) of 0, B zero."""
    shapes = adapter_shapes(config, rank, targets)["layers"]
    keys = jax.random.split(key, len(shapes))
    fresh = {}
    for name, one in zip(sorted(shapes), keys, strict=True):
        bound = 1.0 / math.sqrt(math.prod(shapes[name]["a"][1:-1]))
        fresh[name] = {
            "a": jax.random.uniform(one, shapes[name]["a"], jnp.float32, -bound, bound),
            "b": jnp.zeros(shapes[name]["b"], jnp.float32),
        }
    return {"layers": fresh}


def adapted(params: Params, adapters: Params, scale: float) -> Params:
    """The decoder's parameters with adapters beside their matrices: a layer computes x W + (x A) (scale B).

    Args
      scale: alpha / rank. Gradient flows through both factors (and through `params`, where it is asked for).
    """
    layers = dict(params["layers"])
    for name, factors in adapters["layers"].items():
        layers[name] = Adapted(kernel=layers[name], down=factors["a"], up=factors["b"] * scale)
    return {**params, "layers": layers}


def merged(params: Params, adapters: Params, scale: float) -> Params:
    """The decoder's parameters with each adapter added to its matrix: W + scale A B, in float32."""
    layers = dict(params["layers"])
    for name, factors in adapters["layers"].items():
        rank = factors["b"].shape[1]
        number = layers[name].shape[0]
        product = jnp.einsum(
            "lir,lro->lio",
            factors["a"].reshape(number, -1, rank),
            factors["b"].reshape(number, rank, -1),
            precision=jax.lax.Precision.HIGHEST,
        )
        layers[name] = layers[name].astype(jnp.float32) + scale * product.reshape(layers[name].shape)
    return {**params, "layers": layers}


def _matrices(targets: Sequence[str]) -> list[tuple[str, int]]:
    """The matrices of targets, in the table's order. Raises unknown or no targets -> ValueError."""
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown or not targets:
        raise ValueError(
            f"expected targets out of {', '.join(TARGETS)}, got {', '.join(unknown) or 'none'}; change lora.targets"
        )
    return [matrix for name, matrix in TARGETS.items() if name in targets]


def _factors(matrix: tuple[Any, ...], rank: tuple[Any], inputs: int) -> dict[str, Any]:
    """Of what is said of a stacked matrix per axis, what is said of its two factors."""
    layers, sides = matrix[:1], matrix[1:]
    return {"a": (*layers, *sides[:inputs], *rank), "b": (*layers, *rank, *sides[inputs:])}
