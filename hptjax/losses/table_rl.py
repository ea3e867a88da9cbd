"""Rows for tokens that the policy wrote: mask and denominator say how far it may have moved since.

Equation numbers of papers other than arXiv 2509.04419 and 1707.06347 are from memory: unverified.
"""

from __future__ import annotations

import dataclasses
import math

from hptjax.losses import kl
from hptjax.losses.advantages import centred, leave_one_out, raw_reward, signed, standardised
from hptjax.losses.denominators import (
    clipped_geometric,
    clipped_ratio,
    current_policy,
    pair,
    rollout_policy,
    sequence_ratio,
    sigmoid_gate,
)
from hptjax.losses.estimator import Estimator, ExtraTerm, Need, Regression
from hptjax.losses.returns import reinforce_pp_advantages
from hptjax.losses.stability import everywhere, log_clip, ppo_clip, sequence_clip
from hptjax.losses.value import value_token_loss
from hptjax.losses.view import TokenView, stored
from hptjax.losses.words import said
from hptjax.types import Array

Clip = tuple[float, float]  # half-widths (low, high) of the trust region in the ratio

_OFF_POLICY = frozenset({Need.ROLLOUT_LOGPROBS})
_GROUPED = frozenset({Need.ROLLOUT_LOGPROBS, Need.GROUPS})


@said("k3 to the reference")
def _k3(view: TokenView) -> Array:
    return kl.k3_token_loss(view.logprobs, stored(view.reference_logprobs, "reference_logprobs"))


REINFORCE = Estimator(
    name="reinforce",
    stability_mask=everywhere,
    denominator=current_policy,
    advantage=signed,
    formula="A grad log pi, A = +1 where R > 0, else -1",
    source="Williams 1992; A as in arXiv 2509.04419 v2 Tab. 1",
    reducer="seq_mean_token_sum",
)

RLOO = dataclasses.replace(
    REINFORCE,
    name="rloo",
    advantage=leave_one_out,
    formula="A grad log pi, A = R - mean of the group's other rewards",
    source="Ahmadian et al. 2024, arXiv 2402.14740",
    needs=frozenset({Need.GROUPS}),
    difference="KL is usually folded into the reward (beta 0.03 in TRL's index); here it is a term of its own.",
)


def REINFORCE_PP(clip: Clip = (0.2, 0.2)) -> Estimator:
    """REINFORCE++: PPO's surrogate with whitened returns and no critic. Args: clip: (low, high)."""
    return Estimator(
        name="reinforce_pp",
        stability_mask=ppo_clip(*clip),
        denominator=rollout_policy,
        advantage=raw_reward,
        token_advantage=reinforce_pp_advantages,
        formula="1_clip A_t grad pi / pi_rollout, A_t = whitened return-to-go",
        source="arXiv 2501.03262; advantages as in verl",
        needs=_OFF_POLICY,
        difference="The clip's width and the variance's eps are from memory: unverified. KL in the reward is not part."
        " Whitened over each update; verl over all updates of a rollout batch.",
    )


def PPO(clip: Clip = (0.2, 0.2)) -> Estimator:
    """PPO's surrogate. By itself its advantage is the reward: GAE with value 0, gamma = lambda = 1, and no whitening.

    Method `ppo` gives it whitened advantages per token, from the critic that `VALUE` fits (`hpt/refine.py`). As the row
    of HPT's rollouts it stays without a critic.

    Args
      clip: (low, high), 0.2 and 0.2 in the paper.
    """
    return Estimator(
        name="ppo",
        stability_mask=ppo_clip(*clip),
        denominator=rollout_policy,
        advantage=raw_reward,
        formula="1_clip R grad pi / pi_rollout  =  grad min(ratio R, clip(ratio, 1 - low, 1 + high) R)",
        source="Schulman et al. 2017, arXiv 1707.06347 Eq. 7; arXiv 2509.04419 v2 App. B.3",
        needs=_OFF_POLICY,
        difference="The row alone has no critic; method ppo brings it and its advantages.",
    )


def VALUE(clip: float = 0.2) -> Regression:
    """PPO's critic: values of the policy's tokens, fitted to the returns that GAE makes of rewards and old values.

    Args
      clip: how far a value may move from the one at sampling weights and still be pulled further; >= 0; 0.2 is ours
        (verl 0.5, from memory: unverified).
    """

    @said(f"squares of value - return, a value at most {clip:g} from its old one")
    def token_loss(view: TokenView, returns: Array) -> Array:
        values, before = stored(view.values, "values"), stored(view.rollout_values, "rollout_values")
        return value_token_loss(values, before, returns, stored(view.live, "live"), clip=clip)

    return Regression("value", token_loss, frozenset({Need.VALUES}))


def GRPO(clip: Clip = (0.2, 0.2)) -> Estimator:
    """GRPO: PPO's surrogate with rewards standardised in their group. Its k3 penalty is a term of its own (`kl.py`).

    Args
      clip: (low, high), 0.2 and 0.2; DAPO's 0.2 and 0.28.
    """
    return Estimator(
        name="grpo",
        stability_mask=ppo_clip(*clip),
        denominator=rollout_policy,
        advantage=standardised,
        formula="1_clip A grad pi / pi_rollout, A = (R - mean) / (std + 1e-6), std with ddof 1",
        source="Shao et al. 2024, arXiv 2402.03300 Eq. 3",
        reducer="seq_mean_token_mean",
        needs=_GROUPED,
        extra_terms=(ExtraTerm("kl", _k3, 0.04, frozenset({Need.REFERENCE_LOGPROBS})),),
        difference="The penalty's 0.04 is from memory: unverified; DeepSeek-R1 0.001 and clip 10 by TRL's index.",
    )


