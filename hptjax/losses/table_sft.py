"""Rows for tokens that someone else wrote: the advantage is 1, and the denominator is the method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hptjax.losses.advantages import ones
from hptjax.losses.denominators import at_least, current_policy, implicit_reward, inverse_doubt, unit
from hptjax.losses.estimator import Estimator, Need
from hptjax.losses.pear import PUBLISHED, PearRange, pear_blocks, pear_suffix, pear_whole
from hptjax.losses.stability import everywhere

_PEAR_UNVERIFIED = (
    "Unverified: all constants (gamma, the two ranges, the block's size) are from one re-implementation; the paper may"
    " take the ratio of the initial policy, here it is the current one, without gradient."
)

SFT = Estimator(
    name="sft",
    stability_mask=everywhere,
    denominator=current_policy,
    advantage=ones,
    formula="grad log pi",
    source="maximum likelihood; arXiv 2509.04419 v2 Tab. 1",
    needs=frozenset({Need.DEMONSTRATIONS}),
)

DFT = dataclasses.replace(
    SFT,
    name="dft",
    denominator=unit,
    formula="grad pi = p grad log pi",
    source="arXiv 2508.05629; its code multiplies the loss by the detached probability of the label",
    difference="The authors claim gains for mathematics and code up to 7B only. CHORD's sft_is is the same row.",
)

CHORD_PHI = dataclasses.replace(
    SFT,
    name="chord_phi",
    denominator=inverse_doubt,
    formula="(1 - p) grad pi = p (1 - p) grad log pi",
    source="arXiv 2508.11408",
    difference="CHORD adds it to GRPO with a coefficient mu (0.1 constant with phi), each with its own normaliser.",
)


def TRSFT(floor: float = 0.1) -> Estimator:
    """TrSFT: SFT where p >= floor, DFT / floor below. Args: floor: 0.1 in paper and code."""
    return dataclasses.replace(
        SFT,
        name="trsft",
        denominator=at_least(floor),
        formula="grad pi / max(p, a)",
        source="arXiv 2512.17636 (TRAPO), its loss on prefix tokens",
        difference="TRAPO's code has other constants than the paper for its rollouts, not for this loss.",
    )


def PEAR_TOKEN(gamma: float = 0.999, held: PearRange = PUBLISHED) -> Estimator:
    """PEAR, token variant: a token weighs by how likely the policy is to write what follows it."""
    return dataclasses.replace(
        SFT,
        name="pear_token",
        denominator=pear_suffix(gamma, held),
        formula="G_t grad log pi, G_t = clip(gamma^(n - t) prod_(j > t) p_j / pi_demo_j)",
        source="arXiv 2602.01058",
        needs=SFT.needs | {Need.DEMONSTRATION_LOGPROBS},
        difference=_PEAR_UNVERIFIED,
    )


def PEAR_BLOCK(block_tokens: int = 8, gamma: float = 0.999, held: PearRange = PUBLISHED) -> Estimator:
    """PEAR, block variant: one weight per block of tokens. Args: block_tokens: 8 is ours, the paper's is not known."""
    return dataclasses.replace(
        PEAR_TOKEN(gamma, held),
        name="pear_block",
        denominator=pear_blocks(block_tokens, gamma, held),
        formula="G grad log pi, G = clip(gamma^m prod over the m tokens of later blocks of p_j / pi_demo_j)",
    )


def PEAR_SEQUENCE(held: PearRange = PUBLISHED) -> Estimator:
    """PEAR, sequence variant: one weight for the whole demonstration."""
    return dataclasses.replace(
        PEAR_TOKEN(held=held),
        name="pear_sequence",
        denominator=pear_whole(held),
        formula="G grad log pi, G = clip(prod_j p_j / pi_demo_j)",
    )


def damped(reward: Any) -> Any:
    """`log(2 sigma(-u))`: weight 1 where the policy is the reference, less where it already prefers the token."""
    return jnp.log(jnp.full_like(reward, 2.0)) + jax.nn.log_sigmoid(-reward)


def IMPLICIT_REWARD(
    beta: float = 0.1, log_weight: Callable[[Any], Any] = damped, *, whole_sequence: bool = False
) -> Estimator:
    """SFT that weighs tokens by their implicit reward: a hook, with a weight of ours in it.

    Args
      log_weight: u -> log w(u); `damped` unless another is given; 0 everywhere is SFT.
    """
    return dataclasses.replace(
        SFT,
        name="implicit_reward",
        denominator=implicit_reward(beta, log_weight, whole_sequence=whole_sequence),
        formula="w(u) grad log pi, u = beta log(p / p_reference)",
        source="after arXiv 2507.00018",
        needs=SFT.needs | {Need.REFERENCE_LOGPROBS},
        difference="The default weight 2 sigma(-u) is ours. The paper's f-divergence losses: unverified, not here.",
    )
