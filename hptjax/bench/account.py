"""What an accelerator would need at least: operations of training, bytes of decoding. No jax."""

from __future__ import annotations

from collections.abc import Sequence

from hptjax.explain_flops import BACKWARD, FORWARD, attention_share
from hptjax.explain_memory import parameter_count
from hptjax.models.shape import DecoderConfig


def multiplied(shape: DecoderConfig) -> int:
    """Parameters that a token is multiplied by: all, less an embedding that is only looked up."""
    looked_up = 0 if shape.tie_embeddings else shape.vocab_size * shape.hidden_size
    return parameter_count(shape, shape.vocab_size) - looked_up


def training_flops(shape: DecoderConfig, segments: Sequence[int], adapters: int | None = None) -> float:
    """Of a forward and a backward pass over samples of so many tokens, as they count in a model FLOPs utilisation.

    6 N n + 12 L H E n (n + 1) / 2 for each sample of n tokens: attention is causal and stays in its sample, and what
    remat does again does not count. With `adapters` entries in adapters and N that stay, (4 N + 6 adapters) n instead.

    Source: arXiv 2204.02311, appendix B, with its attention term halved for causality.
    """
    weights, forward = multiplied(shape), FORWARD
    both = FORWARD + BACKWARD
    per_token = both * weights if adapters is None else (both - forward) * weights + both * adapters
    attention = [attention_share(shape, weights, n) * FORWARD * weights * n for n in segments]
    return float(per_token) * sum(segments) + sum(attention) * both / FORWARD


def decode_bytes(shape: DecoderConfig, *, rows: int, cached: float, item: int = 2) -> float:
    """What a decode step reads at least: every weight once, and the keys and values of all rows.

    item (N + 2 L K E rows cached)

    Args
      rows: samples decoded together. cached: tokens that each has in its cache, the mean. item: bytes of a number.
    """
    per_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    return item * (multiplied(shape) + float(per_token) * rows * cached)
