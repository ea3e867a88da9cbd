"""Rows for demonstrations that stand beside rollouts of the same question: their advantage is not always 1."""

from __future__ import annotations

import dataclasses

from hptjax.losses.advantages import centred, signed, standardised
from hptjax.losses.denominators import current_policy, shaped, unit
from hptjax.losses.estimator import Estimator, Need
from hptjax.losses.stability import dual_clip, everywhere
from hptjax.losses.table_rl import GRPO, Clip
from hptjax.losses.table_sft import SFT
from hptjax.losses.weights import entropy_weight, top_entropy_of_sequence, where_positive
from hptjax.losses.words import said


def LUFFY_OFF(gamma: float = 0.1) -> Estimator:
    """LUFFY's demonstration: an off-policy rollout of unknown probability, its ratio shaped. Args: gamma: 0.1."""
    return Estimator(
        name="luffy_off",
        stability_mask=everywhere,
        denominator=shaped(gamma),
        advantage=centred,
        formula="g p / (p + g)^2 A grad log pi, A = R - mean of rollouts and demonstration",
        source="arXiv 2504.14945; f(x) = x / (x + g), the author's policy taken as 1",
        reducer="dr_grpo",
        needs=frozenset({Need.DEMONSTRATIONS}),
        difference="UPGE's table divides A by the group's std; LUFFY's script does not, nor does this row.",
    )


SRFT_OFF = Estimator(
    name="srft_off",
    stability_mask=everywhere,
    denominator=unit,
    advantage=standardised,
    formula="A grad pi, A = (R - mean) / std of rollouts and demonstration",
    source="arXiv 2506.19767; arXiv 2509.04419 v2 Tab. 1",
    reducer="dr_grpo",
    needs=frozenset({Need.DEMONSTRATIONS}),
)


def SRFT_SFT(scale: float = 0.5, sign: int = -1) -> Estimator:
    """SRFT's demonstration as SFT, weighted by the policy's entropy on it.

    Args
      scale: 0.5. sign: -1 as in the paper, +1 as its official code is reported to have it.
    """
    return dataclasses.replace(
        SFT,
        name="srft_sft",
        weights=(entropy_weight(scale, sign),),
        formula=f"{scale:g} exp({'-' if sign < 0 else '+'}H) grad log pi, H the sequence's mean entropy",
        source="arXiv 2506.19767",
        needs=SFT.needs | {Need.ENTROPY},
        difference="Second-hand: paper and HPT's re-implementation exp(-H), the official code is said to have exp(+H).",
    )


def SRFT_ON(scale: float = 0.1) -> Estimator:
    """SRFT's rollouts: likelihood up on the solved, weighted by entropy, and down on the others. Args: scale: 0.1."""
    return Estimator(
        name="srft_on",
        stability_mask=everywhere,
        denominator=current_policy,
        advantage=signed,
        weights=(where_positive(entropy_weight(scale, 1)),),
        formula=f"{scale:g} exp(+H) grad log pi on rollouts with R > 0, -grad log pi on the others",
        source="arXiv 2506.19767; second-hand, agrees with HPT's re-implementation",
        reducer="dr_grpo",
        needs=frozenset({Need.ENTROPY}),
    )


def PREFIX_RFT(clip: Clip = (0.2, 0.2), cap: float = 3.0) -> Estimator:
    """Prefix-RFT's written tokens: GRPO with a dual clip, judged among rollouts of the same prefix.

    Args
      clip: (low, high). cap: of the ratio where A < 0; 3.
    """
    return dataclasses.replace(
        GRPO(clip),
        name="prefix_rft",
        stability_mask=dual_clip(*clip, cap),
        formula="1_dual A grad pi / pi_rollout, A = (R - mean) / std over rollouts of the same question and prefix",
        source="arXiv 2507.01679; code ZeroYuHuang/prefix_rft",
        reducer="token_mean",
        extra_terms=(),
        difference="A rollout that is alone with its prefix has A = R. The code has a variant without std.",
    )


def PREFIX_RFT_OFF(share: float = 0.2, clip: Clip = (0.2, 0.2), cap: float = 3.0) -> Estimator:
    """Prefix-RFT's prefix tokens: the demonstration's, pushed by how much the prefix helped, where entropy is high.

    Args
      share: of a prefix's tokens that learn. clip, cap: as in `PREFIX_RFT`, with a range of their own.
    """
    row = PREFIX_RFT(clip, cap)
    return dataclasses.replace(
        row,
        name="prefix_rft_off",
        advantage=said("R - mean of free")(lambda rewards, group_ids: centred(rewards, group_ids)),  # the route has it
        select=(top_entropy_of_sequence(share),),
        formula="1_top 1_dual A grad pi / pi_rollout, A = (R - mean of the free rollouts) / rollouts of the prefix",
        needs=row.needs | {Need.DEMONSTRATIONS, Need.ENTROPY},
        difference="The share is unverified. The code takes it over the prefixes of a micro-batch; here it is of each"
        " prefix, the same under any split. Its clip range of the prefix is computed and, with the clip on, not used.",
    )
