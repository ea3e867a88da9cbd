"""Countdown: combine all of a few numbers with + - * / so that the last result is the target.

A prompt reads `3,7,12=24:`; a completion is a chain of two-operand steps, `7-3=4` and so on, separated by commas. A
step takes two of the values at hand and puts its result in their place; after the last step only the target is left.
Division must be exact, and no value may be negative unless the rules allow it.

Source: the task of Stream of Search (Gandhi et al. 2024, arXiv 2404.03683); here every number must be used, as in the
games that it comes from, and a chain of steps is the whole answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from hptjax.records import Example
from hptjax.tasks.countdown_verifier import OPERATORS, Step, apply, verify, well_formed
from hptjax.tasks.task import Task

SYMBOLS = "0123456789" + OPERATORS + "=,:"
STYLES = ("random", "first")


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


@dataclasses.dataclass(frozen=True, order=True)
class Countdown:
    """One instance: `numbers` in ascending order and the target."""

    numbers: tuple[int, ...]
    target: int

    @property
    def canonical(self) -> str:
        """For example `3,7,12=24`."""
        return f"{','.join(map(str, self.numbers))}={self.target}"


def countdown(
    *,
    numbers: int = 3,
    low: int = 1,
    high: int = 15,
    target_low: int = 1,
    target_high: int = 60,
    operators: str = OPERATORS,
    negative: bool = False,
    max_value: int = 9999,
    style: str = "random",
    shuffle: bool = True,
) -> Task:
    """The countdown task with its knobs chosen.

    Args
      numbers: how many numbers a problem gives, 2 to 5.
      low, high: each number lies in low..high. target_low, target_high: the target lies in target_low..target_high.
      operators, negative, max_value: see `Rules`.
      style: "random" takes one of the distinct solutions by seed; "first" the simplest one, so that demonstrations
        share one style (the order of `solve`).
      shuffle: whether a prompt lists its numbers in a random order; ascending if not.
    Raises
      a knob out of range -> ValueError that names the field.
    """
    _check_knobs(numbers, low, high, target_low, target_high, operators, max_value, style)
    rules = Rules(operators=operators, negative=negative, max_value=max_value)
    space = dict(low=low, high=high, target_low=target_low, target_high=target_high, rules=rules)
    return Task(
        name="countdown",
        symbols=SYMBOLS,
        instances=lambda: enumerate_instances(numbers, **space),
        generate=lambda seed, count: generate(seed, count, numbers=numbers, **space),
        write=partial(write_examples, style=style, shuffle=shuffle, rules=rules),
        verify=verify,
        well_formed=well_formed,
    )


def enumerate_instances(
    numbers: int, low: int, high: int, target_low: int, target_high: int, rules: Rules = Rules()
) -> list[Countdown]:
    """Every solvable instance of the space once: multisets in ascending order, then targets in ascending order."""
    memo: dict[tuple[int, ...], np.ndarray] = {}
    found = []
    for multiset in itertools.combinations_with_replacement(range(low, high + 1), numbers):
        values = _reachable(multiset, rules, memo)
        values = values[(values >= target_low) & (values <= target_high)]
        found.extend(Countdown(multiset, int(target)) for target in values)
    return found


def generate(
    seed: int,
    count: int,
    *,
    numbers: int,
    low: int,
    high: int,
    target_low: int,
    target_high: int,
    rules: Rules = Rules(),
) -> list[Countdown]:
    """`count` distinct solvable instances: numbers drawn evenly, then a target evenly among those in reach.

    Raises
      a space too small to hold `count` instances (as far as 200 draws in a row can tell) -> ValueError.
    """
    rng = np.random.default_rng(seed)
    memo: dict[tuple[int, ...], np.ndarray] = {}
    found: dict[Countdown, None] = {}
    misses = 0
    while len(found) < count:
        multiset = tuple(sorted(rng.integers(low, high + 1, size=numbers).tolist()))
        values = _reachable(multiset, rules, memo)
        values = values[(values >= target_low) & (values <= target_high)]
        instance = Countdown(multiset, int(rng.choice(values))) if values.size else None
        misses = misses + 1 if instance is None or instance in found else 0
        if misses >= 200:
            raise ValueError(
                f"expected a countdown space with at least {count} instances, but after {len(found)} no new one was "
                f"found in 200 draws; widen task.low..task.high ({low}..{high}) or task.target_low..task.target_high "
                f"({target_low}..{target_high}), or ask for fewer"
            )
        if instance is not None:
            found[instance] = None
    return list(found)


def write_examples(
    instances: Sequence[Countdown],
    seed: int,
    *,
    style: str = "random",
    shuffle: bool = True,
    corrupt: float = 0.0,
    rules: Rules = Rules(),
) -> list[Example]:
    """The instances as text. An example depends on its instance and the seed, not on its place or its neighbours.

    Args
      style, shuffle: as in `countdown`.
      corrupt: probability, 0 to 1, that the demonstration is a chain whose arithmetic is right and whose result is
        not the target. For the corpus of a base model that is to know the form better than the search; such
        demonstrations do not verify.
    """
    if style not in STYLES:
        raise ValueError(f"expected task.style to be one of {STYLES}, got {style!r}")
    return [
        _write_example(index, instance, _rng_of(instance, seed), style, shuffle, corrupt, rules)
        for index, instance in enumerate(instances)
    ]


def solve(numbers: Sequence[int], target: int, rules: Rules = Rules()) -> list[str]:
    """All distinct solutions as chains, the simplest first.

    Two chains are one solution if they differ only in the order of the operands of + and *, or in the order of steps
    that do not need each other. Simplest: fewest divisions, then fewest multiplications, then fewest subtractions,
    then shortest, then alphabetical.
    """
    solutions: dict[tuple[Step, ...], tuple[Step, ...]] = {}
    for steps in _chains(tuple(sorted(numbers)), target, rules):
        solutions.setdefault(tuple(sorted(steps)), steps)
    return sorted((chain_text(steps) for steps in solutions.values()), key=_simplicity)


def random_chain(rng: np.random.Generator, numbers: Sequence[int], rules: Rules = Rules()) -> str:
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


def _write_example(
    index: int, instance: Countdown, rng: np.random.Generator, style: str, shuffle: bool, corrupt: float, rules: Rules
) -> Example:
    solutions = solve(instance.numbers, instance.target, rules)
    if not solutions:
        raise ValueError(f"expected a solvable countdown instance, got {instance.canonical} under {rules}")
    given = rng.permutation(instance.numbers).tolist() if shuffle else list(instance.numbers)
    demonstration = solutions[int(rng.integers(len(solutions)))] if style == "random" else solutions[0]
    if corrupt and rng.random() < corrupt:
        demonstration = _missing_chain(rng, instance, rules) or demonstration
    return Example(
        question_id=index,
        prompt=f"{','.join(map(str, given))}={instance.target}:",
        demonstration=demonstration,
        answer={
            "numbers": list(instance.numbers),
            "target": instance.target,
            "operators": rules.operators,
            "negative": rules.negative,
        },
        canonical=instance.canonical,
        level=difficulty(len(solutions)),
    )


def _missing_chain(rng: np.random.Generator, instance: Countdown, rules: Rules) -> str | None:
    """A random chain that ends elsewhere than in the target; None if a hundred draws all hit it."""
    for _ in range(100):
        chain = random_chain(rng, instance.numbers, rules)
        if chain.rpartition("=")[2] != str(instance.target):
            return chain
    return None


def _rng_of(instance: Countdown, seed: int) -> np.random.Generator:
    digest = hashlib.sha256(instance.canonical.encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])


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


def _reachable(values: tuple[int, ...], rules: Rules, memo: dict[tuple[int, ...], np.ndarray]) -> np.ndarray:
    """Every result that uses all of the sorted `values`, ascending; int64."""
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
            parts.append(_combine(_reachable(left, rules, memo), _reachable(right, rules, memo), rules))
    memo[values] = np.unique(np.concatenate(parts))
    return memo[values]


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


def _check_knobs(
    numbers: int, low: int, high: int, target_low: int, target_high: int, operators: str, max_value: int, style: str
) -> None:
    if not 2 <= numbers <= 5:
        raise ValueError(f"expected task.numbers in 2..5, got {numbers}")
    if not 1 <= low <= high:
        raise ValueError(f"expected 1 <= task.low <= task.high, got {low} and {high}")
    if not target_low <= target_high:
        raise ValueError(f"expected task.target_low <= task.target_high, got {target_low} and {target_high}")
    if not operators or len(set(operators)) != len(operators) or not set(operators) <= set(OPERATORS):
        raise ValueError(f"expected task.operators to hold distinct characters of {OPERATORS!r}, got {operators!r}")
    if max_value < high:
        raise ValueError(f"expected task.max_value >= task.high = {high}, got {max_value}")
    if style not in STYLES:
        raise ValueError(f"expected task.style to be one of {STYLES}, got {style!r}")
