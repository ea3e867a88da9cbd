"""From a row's logits to its next token. Every function works row by row: no row sees another.

Dims: S slots, D model, V vocab.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, UInt32

from hptjax.rollout.threefry import random_bits
from hptjax.types import Array


def sample_keys(key: Array, ids: UInt32[Array, "S 3"]) -> UInt32[Array, "S 2"]:
    """The key of each sample: fold_in(fold_in(fold_in(key, question), round), index), as the words of a Threefry key.

    Args
      key: one jax random key (typed, or raw words). Of another generator's key the first two words are taken: what
        those generators draw for a row depends on its place in the batch.
      ids: question, round and index of each sample, int32 values seen as uint32 (two's complement), so -1 is 2**32 - 1.
    Returns words that depend on nothing but `key` and the id.
    """
    start = _threefry(key)

    def fold(sample_id):
        folded = start
        for part in range(3):
            folded = jax.random.fold_in(folded, sample_id[part])
        return jax.random.key_data(folded)

    return jax.vmap(fold)(ids)


def token_noise(keys: Array, positions: Int[Array, " S"], vocab_size: int) -> Float[Array, "S V"]:
    """Gumbel noise of one token of each sample: gumbel(fold_in(sample key, completion position), [V]), fp32.

    The noise belongs to token ids, so truncation changes which tokens are allowed, not their noise. It is that of
    `jax.random.gumbel` with mode="low", bit for bit: -log(-log(u)), u the 23 high bits of 32 over 2**23, or the
    smallest normal number in the place of 0.
    """
    drawn = jax.vmap(jax.random.fold_in)(_threefry(keys), positions.astype(jnp.uint32))
    bits = random_bits(jax.random.key_data(drawn), vocab_size)
    one_to_two = jax.lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32)
    uniform = jnp.maximum(one_to_two - 1.0, jnp.finfo(jnp.float32).tiny)
    return -jnp.log(-jnp.log(uniform))


def _threefry(keys: Array) -> Array:
    words = jax.random.key_data(keys) if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) else keys
    return jax.random.wrap_key_data(words[..., :2], impl="threefry2x32")


def scaled_logits(
    hidden: Float[Array, "S D"], unembedding: Float[Array, "D V"], temperature: Float[Array, " S"]
) -> Float[Array, "S V"]:
    """logits / temperature, fp32: hidden @ unembedding / temperature.

    The matmul reads the hidden states' type and adds in fp32, as the trainer's log-probs do.
    """
    logits = jnp.einsum("sd,dv->sv", hidden, unembedding.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return logits / temperature[:, None]


def choose(scaled: Float[Array, "S V"], noise: Float[Array, "S V"]) -> Int[Array, " S"]:
    """A draw from softmax(scaled): argmax(scaled + Gumbel noise)."""
    return first_largest(scaled + noise)


def choose_truncated(
    scaled: Float[Array, "S V"],
    noise: Float[Array, "S V"],
    top_k: Int[Array, " S"],
    top_p: Float[Array, " S"],
) -> Int[Array, " S"]:
    """A draw from softmax(scaled) cut to its top-k, then to the nucleus top-p of what top-k left.

    The nucleus is the shortest run of the most likely tokens whose mass reaches top_p: a token stays while the mass
    before it is below top_p, so one always stays. Equal logits are ranked by token id, so top-k keeps exactly k.
    top_k = 0 and top_p = 1 turn each off; top_k = 1 is greedy decoding.
    Source: top-k Fan et al. 2018, 1805.04833; top-p Holtzman et al. 2020, 1904.09751; this order is the usual one of
    sampling libraries.
    """
    vocab_size = scaled.shape[-1]
    ids = jnp.broadcast_to(jnp.arange(vocab_size, dtype=jnp.int32)[None, :], scaled.shape)
    falling, ids, noise = jax.lax.sort((-scaled, ids, noise), dimension=1, num_keys=1, is_stable=True)
    ranked = -falling  # [S V], most likely first
    rank = jnp.arange(vocab_size, dtype=jnp.int32)[None, :]
    in_top_k = rank < jnp.where(top_k > 0, top_k, vocab_size)[:, None]
    probabilities = jax.nn.softmax(jnp.where(in_top_k, ranked, -jnp.inf), axis=-1)
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # rounding can lift the mass before the last tokens to 1, so "off" is asked for by name
    in_nucleus = (mass_before < top_p[:, None]) | (top_p >= 1.0)[:, None] | (rank == 0)
    winner = first_largest(jnp.where(in_top_k & in_nucleus, ranked + noise, -jnp.inf))
    return jnp.take_along_axis(ids, winner[:, None], axis=1)[:, 0]


def first_largest(values: Float[Array, "S V"]) -> Int[Array, " S"]:
    """argmax over V, the first where several are equal; a row with NaN gets any token."""

    def in_two_passes(values: Array) -> Array:
        # the CPU's compiler makes one slow loop of argmax and of all that leads to it
        values = jax.lax.optimization_barrier(values)
        last = values.shape[-1] - 1
        here = values == jnp.max(values, axis=-1, keepdims=True)
        return jnp.min(jnp.where(here, jnp.arange(last + 1, dtype=jnp.int32)[None, :], last), axis=-1)

    def in_one_pass(values: Array) -> Array:
        return jnp.argmax(values, axis=-1).astype(jnp.int32)

    return jax.lax.platform_dependent(values, cpu=in_two_passes, default=in_one_pass)


def chosen_logprobs(scaled: Float[Array, "S V"], tokens: Int[Array, " S"]) -> Float[Array, " S"]:
    """log-softmax of `scaled` at each row's token, in nats: after temperature, before top-k and top-p."""
    vocabulary = jnp.arange(scaled.shape[-1], dtype=tokens.dtype)
    # a masked sum, not a gather, so that a sharded vocabulary stays where it is
    chosen = jnp.sum(jnp.where(vocabulary[None, :] == tokens[:, None], scaled, 0.0), axis=-1)
    return chosen - jax.nn.logsumexp(scaled, axis=-1)


def is_stop(tokens: Int[Array, " S"], stop_ids: Int[Array, "S W"]) -> Array:
    """True where a row's token is one of its stop ids; empty places of `stop_ids` hold -1. [S] bool."""
    return jnp.any(tokens[:, None] == stop_ids, axis=1)
