"""The entropy bonus as a token loss. Exact, from the whole next-token distribution, so it is no coefficient form."""

from __future__ import annotations

from jaxtyping import Float

from hptjax.types import Array


def entropy_token_loss(entropy: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """`-H`, so that a positive coefficient raises the entropy.

    Args
      entropy: exact entropy of the next-token distribution, from `token_logprobs(..., want_entropy=True)`; [B T]; nats.
    Returns [B T]; nats.
    Gradient flows through the entropy: grad H = -E[(logp + H) grad logp], the expectation over the whole vocabulary.
    Source `spec/hpt.md` 2.2: HPT's script takes it over all completion tokens, demonstrations included, with 0.001.
    """
    return -entropy
