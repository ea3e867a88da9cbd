"""What a layer keeps for its backward pass, by name; the rest is computed again there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

from hptjax.models.attention import SAVED

Remat = Literal["none", "full", "dots", "dots_no_batch", "attention", "offload"]
LAYER_INPUT = "layer_input"

Body = Callable[[Any, Any], tuple[Any, Any]]


def rematerialised(body: Body, remat: Remat) -> Body:
    """The body of the scan over layers, `(hidden, weights) -> (hidden, per layer)`, under a policy of this name.

    none: everything is kept. full: only the layer's input. dots: besides, the results of all matmuls, the scores of
    the plain attention among them. dots_no_batch: those of the weights' matmuls alone. attention: besides the input,
    the result of attention in tiles or by splash, so that its forward pass is not done again (the plain form names
    nothing and is as under full). offload: the layers' inputs in host memory, nothing on the device.

    The values are the same under each; their gradients are computed from the same numbers.
    """
    policies = jax.checkpoint_policies
    if remat == "none":
        return body
    if remat == "full":
        return jax.checkpoint(body)
    if remat == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
        return jax.checkpoint(
            lambda hidden, weights: body(checkpoint_name(hidden, LAYER_INPUT), weights), policy=policy
        )
    policy = {
        "dots": policies.dots_saveable,
        "dots_no_batch": policies.dots_with_no_batch_dims_saveable,
        "attention": policies.save_only_these_names(SAVED),
    }[remat]
    return jax.checkpoint(body, policy=policy)
