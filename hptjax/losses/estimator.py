"""What a row of the table is, and the one token loss that all rows share.

    coefficient = mask * selections * weights * A * exp(logp - log d)          loss = - sg(coefficient) * logp

Every factor is a function of the view and of the advantages; the row says which.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, Literal

from jaxtyping import Float

from hptjax.losses.advantages import AdvantageFn
from hptjax.losses.denominators import Denominator, rollout_policy
from hptjax.losses.returns import TokenAdvantageFn
from hptjax.losses.stability import StabilityMask, everywhere
from hptjax.losses.upge import upge_token_loss
from hptjax.losses.view import TokenFn, TokenView
from hptjax.types import Array


class Need(enum.Enum):
    """What a row reads besides the current policy's log-probs and a reward; the value says it to a person."""

    ROLLOUT_LOGPROBS = "the trainer's log-probs at sampling weights, from a score pass"
    SAMPLER_LOGPROBS = "the sampler's log-probs"
    REFERENCE_LOGPROBS = "log-probs of a frozen reference model"
    TEACHER_LOGPROBS = "log-probs of a teacher"
    DEMONSTRATION_LOGPROBS = "log-probs of the demonstration's author"
    ENTROPY = "the entropy of the next-token distribution"
    DEMONSTRATIONS = "demonstrations"
    GROUPS = "groups of two or more rollouts"
    PAIRS = "pairs of a chosen and a rejected completion"
    VALUES = "a value head"


ReducerName = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "dr_grpo"]


@dataclasses.dataclass(frozen=True)
class ExtraTerm:
    """A second term that a method is published with, on the same tokens.

    Args
      token_loss: view -> loss [B T], its gradient through `view.logprobs` or `view.entropy`.
      coefficient: the published one.
      needs: on top of the row's own, if the coefficient is not 0.
    """

    name: str
    token_loss: Callable[[TokenView], Any]
    coefficient: float
    needs: frozenset[Need]


@dataclasses.dataclass(frozen=True)
class Regression:
    """A term that is no coefficient form: something of the view is fitted to targets, one per token.

    Args
      token_loss: (view, targets [B T]) -> loss [B T]. The targets travel where a row's advantages do.
    """

    name: str
    token_loss: Callable[[TokenView, Any], Any]
    needs: frozenset[Need]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimator:
    """One row: four components, the formula they make, and where it comes from.

    Args
      stability_mask: (view, advantages) -> mask [B T]; `stability.py`.
      denominator: (view, advantages) -> log d [B T]; `denominators.py`, `pear.py`.
      advantage: (rewards [N], group_ids [N]) -> [N]; on the host, before the split; `advantages.py`.
      token_advantage: instead of it, one value per token; `returns.py`.
      likelihood: (logprobs, denominator_logprobs, advantages, mask) -> token loss [B T].
      select, weights: further factors of the mask; `stability.py`, `weights.py`.
      reducer: the published one, a name in `reducers.py`; any other may be used with the row.
      extra_terms: terms that the method is published with.
      needs: what must be there; the build refuses a method whose needs are not met.
      difference: what paper, code and this row do differently, and what is not verified; empty if nothing is known.
    """

    name: str
    stability_mask: StabilityMask
    denominator: Denominator
    advantage: AdvantageFn
    formula: str
    source: str
    token_advantage: TokenAdvantageFn | None = None
    likelihood: Callable[[Any, Any, Any, Any], Any] = upge_token_loss
    select: tuple[TokenFn, ...] = ()
    weights: tuple[TokenFn, ...] = ()
    reducer: ReducerName = "token_mean"
    extra_terms: tuple[ExtraTerm, ...] = ()
    needs: frozenset[Need] = frozenset()
    difference: str = ""

    @property
    def reads_rollout_logprobs(self) -> bool:
        """Whether a later update on the same rollouts needs a score pass. For the first one, give sg(logprobs)."""
        return (
            Need.ROLLOUT_LOGPROBS in self.needs
            or self.stability_mask is not everywhere
            or self.denominator is rollout_policy
        )


def missing_needs(estimator: Estimator, met: frozenset[Need]) -> tuple[Need, ...]:
    """The needs of a row that are not met, in the order of `Need`; those of its extra terms included."""
    wanted = estimator.needs.union(*(term.needs for term in estimator.extra_terms if term.coefficient != 0.0))
    return tuple(need for need in Need if need in wanted - met)


def policy_token_loss(estimator: Estimator, view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """The token loss of one row of the table.

    Args
      view: `rollout_logprobs` are the trainer's at sampling weights; with one update per rollout batch and no score
        pass they are sg(logprobs), and every ratio is exactly 1. Ignored unless `estimator.reads_rollout_logprobs`.
      advantages: the row's own, already on the tokens; [B T].
    Returns [B T]; a surrogate, whose gradient is the method's and whose value is not. `weighted_sum` reduces it.
    Gradient flows through `view.logprobs`; exactly 0 through the rest.
    """
    mask = estimator.stability_mask(view, advantages)
    for factor in (*estimator.select, *estimator.weights):
        mask = mask * factor(view, advantages)
    return estimator.likelihood(view.logprobs, estimator.denominator(view, advantages), advantages, mask)