def DR_GRPO(clip: Clip | None = None) -> Estimator:
    """Dr.GRPO: GRPO without the division by the group's std.

    Args
      clip: (low, high), or None for no mask, as the published HPT recipes run it (`spec/hpt.md` 2.2).
    """
    return Estimator(
        name="dr_grpo",
        stability_mask=everywhere if clip is None else ppo_clip(*clip),
        denominator=rollout_policy,
        advantage=centred,
        formula="[1_clip] A grad pi / pi_rollout, A = R - mean",
        source="Liu et al. 2025, arXiv 2503.20783; unclipped: HPT script, arXiv 2509.04419 code",
        reducer="dr_grpo",
        needs=_GROUPED,
    )


def DAPO(clip: Clip = (0.2, 0.28)) -> Estimator:
    """DAPO's loss: GRPO with a wider clip above, a token mean and no KL. Args: clip: (low, high)."""
    return dataclasses.replace(
        GRPO(clip),
        name="dapo",
        source="arXiv 2503.14476 Eq. 8 to 12",
        reducer="token_mean",
        extra_terms=(),
        difference="Dynamic sampling and the overlong filter and penalty act on the batch before this row"
        " (`hpt/route.py`, `train/phases.py`, `advantages.overlong_penalty`).",
    )


def CISPO(low: float = 1.0, high: float = 0.2) -> Estimator:
    """CISPO: the ratio is clipped as a weight, so every token keeps a gradient.

    Args
      low, high: half-widths; low = 1 leaves the lower side open, as the paper is read; verl clips both sides; TRL's
        absolute upper bound e is high = e - 1.
    """
    return dataclasses.replace(
        DAPO(),
        name="cispo",
        stability_mask=everywhere,
        denominator=clipped_ratio(low, high),
        formula="clip(ratio, 1 - low, 1 + high) A grad log pi",
        source="MiniMax-M1, arXiv 2506.13585 Eq. 4 and 5",
        difference="The open lower side and the default upper half-width are unverified (verl 0.2 each, ScaleRL 4).",
    )


def CISPO_TABLE(clip: Clip = (0.2, 0.2)) -> Estimator:
    """CISPO as UPGE's table has it: rollout policy and a 0/1 mask, which drops tokens. Args: clip: (low, high)."""
    return dataclasses.replace(
        DAPO(clip),
        name="cispo_table",
        source="arXiv 2509.04419 v2 Tab. 1",
        difference="The published CISPO drops no token, see cispo. The table only names its mask; PPO's is ours.",
    )


def GSPO(clip: Clip = (3e-4, 4e-4)) -> Estimator:
    """GSPO: ratio and clip of the whole sequence. Args: clip: (low, high) of the sequence's geometric mean ratio."""
    return dataclasses.replace(
        GRPO(),
        name="gspo",
        stability_mask=sequence_clip(*clip),
        denominator=sequence_ratio,
        formula="1_seq s A grad log pi, s = (pi(o) / pi_rollout(o))^(1/|o|)",
        source="arXiv 2507.18071 Eq. 5 and 7; arXiv 2509.04419 v2 Tab. 1",
        extra_terms=(),
        difference="Constants by TRL's index.",
    )


def GMPO(log_clip_widths: Clip = (0.4, 0.4)) -> Estimator:
    """GMPO: geometric mean of clipped token ratios. Args: log_clip_widths: (low, high) in log ratio."""
    return dataclasses.replace(
        GRPO(),
        name="gmpo",
        stability_mask=log_clip(*log_clip_widths),
        denominator=clipped_geometric(*log_clip_widths),
        formula="1_t rho A grad log pi, rho = exp(mean of log ratios clipped against A)",
        source="arXiv 2507.20673; range as in verl and TRL's index",
        extra_terms=(),
        difference="",
    )


def SAPO(temperature_positive: float = 1.0, temperature_negative: float = 1.05) -> Estimator:
    """SAPO: a sigmoid in place of the clip. Args: the temperatures for A > 0 and for the rest."""
    return dataclasses.replace(
        GRPO(),
        name="sapo",
        stability_mask=everywhere,
        denominator=sigmoid_gate(temperature_positive, temperature_negative),
        formula="4 s (1 - s) ratio A grad log pi, s = sigma(tau (ratio - 1))",
        source="arXiv 2511.20347; constants as in TRL",
        extra_terms=(),
        difference="",
    )


def DPO(beta: float = 0.1) -> Estimator:
    """DPO: a pair's tokens, +1 on the chosen and -1 on the rejected, weighted by how wrong the pair still stands.

    Args
      beta: > 0; 0.1 by TRL's index. The loss is a mean over pairs: twice `seq_mean_token_sum`.
    """
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta: expected a finite number > 0, got {beta}")
    return dataclasses.replace(
        REINFORCE,
        name="dpo",
        denominator=pair(beta),
        formula="beta sigma(-D) A grad log pi, D = beta (log pi / pi_reference of the chosen - of the rejected)",
        source="arXiv 2305.18290 Eq. 7",
        needs=frozenset({Need.REFERENCE_LOGPROBS, Need.PAIRS}),
    )
