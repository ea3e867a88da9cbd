"""Routes of the methods whose rollouts continue a demonstration's prefix: every question leaves its rollouts.

route                what it decides beside                                        methods
weighing_prefixes    which samples' prefixes learn                                 TRAPO
judging_prefixes     advantages of continuation and prefix, by question and prefix Prefix-RFT
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from hptjax.hpt.route import Judged, Route, Routed, by_gate
from hptjax.losses.advantages import prefix_hierarchy
from hptjax.losses.words import said
from hptjax.records import Sample, SampleId, Source


def weighing_prefixes(term: str, group_size: int, *, first_only: bool) -> Route:
    """Every sample with a prefix is a member of `term`, or only the first of those that share one.

    Args
      first_only: TRAPO's code gives the loss of a prefix to one of the two samples of a micro-group.
    """
    everything = by_gate(-1, group_size)

    @said(
        "its rollouts; a prefix learns " + ("in the first of those that share it" if first_only else "in each of them")
    )
    def route(judged: Judged) -> Routed:
        routed = everything(judged)
        seen: set[tuple[int, bytes]] = set()
        scales: dict[SampleId, float] = {}
        for sample in routed.live:
            if sample.source == Source.PREFIX:
                key = (sample.group_id, _prefix_of(sample))
                scales[sample.sample_id] = 0.0 if first_only and key in seen else 1.0
                seen.add(key)
        return dataclasses.replace(routed, scales={term: scales})

    return route


def judging_prefixes(written_term: str, prefix_term: str, group_size: int) -> Route:
    """What was written is judged among rollouts of the same prefix, a prefix against the question's free rollouts.

    See `advantages.prefix_hierarchy`.
    """
    everything = by_gate(-1, group_size)

    @said("its rollouts; what was written is judged among those of the same prefix, a prefix against the free ones")
    def route(judged: Judged) -> Routed:
        routed = everything(judged)
        samples = routed.live
        rewards = np.asarray([np.nan if s.reward is None else s.reward for s in samples], np.float64)
        groups = np.asarray([s.group_id for s in samples], np.int64)
        advantages = prefix_hierarchy(rewards, groups, _prefix_ids(samples))
        return dataclasses.replace(
            routed,
            advantages={
                written_term: _by_id(samples, advantages.continuation),
                prefix_term: _by_id(samples, advantages.prefix),
            },
        )

    return route


def _by_id(samples: Sequence[Sample], values: np.ndarray) -> dict[SampleId, float | np.ndarray]:
    return {sample.sample_id: value for sample, value in zip(samples, values.tolist(), strict=True)}


def _prefix_of(sample: Sample) -> bytes:
    return np.asarray(sample.completion_tokens[: sample.prefix_len], np.int64).tobytes()


def _prefix_ids(samples: Sequence[Sample]) -> np.ndarray:
    """0 for a free rollout; the samples of a question that share a prefix share a number above 0."""
    numbers: dict[bytes, int] = {}
    return np.asarray(
        [numbers.setdefault(_prefix_of(s), len(numbers) + 1) if s.prefix_len else 0 for s in samples], np.int64
    )
