"""Findings about the updates of one job, from the weights of its tokens."""

from __future__ import annotations

import numpy as np

from hptjax.audit.decode import LOOSE, WindowTokens, explain
from hptjax.audit.findings import Finding
from hptjax.audit.problems import ROWS, WIDTH, Problem
from hptjax.audit.read import Reading, read_all, tolerance
from hptjax.audit.run import Run
from hptjax.audit.words import blame_text, micro_batches_text, numbers, weights_text

BASE_CODES = {
    "mean_of_means": "mean_of_means",
    "rank_mean_of_means": "mean_of_means",
    "rank_means": "rank_means",
    "sequence_mean": "sequence_mean",
}
CLEAR = ("dropped", "repeated", "unexplained_change")
BFLOAT16_UNIT = 2.0**-8
LARGEST_LOSS = 2.0**-6  # relative to the parts of a sum: what a sum in few digits loses at most in these problems


def judge(problem: Problem, run: Run) -> list[Finding]:
    """Everything wrong with a run, update by update."""
    if run.finding is not None:
        return [run.finding]
    if run.applied is None:
        return []
    windows = problem.job.windows
    found = count_findings(problem, len(run.applied))
    if any(finding.code != "final_window_dropped" for finding in found):
        return found
    found += _between(run)
    for s, gradient in enumerate(run.applied):
        if not np.all(np.isfinite(gradient)):
            return [*found, _not_finite(problem, gradient, s)]
    readings = read_all(problem, run.applied)
    if run.applied and not_sgd(problem, run.applied, readings):
        return [*found, Finding("not_sgd", "all parameters that moved in an update moved by the same amount")]
    moved = _moved(problem, readings)
    if moved:
        return [*found, *moved]
    for s, reading in enumerate(readings):
        found += judge_update(problem, readings, reading, s, len(windows[s]))
    return found


def count_findings(problem: Problem, updates: int) -> list[Finding]:
    """What the number of updates says."""
    windows = problem.job.windows
    if updates == len(windows):
        return []
    if updates == len(windows) - 1 and len(windows[-1]) < len(windows[0]):
        k = len(windows[-1])
        last = len(windows) - 1
        evidence = f"{updates} updates for {len(windows)} windows: window {last}, of {k} micro-batches, is missing"
        return [Finding("final_window_dropped", evidence, tuple(range(k)), last)]
    micro_batches = sum(map(len, windows))
    if updates == micro_batches:
        return [Finding("update_per_micro_batch", f"{updates} updates for {len(windows)} windows")]
    return [Finding("wrong_update_count", f"expected {len(windows)} updates, one per window, got {updates}")]


def judge_update(problem: Problem, readings: list[Reading], reading: Reading, s: int, k: int) -> list[Finding]:
    """What is wrong with update `s`."""
    found = []
    if reading.decay:
        found.append(Finding("weight_decay", f"idle parameters shrank by {reading.decay:.3g} of their size", window=s))
    bound = _bound(problem, k)
    if problem.job.model == "tokens" and bound < reading.unexplained < LOOSE:
        found.append(
            Finding("low_precision_sum", f"{reading.unexplained:.1e} of the change is rounding, not gradient", window=s)
        )
    elif reading.unexplained > bound:
        found.append(
            Finding("unexplained_change", f"{reading.unexplained:.1%} of the change is no token's gradient", window=s)
        )
    found += _masked(problem, reading, s, k)
    found += _earlier(problem, readings, reading, s)
    found += _own_tokens(problem, reading, s, k, anything_before=bool(np.any(readings[0].weights)))
    found += _shared(problem, reading, s, k, found)
    if any(finding.code == "masked_tokens_trained" for finding in found):  # they are counted in the mean, too
        found = [finding for finding in found if finding.code not in ("wrong_scale", "padding_counted")]
    if any(finding.code == "unexplained_change" for finding in found):  # which blurs every finer reading
        return [finding for finding in found if finding.code in CLEAR]
    return found


def window_tokens(problem: Problem, reading: Reading, s: int) -> WindowTokens:
    """The live tokens of window `s`, with their weights relative to 1 / N."""
    tokens, job = problem.tokens, problem.job
    here = tokens.live & (tokens.window == s)
    k = len(job.windows[s])
    return WindowTokens(
        ratio=reading.weights[here] * problem.live_tokens(s),
        micro_batch=tokens.micro_batch[here],
        row=tokens.row[here],
        rank=tokens.row[here] * job.ranks // ROWS,
        k=k,
        ranks=job.ranks,
        slots=ROWS * WIDTH * k,
    )


