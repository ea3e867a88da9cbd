"""From the gradient that an update applied to the weight of every token in it."""

from __future__ import annotations

import dataclasses

import numpy as np

from hptjax.audit.decode import WindowTokens
from hptjax.audit.problems import DECOYS, IDLE, PADDING, ROWS, SHARED, VOCABULARY, WIDTH, Problem
from hptjax.audit.reference import token_gradients

UNIT_ROUNDOFF, BFLOAT16_UNIT = 2.0**-24, 2.0**-8


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """What one update holds.

    Args
      weights: [n] what each entry of `Problem.tokens` was multiplied with; 1 / N is right for the window's live tokens.
      decay: factor of the parameters that is part of the change; 0 where there is none.
      unexplained: norm of the change that is no token's gradient and no decay, relative to that of the tokens'.
      shared, shared_expected: the shared coordinate, as it is and as the weights say; nan in the table model.
      shared_scale: sum of the sizes of the parts of the shared coordinate, for rounding bounds.
      padding: norm of the change of the padding token's row, relative to the whole change; 0 in the linear model.
    """

    weights: np.ndarray
    decay: float
    unexplained: float
    shared: float
    shared_expected: float
    shared_scale: float
    padding: float = 0.0


def read_linear(problem: Problem, applied: np.ndarray, before: np.ndarray) -> Reading:
    """The weights of a linear job: one coordinate each."""
    idle, start = applied[list(IDLE)], before[list(IDLE)]
    decay = float(idle @ start / (start @ start)) if np.any(start) else 0.0
    proportional = np.linalg.norm(idle - decay * start) <= 0.05 * np.linalg.norm(idle)
    decay = decay if abs(decay) > 1e-6 and proportional else 0.0
    gradient = applied - decay * before
    weights = gradient[problem.tokens.place]
    parts = weights * problem.shared
    rest = gradient.copy()
    rest[problem.tokens.place] = 0
    rest[SHARED] = 0
    size = float(np.linalg.norm(weights))  # the shared coordinate would dwarf everything else
    return Reading(
        weights=weights,
        decay=decay,
        unexplained=float(np.linalg.norm(rest)) / size if size else 0.0,
        shared=float(gradient[SHARED]),
        shared_expected=float(parts.sum()),
        shared_scale=float(np.abs(parts).sum()),
    )


def read_table(problem: Problem, applied: np.ndarray, starts: list[np.ndarray]) -> Reading:
    """The weights of a table job, by least squares against the influence matrix: the gradients of the tokens.

    A token's gradient lies in one row of the table that no other token shares, so least squares is one projection per
    token. The gradient of a token of window w is taken at the parameters before update w, also in later updates.

    Args
      starts: parameters before each update so far; the last belongs to this one.
    """
    tokens, before = problem.tokens, starts[-1]
    idle = np.ones(VOCABULARY, bool)
    idle[[PADDING, *tokens.place]] = False
    if problem.blanked:
        idle[VOCABULARY - DECOYS :] = False
    decay = float(np.sum(applied[idle] * before[idle]) / np.sum(before[idle] ** 2))
    proportional = np.linalg.norm(applied[idle] - decay * before[idle]) <= 0.05 * np.linalg.norm(applied[idle])
    decay = decay if abs(decay) > 1e-5 and proportional else 0.0
    gradient = applied - decay * before
    when = np.minimum(tokens.window, len(starts) - 1)
    influence = token_gradients(np.stack(starts)[when, tokens.place], tokens.label)
    rows = gradient[tokens.place]
    weights = np.sum(influence * rows, axis=1) / np.sum(influence**2, axis=1)
    rest = gradient.copy()
    rest[tokens.place] -= weights[:, None] * influence
    rest[PADDING] = 0
    if problem.blanked:
        rest[VOCABULARY - DECOYS :] = 0
    size = float(np.linalg.norm(applied)) or 1.0
    nan = float("nan")
    padding = float(np.linalg.norm(gradient[PADDING])) / size
    return Reading(weights, decay, float(np.linalg.norm(rest)) / size, nan, nan, nan, padding)


def read_all(problem: Problem, applied: tuple[np.ndarray, ...]) -> list[Reading]:
    """One reading per update; parameters in between are followed from what was applied."""
    job, readings = problem.job, []
    starts = [job.parameters.astype(np.float64)]
    for gradient, rate in zip(applied, job.learning_rates, strict=False):
        if job.model == "linear":
            readings.append(read_linear(problem, gradient, starts[-1]))
        else:
            readings.append(read_table(problem, gradient, starts))
        starts.append(starts[-1] - rate * gradient)
    return readings


def tolerance(problem: Problem, k: int) -> float:
    """Relative error of a weight that fp32 rounding can explain.

    Linear: 16 (k + sqrt(tokens)) u, accumulation spec 3.6. Table: the same plus the rounding of parameters of size 0.5
    to which changes of about 1/N are added, as measured on fp32 trainers below 2e-5.
    """
    linear = 16 * (k + np.sqrt(len(problem.tokens.place))) * UNIT_ROUNDOFF
    return float(linear if problem.job.model == "linear" else linear + 2e-4)


def bound_of(problem: Problem, k: int) -> float:
    """Relative error of a weight that rounding can explain, in the dtype of the job's parameters."""
    bound = tolerance(problem, k)
    return max(bound, BFLOAT16_UNIT) if problem.job.parameter_dtype == "bfloat16" else bound


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


def not_sgd(problem: Problem, applied: tuple[np.ndarray, ...], readings: list[Reading]) -> bool:
    """Whether, in the first update, all entries that moved moved alike although their gradients differ by far."""
    moved = np.abs(applied[0])
    if problem.job.model == "linear":
        moved = np.delete(moved, list(IDLE))  # which decay moves, too
    sizes = moved[moved > max(1e-12, 1e-3 * moved.max())]
    if len(sizes) < 3 or sizes.max() > 1.01 * sizes.min():
        return False
    shared, expected = abs(readings[0].shared), abs(readings[0].shared_expected)
    return problem.job.model == "tokens" or 0 < shared < expected / 2
