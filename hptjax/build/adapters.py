"""Which parameters of a policy are trained: all of them, or low-rank adapters beside a model that stays as it is.

    all        trees {policy: decoder}                     the model call takes trees[policy]
    adapters   trees {policy: adapters}, frozen {base}     the model call takes `adapted`, rollouts `merged` weights

Gradients, sums, moments, checkpoints and the ledger have the trees alone; what is frozen is an argument of the compiled
programs beside them. It is held in the type that the decoder computes with, which gives the same numbers as float32
would: a matrix is cast where it is used.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hptjax.config import Config
from hptjax.models.lora import adapted, adapter_axes, adapter_shapes, init_adapters, merged
from hptjax.models.lora_config import AdapterShape
from hptjax.models.lora_folder import load_adapter
from hptjax.models.shape import DecoderConfig
from hptjax.sharding.rules import Rules, named_shardings, shard_tree
from hptjax.train.objective import PolicyOf, policy_tree
from hptjax.types import Params

BASE = "base"  # the name of the frozen tree
LORA_KEY = 3  # what the run's seed is folded with, beside the model's own start


@dataclasses.dataclass(frozen=True, eq=False)
class Frozen:
    """What stands beside the trained parameters.

    Args
      trees: by name, on their devices; none where the whole model is trained.
      policy_of: named trees, these among them -> the decoder's parameters.
    """

    trees: Mapping[str, Params] = dataclasses.field(default_factory=dict)
    policy_of: PolicyOf = policy_tree


@dataclasses.dataclass(frozen=True, eq=False)
class Adapters:
    """Adapters in place of a model as what is trained.

    Args
      params, shardings: where they start, and where they live. frozen: the model.
      merge: base, adapters -> the decoder's parameters with the adapters added, a copy that the caller deletes.
    """

    params: Params
    shardings: Any
    frozen: Frozen
    merge: Callable[[Params, Params], Params]


def place_adapters(
    shape: DecoderConfig,
    lora: AdapterShape,
    base: Params,
    mesh: jax.sharding.Mesh,
    rules: Rules,
    places: Any,
    dtype: Any,
    start: Params | None = None,
) -> Adapters:
    """Adapters on a mesh.

    Args
      base: the model, or its shapes. places: where it lives, and merged weights too. dtype: of merged weights.
      start: host arrays; without them, shapes stand in the place of arrays.
    """
    shapes = adapter_shapes(shape, lora.rank, lora.targets)
    shardings = named_shardings(mesh, adapter_axes(shape, lora.targets), shapes, rules)

    def whole(trees: Mapping[str, Params]) -> Params:
        return adapted(trees[BASE], trees["policy"], lora.scale)

    def merge(base: Params, adapters: Params) -> Params:
        return as_used(merged(base, adapters, lora.scale), dtype=dtype)

    if start is None:
        params = jax.tree.map(
            lambda sizes, place: jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=place),
            shapes,
            shardings,
            is_leaf=lambda node: isinstance(node, tuple),
        )
    else:
        params = shard_tree(start, shardings)
    return Adapters(params, shardings, Frozen({BASE: base}, whole), jax.jit(merge, out_shardings=places))


def first_adapters(config: Config, shape: DecoderConfig, lora: AdapterShape) -> Params:
    """What a run's adapters start as: those of `lora.adapter`, or fresh ones, which change nothing yet."""
    if config.lora.adapter is not None:
        return load_adapter(config.lora.adapter, shape)
    key = jax.random.fold_in(jax.random.key(config.seed), LORA_KEY)
    return init_adapters(key, shape, lora.rank, lora.targets)


def as_used(params: Params, *, dtype: Any) -> Params:
    """The weights in the type that the decoder casts them to at use; the scales of norms it uses as they are."""

    def cast(path: tuple[Any, ...], leaf: Any) -> Any:
        return leaf if path[-1].key.endswith("norm") else leaf.astype(dtype)

    return jax.tree.map_with_path(cast, params)


def seeing(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(trees, *rest)` with the frozen trees in front: (frozen, trees, *rest)."""
    return lambda frozen, trees, *rest: function({**frozen, **trees}, *rest)


def with_frozen(frozen: Frozen, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(trees, *rest)` compiled; the frozen trees are among its `trees`, as arguments of the program."""
    compiled = jax.jit(seeing(function))

    @functools.wraps(compiled)
    def call(trees: Mapping[str, Params], *rest: Any) -> Any:
        return compiled(dict(frozen.trees), trees, *rest)

    return call


def merge_on_host(base: Params, adapters: Params, scale: float) -> Params:
    """`merged` of host arrays, without another copy of the model: the matrices of `base` are changed in place."""
    for name, factors in adapters["layers"].items():
        rank = factors["b"].shape[1]
        for layer, kernel in enumerate(base["layers"][name]):
            down, up = factors["a"][layer].reshape(-1, rank), factors["b"][layer].reshape(rank, -1)
            kernel += np.float32(scale) * (down @ up).reshape(kernel.shape)
    return base
