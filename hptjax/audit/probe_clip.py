"""Whether the summed gradient is clipped, and not its parts."""

from __future__ import annotations

import dataclasses

import numpy as np

from hptjax.audit.findings import Finding
from hptjax.audit.job import Batch, LinearBatch
from hptjax.audit.judge import count_findings
from hptjax.audit.probe import WRONG_SUMS, Audited, Seen, plain
from hptjax.audit.problems import FEATURES, IDLE, IDLE_START, ROWS, WIDTH, Problem
from hptjax.audit.reference import clipped, live_tokens, summed_gradient
from hptjax.audit.run import carry_out

GRADIENTS = (  # opposite outliers cancel in the sum (accumulation spec 3.7); the same ten times larger; a long sum
    ((3.0, 0.0), (-3.0, 0.1), (0.0, 0.1)),
    ((30.0, 0.0), (-30.0, 1.0), (0.0, 1.0)),
    ((3.0, 0.0), (3.0, 0.0), (3.0, 12.0)),
)
TOLERANCE = 0.02  # room for sums in bfloat16, which are a finding of their own; every mistake is further off
MISTAKES = {
    "each micro-batch's summed gradient is clipped by itself": "clip_before_sum",
    "each micro-batch's mean gradient is clipped by itself": "clip_before_sum",
    "each micro-batch's share of the mean is clipped by itself": "clip_before_sum",
    "the sum is clipped before it is divided by the number of tokens": "clip_wrong",
    "nothing is clipped": "clip_wrong",
}


def probe_clip(audited: Audited) -> Seen:
    """Windows in which clipping before and after the sum differ, and one in which the sum must be clipped."""
    asked = clip_problem(audited)
    run = carry_out(audited.target, asked.job)
    if run.unsupported:
        return Seen(not_run=run.unsupported)
    if run.finding is not None or run.applied is None:
        return Seen((run.finding,) if run.finding else ())
    miscounted = count_findings(asked, len(run.applied))
    if miscounted:
        return Seen(tuple(miscounted))
    parameters = asked.job.parameters.astype(np.float64)
    right, mistakes = [], []
    for window, applied, rate in zip(asked.job.windows, run.applied, asked.job.learning_rates, strict=False):
        wanted, others = answers(window, parameters, asked.job.clip_norm)
        right.append(_close(applied, wanted))
        mistakes.append([_close(applied, other) for other in others])
        parameters = parameters - rate * applied
    if all(right):
        return Seen()
    wrong = right.index(False)
    norms = f"update {wrong} has norm {float(np.linalg.norm(run.applied[wrong])):.4g}"
    for place, (mistake, code) in enumerate(MISTAKES.items()):
        if all(answer[place] for answer in mistakes):
            return Seen((Finding(code, f"{mistake}; {norms}", window=wrong),))
    if audited.sums:
        return Seen(not_run=WRONG_SUMS)
    return Seen((Finding("clip_wrong", f"no known order of sum and clip gives this; {norms}", window=wrong),))


def clip_problem(audited: Audited) -> Problem:
    """Linear: the gradients above, one token each, clipped at 1. Table: at half of the first window's norm."""
    if audited.model == "tokens":
        asked = plain(audited, 3)
        start = asked.job.parameters.astype(np.float64)
        wanted, _ = answers(asked.job.windows[0], start, None)
        half = float(np.float32(np.linalg.norm(wanted) / 2))
        return dataclasses.replace(asked, job=dataclasses.replace(asked.job, clip_norm=half))
    asked = plain(audited, 3)
    windows = []
    for gradients in GRADIENTS:
        batches: list[Batch] = []
        for i, gradient in enumerate(gradients):
            features = np.zeros((ROWS, WIDTH, FEATURES), np.float32)
            mask = np.zeros((ROWS, WIDTH), bool)
            mask[0, 1] = True
            features[0, 1, :2] = gradient
            if audited.blanked and i == 1:
                features[:] = 0
            batches.append(LinearBatch(features=features, mask=mask, index=i, is_last=i == len(gradients) - 1))
        windows.append(tuple(batches))
    parameters = np.zeros(FEATURES, np.float32)
    parameters[list(IDLE)] = IDLE_START
    job = dataclasses.replace(
        asked.job,
        parameters=parameters,
        windows=tuple(windows),
        learning_rates=(1.0,) * len(windows),
        clip_norm=1.0,
    )
    return dataclasses.replace(asked, job=job)


def answers(
    window: tuple[Batch, ...], parameters: np.ndarray, clip_norm: float | None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The right clipped gradient of a window, and those of the mistakes in the order of `MISTAKES`."""
    parts = [summed_gradient(batch, parameters) for batch in window]
    counts = [max(int(live_tokens(batch).sum()), 1) for batch in window]
    tokens, total, k = sum(counts), np.sum(parts, axis=0), len(window)
    others = [
        np.sum([clipped(part, clip_norm) for part in parts], axis=0) / tokens,
        np.sum([clipped(part / count, clip_norm) for part, count in zip(parts, counts, strict=True)], axis=0) / k,
        np.sum([clipped(part / tokens, clip_norm) for part in parts], axis=0),
        clipped(total, clip_norm) / tokens,
        total / tokens,
    ]
    return clipped(total / tokens, clip_norm), others


def _close(applied: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.linalg.norm(applied - wanted) <= TOLERANCE * np.linalg.norm(wanted))
