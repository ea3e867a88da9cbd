"""Whether update s uses the learning rate of update s."""

from __future__ import annotations

from hptjax.audit.decode import LOOSE, explain
from hptjax.audit.findings import Finding
from hptjax.audit.judge import judge, window_tokens
from hptjax.audit.probe import Audited, Seen
from hptjax.audit.problems import COUNTS, problem, turned
from hptjax.audit.read import read_all
from hptjax.audit.run import carry_out

K, UPDATES = 3, 3
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
        return Seen(not_run="not judged: the sums themselves are wrong")
    wrong = []
    for s, reading in enumerate(read_all(asked, run.applied or ())):
        explanation = explain(window_tokens(asked, reading, s))
        if explanation is not None and explanation.factor_code not in ("", *known):
            wrong.append((s, explanation.factor * rates[s]))
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
    return next((j for j, rate in enumerate(rates) if abs(rate - used) <= LOOSE * rate), None)
