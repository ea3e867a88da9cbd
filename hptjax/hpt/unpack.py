"""The way back from packed rows: per-token values of a score pass, by sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hptjax.hpt.assemble import Update
from hptjax.hpt.terms import target_length
from hptjax.records import SampleId


def by_sample(update: Update, values: Sequence[np.ndarray]) -> dict[SampleId, np.ndarray]:
    """The values at each sample's target positions, prompt and completion, in order; 0 where its row leaves one out.

    Args
      values: one [B T] array per micro-batch of the update, aligned as its `target_tokens`.
    """
    found: dict[SampleId, np.ndarray] = {}
    for micro_batch, array in zip(update.micro_batches, values, strict=True):
        for row, seats in enumerate(np.asarray(micro_batch.sample_index).tolist()):
            for seat, place in enumerate(seats):
                if place >= 0:
                    mine = micro_batch.segment_ids[row] == seat + 1
                    values_of = np.zeros(target_length(update.samples[place]), array.dtype)
                    values_of[np.asarray(micro_batch.positions[row])[mine]] = np.asarray(array[row])[mine]
                    found[update.sample_ids[place]] = values_of
    return found
