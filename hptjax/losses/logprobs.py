"""Log-probs and entropy of the target tokens from hidden states, without ever holding [B T V].

Dims: B rows, T target positions, D model, V vocab, C positions of a chunk.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from hptjax.types import Array


class TokenStats(NamedTuple):
    """What one look at the vocabulary tells of each target token, in fp32 and nats.

    Args
      logprobs: log pi(target | context) at the token's temperature; [B T].
      entropy: of the same tempered distribution, exact; [B T], or None if it was not asked for.
      hidden: the states that it looked from, after the final norm, in the compute type; [B T D]; for a value head.
        Whatever stands where no token is live. None from `token_logprobs` itself, which was given them.
    """

    logprobs: Float[Array, "B T"]
    entropy: Float[Array, "B T"] | None
    hidden: Float[Array, "B T D"] | None = None


def token_logprobs(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "D V"],
    target_tokens: Int[Array, "B T"],
    temperature: Float[Array, "B T"],
    *,
    chunk_tokens: int,
    want_entropy: bool,
    live: Bool[Array, "B T"] | None = None,
    time_parts: int = 1,
) -> TokenStats:
    """Log-probs (and entropy) of the targets under softmax(hidden @ unembedding / temperature).

        z = hidden . unembedding / temperature       logprob = z[target] - logsumexp(z)
        entropy = -sum_v exp(z_v - logsumexp(z)) * (z_v - logsumexp(z))

    Args
      hidden: after the final norm; [B T D]; fp32 or bf16, which is also the type the matmul reads.
      unembedding: [D V]; fp32 or bf16.
      target_tokens: [B T]; 0..V-1 wherever the result counts.
      temperature: > 0; [B T].
      chunk_tokens: tokens whose logits are held at once, over all devices; at least one position of every row is.
        Peak memory is a few times chunk_tokens * V * 4 bytes. No loop and no recomputation if B * T fits.
      want_entropy: whether to compute the entropy.
      live: True where the result counts, if known. Elsewhere the hidden state is not looked at (it may be NaN), the
        results are 0 and so is every gradient.
      time_parts: over how many devices T is cut; each chunk takes as many positions from every part, so that no part
        waits while another one's positions are looked at. Divides T.
    Returns TokenStats, fp32.
    Raises chunk_tokens < 1, time_parts that do not divide T -> ValueError.
    Gradient flows through `hidden` and `unembedding`, of log-probs and entropy; logits are recomputed chunk by chunk.
      The unembedding's is added up in fp32 whatever its type; in bf16 compute the logits' cotangent is rounded to bf16
      before its two matmuls, as any bf16 layer does.

    Chunks run along T within the rows, not over flattened tokens, so that rows sharded over the data axis stay where
    they are; the picked logit is a masked sum, not a gather, so that a sharded vocabulary stays where it is.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: expected at least 1, got {chunk_tokens}")
    rows, positions = target_tokens.shape
    if positions % time_parts:
        raise ValueError(f"expected a number of positions that time_parts ({time_parts}) divides, got {positions}")
    if live is not None:
        hidden = jnp.where(live[:, :, None], hidden, 0)
        temperature = jnp.where(live, temperature, 1)
    # In fp32 before the loop: the loop adds the chunks' gradients in this type. A no-op for fp32 parameters.
    unembedding = unembedding.astype(jnp.float32)

    def chunk_stats(chunk: Any) -> TokenStats:
        return _stats(_project(chunk[0], unembedding), chunk[1], chunk[2], want_entropy)

    if rows * positions <= chunk_tokens:
        stats = chunk_stats((hidden, target_tokens, temperature))
    else:
        part = positions // time_parts
        chunks = math.ceil(part / max(1, chunk_tokens // (rows * time_parts)))
        width = math.ceil(part / chunks)
        xs = tuple(
            _cut(x, time_parts, chunks, width, pad) for x, pad in ((hidden, 0), (target_tokens, 0), (temperature, 1))
        )
        recomputed = jax.checkpoint(chunk_stats, prevent_cse=False)  # a loop's body needs no guard against CSE
        _, stacked = jax.lax.scan(lambda carry, chunk: (carry, recomputed(chunk)), None, xs)
        stats = jax.tree.map(lambda x: _joined(x, time_parts, part), stacked)  # [B T]
    if live is not None:
        stats = jax.tree.map(lambda x: jnp.where(live, x, 0), stats)
    return stats


def _cut(x: Any, parts: int, chunks: int, width: int, pad: int) -> Any:
    """[B, T, ...] -> [chunks, B, C, ...] with C = parts * width; every part is padded to chunks * width."""
    rows, positions, *rest = x.shape
    x = x.reshape(rows, parts, positions // parts, *rest)
    room = chunks * width - positions // parts
    x = jnp.pad(x, [(0, 0), (0, 0), (0, room), *[(0, 0)] * len(rest)], constant_values=pad)
    x = jnp.moveaxis(x.reshape(rows, parts, chunks, width, *rest), 2, 0)
    return x.reshape(chunks, rows, parts * width, *rest)


def _joined(x: Any, parts: int, part: int) -> Any:
    """[chunks, B, C] -> [B, T], the reverse of `_cut`."""
    chunks, rows, tokens = x.shape
    x = jnp.moveaxis(x.reshape(chunks, rows, parts, tokens // parts), 0, 2)  # [B parts chunks width]
    return x.reshape(rows, parts, -1)[:, :, :part].reshape(rows, parts * part)


def _stats(
    logits: Float[Array, "B C V"],
    target_tokens: Int[Array, "B C"],
    temperature: Float[Array, "B C"],
    want_entropy: bool,
) -> TokenStats:
    logits = logits / temperature.astype(logits.dtype)[:, :, None]  # [B C V]
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)  # [B C]
    vocabulary = jnp.arange(logits.shape[-1], dtype=target_tokens.dtype)
    is_target = vocabulary[None, None, :] == target_tokens[:, :, None]  # [B C V]
    picked = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)  # [B C]
    entropy = None
    if want_entropy:
        all_logprobs = logits - log_normaliser[:, :, None]  # [B C V]
        entropy = -jnp.sum(jnp.exp(all_logprobs) * all_logprobs, axis=-1)  # [B C]
    return TokenStats(picked - log_normaliser, entropy)


@jax.custom_vjp
def _project(hidden: Float[Array, "B C D"], unembedding: Float[Array, "D V"]) -> Float[Array, "B C V"]:
    """Logits in the unembedding's (fp32) precision from operands in the hidden states' type."""
    return jnp.einsum("bcd,dv->bcv", hidden, unembedding.astype(hidden.dtype), preferred_element_type=unembedding.dtype)


def _project_forward(hidden: Any, unembedding: Any) -> tuple[Any, Any]:
    return _project(hidden, unembedding), (hidden, unembedding)


def _project_backward(saved: Any, cotangent: Any) -> tuple[Any, Any]:
    # By hand, because autodiff would multiply fp32 by bf16 (no fast path) and round each chunk's result to bf16.
    hidden, unembedding = saved
    cotangent = cotangent.astype(hidden.dtype)
    wide = unembedding.dtype
    d_hidden = jnp.einsum("bcv,dv->bcd", cotangent, unembedding.astype(hidden.dtype), preferred_element_type=wide)
    d_unembedding = jnp.einsum("bcd,bcv->dv", hidden, cotangent, preferred_element_type=wide)
    return d_hidden.astype(hidden.dtype), d_unembedding


_project.defvjp(_project_forward, _project_backward)
