"""The probes of a target whose optimizer can be set, in the order in which they run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from hptjax.audit.findings import Finding
from hptjax.audit.job import IGNORED, Batch, TokenBatch
from hptjax.audit.judge import count_findings, judge
from hptjax.audit.probe import WRONG_SUMS, Audited, Probe, Seen, judged, plain, same_bits
from hptjax.audit.probe_clip import probe_clip
from hptjax.audit.probe_nan import probe_nan
from hptjax.audit.probe_rates import probe_learning_rates
from hptjax.audit.problems import COUNTS, IDLE, PADDING, Problem, middle, problem, turned
from hptjax.audit.reference import live_tokens, summed_gradient
from hptjax.audit.run import Run, carry_out

SUMS_AT_3 = "sum, k = 3"
AS_TOLD = "as far as the target says"  # nothing that it returns shows it
SHORT = (1, 3)  # live tokens of a window whose count is no other's by a factor of k
SHARED_ROWS, LARGE_RATE = 8, 32.0  # few rows and long steps: a gradient taken a micro-batch later is another one
SAME_GRADIENT = 1e-3  # relative distance that rounding explains


def probes() -> tuple[Probe, ...]:
    """All of them, in the order in which they run."""
    return (
        Probe("repeatable", "the same job twice gives the same bits", probe_repeatable),
        Probe("injected drop", "a blanked micro-batch is seen through this target", probe_blank),
        *[Probe(f"sum, k = {k}", f"every token of {_uneven(k)} once, with weight 1/N", _sums(k)) for k in COUNTS],
        Probe("short last window", "windows of 4, 4 and 2 micro-batches: all three applied", probe_short_window),
        Probe("uneven windows", "windows of 4, 2, 4, 1 and 4: the next one starts from zero", probe_uneven_windows),
        Probe("empty micro-batch", "one micro-batch without a live token changes nothing", probe_empty),
        Probe("one gradient", "all of a window at the parameters before it", probe_one_gradient),
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
    """The self-check: a job with a blanked micro-batch must look different, and name it.

    The middle one; where it is missing without being blanked, one that is not.
    """
    whole = plain(audited, 4, blanked=False)
    clean = carry_out(audited.target, whole.job)
    if clean.finding is not None or clean.unsupported:
        return Seen((clean.finding,) if clean.finding else (), clean.unsupported or "")
    if not np.all(np.isfinite(clean.applied or ())):
        return Seen(not_run="the target's result is not finite with whole data either")
    lost = _dropped(judge(whole, clean))
    blank = next((i for i in (middle(4), 0, 1, 3) if i not in lost), None)
    if blank is None:
        return Seen(not_run="every micro-batch is dropped already")
    asked = plain(audited, 4, blanked=True, blank=blank)
    run = carry_out(audited.target, asked.job)
    if run.exception:
        return Seen(detail=f"refused: {run.exception}")
    if blank in _dropped(judge(asked, run)):
        return Seen(detail=f"names micro-batch {blank}")
    if same_bits(clean, run):
        return Seen((Finding("blind", f"micro-batch {blank} of 4 was blanked: the same bits came back"),))
    return Seen(detail="seen, but not named")


def _dropped(found: list[Finding]) -> set[int]:
    return {i for finding in found if finding.code == "dropped" for i in finding.micro_batches}


def _sums(k: int) -> Callable[[Audited], Seen]:
    def ask(audited: Audited) -> Seen:
        return judged(audited, plain(audited, k, windows=1 if k > 7 else 2))

    return ask


def probe_short_window(audited: Audited) -> Seen:
    """An epoch whose length is no multiple of the window."""
    counts = [COUNTS[4], turned(COUNTS[4], 1), SHORT]
    return judged(audited, problem(audited.model, counts, blanked=audited.blanked))


def probe_uneven_windows(audited: Audited) -> Seen:
    """Longer and shorter windows in turn: what a shorter one leaves behind shows in the longer one after it."""
    four = COUNTS[4]
    counts = [four, SHORT, turned(four, 1), COUNTS[1], turned(four, 2)]
    return judged(audited, problem(audited.model, counts, blanked=audited.blanked))


def probe_one_gradient(audited: Audited) -> Seen:
    """A few rows of the table that all tokens share: an update inside a window changes the window's later gradients."""
    if audited.model != "tokens":
        return Seen(not_run="the linear model's gradient is the same at all parameters")
    asked = plain(audited, 3, blanked=False)
    windows = tuple(tuple(_on_shared_rows(batch) for batch in window) for window in asked.job.windows)
    job = dataclasses.replace(asked.job, windows=windows, learning_rates=(LARGE_RATE,) * len(windows))
    run = carry_out(audited.target, job)
    if run.applied is None:
        return Seen((run.finding,) if run.finding else (), run.unsupported or "")
    miscounted = count_findings(asked, len(run.applied))
    if miscounted:
        return Seen(tuple(miscounted))
    parameters = job.parameters.astype(np.float64)
    for s, (window, applied) in enumerate(zip(windows, run.applied, strict=True)):
        total = np.sum([summed_gradient(batch, parameters) for batch in window], axis=0)
        wanted = total / sum(int(live_tokens(batch).sum()) for batch in window)
        gap = float(np.linalg.norm(applied - wanted) / np.linalg.norm(wanted))
        if not gap <= SAME_GRADIENT:
            if audited.sums:
                return Seen(not_run=WRONG_SUMS)
            evidence = f"update {s} is off by {gap:.2g} of its norm where micro-batches share parameters, else right"
            return Seen((Finding("update_before_window_end", evidence, window=s),))
        parameters = parameters - job.learning_rates[s] * applied
    return Seen()


