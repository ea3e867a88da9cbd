"""Findings about the updates of one job, from the weights of its tokens."""

from __future__ import annotations

import numpy as np

from hptjax.audit.decode import LOOSE, ROUGH, Explanation, WindowTokens, common_offset, explain, relative
from hptjax.audit.findings import Finding
from hptjax.audit.problems import Problem
from hptjax.audit.read import BFLOAT16_UNIT, Reading, bound_of, not_sgd, read_all, tolerance, window_tokens
from hptjax.audit.run import Run
from hptjax.audit.words import blame_text, micro_batches_text, numbers, weights_text

BASE_CODES = {
    "mean_of_means": "mean_of_means",
    "rank_mean_of_means": "mean_of_means",
    "row_weighted_means": "mean_of_means",
    "rank_means": "rank_means",
    "sequence_mean": "sequence_mean",
}
CLEAR = ("dropped", "repeated", "unexplained_change")
SAME_SHARE = 1e-3  # relative: 0.9^4 is near 2/3
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
    """What is wrong with update `s`, which is that of a window of `k` micro-batches; `readings` has all updates."""
    found = []
    if reading.decay:
        found.append(Finding("weight_decay", f"idle parameters shrank by {reading.decay:.3g} of their size", window=s))
    bound = bound_of(problem, k)
    if problem.job.model == "tokens" and bound < reading.unexplained < LOOSE:
        found.append(
            Finding("low_precision_sum", f"{reading.unexplained:.1e} of the change is rounding, not gradient", window=s)
        )
    elif reading.unexplained > bound:
        found.append(
            Finding("unexplained_change", f"{reading.unexplained:.2g} of the change is no token's gradient", window=s)
        )
    found += _masked(problem, reading, s, k)
    found += _earlier(problem, readings, reading, s)
    found += _own_tokens(problem, readings, reading, s, k)
    found += _shared(problem, reading, s, k, found)
    if any(finding.code == "masked_tokens_trained" for finding in found):  # they are counted in the mean, too
        found = [finding for finding in found if finding.code not in ("wrong_scale", "padding_counted")]
    if any(finding.code == "unexplained_change" for finding in found):  # which blurs every finer reading
        return [finding for finding in found if finding.code in CLEAR]
    return found


def _own_tokens(problem: Problem, readings: list[Reading], reading: Reading, s: int, k: int) -> list[Finding]:
    """How the live tokens of the window were weighted."""
    window = window_tokens(problem, reading, s)
    lengths = [len(batches) for batches in problem.job.windows]
    anything_before = bool(np.any(readings[0].weights))
    largest, bound = float(np.abs(window.ratio).max()), bound_of(problem, k)
    if largest < LOOSE and 0 < s == len(lengths) - 1 and k < lengths[0] and anything_before:
        return [
            Finding("final_window_dropped", f"window {s}, of {k} micro-batches, changes nothing", tuple(range(k)), s)
        ]
    if largest <= bound:
        return [Finding("no_update", "no token of the window has any weight", window=s)]
    if largest < LOOSE:
        return [Finding("wrong_scale", f"no token has more than {largest:.2g} of the weight that it should", window=s)]
    explanation = explain(window)
    if explanation is None:
        return _unexplained(window, s)
    found = []
    if explanation.factor_code:
        earlier = _count_of(problem, readings, explanation.factor, s)
        found.append(
            Finding(
                explanation.factor_code if earlier is None else "wrong_scale",
                f"every weight is {explanation.factor:.4g} times what it should be"
                + ("" if earlier is None else f", as if divided by the token count of window {earlier}"),
                window=s,
            )
        )
    if explanation.base != "token_mean":
        found.append(Finding(BASE_CODES[explanation.base], weights_text(window), window=s))
    for code, times in (("dropped", 0), ("repeated", 2)):
        blamed = explanation.with_times(times)
        if blamed:
            found.append(Finding(code, blame_text(problem, reading, explanation, window, blamed, s), blamed, s))
    if explanation.error > bound:
        found.append(_inexact(window, explanation, bound, s))
    return found


def _inexact(window: WindowTokens, explanation: Explanation, bound: float, s: int) -> Finding:
    """A pattern that fits roughly: one factor, a factor per micro-batch that is no rounding, or lost digits."""
    common = common_offset(window, explanation, bound)
    if common is not None:
        evidence = f"every weight is {common * explanation.factor:.6g} times what it should be"
        return Finding("wrong_scale", evidence, window=s)
    offsets = relative(window, explanation)
    kept = np.isfinite(offsets)
    parts = [offsets[kept & (window.micro_batch == i)] for i in np.unique(window.micro_batch[kept])]
    alike = all(np.ptp(part) <= 2 * bound for part in parts)
    if explanation.base == "token_mean" and alike and explanation.error > ROUGH:
        return Finding("uneven_weights", weights_text(window), window=s)
    return Finding("low_precision_sum", f"weights are off by {explanation.error:.1e}, relative", window=s)


def _count_of(problem: Problem, readings: list[Reading], factor: float, s: int) -> int | None:
    """The window before whose token count explains the factor, where the first window has none to explain."""
    if s == 0 or problem.live_tokens(s - 1) == problem.live_tokens(s):
        return None
    first = explain(window_tokens(problem, readings[0], 0))
    wanted = problem.live_tokens(s) / problem.live_tokens(s - 1)
    near = abs(factor - wanted) <= LOOSE * wanted
    return s - 1 if near and first is not None and not first.factor_code else None


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
    weights = np.abs(reading.weights) * problem.live_tokens(s)  # of a right trainer: exact zeros
    bound = LOOSE if problem.job.parameter_dtype == "bfloat16" else tolerance(problem, k)
    here = ~tokens.live & (tokens.window == s) & (weights > bound)
    blamed = tuple(int(i) for i in np.unique(tokens.micro_batch[here]))
    if not blamed and reading.padding > LOOSE:
        return [Finding("masked_tokens_trained", f"padding makes {reading.padding:.1%} of the change", (), s)]
    if not blamed:
        return []
    return [
        Finding("masked_tokens_trained", f"masked positions have weight in {micro_batches_text(blamed, k)}", blamed, s)
    ]


def _earlier(problem: Problem, readings: list[Reading], reading: Reading, s: int) -> list[Finding]:
    """Tokens of earlier windows that act again in update `s`.

    All tokens of a window with one share below one of their first weight is momentum; anything else is a leak.
    """
    tokens, found = problem.tokens, []
    for w in range(s):
        here = tokens.live & (tokens.window == w)
        weights = np.abs(reading.weights) * problem.live_tokens(w)  # of a right trainer: exact zeros
        again = here & (weights > tolerance(problem, len(problem.job.windows[s])))
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
    return any(abs(share - old / total) <= SAME_SHARE * share for total in (new, old + new))


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
