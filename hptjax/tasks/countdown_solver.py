"""Countdown's solver: every solution of an instance, every target in reach, and chains that wander."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from hptjax.tasks.countdown_verifier import OPERATORS, Step, apply


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which steps are allowed.

    Args
      operators: a subset of "+-*/".
      negative: whether a value may be negative.
      max_value: no value of a demonstration exceeds it in size, so completions stay short. The verifier does not ask.
    """

    operators: str = OPERATORS
    negative: bool = False
    max_value: int = 9999


DEFAULT_RULES = Rules()


def solve(numbers: Sequence[int], target: int, rules: Rules = DEFAULT_RULES) -> list[str]:
    """All distinct solutions as chains, the simplest first.

    Two chains are one solution if they differ only in the order of the operands of + and *, or in the order of steps
    that do not need each other. Simplest: fewest divisions, then fewest multiplications, then fewest subtractions,
    then shortest, then alphabetical.
    """
    solutions: dict[tuple[Step, ...], tuple[Step, ...]] = {}
    for steps in _chains(tuple(sorted(numbers)), target, rules):
        solutions.setdefault(tuple(sorted(steps)), steps)
    return sorted((chain_text(steps) for steps in solutions.values()), key=_simplicity)


def reachable(values: tuple[int, ...], rules: Rules, memo: dict[tuple[int, ...], np.ndarray]) -> np.ndarray:
    """Every result that uses all of the sorted `values`, ascending; int64.

    Args
      memo: results by values, filled in as they are found; share it between calls under the same rules.
    """
    if len(values) == 1:
        return np.asarray(values, np.int64)
    if values in memo:
        return memo[values]
    indices = range(1, len(values))
    parts = []
    for size in range(len(values) - 1):
        for with_first in itertools.combinations(indices, size):
            left = tuple(values[i] for i in (0, *with_first))
            right = tuple(values[i] for i in indices if i not in with_first)
            parts.append(_combine(reachable(left, rules, memo), reachable(right, rules, memo), rules))
    memo[values] = np.unique(np.concatenate(parts))
    return memo[values]


def random_chain(rng: np.random.Generator, numbers: Sequence[int], rules: Rules = DEFAULT_RULES) -> str:
    """A chain that uses all of the numbers by random legal steps: right in form and arithmetic, wherever it ends.

    Raises
      two values on which the rules allow no step (possible only without `-`) -> ValueError.
    """
    values = list(numbers)
    steps = []
    while len(values) > 1:
        chosen = sorted(rng.choice(len(values), size=2, replace=False).tolist(), reverse=True)
        pair = [values.pop(index) for index in chosen]
        legal = list(_legal_steps(max(pair), min(pair), rules))
        if not legal:
            raise ValueError(
                f"no step on {pair} stays within task.operators {rules.operators!r} and task.max_value "
                f"{rules.max_value}; raise task.max_value or allow '-'"
            )
        step = legal[int(rng.integers(len(legal)))]
        steps.append(step)
        values.append(step[3])
    return chain_text(steps)


def difficulty(solution_count: int) -> int:
    """Level of an instance by its number of distinct solutions: 0 with five or more, 1 with two to four, 2 with one."""
    return 0 if solution_count >= 5 else 1 if solution_count >= 2 else 2


def chain_text(steps: Sequence[Step]) -> str:
    """The steps as a completion, such as `7-3=4,4*6=24`."""
    return ",".join(f"{left}{operator}{right}={result}" for left, operator, right, result in steps)


def _simplicity(chain: str) -> tuple[int, int, int, int, str]:
    return chain.count("/"), chain.count("*"), chain.count("-"), len(chain), chain


def _legal_steps(large: int, small: int, rules: Rules) -> Iterator[Step]:
    """Every legal step on two values, `large >= small`; operands of + and * in one order only."""
    for operator in rules.operators:
        orders = ((large, small),) if operator in "+*" or large == small else ((large, small), (small, large))
        for left, right in orders:
            result = apply(left, operator, right)
            if result is None or abs(result) > rules.max_value or (result < 0 and not rules.negative):
                continue
            yield left, operator, right, result


def _chains(values: tuple[int, ...], target: int, rules: Rules) -> Iterator[tuple[Step, ...]]:
    """Every chain from the sorted `values` to the target, some solutions more than once."""
    if len(values) == 1:
        if values[0] == target:
            yield ()
        return
    taken: set[tuple[int, int]] = set()
    for first, second in itertools.combinations(range(len(values)), 2):
        if (values[first], values[second]) in taken:
            continue
        taken.add((values[first], values[second]))
        rest = values[:first] + values[first + 1 : second] + values[second + 1 :]
        for step in _legal_steps(values[second], values[first], rules):
            if not rest:
                if step[3] == target:
                    yield (step,)
                continue
            for tail in _chains(tuple(sorted((*rest, step[3]))), target, rules):
                yield (step, *tail)


def _combine(left: np.ndarray, right: np.ndarray, rules: Rules) -> np.ndarray:
    """Every legal result of one step with one operand from each side; the order of the sides does not matter."""
    a, b = (grid.ravel() for grid in np.meshgrid(left, right, indexing="ij"))
    results = []
    if "+" in rules.operators:
        results.append(a + b)
    if "-" in rules.operators:
        results += [a - b, b - a]
    if "*" in rules.operators:
        results.append(a * b)
    if "/" in rules.operators:
        for upper, lower in ((a, b), (b, a)):
            exact = lower != 0
            exact[exact] = upper[exact] % lower[exact] == 0
            results.append(upper[exact] // lower[exact])
    values = np.concatenate(results)
    lowest = -rules.max_value if rules.negative else 0
    return values[(values >= lowest) & (values <= rules.max_value)]
