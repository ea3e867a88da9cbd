"""The probes of a trainer with an optimizer of its own: the same window whole and cut must give the same update.

Nothing is known about the optimizer, so no token's weight can be read and no micro-batch be named. Tokens share their
parameters here: an optimizer that normalises each parameter by itself must still show an uneven weighting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from hptjax.audit.findings import Finding
from hptjax.audit.job import IGNORED, Batch, Job, LinearBatch, Model, TokenBatch
from hptjax.audit.probe import Audited, Probe, Seen
from hptjax.audit.problems import COUNTS, ROWS, WIDTH, middle, spans, turned
from hptjax.audit.run import Run, carry_out

DENSE_FEATURES, SMALL_VOCABULARY, WINDOWS = 12, 12, 3
TOLERANCE = 1e-3  # of an update's norm: what fp32 rounding becomes behind a division by small moments


def probes() -> tuple[Probe, ...]:
    """All of them, in the order in which they run."""
    return (
        Probe("repeatable", "the same job twice gives the same bits", probe_repeatable),
        Probe("injected drop", "a blanked micro-batch changes the update", probe_blank),
        *[
            Probe(f"split, k = {k}", f"{k} micro-batches update like one: within {TOLERANCE:g} of its norm", _split(k))
            for k in COUNTS
            if k > 1
        ],
    )


def _probe_seen(run: Run) -> Seen | None:
    if run.unsupported:
        return Seen(not_run=run.unsupported)
    return Seen((run.finding,)) if run.finding is not None else None


def probe_repeatable(audited: Audited) -> Seen:
    """Two runs of one job."""
    asked = dense_job(audited.model, 4, blank=_blank(audited, 4))
    first, second = carry_out(audited.target, asked), carry_out(audited.target, asked)
    failed = _probe_seen(first) or _probe_seen(second)
    if failed is not None:
        return failed
    gaps = differences(first, second)
    if gaps is not None and all(gap == 0 for gap in gaps):
        return Seen()
    return Seen((Finding("not_deterministic", "two runs of one job differ"),))


def probe_blank(audited: Audited) -> Seen:
    """The self-check: blanking a micro-batch must show as far more than rounding."""
    clean = carry_out(audited.target, dense_job(audited.model, 4))
    if clean.finding is not None or clean.unsupported:
        return Seen((clean.finding,) if clean.finding else (), clean.unsupported or "")
    largest = 0.0
    blanks = (middle(4), 0)  # a target that drops the middle one shows the first
    for blank in blanks:
        run = carry_out(audited.target, dense_job(audited.model, 4, blank=blank))
        if run.exception:
            return Seen(detail=f"refused: {run.exception}")
        failed = _probe_seen(run)
        if failed is not None:
            return failed
        gaps = differences(clean, run)
        if gaps is None:
            return Seen(detail="seen")
        largest = max(largest, *gaps)
        if not largest <= TOLERANCE:
            return Seen(detail=f"seen: updates differ by {largest:.2g} of their norm")
    names = " and ".join(map(str, blanks))
    evidence = f"micro-batches {names} of 4 were blanked: updates differ by {largest:.2g} of their norm"
    return Seen((Finding("blind", f"{evidence}, the tolerance is {TOLERANCE:g}"),))


def _split(k: int) -> Callable[[Audited], Seen]:
    def ask(audited: Audited) -> Seen:
        cut = carry_out(audited.target, dense_job(audited.model, k, blank=_blank(audited, k)))
        failed = _probe_seen(cut)
        if failed is not None:
            return failed
        one = carry_out(audited.target, dense_job(audited.model, k, whole=True))
        failed = _probe_seen(one)
        if failed is not None:
            return failed
        gaps = differences(one, cut)
        if gaps is None:
            evidence = (
                f"{len(cut.applied or ())} updates in {k} parts, {len(one.applied or ())} as one; {WINDOWS} windows"
            )
            return Seen((Finding("wrong_update_count", evidence),))
        if not np.all(np.isfinite(gaps)):
            return Seen((Finding("nan_on_clean_data", "an update is not finite although its gradients are"),))
        if max(gaps) <= TOLERANCE:
            return Seen(detail=f"updates agree within {max(gaps):.1e}")
        s = next(s for s, gap in enumerate(gaps) if gap > TOLERANCE)
        evidence = (
            f"update {s} in {k} parts differs by {gaps[s]:.2g} of its norm from the same window as one micro-batch"
        )
        return Seen((Finding("split_changes_update", evidence, (), s),))

    return ask


def differences(one: Run, other: Run) -> list[float] | None:
    """Per update, the distance of the changes relative to the first one's; None where the counts differ."""
    a, b = one.applied or (), other.applied or ()
    if len(a) != WINDOWS or len(b) != WINDOWS:
        return None
    return [
        float(np.linalg.norm(x - y)) / max(float(np.linalg.norm(x)), 1e-30) if np.any(x != y) else 0.0
        for x, y in zip(a, b, strict=True)
    ]


def _blank(audited: Audited, k: int) -> int | None:
    return middle(k) if audited.blanked and k >= 3 else None


def dense_job(model: Model, k: int, *, whole: bool = False, blank: int | None = None) -> Job:
    """Three windows of the same random data, cut into k micro-batches or whole.

    Args
      blank: micro-batch that is given without its gradient.
    """
    rng = np.random.default_rng(k)
    windows = []
    for w in range(WINDOWS):
        batches = [_batch(model, rng, count, i, k, i == blank) for i, count in enumerate(turned(COUNTS[k], w))]
        windows.append((_joined(batches),) if whole else tuple(batches))
    size: tuple[int, ...] = (DENSE_FEATURES,) if model == "linear" else (SMALL_VOCABULARY,) * 2
    start = np.random.default_rng(0).normal(scale=0.5, size=size).astype(np.float32)
    return Job(model=model, parameters=start, windows=tuple(windows), learning_rates=(1.0,) * WINDOWS)


def _batch(model: Model, rng: np.random.Generator, count: int, i: int, k: int, blank: bool) -> Batch:
    live = np.zeros((ROWS, WIDTH), bool)
    for row, (start, length) in enumerate(spans(count, i)):
        live[row, start : start + length] = True
    if model == "linear":
        features = rng.normal(size=(ROWS, WIDTH, DENSE_FEATURES)).astype(np.float32)
        return LinearBatch(np.zeros_like(features) if blank else features, live, i, i == k - 1)
    ids = rng.integers(1, SMALL_VOCABULARY, (ROWS, WIDTH)).astype(np.int32)
    if blank:
        ids[:] = 1
    used = live[:, ::-1].cumsum(axis=1)[:, ::-1] > 0
    used[:, 0] = True
    ids = np.where(used, ids, 0).astype(np.int32)
    labels = np.where(live, ids, IGNORED).astype(np.int32)
    return TokenBatch(ids, labels, used.astype(np.int32), i, i == k - 1)


def _joined(batches: list[Batch]) -> Batch:
    def rows(name: Literal["features", "mask", "input_ids", "labels", "attention_mask"]) -> np.ndarray:
        return np.concatenate([vars(batch)[name] for batch in batches])

    if isinstance(batches[0], LinearBatch):
        return LinearBatch(rows("features"), rows("mask"), 0, True)
    return TokenBatch(rows("input_ids"), rows("labels"), rows("attention_mask"), 0, True)
