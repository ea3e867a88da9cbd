"""Error bars: question-level standard errors, Wilson intervals, bootstraps by question, sign-flip tests.

The unit that varies is the question: a benchmark is a sample of questions, and the samples of one question are not
independent pieces of evidence about another. Two models on the same questions are compared by paired differences.
Source: Miller 2024, arXiv 2411.00640, for the first; below some hundred questions no normal approximation is used
(arXiv 2503.01747), but Wilson where every value is 0 or 1 and the percentile bootstrap by question elsewhere.

Every random function takes a seed and gives the same interval for the same seed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from statistics import NormalDist

import numpy as np
from jaxtyping import Float

from hptjax.masked import inverse_count, mean, ratio

RESAMPLES = 10_000
EXACT_FLIPS = 12  # up to 2^12 sign patterns are enumerated
CHUNK_ENTRIES = 4_000_000  # resampled entries that exist at the same time


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure with its error bar.

    Args
      value: the figure. se: its standard error over questions. low, high: its interval, 95 % unless `method` says else.
      questions: Q. samples: completions per question, n. method: how the interval was made.
    """

    value: float
    se: float
    low: float
    high: float
    questions: int
    samples: int
    method: str

    def __str__(self) -> str:
        bars = f"{self.value:.4f} +- {self.se:.4f} [{self.low:.4f}, {self.high:.4f}]"
        return f"{bars} (Q={self.questions}, n={self.samples}, {self.method})"


def question_se(values: Float[np.ndarray, " Q"]) -> float:
    """Standard error of the mean over questions, sd / sqrt(Q) with ddof 1; NaN below two questions."""
    values = np.asarray(values, np.float64)
    centred = values - mean(values)
    return math.sqrt(ratio(float(centred @ centred), values.size * (values.size - 1))) if values.size else float("nan")


def fixed_benchmark_se(variances: Float[np.ndarray, " Q"]) -> float:
    """Standard error from sampling noise alone, for these very questions: sqrt(sum of Var_i) / Q."""
    variances = np.asarray(variances, np.float64)
    return ratio(math.sqrt(float(variances.sum())), variances.size)


def wilson(successes: float | int, trials: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion; it contains successes / trials and lies in [0, 1].

        (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Raises: not 0 <= successes <= trials, or no trials -> ValueError.
    Source: Wilson 1927. Exact coverage for p = 0.02, 0.03 .. 0.98 is at least 0.9298 at n = 30 and 0.9420 at n = 234;
    between those points it falls to 0.916 and 0.933 (near p = 0.97 and p = 0.05).
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"expected 0 <= successes <= trials and at least one trial, got {successes} of {trials}")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p = ratio(successes, trials)
    spread = ratio(z * z, trials)
    centre = (p + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (p * (1 - p) + spread / 4)) / (1 + spread)
    return max(0.0, min(centre - half, p)), min(1.0, max(centre + half, p))


def bootstrap_means(
    values: Float[np.ndarray, " Q"], *, resamples: int = RESAMPLES, seed: int = 0
) -> Float[np.ndarray, " R"]:
    """Means of `resamples` draws of Q questions with replacement."""
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"expected values of at least one question, [Q], got shape {values.shape}")
    rng = np.random.default_rng(seed)
    means = []
    for count in chunks(resamples, values.size):
        drawn = values[rng.integers(values.size, size=(count, values.size))]
        means.append(drawn.sum(axis=1) * inverse_count(values.size))
    return np.concatenate(means)


