"""The entropy bonus as a token loss, and a controller of its coefficient.

Exact, from the whole next-token distribution, so it is no coefficient form.
"""

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


def next_entropy_coefficient(coefficient: float, entropy: float, *, target: float, step: float) -> float:
    """The coefficient after an update whose mean entropy was `entropy`: a step up at or below the target, else down.

    Args
      coefficient: >= 0; never falls below 0. entropy, target: nats. step: > 0.
    Source Skywork-OR1 as in TRL's index (`spec/methods.md` 2.13); the gate is `entropy_coefficient_in_use`.
    """
    return max(coefficient + step if entropy <= target else coefficient - step, 0.0)


def entropy_coefficient_in_use(coefficient: float, entropy: float, *, target: float) -> float:
    """The controlled coefficient where the entropy is at or below its target, else 0."""
    return coefficient if entropy <= target else 0.0
