"""Whether update s uses the learning rate of update s."""

from __future__ import annotations

from hptjax.audit.decode import common_offset, explain
from hptjax.audit.findings import Finding
from hptjax.audit.judge import judge
from hptjax.audit.probe import WRONG_SUMS, Audited, Seen
from hptjax.audit.problems import COUNTS, problem, turned
from hptjax.audit.read import bound_of, read_all, window_tokens
from hptjax.audit.run import carry_out

K, UPDATES = 3, 3
SAME_RATE = 1e-3  # relative: room for the rounding of the weights that a rate is read from
HIDES_RATES = {
    "masked_tokens_trained",
    "uneven_weights",
    "stale",
    "momentum",
    "wrong_boundary",
    "unexplained_change",
    "wrong_scale",
    "no_update",
}


def probe_learning_rates(audited: Audited) -> Seen:
    """Rates that halve with every entry, more of them than updates: a schedule that runs ahead is recognised."""
    rates = [0.5**s for s in range(K * UPDATES)]
    counts = [turned(COUNTS[K], by) for by in range(UPDATES)]
    asked = problem(audited.model, counts, learning_rates=rates, blanked=audited.blanked)
    run = carry_out(audited.target, asked.job)
    if run.unsupported:
        return Seen(not_run=run.unsupported)
    if run.parameters is None and run.finding is None:
        return Seen(not_run="the target returns gradients, in which the rate cannot be seen")
    found = judge(asked, run)
    if run.finding is not None or any(
        finding.window is None or finding.code == "nan_on_clean_data" for finding in found
    ):
        return Seen(tuple(found))
    known = {finding.code for finding in audited.sums}
    if known & HIDES_RATES:
        return Seen(not_run=WRONG_SUMS)
    wrong = []
    for s, reading in enumerate(read_all(asked, run.applied or ())):
        window, bound = window_tokens(asked, reading, s), bound_of(asked, K)
        explanation = explain(window)
        if explanation is None or explanation.factor_code in known:
            continue
        offset = common_offset(window, explanation, bound) or 1.0
        if explanation.factor_code or abs(offset - 1) > bound:
            wrong.append((s, explanation.factor * offset * rates[s]))
    if not wrong:
        return Seen(tuple(finding for finding in found if finding.code not in known))
    entries = [_entry(rates, used) for _, used in wrong]
    ahead = all(entry is not None and entry // K == s for entry, (s, _) in zip(entries, wrong, strict=True))
    evidence = "; ".join(
        f"update {s} used rate {used:.4g}"
        + (f", entry {entry} of the schedule," if entry is not None else "")
        + f" instead of {rates[s]:.4g}, entry {s}"
        for entry, (s, used) in zip(entries, wrong, strict=True)
    )
    return Seen(
        (Finding("schedule_per_micro_batch" if ahead else "wrong_learning_rate", evidence, window=wrong[0][0]),)
    )


def _entry(rates: list[float], used: float) -> int | None:
    return next((j for j, rate in enumerate(rates) if abs(rate - used) <= SAME_RATE * rate), None)
