"""From the layout of training to that of rollouts: one compiled copy over the mesh, checked word by word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from hptjax.sharding.host import to_host
from hptjax.sharding.words import word_sum


def make_reshard(target: Any, convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns `reshard(params) -> params`: a copy in another layout (and type) that the caller deletes after use.

    Args
      target: the tree of shardings of the copy. convert: what becomes of the values on the way, such as a cast; it is
        done before anything travels.

    The parameters themselves stay: training goes on from them, so their buffers are not given away.
    Raises RuntimeError from `reshard` where the words of a leaf do not sum to what they summed to before the move.
    """
    move = jax.jit(convert, out_shardings=target)
    before = jax.jit(lambda params: jax.tree.map(word_sum, convert(params)))
    after = jax.jit(lambda copy: jax.tree.map(word_sum, copy))

    def reshard(params: Any) -> Any:
        expected = to_host(before(params))
        copy = move(params)
        found = jax.tree.leaves_with_path(to_host(after(copy)))
        wrong = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for (path, got), want in zip(found, jax.tree.leaves(expected), strict=True)
            if got != want
        ]
        if wrong:
            raise RuntimeError(
                f"expected the rollout copy of the weights to hold the words of the training weights, got other sums "
                f"in {', '.join(wrong)}; leave mesh.rollout_rules out and report it"
            )
        return copy

    return reshard
