"""Evidence in words: which micro-batches, with which weights."""

from __future__ import annotations

import numpy as np

from hptjax.audit.decode import LOOSE, Explanation, WindowTokens
from hptjax.audit.problems import Problem, digit_base
from hptjax.audit.read import Reading


def numbers(values: tuple[int, ...] | list[int]) -> str:
    """Sorted whole numbers as text, runs joined: 1, 3-5.

    Example
      >>> numbers([5, 1, 4, 3])
      '1, 3-5'
    """
    runs: list[list[int]] = []
    for value in sorted(set(values)):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def micro_batches_text(values: tuple[int, ...] | list[int], k: int) -> str:
    """Which of a window's micro-batches, in words."""
    noun = "micro-batch" if len(set(values)) == 1 else "micro-batches"
    return f"{noun} {numbers(values)} of {k} (counted from 0)"


def blame_text(
    problem: Problem, reading: Reading, explanation: Explanation, window: WindowTokens, blamed: tuple[int, ...], s: int
) -> str:
    """How often the blamed micro-batches were added, with the digits of the shared sum as a second witness."""
    k = window.k
    counts = sorted({times for (i, _), times in explanation.times.items() if i in blamed and times != 1})
    text = f"{micro_batches_text(blamed, k)}: weight {' or '.join(map(str, counts))} instead of 1"
    ranks = sorted({rank for (i, rank), times in explanation.times.items() if i in blamed and times != 1 and rank >= 0})
    if ranks:
        text += f", on rank {numbers(ranks)}"
    total = reading.shared * problem.live_tokens(s) / explanation.factor / digit_base(k)
    if problem.digits and explanation.base == "token_mean" and abs(total - round(total)) < 1e-3:
        base = digit_base(k)
        digits = [round(total) // base**i % base for i in range(k)]
        text += f"; the shared sum is {round(total)}, in base {base} from the first: {' '.join(map(str, digits))}"
    return text


def weights_text(window: WindowTokens) -> str:
    """The weight of a token of every micro-batch."""
    parts = []
    for i in np.unique(window.micro_batch):
        here = window.micro_batch == i
        low, high = window.ratio[here].min(), window.ratio[here].max()
        weight = f"{low:.3g}" if high - low <= LOOSE * abs(high) else f"{low:.3g}-{high:.3g}"
        parts.append(f"{weight} ({int(here.sum())} tokens)")
    return f"weight of a token by micro-batch, 1 is right: {', '.join(parts)}"
