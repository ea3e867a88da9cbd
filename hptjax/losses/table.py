"""The methods, one row each: what they choose for the four components of the unified policy gradient.

    gradient = stability mask x advantage / denominator x grad pi    (per token; arXiv 2509.04419 v2, Eq. 6 and Tab. 1)

    row              stability mask   denominator          advantage              weight on grad log pi
    SFT              everywhere       current policy       1                      1
    DFT              everywhere       1                    1                      p
    TRSFT            everywhere       max(p, a)            1                      min(1, p / a)
    CHORD_PHI        everywhere       1 / (1 - p)          1                      p (1 - p)
    PEAR_*           everywhere       p / G                1                      G of later demonstration ratios
    IMPLICIT_REWARD  everywhere       p / w(u)             1                      w(u)
    REINFORCE        everywhere       current policy       +1 or -1               A
    RLOO             everywhere       current policy       R - mean of others     A
    REINFORCE_PP     ppo clip         rollout policy       whitened return        clip mask x ratio x A
    PPO              ppo clip         rollout policy       reward or GAE          clip mask x ratio x A
    GRPO             ppo clip         rollout policy       (R - mean) / std       clip mask x ratio x A
    DR_GRPO          ppo clip or none rollout policy       R - mean               [clip mask x] ratio x A
    DAPO             ppo clip-higher  rollout policy       as GRPO                clip mask x ratio x A
    CISPO            everywhere       p / clip(ratio)      as GRPO                clip(ratio) x A
    CISPO_TABLE      ppo clip         rollout policy       as GRPO                clip mask x ratio x A
    GSPO             sequence clip    p / s                as GRPO                clip mask x s x A
    GMPO             log clip         p / rho              as GRPO                clip mask x rho x A
    SAPO             everywhere       pi_roll / 4 s (1-s)  as GRPO                4 s (1 - s) ratio x A
    DPO              everywhere       p / (beta sigma(-D)) +1 chosen, -1 rejected beta sigma(-D) x A
    LUFFY_OFF        everywhere       (p + g)^2 / g        R - mean of union      g p / (p + g)^2 x A
    SRFT_OFF         everywhere       1                    GRPO's, of the union   p x A
    SRFT_SFT         everywhere       current policy       1                      exp(-H) / 2
    SRFT_ON          everywhere       current policy       +1 or -1               exp(H) / 10 or -1
    PREFIX_RFT       dual clip        rollout policy       as GRPO, by prefix     clip mask x ratio x A
    PREFIX_RFT_OFF   dual clip        rollout policy       R - mean of free       top entropy x clip mask x ratio x A

The last six are of methods that learn from demonstrations beside rollouts of the same question (union: the rewards of
both); the two of Prefix-RFT are for rollouts that continue a demonstration's prefix (free: rollouts without one).

The fourth component, the likelihood, is the same for all: `upge_token_loss`. How tokens are added up (token mean,
sequence mean, constant ...) is a setting of its own: a row names the published one, see `reducers.py`. A new method is
a new row. An option is another component: `dataclasses.replace(GRPO(), stability_mask=dual_clip(0.2, 0.2))`, or
`weights=(token_tis(2.0),)`.

The rows stand in `table_sft.py`, `table_rl.py` and `table_hybrid.py`; what a row is, in `estimator.py`; and
`hpt/methods.py` makes methods of them.
"""

from __future__ import annotations

from hptjax.losses.estimator import Estimator, ExtraTerm, Need, Regression, missing_needs, policy_token_loss
from hptjax.losses.table_hybrid import LUFFY_OFF, PREFIX_RFT, PREFIX_RFT_OFF, SRFT_OFF, SRFT_ON, SRFT_SFT
from hptjax.losses.table_rl import (
    CISPO,
    CISPO_TABLE,
    DAPO,
    DPO,
    DR_GRPO,
    GMPO,
    GRPO,
    GSPO,
    PPO,
    REINFORCE,
    REINFORCE_PP,
    RLOO,
    SAPO,
    VALUE,
    Clip,
)
from hptjax.losses.table_sft import CHORD_PHI, DFT, IMPLICIT_REWARD, PEAR_BLOCK, PEAR_SEQUENCE, PEAR_TOKEN, SFT, TRSFT

__all__ = [
    "CHORD_PHI",
    "CISPO",
    "CISPO_TABLE",
    "DAPO",
    "DFT",
    "DPO",
    "DR_GRPO",
    "GMPO",
    "GRPO",
    "GSPO",
    "IMPLICIT_REWARD",
    "LUFFY_OFF",
    "PEAR_BLOCK",
    "PEAR_SEQUENCE",
    "PEAR_TOKEN",
    "PPO",
    "PREFIX_RFT",
    "PREFIX_RFT_OFF",
    "REINFORCE",
    "REINFORCE_PP",
    "RLOO",
    "SAPO",
    "SFT",
    "SRFT_OFF",
    "SRFT_ON",
    "SRFT_SFT",
    "TRSFT",
    "VALUE",
    "Clip",
    "Estimator",
    "ExtraTerm",
    "Need",
    "Regression",
    "missing_needs",
    "policy_token_loss",
]
