"""The right answer in float64 NumPy, by the shortest road: the gradient of every token, summed, divided once."""

from __future__ import annotations

import numpy as np

from hptjax.audit.job import IGNORED, Batch, Job, LinearBatch


def token_gradients(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[n V] gradient of -log softmax(row)[label] with respect to the row, for n rows of the table."""
    shifted = np.exp(rows - rows.max(axis=1, keepdims=True, initial=-np.inf))
    gradients = shifted / shifted.sum(axis=1, keepdims=True)
    gradients[np.arange(len(labels)), labels] -= 1
    return gradients


def live_tokens(batch: Batch) -> np.ndarray:
    """[B] live tokens of every row."""
    live = batch.mask if isinstance(batch, LinearBatch) else batch.labels[:, 1:] != IGNORED
    return np.sum(live, axis=1)


def summed_gradient(batch: Batch, parameters: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
    """Sum over the live tokens of these rows of the gradient of the token loss."""
    if isinstance(batch, LinearBatch):
        return batch.features[rows][batch.mask[rows]].astype(parameters.dtype).sum(axis=0)
    total = np.zeros_like(parameters)
    ids, labels = batch.input_ids[rows], batch.labels[rows]
    live = labels[:, 1:] != IGNORED
    tokens = ids[:, :-1][live]
    np.add.at(total, tokens, token_gradients(parameters[tokens], labels[:, 1:][live]))
    return total


def clipped(gradient: np.ndarray, clip_norm: float | None) -> np.ndarray:
    """The gradient, scaled down to the norm where it is longer."""
    norm = float(np.linalg.norm(gradient))
    return gradient if clip_norm is None or norm <= clip_norm else gradient * (clip_norm / norm)


def applied_gradients(job: Job) -> list[np.ndarray]:
    """The gradient that each update must apply, float64."""
    parameters, applied = job.parameters.astype(np.float64), []
    for window, rate in zip(job.windows, job.learning_rates, strict=False):
        tokens = sum(int(live_tokens(batch).sum()) for batch in window)
        total = sum((summed_gradient(batch, parameters) for batch in window), np.zeros_like(parameters))
        applied.append(clipped(total / tokens, job.clip_norm))
        parameters = parameters - rate * applied[-1]
    return applied


def target(job: Job) -> list[np.ndarray]:
    """Parameters after every update of the right trainer, float32."""
    parameters, after = job.parameters.astype(np.float64), []
    for gradient, rate in zip(applied_gradients(job), job.learning_rates, strict=False):
        parameters = parameters - rate * gradient
        after.append(parameters.astype(np.float32))
    return after
