"""The logical micro-batches of preset `official`: data of its formulas, unrelated to how the update is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hptjax.hpt.balance import balanced_sets
from hptjax.records import Sample, SampleId


def logical_partition(ranks: int, micro_tokens: int) -> Callable[[Sequence[Sample]], dict[SampleId, int]]:
    """Makes samples of one update -> logical micro-batch, numbered over all ranks, as the published script has them.

    Rows go to the ranks in equal numbers with near-equal tokens; every rank cuts its rows into as many micro-batches as
    the fullest rank needs for `micro_tokens` tokens each, again with near-equal tokens. Both by the method of Karmarkar
    and Karp. Where rows do not divide by ranks the script pads them; here a rank has one fewer.

    Args
      micro_tokens: 32,768 in the script; prompt and completion count.
    Source TsinghuaC3I/Unify-Post-Training@ae332f5, as `spec/hpt.md` 2.2 reads it. Which of several equally balanced
      splits the script takes depends on its order of rows, and is not reproduced.
    """

    def partition(samples: Sequence[Sample]) -> dict[SampleId, int]:
        ordered = sorted(samples, key=lambda sample: sample.sample_id)
        lengths = [len(sample.prompt_tokens) + len(sample.completion_tokens) for sample in ordered]
        by_rank = balanced_sets(lengths, ranks, equal_counts=True)
        most = max(sum(lengths[place] for place in members) for members in by_rank)
        per_rank = max(-(-most // micro_tokens), 1)
        found: dict[SampleId, int] = {}
        for rank, members in enumerate(by_rank):
            parts = balanced_sets([lengths[place] for place in members], per_rank, equal_counts=False)
            for part, inside in enumerate(parts):
                found |= {ordered[members[place]].sample_id: rank * per_rank + part for place in inside}
        return found

    return partition
