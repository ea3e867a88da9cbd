"""The logical micro-batches of preset `official`: data of its formulas, unrelated to how the update is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hptjax.records import Sample, SampleId


def logical_partition(ranks: int, micro_tokens: int) -> Callable[[Sequence[Sample]], dict[SampleId, int]]:
    """Makes samples -> logical micro-batch: dealt to the ranks by length, then filled up to a token budget.

    The published script balances ranks by the Karmarkar-Karp method; this deal of the sorted samples is simpler and
    gives other, equally arbitrary, neighbours. The formulas take any partition.
    """

    def partition(samples: Sequence[Sample]) -> dict[SampleId, int]:
        def length(sample: Sample) -> int:
            return len(sample.prompt_tokens) + len(sample.completion_tokens)

        ordered = sorted(samples, key=lambda sample: (-length(sample), sample.sample_id))
        places: dict[SampleId, int] = {}
        used = 0
        for rank in range(ranks):
            room = 0
            for sample in ordered[rank::ranks]:
                if length(sample) > room:
                    used, room = used + 1, micro_tokens
                places[sample.sample_id] = used
                room -= length(sample)
        return places

    return partition
