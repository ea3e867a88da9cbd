"""Countdown: combine all of a few numbers with + - * / so that the last result is the target.

A prompt reads `3,7,12=28:`; a completion is a chain of two-operand steps separated by commas, here `12/3=4,7*4=28`. A
step takes two of the values at hand and puts its result in their place; after the last step only the target is left.
Division must be exact, and no value may be negative unless the rules allow it.

Source: the task of Stream of Search (Gandhi et al. 2024, arXiv 2404.03683); here every number must be used, as in the
games that it comes from, and a chain of steps is the whole answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from functools import partial

import numpy as np

from hptjax.records import Example
from hptjax.tasks.countdown_solver import DEFAULT_RULES, Rules, difficulty, random_chain, reachable, solve
from hptjax.tasks.countdown_verifier import OPERATORS, verify, well_formed
from hptjax.tasks.task import Task

SYMBOLS = "0123456789" + OPERATORS + "=,:"
STYLES = ("random", "first")
LEVELS = 3  # of problems with as many numbers, see `difficulty`


@dataclasses.dataclass(frozen=True, order=True)
class Countdown:
    """One instance: `numbers` in ascending order and the target."""

    numbers: tuple[int, ...]
    target: int

    @property
    def canonical(self) -> str:
        """For example `3,7,12=28`."""
        return f"{','.join(map(str, self.numbers))}={self.target}"


def countdown(
    *,
    numbers: int = 3,
    numbers_to: int | None = None,
    low: int = 1,
    high: int = 15,
    target_low: int = 1,
    target_high: int = 60,
    operators: str = OPERATORS,
    negative: bool = False,
    max_value: int = 9999,
    style: str = "random",
    shuffle: bool = True,
    corrupt: float = 0.0,
) -> Task:
    """The countdown task with its knobs chosen.

    Args
      numbers, numbers_to: how many numbers a problem gives: `numbers` to `numbers_to` (the same if None), 2 to 5. Each
        number more adds 3 to the level of a problem.
      low, high: each number lies in low..high. target_low, target_high: the target lies in target_low..target_high.
      operators, negative, max_value: see `Rules`.
      style: "random" takes one of the distinct solutions by seed; "first" the simplest one, so that demonstrations
        share one style (the order of `solve`).
      shuffle: whether a prompt lists its numbers in a random order; ascending if not.
      corrupt: share of demonstrations that miss the target, see `write_examples`; for a base model's corpus.
    Raises
      a knob out of range -> ValueError that names the field.
    """
    _check_knobs(numbers, low, high, target_low, target_high, operators, max_value, style)
    sizes = tuple(range(numbers, (numbers_to or numbers) + 1))
    if not sizes or sizes[-1] > 5:
        raise ValueError(f"expected task.numbers_to in task.numbers..5 ({numbers}..5), got {numbers_to}")
    rules = Rules(operators=operators, negative=negative, max_value=max_value)
    return Task(
        name="countdown",
        symbols=SYMBOLS,
        instances=lambda: [
            instance
            for size in sizes
            for instance in enumerate_instances(size, low, high, target_low, target_high, rules)
        ],
        generate=partial(
            generate,
            numbers=sizes,
            low=low,
            high=high,
            target_low=target_low,
            target_high=target_high,
            rules=rules,
        ),
        write=partial(
            write_examples, style=style, shuffle=shuffle, corrupt=corrupt, rules=rules, fewest_numbers=numbers
        ),
        verify=verify,
        well_formed=well_formed,
    )


def enumerate_instances(
    numbers: int, low: int, high: int, target_low: int, target_high: int, rules: Rules = DEFAULT_RULES
) -> list[Countdown]:
    """Every solvable instance of the space once: multisets in ascending order, then targets in ascending order."""
    memo: dict[tuple[int, ...], np.ndarray] = {}
    found: list[Countdown] = []
    for multiset in itertools.combinations_with_replacement(range(low, high + 1), numbers):
        values = reachable(multiset, rules, memo)
        values = values[(values >= target_low) & (values <= target_high)]
        found.extend(Countdown(multiset, int(target)) for target in values)
    return found


def generate(
    seed: int,
    count: int,
    *,
    numbers: int | Sequence[int],
    low: int,
    high: int,
    target_low: int,
    target_high: int,
    rules: Rules = DEFAULT_RULES,
) -> list[Countdown]:
    """`count` distinct solvable instances: numbers drawn evenly, then a target evenly among those in reach.

    Args
      numbers: how many an instance has; where there are several, one of them is drawn evenly.

    Raises
      a space too small to hold `count` instances (as far as 2000 draws in a row can tell) -> ValueError.
    """
    rng = np.random.default_rng(seed)
    sizes = (numbers,) if isinstance(numbers, int) else tuple(numbers)
    memo: dict[tuple[int, ...], np.ndarray] = {}
    targets: dict[tuple[int, ...], list[int]] = {}  # of the multisets drawn so far
    found: dict[Countdown, None] = {}
    misses = 0
    while len(found) < count:
        size = sizes[0] if len(sizes) == 1 else int(rng.choice(sizes))
        multiset = tuple(sorted(rng.integers(low, high + 1, size=size).tolist()))
        if multiset not in targets:
            values = reachable(multiset, rules, memo)
            targets[multiset] = values[(values >= target_low) & (values <= target_high)].tolist()
        within = targets[multiset]
        instance = Countdown(multiset, within[int(rng.integers(len(within)))]) if within else None
        misses = misses + 1 if instance is None or instance in found else 0
        if misses >= 2000:
            raise ValueError(
                f"expected a countdown space with at least {count} instances, but after {len(found)} no new one was "
                f"found in 2000 draws; widen task.low..task.high ({low}..{high}) or task.target_low..task.target_high "
                f"({target_low}..{target_high}), or lower task.instances"
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
    rules: Rules = DEFAULT_RULES,
    fewest_numbers: int | None = None,
) -> list[Example]:
    """The instances as text. An example depends on its instance and the seed, not on its place or its neighbours.

    Args
      style, shuffle: as in `countdown`.
      corrupt: probability, 0 to 1, that the demonstration is a chain whose arithmetic is right and whose result is
        not the target. For the corpus of a base model that is to know the form better than the search; such
        demonstrations do not verify.
      fewest_numbers: of the task's instances; None: all have as many.
    """
    if style not in STYLES:
        raise ValueError(f"expected task.style to be one of {STYLES}, got {style!r}")
    return [
        _write_example(
            index,
            instance,
            _rng_of(instance, seed),
            style,
            shuffle,
            corrupt,
            rules,
            len(instance.numbers) - (fewest_numbers or len(instance.numbers)),
        )
        for index, instance in enumerate(instances)
    ]


def _write_example(
    index: int,
    instance: Countdown,
    rng: np.random.Generator,
    style: str,
    shuffle: bool,
    corrupt: float,
    rules: Rules,
    more_numbers: int,
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
        level=difficulty(len(solutions)) + LEVELS * more_numbers,
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
