"""Between the score pass and the updates: what is known of a whole update changes its advantages or coefficients.

The samples are assembled a second time, with the new advantages. Packing does not depend on them: what was scored
must come out as it was, or the run stops.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hptjax.hpt.assemble import Update
from hptjax.hpt.control import Control, Controls
from hptjax.hpt.refine import Refined, Refinement, ScoredUpdate, scored_update
from hptjax.losses.returns import explained_variance
from hptjax.train.ledger import AccumulationError
from hptjax.types import MicroBatch, Params

ScorePass = Callable[[Mapping[str, Params], MicroBatch], dict[str, Any]]
"""Named parameters and a micro-batch -> name -> [B T], such as `rollout_logprobs`, at these parameters."""

IN_MICRO_BATCH = ("rollout_logprobs", "rollout_values")
PACKED = (
    "input_tokens",
    "target_tokens",
    "positions",
    "segment_ids",
    "completion_mask",
    "sample_index",
    "shared_tokens",
)


@dataclasses.dataclass(frozen=True, eq=False)
class SecondLook:
    """What a stage makes of a score pass, on the host.

    Args
      refine: an update and its scores -> advantages. control: coefficients so far and the step's scored updates ->
        those of this step, and those to go on with.
    """

    refine: Refinement | None
    control: Control | None


@dataclasses.dataclass(frozen=True, eq=False)
class Looked:
    """The updates as they are trained on.

    Args
      micro_batches: of each update, with its scores. controls_after: steered coefficients to go on with.
      metrics: of the critic and the coefficients.
    """

    updates: list[Update]
    micro_batches: list[list[MicroBatch]]
    controls_after: Controls
    metrics: dict[str, Any]


def look_again(
    updates: Sequence[Update],
    scores: Sequence[Mapping[str, np.ndarray]],
    look: SecondLook,
    controls: Controls,
    *,
    reassemble: Callable[..., list[Update]],
) -> Looked:
    """The updates with refined advantages and steered coefficients.

    Args
      scores: host arrays by name, for the micro-batches of all updates in order.
      reassemble: (refined, controls), as keywords -> the updates of the same samples, see `phases.assemble_updates`.
    Raises AccumulationError where an update comes out packed in another way: its scores would be of other tokens.
    """
    each = iter(scores)
    parts = [[next(each) for _ in update.micro_batches] for update in updates]
    scored = [scored_update(update, part) for update, part in zip(updates, parts, strict=True)]
    now, after = ({}, controls) if look.control is None else look.control(controls, scored)
    refined: list[Refined] = [{} if look.refine is None else look.refine(each) for each in scored]
    again = reassemble(refined=refined, controls=now)
    for place, (before, update) in enumerate(zip(updates, again, strict=True)):
        check_same_packing(before, update, f"update {place}")
    micro_batches = [
        [filled(micro_batch, score) for micro_batch, score in zip(update.micro_batches, part, strict=True)]
        for update, part in zip(again, parts, strict=True)
    ]
    return Looked(again, micro_batches, after, {**_critic_metrics(scored, refined), **_control_metrics(now)})


def check_same_packing(scored: Update, update: Update, what: str) -> None:
    """Raises AccumulationError unless both hold the same tokens and live tokens in the same places."""
    pairs = list(zip(scored.micro_batches, update.micro_batches, strict=False))
    changed = [
        name
        for name in PACKED
        if not all(np.array_equal(getattr(left, name), getattr(right, name)) for left, right in pairs)
    ]
    if len(scored.micro_batches) != len(update.micro_batches) or changed or scored.sample_ids != update.sample_ids:
        raise AccumulationError(
            f"{what}: expected the packed rows that were scored, got others after its advantages were refined "
            f"({', '.join(changed) or 'its samples or micro-batches differ'}); nothing was trained on them. Keep the "
            "run folder and report it"
        )


def filled(micro_batch: MicroBatch, scores: Mapping[str, Any]) -> MicroBatch:
    """The micro-batch with those of its scores that the losses read."""
    return dataclasses.replace(micro_batch, **{name: scores[name] for name in IN_MICRO_BATCH if name in scores})


def advantage_sums(updates: Sequence[Update]) -> list[dict[str, float]]:
    """Per update and term, the sum of its advantages: what processes compare."""
    return [
        {
            term: float(
                sum(micro_batch.planes[term].advantages.sum(dtype=np.float64) for micro_batch in u.micro_batches)
            )
            for term in u.terms
        }
        for u in updates
    ]


def _critic_metrics(scored: Sequence[ScoredUpdate], refined: Sequence[Refined]) -> dict[str, Any]:
    fitted = [
        (each.flat("value", "rollout_values"), np.concatenate([np.zeros(0), *found["value"].values()]))
        for each, found in zip(scored, refined, strict=True)
        if "value" in found
    ]
    if not sum(values.size for values, _ in fitted):
        return {}
    values, returns = (np.concatenate([pair[place] for pair in fitted]) for place in (0, 1))
    return {
        "critic/values/mean": (values.sum(), values.size),
        "critic/returns/mean": (returns.sum(), returns.size),
        "critic/vf_explained_var": explained_variance(values, returns),
    }


def _control_metrics(controls: Controls) -> dict[str, Any]:
    return {f"actor/{name}_coefficient": value for name, value in controls.items()}
