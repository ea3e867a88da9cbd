"""Every figure of an evaluation, from its judged samples; each with its standard error and interval over questions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from hptjax.diagnostics.intervals import Estimate, estimate_mean, fixed_benchmark_se, paired_difference, sign_flip_p
from hptjax.diagnostics.passk import average_at_n, jackknife_variance, pass_at_k
from hptjax.diagnostics.tails import g_pass_at_k, worst_at_k
from hptjax.diagnostics.votes import ABSTAINS, answer_classes, maj_at_k
from hptjax.eval.samples import FILTERS, Graded, by_question
from hptjax.masked import mean, ratio

Same = Callable[[str, str], bool]
STRICT = FILTERS[0]  # of its vote a completion takes part only in the format that was asked for
LOWER_IS_BETTER = ("truncated", "abstained", "length")


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure by its name and the policy whose word it counts.

    Args
      filter: "strict", "lenient", or "none" where no verdict is counted.
      sampling_se: its standard error for these very questions, from sampling noise alone; None where not known.
    """

    name: str
    filter: str
    estimate: Estimate
    sampling_se: float | None = None

    @property
    def higher_is_better(self) -> bool:
        """Whether more of it is better."""
        return not self.name.startswith(LOWER_IS_BETTER)


def figures(
    samples: Sequence[Graded],
    *,
    ks: Sequence[int],
    shares: Sequence[float] = (0.5,),
    same: Same | None = None,
    answers: bool = True,
) -> list[Figure]:
    """The figures of one task.

    avg@n, pass@k, worst@k, g-pass@k(share) and maj@k for both policies, the shares of completions that have the format
    asked for, that hold no answer and that met their limit, and the mean length. n: samples per question.

    Args
      ks: each in 1..n. shares: of g-pass@k.
      same: whether two answers are one for the vote; None: where their text is equal.
      answers: whether the verifier tells answers; else there is no vote, no format and nobody abstains.
    Raises no samples, or not as many of every question, a k out of range -> ValueError.
    """
    groups = by_question(samples)
    n = len(groups[0])
    if bad := [k for k in ks if not 1 <= k <= n]:
        raise ValueError(f"expected eval.ks in 1..{n}, the samples per question, got {bad}; change eval.ks")
    classes = np.stack([answer_classes([sample.answer for sample in group], same or str.__eq__) for group in groups])
    formatted = np.array([[sample.formatted for sample in group] for group in groups], bool)
    found: list[Figure] = []
    for policy in FILTERS:
        solved = np.array([[getattr(sample, policy) for sample in group] for group in groups], bool)
        votes = np.where(formatted, classes, ABSTAINS) if policy == STRICT else classes
        found += _of_verdicts(policy, solved, votes if answers else None, ks, shares)

    def told(name: str, value: Callable[[Graded], float]) -> Figure:
        values = [mean(np.array([value(sample) for sample in group], np.float64)) for group in groups]
        return Figure(name, "none", estimate_mean(np.array(values), samples=n))

    if answers:
        found.append(told("format", lambda sample: float(sample.formatted)))
        found.append(told("abstained", lambda sample: float(sample.answer is None)))
    return [
        *found,
        told("truncated", lambda sample: float(sample.finish_reason == "length")),
        told("length", lambda sample: float(sample.length)),
    ]


def _of_verdicts(
    policy: str,
    solved: Bool[np.ndarray, "Q n"],
    classes: Int[np.ndarray, "Q n"] | None,
    ks: Sequence[int],
    shares: Sequence[float],
) -> list[Figure]:
    counts, n = solved.sum(axis=1), solved.shape[1]

    def told(name: str, values: Float[np.ndarray, " Q"], k: int | None = None) -> Figure:
        noise = None
        if k is not None and k < n:
            noise = fixed_benchmark_se(jackknife_variance(counts, n, k))
        return Figure(name, policy, estimate_mean(values, samples=n), noise)

    found = [told(f"avg@{n}", average_at_n(counts, n), 1)]
    for k in sorted(set(ks)):
        found.append(told(f"pass@{k}", pass_at_k(counts, n, k), k))
        if k == 1:
            continue  # the others are all pass@1
        found.append(told(f"worst@{k}", worst_at_k(counts, n, k)))
        found += [told(f"g-pass@{k}({share:g})", g_pass_at_k(counts, n, k, share)) for share in shares]
        found += [] if classes is None else [told(f"maj@{k}", maj_at_k(classes, solved, k))]
    return found


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of completions; NaN where there is none."""

    count: int
    mean_tokens: float
    median_tokens: float


def lengths(samples: Sequence[Graded], policy: str = "strict") -> dict[str, Lengths]:
    """Lengths of all completions, of the right and of the wrong ones by a policy."""
    kinds = {
        "all": list(samples),
        "right": [sample for sample in samples if getattr(sample, policy)],
        "wrong": [sample for sample in samples if not getattr(sample, policy)],
    }
    return {kind: _lengths([sample.length for sample in chosen]) for kind, chosen in kinds.items()}


def _lengths(tokens: Sequence[int]) -> Lengths:
    count = len(tokens)
    return Lengths(count, ratio(float(sum(tokens)), count), float(np.median(tokens)) if count else math.nan)


@dataclasses.dataclass(frozen=True)
class Paired:
    """One evaluation minus another on the same questions.

    Args
      difference: after - before with the interval of a paired bootstrap. p: of a sign-flip test.
      won, lost: questions whose pass@k went up or down, the largest change first.
    """

    difference: Estimate
    p: float
    won: list[int]
    lost: list[int]


def paired(before: Sequence[Graded], after: Sequence[Graded], k: int, *, policy: str = "strict") -> Paired:
    """pass@k of two evaluations of the same questions.

    Each side may have its own number of samples per question, at least k.
    Raises other questions, or other right answers to them -> ValueError.
    """
    left, right = by_question(before), by_question(after)
    asked = [[(group[0].problem, group[0].gold) for group in side] for side in (left, right)]
    if asked[0] != asked[1]:
        place = next((i for i, (a, b) in enumerate(zip(*asked, strict=False)) if a != b), min(map(len, asked)))
        raise ValueError(
            f"expected two evaluations of the same questions, got {len(asked[0])} and {len(asked[1])} that differ at "
            f"question {place}; evaluate both on one file"
        )
    values = [
        pass_at_k(np.array([sum(getattr(s, policy) for s in group) for group in side]), len(side[0]), k)
        for side in (left, right)
    ]
    change = values[1] - values[0]
    order = np.argsort(-np.abs(change), kind="stable")
    samples = min(len(left[0]), len(right[0]))
    return Paired(
        difference=paired_difference(values[0], values[1], samples=samples),
        p=sign_flip_p(change),
        won=[right[i][0].question for i in order if change[i] > 0],
        lost=[right[i][0].question for i in order if change[i] < 0],
    )