def _on_shared_rows(batch: Batch) -> Batch:
    assert isinstance(batch, TokenBatch)
    ids = np.where(batch.attention_mask == 1, 1 + batch.input_ids % SHARED_ROWS, PADDING).astype(np.int32)
    return dataclasses.replace(batch, input_ids=ids, labels=np.where(batch.labels == IGNORED, IGNORED, ids))


def probe_empty(audited: Audited) -> Seen:
    """0/0 in a mean over no tokens."""
    return judged(audited, problem(audited.model, [(7, 0, 8, 1), COUNTS[4]], blanked=audited.blanked))


def probe_fp32_sum(audited: Audited) -> Seen:
    """Parts that bfloat16 and float16 lose beside a large one."""
    return _cancelling(audited, "float32")


def probe_bf16_parameters(audited: Audited) -> Seen:
    """bfloat16 parameters must not mean bfloat16 sums; every right value here is exact in bfloat16."""
    seen = _cancelling(audited, "bfloat16")
    if seen.findings or seen.not_run:
        return seen
    asked = _cancelling_problem(audited, "bfloat16")
    start = asked.job.parameters.copy()
    start[IDLE[0]] = 1 + 2.0**-10  # between two neighbours in bfloat16
    run = carry_out(audited.target, dataclasses.replace(asked.job, parameters=start))
    if run.parameters is None:
        return Seen((run.finding,) if run.finding else (), run.unsupported or "", AS_TOLD)
    if not all(_fits_bfloat16(parameters) for parameters in run.parameters):
        return Seen(not_run="the target kept float32 parameters")
    return Seen()


def _fits_bfloat16(values: np.ndarray) -> bool:
    single = values.astype(np.float32)
    return bool(np.all(single == values) and not np.any(single.view(np.uint32) & 0xFFFF))


def _cancelling(audited: Audited, dtype: Literal["float32", "bfloat16"]) -> Seen:
    if audited.model != "linear":
        return Seen(not_run="the gradients of the table model cannot be chosen")
    return judged(audited, _cancelling_problem(audited, dtype))


def _cancelling_problem(audited: Audited, dtype: Literal["float32", "bfloat16"]) -> Problem:
    shared = [4096.0, *[1.0] * 14, -4096.0]
    return problem("linear", [COUNTS[16]], shared=shared, parameter_dtype=dtype, blanked=audited.blanked)


def probe_ranks(audited: Audited) -> Seen:
    """Row 0 belongs to worker 0, row 1 to worker 1."""
    counts = (9, 3, 4)
    seen = judged(audited, problem(audited.model, [counts, turned(counts, 1)], ranks=2, blanked=audited.blanked))
    seen = dataclasses.replace(seen, detail=AS_TOLD)
    if not any(finding.code == "sequence_mean" for finding in audited.sums):
        return seen
    # here a worker's share is one row: the mean over a row cannot be told from the mean over a share
    same = [dataclasses.replace(f, code="sequence_mean") if f.code == "mean_of_means" else f for f in seen.findings]
    return dataclasses.replace(seen, findings=tuple(same))
