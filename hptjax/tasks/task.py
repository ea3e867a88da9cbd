"""What a task is: problems with demonstrations, and functions that judge a completion. Pure Python, no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from hptjax.records import Example, RewardFunction


@runtime_checkable
class Instance(Protocol):
    """A problem before it is written down: all that a split needs to know of it."""

    @property
    def canonical(self) -> str:
        """Equal for two instances that are the same problem."""
        ...


@dataclasses.dataclass(frozen=True)
class Task:
    """One family of problems, with its knobs already chosen.

    Args
      name: as the config names it.
      symbols: every character that a prompt or a completion can hold; a character tokenizer is made of them.
      instances: () -> every instance of the space once, in a fixed order; for spaces small enough to enumerate.
      generate: (seed, count) -> `count` distinct instances drawn from the space, which need not be enumerable.
      write: (instances, seed) -> their examples. The text of an example depends on its instance and the seed alone,
        not on its neighbours; question ids count from 0 in the given order.
      verify: the reward that decides whether an example is solved.
      well_formed: a reward for the form of the completion alone.
    """

    name: str
    symbols: str
    instances: Callable[[], Sequence[Instance]]
    generate: Callable[[int, int], Sequence[Instance]]
    write: Callable[[Sequence[Any], int], list[Example]]
    verify: RewardFunction
    well_formed: RewardFunction