def _bound(problem: Problem, k: int) -> float:
    bound = tolerance(problem, k)
    return max(bound, BFLOAT16_UNIT) if problem.job.parameter_dtype == "bfloat16" else bound


def _own_tokens(problem: Problem, reading: Reading, s: int, k: int, *, anything_before: bool) -> list[Finding]:
    """How the live tokens of the window were weighted."""
    window = window_tokens(problem, reading, s)
    lengths = [len(batches) for batches in problem.job.windows]
    if np.all(np.abs(window.ratio) < LOOSE) and 0 < s == len(lengths) - 1 and k < lengths[0] and anything_before:
        return [
            Finding("final_window_dropped", f"window {s}, of {k} micro-batches, changes nothing", tuple(range(k)), s)
        ]
    if np.all(np.abs(window.ratio) < LOOSE):
        return [Finding("no_update", "no token of the window has any weight", window=s)]
    explanation = explain(window)
    if explanation is None:
        return _unexplained(window, s)
    found = []
    if explanation.factor_code:
        found.append(
            Finding(explanation.factor_code, f"every weight is {explanation.factor:.4g} times what it should be", (), s)
        )
    if explanation.base != "token_mean":
        found.append(Finding(BASE_CODES[explanation.base], weights_text(window), window=s))
    for code, times in (("dropped", 0), ("repeated", 2)):
        blamed = explanation.with_times(times)
        if blamed:
            found.append(Finding(code, blame_text(problem, reading, explanation, window, blamed, s), blamed, s))
    if explanation.error > _bound(problem, k):
        found.append(Finding("low_precision_sum", f"weights are off by {explanation.error:.1e}, relative", window=s))
    return found


def _unexplained(window: WindowTokens, s: int) -> list[Finding]:
    """No single pattern fits: tokens without weight are set apart, the others tried again."""
    zero = np.abs(window.ratio) < LOOSE
    found = []
    partly = [
        i
        for i in np.unique(window.micro_batch)
        if 0 < np.count_nonzero(zero[window.micro_batch == i]) / np.count_nonzero(window.micro_batch == i) < 1
    ]
    if partly:
        lost = int(zero[np.isin(window.micro_batch, partly)].sum())
        blamed = tuple(int(i) for i in partly)
        evidence = f"{lost} of {len(zero)} live tokens have no weight, in {micro_batches_text(blamed, window.k)}"
        found.append(Finding("tokens_dropped", evidence, blamed, s))
        rest = window.ratio[~zero]
        if np.ptp(rest) <= LOOSE * np.abs(rest).max():
            return found
    whole = tuple(int(i) for i in np.unique(window.micro_batch) if np.all(zero[window.micro_batch == i]))
    if whole:
        found.append(Finding("dropped", f"{micro_batches_text(whole, window.k)}: weight 0 instead of 1", whole, s))
    return [*found, Finding("uneven_weights", weights_text(window), window=s)]


def _masked(problem: Problem, reading: Reading, s: int, k: int) -> list[Finding]:
    tokens = problem.tokens
    here = ~tokens.live & (tokens.window == s) & (np.abs(reading.weights) * problem.live_tokens(s) > LOOSE)
    blamed = tuple(int(i) for i in np.unique(tokens.micro_batch[here]))
    if not blamed and reading.padding > LOOSE:
        return [Finding("masked_tokens_trained", f"padding makes {reading.padding:.1%} of the change", (), s)]
    if not blamed:
        return []
    return [
        Finding("masked_tokens_trained", f"masked positions have weight in {micro_batches_text(blamed, k)}", blamed, s)
    ]


def _earlier(problem: Problem, readings: list[Reading], reading: Reading, s: int) -> list[Finding]:
    """Tokens of earlier windows that act again: with a weight below one that is momentum, else a leak."""
    tokens, found = problem.tokens, []
    for w in range(s):
        here = tokens.live & (tokens.window == w)
        again = here & (np.abs(reading.weights) * problem.live_tokens(w) > LOOSE / 2)
        if not np.any(again):
            continue
        first = readings[w].weights
        shares = reading.weights[again] / np.where(first[again] == 0, np.inf, first[again])
        blamed = tuple(int(i) for i in np.unique(tokens.micro_batch[again]))
        k = len(problem.job.windows[w])
        share = float(np.median(shares))
        uniform = np.ptp(shares) <= LOOSE * abs(share) and np.array_equal(again, here & (np.abs(first) > 0))
        if uniform and 0 < share < 1 - LOOSE and not _counted_anew(problem, share, s, w):
            evidence = f"update {s} holds {share:.3g} times the gradient of window {w}"
            found.append(Finding("momentum", evidence, (), s))
        else:
            evidence = f"update {s} holds window {w}'s {micro_batches_text(blamed, k)} again, weight {share:.3g}"
            found.append(Finding("stale", evidence, blamed, s))
    return found


