"""The jobs of an audit: small problems in which every token leaves its own mark on the parameters.

In the linear model each position of every window has a coordinate of its own, so the applied gradient holds the
weight of every token, live or masked. One more coordinate is shared: micro-batch i adds 4^(i+1) to it, or 2^(i+1) in
long windows, so the digits of that one number list the micro-batches a second time. Two idle coordinates start away
from zero and are touched by no token: they move only under weight decay.

In the table model each position has an input token of its own, hence a row of the table of its own; rows of no token
are idle.

Live tokens per micro-batch are uneven everywhere, and chosen so that no mean of means looks like a drop or a repeat.
Every window's token count is a power of two, so that dividing by it is exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from hptjax.audit.job import IGNORED, Batch, Job, LinearBatch, Model, TokenBatch

ROWS, WIDTH = 2, 6  # of every micro-batch
FEATURES, VOCABULARY = 200, 192  # one size for all jobs, so that targets which compile need not compile again
SHARED, IDLE, IDLE_START = FEATURES - 3, (FEATURES - 2, FEATURES - 1), (1.0, -2.0)
PADDING = 0  # the token of padding
DECOYS = 16  # last rows of the table: where the tokens of a blanked micro-batch go
assert max(SHARED, *IDLE) < FEATURES

COUNTS: dict[int, tuple[int, ...]] = {
    1: (8,),
    2: (3, 5),
    3: (9, 2, 5),
    4: (7, 3, 5, 1),
    5: (3, 6, 1, 4, 2),
    7: (5, 9, 1, 7, 3, 2, 5),
    16: (3, 7, 2, 5, 1, 6, 4, 8, 2, 3, 5, 1, 4, 6, 2, 5),
}
"""Window length k -> live tokens of its micro-batches; the sum is a power of two."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """Every position of a job that a trainer could train on, one entry each.

    Args
      window, micro_batch, row: where it is. live: whether it is trained on.
      place: its own coordinate (linear), or its input token: a row of the table. label: the token to predict; else 0.
    """

    window: np.ndarray
    micro_batch: np.ndarray
    row: np.ndarray
    live: np.ndarray
    place: np.ndarray
    label: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A job and what the kit knows about it.

    Args
      shared: [n] feature of every entry of `tokens` on the shared coordinate; zeros in the table model.
      digits: whether the shared coordinate lists the micro-batches.
      blanked: whether the target gets one micro-batch of every window of 3 and more without its gradient.
    """

    job: Job
    tokens: Tokens
    shared: np.ndarray
    digits: bool = False
    blanked: bool = False

    def live_tokens(self, window: int) -> int:
        """N of the window."""
        return int(np.sum(self.tokens.live & (self.tokens.window == window)))


def turned(counts: Sequence[int], by: int) -> tuple[int, ...]:
    """The same counts in another order, so that windows differ."""
    by %= len(counts)
    return (*counts[by:], *counts[:by])


