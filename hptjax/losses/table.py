"""The methods, one row each: what they choose for the four components of the unified policy gradient.

    gradient = stability mask x advantage / denominator x grad pi    (per token; arXiv 2509.04419 v2, Eq. 6 and Tab. 1)

    row         stability mask   denominator      advantage              weight on grad log pi
    SFT         everywhere       current policy   1                      1
    REINFORCE   everywhere       current policy   +1 or -1               A
    PPO         ppo clip         rollout policy   reward (no critic)     clip mask x ratio x A
    GRPO        ppo clip         rollout policy   (R - mean) / std       clip mask x ratio x A
    DR_GRPO     ppo clip or none rollout policy   R - mean               [clip mask x] ratio x A

The fourth component, the likelihood, is the same for all: `upge_token_loss`. How tokens are added up (token mean,
sequence mean, constant ...) is not part of a row: see `reducers.py`. A new method is a new row; DFT, for one, is
Estimator(name="DFT", stability_mask=everywhere, denominator=unit, advantage=ones, ...).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Float

from hptjax.losses.advantages import AdvantageFn, centred, ones, raw_reward, signed, standardised
from hptjax.losses.denominators import Denominator, current_policy, rollout_policy
from hptjax.losses.stability import StabilityMask, everywhere, ppo_clip
from hptjax.losses.upge import upge_token_loss
from hptjax.types import Array

Clip = tuple[float, float]  # half-widths (low, high) of the trust region in the ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimator:
    """One row: four components, the formula they make, and where it comes from.

    Args
      stability_mask: (log_ratio, advantages) -> mask [B T]; `stability.py`.
      denominator: (logprobs, rollout_logprobs) -> denominator_logprobs [B T]; `denominators.py`.
      advantage: (rewards [N], group_ids [N]) -> [N]; on the host, before the split; `advantages.py`.
      likelihood: (logprobs, denominator_logprobs, advantages, stability_mask) -> token loss [B T].
    """

    name: str
    stability_mask: StabilityMask
    denominator: Denominator
    advantage: AdvantageFn
    formula: str
    source: str
    likelihood: Callable[[Any, Any, Any, Any], Any] = upge_token_loss

    @property
    def reads_rollout_logprobs(self) -> bool:
        """Whether a later update on the same rollouts needs a score pass. For the first one, give sg(logprobs)."""
        return self.stability_mask is not everywhere or self.denominator is rollout_policy


def policy_token_loss(
    estimator: Estimator,
    logprobs: Float[Array, "B T"],
    rollout_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
) -> Float[Array, "B T"]:
    """The token loss of one row of the table.

    Args
      logprobs: current policy; [B T]; nats; carries the gradient.
      rollout_logprobs: trainer's at sampling weights; [B T]; nats. With one update per rollout batch and no score pass
        it is sg(logprobs), and every ratio is exactly 1. Ignored unless `estimator.reads_rollout_logprobs`.
      advantages: the row's own, already on the tokens; [B T].
    Returns [B T]; a surrogate, whose gradient is the method's and whose value is not. `weighted_sum` reduces it.
    Gradient flows through `logprobs`; exactly 0 through the rest.
    """
    log_ratio = jax.lax.stop_gradient(logprobs - rollout_logprobs)
    return estimator.likelihood(
        logprobs,
        estimator.denominator(logprobs, rollout_logprobs),
        advantages,
        estimator.stability_mask(log_ratio, advantages),
    )


SFT = Estimator(
    name="SFT",
    stability_mask=everywhere,
    denominator=current_policy,
    advantage=ones,
    formula="grad log pi",
    source="maximum likelihood; arXiv 2509.04419 v2 Tab. 1",
)

REINFORCE = Estimator(
    name="REINFORCE",
    stability_mask=everywhere,
    denominator=current_policy,
    advantage=signed,
    formula="A grad log pi, A = +1 or -1",
    source="Williams 1992; A as in arXiv 2509.04419 v2 Tab. 1",
)


def PPO(clip: Clip) -> Estimator:
    """PPO without a critic: GAE with value 0 and gamma = lambda = 1, which is the reward at the end.

    Args
      clip: (low, high), 0.2 and 0.2 in the paper. A critic comes later and brings its advantages per token.
    """
    return Estimator(
        name="PPO",
        stability_mask=ppo_clip(*clip),
        denominator=rollout_policy,
        advantage=raw_reward,
        formula="1_clip R grad pi / pi_rollout  =  grad min(ratio R, clip(ratio, 1 - low, 1 + high) R)",
        source="Schulman et al. 2017, arXiv 1707.06347 Eq. 7; arXiv 2509.04419 v2 App. B.3",
    )


def GRPO(clip: Clip) -> Estimator:
    """GRPO: PPO's surrogate with rewards standardised in their group. Its k3 penalty is a term of its own (`kl.py`).

    Args
      clip: (low, high), 0.2 and 0.2; DAPO's 0.2 and 0.28. Its published reducer is `seq_mean_token_mean`.
    """
    return Estimator(
        name="GRPO",
        stability_mask=ppo_clip(*clip),
        denominator=rollout_policy,
        advantage=standardised,
        formula="1_clip A grad pi / pi_rollout, A = (R - mean) / (std + 1e-6), std with ddof 1",
        source="Shao et al. 2024, arXiv 2402.03300 Eq. 3",
    )


def DR_GRPO(clip: Clip | None = None) -> Estimator:
    """Dr.GRPO: GRPO without the division by the group's std. Its published reducer is `dr_grpo` (a constant).

    Args
      clip: (low, high), or None for no mask, as the published HPT recipes run it (`spec/hpt.md` 2.2).
    """
    return Estimator(
        name="DR_GRPO",
        stability_mask=everywhere if clip is None else ppo_clip(*clip),
        denominator=rollout_policy,
        advantage=centred,
        formula="[1_clip] A grad pi / pi_rollout, A = R - mean",
        source="Liu et al. 2025, arXiv 2503.20783; unclipped: HPT script, arXiv 2509.04419 code",
    )
