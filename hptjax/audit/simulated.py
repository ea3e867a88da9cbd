"""Targets that carry published accumulation bugs, each on an otherwise right trainer (NumPy, fp32).

Source: accumulation spec 1.1 to 1.3; Limozin et al. 2026, arXiv 2604.23747.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hptjax.audit.job import Job, accepts
from hptjax.audit.problems import ROWS
from hptjax.audit.reference import clipped, live_tokens, summed_gradient

Combine = Callable[[Sequence[np.ndarray], Sequence[int], int], np.ndarray]
"""Summed gradients of a window's parts (micro-batch by micro-batch, worker by worker), their live tokens, the number of
workers -> the gradient that is applied."""


def train(job: Job, combine: Combine) -> list[np.ndarray]:
    """Parameters after every update of plain SGD, the gradients of a window put together by `combine`."""
    parameters, after = job.parameters.astype(np.float32), []
    share = ROWS // job.ranks
    for window, rate in zip(job.windows, job.learning_rates, strict=False):
        parts, counts = [], []
        for batch in window:
            for rank in range(job.ranks):
                rows = slice(rank * share, (rank + 1) * share) if job.ranks > 1 else slice(None)
                parts.append(summed_gradient(batch, parameters, rows))
                counts.append(int(live_tokens(batch)[rows].sum()))
        with np.errstate(invalid="ignore", divide="ignore"):
            gradient = clipped(combine(parts, counts, job.ranks), job.clip_norm)
            parameters = (parameters - np.float32(rate) * gradient).astype(np.float32)
        after.append(parameters)
    return after


def deepspeed(job: Job) -> list[np.ndarray]:
    """CPU-offloaded ZeRO-2, versions 0.15.2 to 0.18.9: the sum is written back for the first micro-batch only, so that
    the first and the last reach the optimizer."""

    def first_and_last(parts: Sequence[np.ndarray], counts: Sequence[int], ranks: int) -> np.ndarray:
        last = parts[-ranks:] if len(parts) > ranks else []
        return np.sum([*parts[:ranks], *last], axis=0) / np.float32(sum(counts))

    return train(job, first_and_last)


def deepspeed_first_only(job: Job) -> list[np.ndarray]:
    """The same bug as its fix's text describes it: the first micro-batch only."""

    def first(parts: Sequence[np.ndarray], counts: Sequence[int], ranks: int) -> np.ndarray:
        return np.sum(parts[:ranks], axis=0) / np.float32(sum(counts))

    return train(job, first)


def mean_of_means(parts: Sequence[np.ndarray], counts: Sequence[int], ranks: int) -> np.ndarray:
    """Every part divided by its own live tokens, then by the number of parts; 0/0 where a part has none."""
    return np.sum([part / np.float32(count) for part, count in zip(parts, counts, strict=True)], axis=0) / np.float32(
        len(parts)
    )


def openrlhf(job: Job) -> list[np.ndarray]:
    """OpenRLHF, seen in 0.9.10, and LLaMA-Factory: a mean over each micro-batch's tokens, then a mean of the means."""
    return train(job, mean_of_means)


@accepts("tokens")
def huggingface_2024(job: Job) -> list[np.ndarray]:
    """The Hugging Face Trainer before October 2024: the model's own mean loss of each micro-batch, divided by k."""
    return train(job, mean_of_means)