def spans(count: int, index: int) -> list[tuple[int, int]]:
    """(first position, live tokens) of each row of a micro-batch; the first row holds about two thirds.

    Position 0 is never live: no token predicts it.
    """
    first = min(WIDTH - 1, (2 * count + 2) // 3)
    lengths = (first, count - first)
    return [(1 + ((index + row) % 2 if length < WIDTH - 1 else 0), length) for row, length in enumerate(lengths)]


def digit_base(k: int) -> int:
    """4 where a digit of its own per micro-batch, with room for repeats, fits exactly into float32; else 2."""
    return 4 if k <= 11 else 2


def problem(
    model: Model,
    counts: Sequence[Sequence[int]],
    *,
    learning_rates: Sequence[float] | None = None,
    shared: Sequence[float] | None = None,
    clip_norm: float | None = None,
    parameter_dtype: Literal["float32", "bfloat16"] = "float32",
    ranks: int = 1,
    blanked: bool = False,
    blank: int | None = None,
) -> Problem:
    """The problem with these live tokens per window and micro-batch.

    Args
      learning_rates: 1 for every update where it is None.
      shared: value that micro-batch i adds to the shared coordinate; digits where it is None. Linear model only.
      blanked: give the target one micro-batch of every window of 3 and more without its gradient; shapes and counts
        stay. blank: which one; the middle one where None.
    """
    make = _linear if model == "linear" else _table
    parameters, windows, tokens, marks = make(counts, shared, blanked, blank)
    job = Job(
        model=model,
        parameters=parameters,
        windows=tuple(tuple(window) for window in windows),
        learning_rates=tuple(learning_rates or [1.0] * len(counts)),
        clip_norm=clip_norm,
        parameter_dtype=parameter_dtype,
        ranks=ranks,
    )
    return Problem(job, tokens, marks, digits=model == "linear" and shared is None, blanked=blanked)


def middle(k: int) -> int:
    """The micro-batch that is blanked: neither first nor last."""
    return k // 2


def is_blank(blanked: bool, blank: int | None, index: int, k: int) -> bool:
    """Whether the target sees this micro-batch without its gradient; short windows are left whole."""
    return blanked and k >= 3 and index == (middle(k) if blank is None else blank)


def _linear(
    counts: Sequence[Sequence[int]], shared: Sequence[float] | None, blanked: bool, blank: int | None
) -> tuple[np.ndarray, list[list[Batch]], Tokens, np.ndarray]:
    entries: list[tuple[int, int, int, bool, int, int]] = []
    marks: list[float] = []
    windows: list[list[Batch]] = []
    for w, window in enumerate(counts):
        k = len(window)
        batches: list[Batch] = []
        for i, count in enumerate(window):
            features = np.zeros((ROWS, WIDTH, FEATURES), np.float32)
            mask = np.zeros((ROWS, WIDTH), bool)
            mark = float(digit_base(k) ** (i + 1) if shared is None else shared[i])
            for row, (start, length) in enumerate(spans(count, i)):
                mask[row, start : start + length] = True
                for position in range(WIDTH):
                    live = bool(mask[row, position])
                    features[row, position, len(entries)] = 1
                    here, mark = (mark, 0.0) if live else (0.0, mark)  # on the first live token only
                    features[row, position, SHARED] = here
                    marks.append(here)
                    entries.append((w, i, row, live, len(entries), 0))
            if is_blank(blanked, blank, i, k):
                features[:] = 0
            batches.append(LinearBatch(features=features, mask=mask, index=i, is_last=i == k - 1))
        windows.append(batches)
    if len(entries) > SHARED:
        raise ValueError(f"expected at most {SHARED} positions in a job, got {len(entries)}; use shorter windows")
    parameters = np.zeros(FEATURES, np.float32)
    parameters[list(IDLE)] = IDLE_START
    return parameters, windows, _tokens(entries), np.asarray(marks)


def _table(
    counts: Sequence[Sequence[int]], _: Sequence[float] | None, blanked: bool, blank: int | None
) -> tuple[np.ndarray, list[list[Batch]], Tokens, np.ndarray]:
    entries = []
    windows: list[list[Batch]] = []
    fresh = PADDING + 1
    for w, window in enumerate(counts):
        k = len(window)
        batches: list[Batch] = []
        for i, count in enumerate(window):
            ids = np.full((ROWS, WIDTH), PADDING, np.int32)
            labels = np.full((ROWS, WIDTH), IGNORED, np.int32)
            attention = np.zeros((ROWS, WIDTH), np.int32)
            for row, (start, length) in enumerate(spans(count, i)):
                used = start + max(length, 1)  # a row without live tokens still has a prompt
                ids[row, :used] = np.arange(fresh, fresh + used)
                fresh += used
                attention[row, :used] = 1
                labels[row, start : start + length] = ids[row, start : start + length]
                for position in range(1, min(used + 1, WIDTH)):
                    live = bool(labels[row, position] != IGNORED)
                    entries.append((w, i, row, live, int(ids[row, position - 1]), int(ids[row, position])))
            if is_blank(blanked, blank, i, k):
                ids, labels = _on_decoys(ids, labels, attention)
            batches.append(
                TokenBatch(input_ids=ids, labels=labels, attention_mask=attention, index=i, is_last=i == k - 1)
            )
        windows.append(batches)
    if fresh > VOCABULARY - DECOYS:
        raise ValueError(f"expected at most {VOCABULARY - DECOYS} tokens in a job, got {fresh}; use shorter windows")
    parameters = np.random.default_rng(0).normal(scale=0.5, size=(VOCABULARY, VOCABULARY)).astype(np.float32)
    return parameters, windows, _tokens(entries), np.zeros(len(entries))


def _on_decoys(ids: np.ndarray, labels: np.ndarray, attention: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same rows with other tokens, which the kit does not look at: counts stay, the gradient goes elsewhere."""
    decoys = ids.copy()
    decoys[attention == 1] = VOCABULARY - DECOYS + np.arange(int(attention.sum()))
    return decoys, np.where(labels == IGNORED, labels, decoys).astype(np.int32)


def _tokens(entries: Sequence[tuple[int, int, int, bool, int, int]]) -> Tokens:
    columns = [np.asarray(column) for column in zip(*entries, strict=True)]
    return Tokens(*columns)
