"""Who has which part of the KV cache: a whole row for each slot, or pages that slots take as their samples grow.

Host side; everything here follows from requests and from what all processes read alike. Which pages a sample has is
copied and read through, never computed with, so it changes no bit of the sample.

Dims: S slots, M pages that a slot may have, N pages of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from hptjax.rollout.requests import DecodeShape


class Copy(NamedTuple):
    """One page to fill: the block of a prefilled row, and the page (of the cache) that takes it."""

    row: int
    block: int
    page: int


class OwnRows:
    """A row of the whole capacity for each slot, as many as there are slots."""

    def enter(self, slot: int, row: int, context_tokens: int) -> list[Copy]:
        """As `SharedPages.enter`: the whole row."""
        return [Copy(row, 0, slot)]

    def cover(self, slot: int, positions: int) -> bool:
        """As `SharedPages.cover`: always."""
        return True

    def leave(self, slot: int) -> None:
        """As `SharedPages.leave`: nothing to do."""

    def forget_rows(self) -> None:
        """As `SharedPages.forget_rows`: nothing to do."""

    def table(self) -> None:
        """None: the slots' own rows are meant."""


class SharedPages:
    """Pages of one size. Those that a prompt fills are shared by all samples of it, the one it ends in is copied."""

    def __init__(self, shape: DecodeShape) -> None:
        self._size, self._count = shape.cache_page, shape.pages
        self._free = list(range(self._count - 1, -1, -1))
        self._users = np.zeros(self._count, np.int64)
        self._of_slot: list[list[int]] = [[] for _ in range(shape.slots)]
        self._of_row: dict[int, list[int]] = {}  # the pages that a context fills
        self._table = np.full((shape.slots, shape.pages_per_slot), self._count, np.int32)

    def enter(self, slot: int, row: int, context_tokens: int) -> list[Copy] | None:
        """What to copy so that the slot has the context that stands in a prefilled row; None where there is no room."""
        # the context's last token is decoded again and enters its page, so that page is never shared
        full = (context_tokens - 1) // self._size
        known = self._of_row.get(row)
        busy = sum(map(bool, self._of_slot))
        if len(self._free) < (0 if known is not None else full) + 1 + busy:  # the others may soon want one more each
            return None
        copies = []
        if known is None:
            known = self._of_row[row] = [self._take() for _ in range(full)]
            copies = [Copy(row, block, page) for block, page in enumerate(known)]
        self._users[known] += 1
        self._give(slot, known)
        own = self._take()
        self._give(slot, [own])
        return [*copies, Copy(row, full, own)]

    def cover(self, slot: int, positions: int) -> bool:
        """Whether the slot now has room for so many positions; it keeps what it was given on the way."""
        while len(self._of_slot[slot]) * self._size < positions:
            if not self._free:
                return False
            self._give(slot, [self._take()])
        return True

    def leave(self, slot: int) -> None:
        """What the slot had is free again, but for what others share."""
        self._drop(self._of_slot[slot])
        self._of_slot[slot] = []
        self._table[slot] = self._count

    def forget_rows(self) -> None:
        """Rows mean other contexts from now on."""
        for pages in self._of_row.values():
            self._drop(pages)
        self._of_row = {}

    def table(self) -> Int32[np.ndarray, "S M"]:
        """The page of each slot's m-th block, N where it has none."""
        return self._table.copy()  # a call that is on its way may still read it

    def _take(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _give(self, slot: int, pages: Sequence[int]) -> None:
        start = len(self._of_slot[slot])
        self._of_slot[slot] += pages
        self._table[slot, start : start + len(pages)] = pages

    def _drop(self, pages: Sequence[int]) -> None:
        self._users[pages] -= 1
        self._free += [page for page in pages if self._users[page] == 0]


def make_room(shape: DecodeShape) -> OwnRows | SharedPages:
    """The cache of a decode shape with nobody in it."""
    return OwnRows() if shape.cache_positions is None else SharedPages(shape)