def estimate_mean(
    values: Float[np.ndarray, " Q"], *, samples: int, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """The mean of a per-question figure, its question-level standard error, and its interval.

    The interval is Wilson's where every value is 0 or 1 (one sample per question, or all questions agree: there a
    bootstrap has no width), and the percentile bootstrap by question elsewhere.
    """
    values = np.asarray(values, np.float64)
    agree = bool(np.all(values == values[:1])) and bool(np.all((values >= 0) & (values <= 1)))
    if agree or np.all((values == 0) | (values == 1)):
        low, high = wilson(float(values.sum()), values.size, level=level)
        method = "wilson"
    else:
        low, high = percentiles(bootstrap_means(values, resamples=resamples, seed=seed), level)
        method = "bootstrap by question"
    return Estimate(mean(values), question_se(values), low, high, values.size, samples, named(method, level))


def paired_difference(
    before: Float[np.ndarray, " Q"],
    after: Float[np.ndarray, " Q"],
    *,
    samples: int,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean of after - before on the same questions, with the interval of a bootstrap over the paired differences.

    Identical inputs give 0 with the interval [0, 0]. Raises: different questions by their number -> ValueError.
    """
    if np.shape(before) != np.shape(after):
        raise ValueError(f"expected the same questions on both sides, got {np.shape(before)} and {np.shape(after)}")
    differences = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    low, high = percentiles(bootstrap_means(differences, resamples=resamples, seed=seed), level)
    method = named("paired bootstrap by question", level)
    return Estimate(mean(differences), question_se(differences), low, high, differences.size, samples, method)


def two_level_difference(
    differences: Float[np.ndarray, "S Q"],
    *,
    samples: int,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean over training seeds and questions, with a bootstrap that draws seeds and questions, both with replacement.

    Each resample draws S seeds and Q questions, and takes the mean of the S x Q block. One seed gives the bootstrap by
    question. With few seeds the interval is too narrow (three seeds hardly show their spread): print each seed's value
    beside it.

    Args
      differences: a figure per training seed and question, paired where it is a difference.
    """
    differences = np.asarray(differences, np.float64)
    if differences.ndim != 2 or not differences.size:
        raise ValueError(f"expected values of seeds and questions, [S Q], got shape {differences.shape}")
    seeds, questions = differences.shape
    rng = np.random.default_rng(seed)
    means = []
    for count in chunks(resamples, questions):
        times_drawn = rng.multinomial(seeds, np.full(seeds, ratio(1, seeds)), size=count)  # [R S]
        of_seeds = times_drawn.astype(np.float64) @ differences  # [R Q], a sum over the seeds drawn
        drawn = np.take_along_axis(of_seeds, rng.integers(questions, size=(count, questions)), axis=1)
        means.append(drawn.sum(axis=1) * inverse_count(seeds * questions))
    replicates = np.concatenate(means)
    low, high = percentiles(replicates, level)
    centred = replicates - mean(replicates)
    se = math.sqrt(ratio(float(centred @ centred), replicates.size - 1))
    method = named(f"bootstrap over {seeds} seeds and questions", level)
    return Estimate(mean(differences), se, low, high, questions, samples, method)


def sign_flip_p(differences: Float[np.ndarray, " Q"], *, flips: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p that paired differences have a symmetric distribution about 0, by flipping their signs.

    The share of sign patterns whose absolute sum reaches the observed one: all patterns where at most 12 differences
    are not 0, otherwise `flips` random ones with the observed pattern counted among them, (1 + hits) / (1 + flips).
    """
    differences = np.asarray(differences, np.float64)
    live = differences[differences != 0]
    if not live.size:
        return 1.0
    observed = abs(float(live.sum()))
    slack = 1e-12 * float(np.abs(live).sum())  # patterns that tie with the observed one count as reaching it
    if live.size <= EXACT_FLIPS:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=live.size)))
        return mean(np.abs(signs @ live) >= observed - slack)
    rng = np.random.default_rng(seed)
    hits = 0
    for count in chunks(flips, live.size):
        signs = rng.integers(2, size=(count, live.size)) * 2.0 - 1.0
        hits += int(np.sum(np.abs(signs @ live) >= observed - slack))
    return ratio(1 + hits, 1 + flips)


def percentiles(replicates: Float[np.ndarray, " R"], level: float) -> tuple[float, float]:
    """The central interval that holds a share `level` of the replicates."""
    low, high = np.quantile(replicates, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def named(method: str, level: float) -> str:
    """The method, with its level where that is not 95 %."""
    return method if level == 0.95 else f"{method}, {level:.0%}"


def chunks(total: int, width: int) -> list[int]:
    """Splits `total` rows of `width` entries into parts that fit in memory."""
    size = max(1, CHUNK_ENTRIES // max(width, 1))
    return [min(size, total - start) for start in range(0, total, size)]