def _counted_anew(problem: Problem, share: float, s: int, w: int) -> bool:
    """Whether the share is that of an old sum divided by the new window's token count."""
    old, new = problem.live_tokens(w), problem.live_tokens(s)
    return any(abs(share - old / total) <= LOOSE * share for total in (new, old + new))


def _shared(problem: Problem, reading: Reading, s: int, k: int, found: list[Finding]) -> list[Finding]:
    """The second route: the shared coordinate must be what the weights of the tokens add up to."""
    if problem.job.model != "linear" or any(finding.code == "unexplained_change" for finding in found):
        return []
    gap = abs(reading.shared - reading.shared_expected)
    bound = tolerance(problem, k) * reading.shared_scale
    if problem.job.parameter_dtype == "bfloat16":
        bound = max(bound, 2 * BFLOAT16_UNIT * abs(reading.shared_expected))
    if gap <= bound:
        return []
    evidence = f"the shared sum is {reading.shared:.6g} where its parts add up to {reading.shared_expected:.6g}"
    lossy = gap <= LARGEST_LOSS * reading.shared_scale
    if lossy and any(finding.code == "low_precision_sum" for finding in found):
        return []
    return [Finding("low_precision_sum" if lossy else "unexplained_change", evidence, window=s)]


def _moved(problem: Problem, readings: list[Reading]) -> list[Finding]:
    """Micro-batches that are missing from their own update and present in another one."""
    tokens, found = problem.tokens, []
    for w, window in enumerate(problem.job.windows[: len(readings)]):
        for i in range(len(window)):
            here = tokens.live & (tokens.window == w) & (tokens.micro_batch == i)
            if not np.any(here):
                continue
            seen = [
                s
                for s, reading in enumerate(readings)
                if np.all(np.abs(reading.weights[here]) * problem.live_tokens(w) > LOOSE)
            ]
            if seen and w not in seen:
                evidence = f"micro-batch {i} of window {w} is in update {seen[0]}"
                found.append(Finding("wrong_boundary", evidence, (i,), seen[0]))
    return found


def _between(run: Run) -> list[Finding]:
    found = []
    for s, early in enumerate(run.between):
        if not np.all(np.isfinite(early)):
            found.append(Finding("nan_poisoning", f"a NaN moved the parameters before window {s} was complete", (), s))
        elif np.any(early):
            found.append(Finding("update_before_window_end", f"parameters moved before window {s} was complete", (), s))
    return found


def _not_finite(problem: Problem, gradient: np.ndarray, s: int) -> Finding:
    """Names the micro-batches whose own marks are not finite, if not all are."""
    tokens = problem.tokens
    k = len(problem.job.windows[s])
    bad = ~np.isfinite(gradient[tokens.place]).reshape(len(tokens.place), -1).all(axis=1)
    own = tokens.live & (tokens.window == s)
    blamed = {int(i) for i in np.unique(tokens.micro_batch[bad & own])}
    blamed = blamed if len(blamed) < len(np.unique(tokens.micro_batch[own])) else set()
    empty = set(range(k)) - {int(i) for i in np.unique(tokens.micro_batch[own])}
    named = tuple(sorted(blamed or empty))
    where = f"; micro-batch {numbers(named)} of {k}" if named else ""
    where += " has no live token" if named and not blamed else ""
    return Finding("nan_on_clean_data", f"update {s} is not finite although its gradients are{where}", named, s)


def not_sgd(problem: Problem, applied: tuple[np.ndarray, ...], readings: list[Reading]) -> bool:
    """Whether, in the first update, all entries that moved moved alike although their gradients differ by far."""
    sizes = np.abs(applied[0][np.abs(applied[0]) > 1e-12])
    if len(sizes) < 3 or sizes.max() > 1.01 * sizes.min():
        return False
    shared, expected = abs(readings[0].shared), abs(readings[0].shared_expected)
    return problem.job.model == "tokens" or 0 < shared < expected / 2
