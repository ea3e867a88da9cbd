"""Attention of rows whose segments share one prompt: the prompt is computed once, and every segment reads it.

A row is the prompt's first tokens, P positions of them, and then `lanes` equal parts that no segment crosses. A query
of the prompt sees the prompt up to itself; a query of a segment sees the whole prompt and its own segment up to itself.
A sample with a prompt of its own sees the same in the same order, so the results are those of
`attention.reference_attention` up to rounding. Lanes are rows to the attention, so that it costs no more than there.

Dims: B rows, P positions of the shared prompt, T positions after it, N lanes, L = T / N positions of a lane, U = P + L
that its queries may see.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from hptjax.models.attention import Attend, causal_attention, packed_mask
from hptjax.types import Array


class SharedPrompt(NamedTuple):
    """The prompt that all segments of a row go on from.

    Args
      tokens: all of the prompt but its last token, which every segment begins with. mask: True where there is one.
      lanes: into how many equal parts the positions after it are cut; no segment crosses from one to another.
    """

    tokens: Int[Array, "B P"]
    mask: Bool[Array, "B P"]
    lanes: int


def shared_attention(segment_ids: Int[Array, "B T"], shared: SharedPrompt) -> Attend:
    """The attend of rows of W = P + T positions, the shared prompt first.

    Raises lanes that do not divide T -> ValueError.
    """
    (rows, after), room, lanes = segment_ids.shape, shared.mask.shape[1], shared.lanes
    if after % lanes:
        raise ValueError(f"expected batch.row_tokens to be a multiple of batch.lanes, got {after} and {lanes}")
    prompt_mask = packed_mask(shared.mask.astype(jnp.int32))  # [B P P]
    segments = segment_ids.reshape(rows * lanes, -1)  # [BN L]
    reads_prompt = (segments > 0)[:, :, None] & jnp.repeat(shared.mask, lanes, axis=0)[:, None, :]  # [BN L P]
    lane_mask = jnp.concatenate([reads_prompt, packed_mask(segments)], axis=2)  # [BN L P+L]

    def folded(x: Float[Array, "B W H E"]) -> Float[Array, "BN L H E"]:
        return x[:, room:].reshape(rows * lanes, -1, *x.shape[2:])

    def behind_prompt(x: Float[Array, "B W K E"]) -> Float[Array, "BN U K E"]:
        return jnp.concatenate([jnp.repeat(x[:, :room], lanes, axis=0), folded(x)], axis=1)

    def attend(query: Array, key: Array, value: Array) -> Array:
        front = causal_attention(query[:, :room], key[:, :room], value[:, :room], prompt_mask)
        behind = causal_attention(folded(query), behind_prompt(key), behind_prompt(value), lane_mask)
        return jnp.concatenate([front, behind.reshape(rows, after, *query.shape[2:])], axis=1)

    return attend
