"""Trainers of other libraries as targets of the audit; each module needs its own library, and only tunix's needs jax.

Each library is driven as its users drive it, with its own way of averaging over tokens. Nothing that it does is
repaired here: what it gets wrong is what the audit is to find.
"""

from __future__ import annotations

import numpy as np

from hptjax.audit.job import IGNORED, Job, TokenBatch, Unsupported


def require(job: Job, model: str) -> None:
    """Raises Unsupported where a job is for another model or for several workers: these trainers run in one process."""
    if job.model != model:
        raise Unsupported(f"this trainer takes the {model} model, not {job.model}")
    if job.ranks != 1:
        raise Unsupported(f"runs in one process; {job.ranks} data-parallel workers need a launcher")


def window_length(job: Job) -> int:
    """k of a trainer that has one fixed number of micro-batches per update; only the last window may be shorter.

    Raises
      other lengths -> Unsupported.
    """
    lengths = [len(window) for window in job.windows]
    if any(length != lengths[0] for length in lengths[:-1]) or lengths[-1] > lengths[0]:
        raise Unsupported(
            f"has one number of micro-batches for all updates; windows of {lengths} cannot be asked of it"
        )
    return lengths[0]


def token_batches(job: Job) -> list[TokenBatch]:
    """The micro-batches of all windows in order.

    Raises
      a job that is not of the table model, or parameters that are not finite -> Unsupported.
    """
    require(job, "tokens")
    if not np.isfinite(job.parameters).all():
        raise Unsupported("token ids carry no NaN, so the NaN has to come from the data of another model")
    return [batch for window in job.windows for batch in window if isinstance(batch, TokenBatch)]


def unpadded_rows(batch: TokenBatch) -> list[dict[str, list[int]]]:
    """input_ids and labels of each row without its padding, for trainers that pad by themselves.

    Raises
      padding that is not on the right -> Unsupported.
    """
    rows = []
    for input_ids, labels, attention in zip(batch.input_ids, batch.labels, batch.attention_mask, strict=True):
        length = int(attention.sum())
        if attention[:length].min(initial=1) == 0 or (labels[length:] != IGNORED).any():
            raise Unsupported("this trainer pads by itself, on the right; a row is padded elsewhere")
        kept = max(length, 1)  # a row of padding alone stays a row: one token, not trained on
        rows.append({"input_ids": input_ids[:kept].tolist(), "labels": labels[:kept].tolist()})
    return rows
