"""Disjoint splits of a task's problems, decided by what the problem is and a seed, and by nothing else.

Each canonical instance has a number u in [0, 1) that depends on its text and the seed. The splits are consecutive
intervals of u. So no problem is in two splits, equal problems (the same numbers in another order) are always together,
and a problem keeps its split when the space grows, shrinks or is listed in another order: the corpus of a base model
stays apart from everything that is drawn later with the same seed and fractions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar, runtime_checkable


@runtime_checkable
class Canonical(Protocol):
    """Anything that knows which problem it is: an instance of a task, or an `Example`."""

    @property
    def canonical(self) -> str: ...


Item = TypeVar("Item", bound=Canonical)

FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}


def split_by_canonical(
    items: Sequence[Item],
    *,
    seed: int,
    fractions: Mapping[str, float] = FRACTIONS,
    limits: Mapping[str, int] | None = None,
) -> dict[str, list[Item]]:
    """Every item in its split, in the order of its u: the first n of a split are a fair draw of n.

    Args
      items: anything with `canonical`; equal problems may occur more than once.
      fractions: split name -> its share, > 0; the shares sum to at most 1, what is left over belongs to no split.
      limits: split name -> how many items to keep at most (no limit where the name is absent).
    Raises
      shares that do not fit, an unknown name in limits, or a split that comes out empty -> ValueError with the field.
    """
    limits = dict(limits or {})
    _check(fractions, limits)
    splits: dict[str, list[Item]] = {name: [] for name in fractions}
    for position, item in sorted(((split_position(item.canonical, seed), item) for item in items), key=_by_position):
        upper = 0.0
        for name, fraction in fractions.items():
            upper += fraction
            if position < upper:
                splits[name].append(item)
                break
    splits = {name: members[: limits.get(name, len(members))] for name, members in splits.items()}
    for name, members in splits.items():
        if not members:
            raise ValueError(
                f"expected at least one question in the {name} split, got none out of {len(items)} items with "
                f"data.fractions.{name} = {fractions[name]}; raise the "
                f"fraction, raise task.instances or widen the task's space"
            )
    return splits


def split_position(canonical: str, seed: int) -> float:
    """u in [0, 1) of a canonical instance: 52 bits of SHA-256 of the seed and the text."""
    digest = hashlib.sha256(f"{seed}\x00{canonical}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 12) / float(1 << 52)


def _by_position(pair: tuple[float, Canonical]) -> tuple[float, str]:
    return pair[0], pair[1].canonical


def _check(fractions: Mapping[str, float], limits: Mapping[str, int]) -> None:
    for name, fraction in fractions.items():
        if not 0.0 < fraction <= 1.0:
            raise ValueError(f"expected data.fractions.{name} in (0, 1], got {fraction}")
    total = sum(fractions.values())
    if total > 1.0 + 1e-9:
        raise ValueError(f"expected data.fractions to sum to at most 1, got {total}: {dict(fractions)}")
    for name, limit in limits.items():
        if name not in fractions:
            raise ValueError(f"expected limits to name splits of data.fractions, {sorted(fractions)}, got {name!r}")
        if limit < 1:
            raise ValueError(f"expected data.{name}_questions >= 1, got {limit}: a split must not be empty")
