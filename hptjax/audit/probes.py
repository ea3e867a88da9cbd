"""The probes of a target whose optimizer can be set, in the order in which they run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from hptjax.audit.findings import Finding
from hptjax.audit.judge import judge
from hptjax.audit.probe import Audited, Probe, Seen, judged, plain, same_bits
from hptjax.audit.probe_clip import probe_clip
from hptjax.audit.probe_nan import probe_nan
from hptjax.audit.probe_rates import probe_learning_rates
from hptjax.audit.problems import COUNTS, middle, problem, turned
from hptjax.audit.run import Run, carry_out

SUMS_AT_3 = "sum, k = 3"


def probes() -> tuple[Probe, ...]:
    """All of them, in the order in which they run."""
    return (
        Probe("repeatable", "the same job twice gives the same bits", probe_repeatable),
        Probe("injected drop", "a blanked micro-batch is seen through this target", probe_blank),
        *[Probe(f"sum, k = {k}", f"every token of {_uneven(k)} once, with weight 1/N", _sums(k)) for k in COUNTS],
        Probe("short last window", "windows of 4, 4 and 2 micro-batches: all three applied", probe_short_window),
        Probe("empty micro-batch", "one micro-batch without a live token changes nothing", probe_empty),
        Probe("learning rates", "update s uses the rate of update s", probe_learning_rates),
        Probe("clipping", "the summed gradient is clipped, not its parts", probe_clip),
        Probe("NaN", "one bad micro-batch stays in its window", probe_nan),
        Probe("fp32 sum", "large - large + 14 small parts: nothing is lost", probe_fp32_sum),
        Probe("bf16 parameters", "the same with bfloat16 parameters", probe_bf16_parameters),
        Probe("2 workers", "rows shared by 2 data-parallel workers, uneven tokens", probe_ranks),
    )


def _uneven(k: int) -> str:
    return "1 micro-batch" if k == 1 else f"{k} uneven micro-batches"


def probe_repeatable(audited: Audited) -> Seen:
    """Two runs of one job."""
    asked = plain(audited, 4)
    first = carry_out(audited.target, asked.job)
    if first.finding is not None or first.unsupported:
        return Seen((first.finding,) if first.finding else (), first.unsupported or "")
    second = carry_out(audited.target, asked.job)
    if second.finding is not None:
        return Seen((second.finding,))
    if same_bits(first, second):
        return Seen()
    return Seen((Finding("not_deterministic", "two runs of one job differ" + _difference(first, second)),))


def _difference(first: Run, second: Run) -> str:
    if first.applied is None or second.applied is None or len(first.applied) != len(second.applied):
        return " in the number of updates"
    largest = max(float(np.max(np.abs(a - b))) for a, b in zip(first.applied, second.applied, strict=True))
    return f" by up to {largest:.3g}"


def probe_blank(audited: Audited) -> Seen:
    """The self-check: a job with a blanked micro-batch must look different, and name it."""
    clean = carry_out(audited.target, plain(audited, 4, blanked=False).job)
    if clean.finding is not None or clean.unsupported:
        return Seen(not_run=clean.unsupported or "the target fails this job with whole data too")
    if not np.all(np.isfinite(clean.applied or ())):
        return Seen(not_run="the target's result is not finite with whole data either")
    asked = plain(audited, 4, blanked=True)
    run = carry_out(audited.target, asked.job)
    if run.exception:
        return Seen(detail=f"refused: {run.exception}")
    named = {i for finding in judge(asked, run) if finding.code == "dropped" for i in finding.micro_batches}
    if middle(4) in named:
        return Seen(detail=f"names micro-batch {middle(4)}")
    if same_bits(clean, run):
        return Seen((Finding("blind", f"micro-batch {middle(4)} of 4 was blanked: the same bits came back"),))
    return Seen(detail="seen, but not named")


def _sums(k: int) -> Callable[[Audited], Seen]:
    def ask(audited: Audited) -> Seen:
        return judged(audited, plain(audited, k, windows=1 if k > 7 else 2))

    return ask


def probe_short_window(audited: Audited) -> Seen:
    """An epoch whose length is no multiple of the window."""
    counts = [COUNTS[4], turned(COUNTS[4], 1), COUNTS[2]]
    return judged(audited, problem(audited.model, counts, blanked=audited.blanked))


def probe_empty(audited: Audited) -> Seen:
    """0/0 in a mean over no tokens."""
    return judged(audited, problem(audited.model, [(7, 0, 8, 1), COUNTS[4]], blanked=audited.blanked))


def probe_fp32_sum(audited: Audited) -> Seen:
    """Parts that bfloat16 and float16 lose beside a large one."""
    return _cancelling(audited, "float32")


def probe_bf16_parameters(audited: Audited) -> Seen:
    """bfloat16 parameters must not mean bfloat16 sums; every right value here is exact in bfloat16."""
    return _cancelling(audited, "bfloat16")


def _cancelling(audited: Audited, dtype: Literal["float32", "bfloat16"]) -> Seen:
    if audited.model != "linear":
        return Seen(not_run="the gradients of the table model cannot be chosen")
    shared = [4096.0, *[1.0] * 14, -4096.0]
    asked = problem("linear", [COUNTS[16]], shared=shared, parameter_dtype=dtype, blanked=audited.blanked)
    return judged(audited, asked)


def probe_ranks(audited: Audited) -> Seen:
    """Row 0 belongs to worker 0, row 1 to worker 1."""
    counts = (9, 3, 4)
    seen = judged(audited, problem(audited.model, [counts, turned(counts, 1)], ranks=2, blanked=audited.blanked))
    if not any(finding.code == "sequence_mean" for finding in audited.sums):
        return seen
    # here a worker's share is one row: the mean over a row cannot be told from the mean over a share
    same = [dataclasses.replace(f, code="sequence_mean") if f.code == "mean_of_means" else f for f in seen.findings]
    return dataclasses.replace(seen, findings=tuple(same))
