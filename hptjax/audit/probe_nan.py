"""What one NaN does: refuse it, or skip its window and go on; never let it into another window."""

from __future__ import annotations

import dataclasses

import numpy as np

from hptjax.audit.findings import Finding
from hptjax.audit.job import LinearBatch
from hptjax.audit.judge import count_findings, judge
from hptjax.audit.probe import WRONG_SUMS, Audited, Seen
from hptjax.audit.problems import COUNTS, Problem, problem, turned
from hptjax.audit.run import Run, carry_out

LOSES_TOKENS = {"dropped", "tokens_dropped", "uneven_weights", "not_sgd", "no_update"}
STRUCK, BAD, K = 1, 1, 3  # window and micro-batch with the NaN; micro-batches per window


def probe_nan(audited: Audited) -> Seen:
    """A NaN in one token's feature, one clean window before it and two after."""
    if audited.model != "linear":
        return Seen(not_run="the table model's data are tokens: no NaN can be given")
    asked = poisoned_problem(blanked=audited.blanked)
    known = {finding.code for finding in audited.sums}
    # where plain updates come in arrays of their own, a shared one says that nothing was updated
    run = carry_out(audited.target, asked.job, may_share="same_array" not in known)
    if run.unsupported:
        return Seen(not_run=run.unsupported)
    if run.exception and "target_raised" not in known:
        return Seen(detail=f"refused: {run.exception}")
    if run.finding is not None:
        return Seen((run.finding,))
    applied = list(run.applied or ())
    if len(applied) == len(asked.job.windows) - 1:  # a skipped window that left no update
        applied.insert(STRUCK, np.zeros_like(applied[0]))
    miscounted = count_findings(asked, len(applied))
    if miscounted:
        return Seen(tuple(miscounted))
    return _judged(known, asked, run, applied)


def poisoned_problem(*, blanked: bool) -> Problem:
    """Four windows; in window 1 the second live token of micro-batch 1 has a NaN on its own coordinate."""
    asked = problem("linear", [turned(COUNTS[K], by) for by in range(4)], blanked=blanked)
    tokens = asked.tokens
    token = np.nonzero(tokens.live & (tokens.window == STRUCK) & (tokens.micro_batch == BAD))[0][1]
    place = tokens.place[token]
    clean = asked.job.windows[STRUCK][BAD]
    assert isinstance(clean, LinearBatch)
    features = clean.features.copy()
    position = np.nonzero((tokens.window == STRUCK) & (tokens.micro_batch == BAD))[0].tolist().index(token)
    features.reshape(-1, features.shape[-1])[position, place] = np.nan
    window = list(asked.job.windows[STRUCK])
    window[BAD] = dataclasses.replace(clean, features=features)
    windows = [*asked.job.windows[:STRUCK], tuple(window), *asked.job.windows[STRUCK + 1 :]]
    return dataclasses.replace(asked, job=dataclasses.replace(asked.job, windows=tuple(windows)))


def _judged(known: set[str], asked: Problem, run: Run, applied: list[np.ndarray]) -> Seen:
    """What the NaN did; `known` is what is wrong with sums of finite values."""
    found, poison = [], []
    early = next((s for s, values in enumerate(run.between) if not np.all(np.isfinite(values))), None)
    if early is not None:
        poison.append(f"the NaN of micro-batch {BAD} reached the parameters before window {early} was complete")
    struck = ~np.isfinite(applied[STRUCK])
    if np.any(struck):
        evidence = (
            f"micro-batch {BAD} had a NaN; {int(struck.sum())} of {struck.size} parameters have one after update 1"
        )
        if run.parameters is not None:
            evidence += (
                "; these stay NaN whatever comes, so later gradients of theirs were not judged: "
                "a target that returns Gradients shows them"
            )
        found.append(Finding("nan_applied", evidence, (BAD,), STRUCK, level="note"))
    elif np.any(applied[STRUCK]) and not known & LOSES_TOKENS:
        evidence = f"update {STRUCK} was applied without a trace of the NaN in its micro-batch {BAD}"
        found.append(Finding("nan_hidden", evidence, (BAD,), STRUCK))
    # a parameter that is NaN stays NaN under any update: only gradients can show that the sums did not recover
    unseen = struck if run.parameters is not None else np.zeros_like(struck)
    later = [s for s in range(STRUCK + 1, len(applied)) if not np.all(np.isfinite(applied[s][~unseen]))]
    if later:
        poison.append(f"the NaN of window {STRUCK} is in the update of window {later[0]}, whose data are clean")
    if poison:
        found.append(Finding("nan_poisoning", "; ".join(poison), (BAD,), later[0] if later else early))
    if later:
        return Seen(tuple(found))
    if int(unseen.sum()) <= 1:
        found += _after(asked, applied, unseen, known)
    if known & LOSES_TOKENS and not found and not np.any(struck) and np.any(applied[STRUCK]):
        return Seen(not_run=WRONG_SUMS)  # the micro-batch with the NaN may be one that is lost
    skipped = not np.any(applied[STRUCK]) and not found
    return Seen(tuple(found), detail="the window was skipped, bit for bit" if skipped else "")


def _after(asked: Problem, applied: list[np.ndarray], unseen: np.ndarray, known: set[str]) -> list[Finding]:
    """Whether the windows after the bad one are applied as any other."""
    finite = [np.where(unseen, 0.0, np.nan_to_num(gradient)) for gradient in applied]
    for finding in judge(asked, Run(applied=tuple(finite))):
        if finding.code not in known and finding.window is not None and finding.window > STRUCK:
            evidence = f"update {finding.window}: {finding.evidence}"
            return [Finding("after_nan_window", evidence, finding.micro_batches, finding.window)]
    return []
