"""What a method is: a route that says which samples learn, and parts that say from which row of the token table."""

from __future__ import annotations

import dataclasses
from typing import Literal

from hptjax.hpt.plan import PrefixPlan, free_group
from hptjax.hpt.refine import Refinement
from hptjax.hpt.route import Route
from hptjax.hpt.schedules import Schedule
from hptjax.hpt.terms import SpanFn, written_span
from hptjax.losses.estimator import Estimator, ExtraTerm, Need, Regression
from hptjax.records import Source

ROLLOUTS = frozenset({Source.ROLLOUT, Source.PREFIX})
CONTINUED = frozenset({Source.PREFIX})
DEMONSTRATIONS = frozenset({Source.DEMONSTRATION})

Share = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "dr_grpo", "official_fixed_rl"]
"""How a part's tokens share its coefficient: a name of `losses/reducers.py`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One term of a method: whose tokens, by which row, how much, shared how.

    Args
      name: of the term plane, and in the metrics.
      row: of `losses/table.py`, or a term that a method is published with beside its row, or its critic's.
      sources: whose tokens learn.
      kind: "rl" or "sft"; the config's coefficients and presets speak of these two. "beside" for a penalty or bonus.
      coefficient: the published one. schedule: a factor that changes with the steps.
      reducer: the published one.
      judged_with: sources that share the groups' statistics beside the part's own.
      span: which tokens of them; those their author wrote, or the forced prefix.
      counted, normalised_over: what the reducer counts, as in `terms.Term`.
    """

    name: str
    row: Estimator | ExtraTerm | Regression
    sources: frozenset[Source]
    kind: Literal["rl", "sft", "beside"]
    reducer: Share
    coefficient: float = 1.0
    schedule: Schedule | None = None
    judged_with: frozenset[Source] = frozenset()
    span: SpanFn = written_span
    counted: SpanFn | None = None
    normalised_over: frozenset[Source] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A method of the table, its options chosen.

    Args
      parts: one term plane each. route: judged rollouts -> live samples.
      rollouts: per question; 0 where nothing is sampled. plan: what they start with; None: all from the prompt.
      most_samples: that a question can leave in an update.
      rewards_demonstrations: whether the verifier is asked about them too, for a baseline over both.
      mask_overlong: whether completions that met their limit are left out of the gradient.
      apart: samples of an update of their own, with an optimizer of its own; 0: the method has no such updates.
      refills: whether questions that leave nothing are replaced by the next ones of the stream.
      refine: what a score pass of the whole update makes of its advantages, before it is trained on.
      needs: beside those of the parts.
      source, difference: where the parts' own do not say it.
    """

    name: str
    parts: tuple[Part, ...]
    route: Route
    rollouts: int
    most_samples: int
    plan: PrefixPlan | None = None
    rewards_demonstrations: bool = False
    mask_overlong: bool = False
    apart: int = 0
    refills: bool = False
    refine: Refinement | None = None
    needs: frozenset[Need] = frozenset()
    source: str = ""
    difference: str = ""

    def sampled(self) -> PrefixPlan:
        """What the rollouts of a question start with."""
        return free_group(self.rollouts) if self.plan is None else self.plan


def all_needs(method: Method) -> frozenset[Need]:
    """What the method and its parts read beside the policy and a reward."""
    return method.needs.union(*(part.row.needs for part in method.parts if part.coefficient != 0.0))
