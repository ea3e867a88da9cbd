"""The way back from packed rows: per-token values of a score pass, by sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hptjax.hpt.assemble import Update
from hptjax.records import SampleId


def by_sample(update: Update, values: Sequence[np.ndarray]) -> dict[SampleId, np.ndarray]:
    """The values at each sample's target positions, prompt and completion, in order.

    Args
      values: one [B T] array per micro-batch of the update, aligned as its `target_tokens`.
    """
    found: dict[SampleId, np.ndarray] = {}
    for micro_batch, array in zip(update.micro_batches, values, strict=True):
        for row, seats in enumerate(np.asarray(micro_batch.sample_index).tolist()):
            for seat, place in enumerate(seats):
                if place >= 0:
                    mine = micro_batch.segment_ids[row] == seat + 1
                    found[update.sample_ids[place]] = np.asarray(array[row])[mine]
    return found
