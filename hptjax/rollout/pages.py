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
    """One page to fill: the block of a prefilled row, and the page that takes it, counted over the whole cache."""

    row: int
    block: int
    page: int


class OwnRows:
    """A row of the whole capacity for each slot, as many as there are slots."""

    def part(self, slot: int) -> int:
        """As `SharedPages.part`: there is but one."""
        return 0

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
    """Pages of one size. Those that a prompt fills are shared by all samples of it, the one it ends in is copied.

    Where slots and pages are cut over devices, a slot takes pages of its own share, and so do prompts.
    """

    def __init__(self, shape: DecodeShape) -> None:
        self._size, self._share = shape.cache_page, shape.pages // shape.cache_parts
        self._slots_of_part = shape.slots // shape.cache_parts
        self._free = [list(range(self._share - 1, -1, -1)) for _ in range(shape.cache_parts)]
        self._users = np.zeros((shape.cache_parts, self._share), np.int64)
        self._of_slot: list[list[int]] = [[] for _ in range(shape.slots)]
        self._of_row: dict[tuple[int, int], list[int]] = {}  # the pages that a context fills, by part and row
        self._table = np.full((shape.slots, shape.pages_per_slot), self._share, np.int32)

    def part(self, slot: int) -> int:
        """The share that the slot's pages are taken from."""
        return slot // self._slots_of_part

    def enter(self, slot: int, row: int, context_tokens: int) -> list[Copy] | None:
        """What to copy so that the slot has the context that stands in a prefilled row; None where there is no room.

        Rows are entered one after the other: what an earlier one keeps for samples still to come is free again.
        """
        # the context's last token is decoded again and enters its page, so that page is never shared
        full, part = (context_tokens - 1) // self._size, self.part(slot)
        self.forget_rows(but=row)
        known = self._of_row.get((part, row))
        first = part * self._slots_of_part
        busy = sum(map(bool, self._of_slot[first : first + self._slots_of_part]))  # may soon want one more each
        if len(self._free[part]) < (0 if known is not None else full) + 1 + busy:
            return None
        blocks = []
        if known is None:
            known = self._of_row[part, row] = [self._take(part) for _ in range(full)]
            blocks = list(enumerate(known))
        self._users[part, known] += 1
        self._give(slot, known)
        own = self._take(part)
        self._give(slot, [own])
        return [Copy(row, block, part * self._share + page) for block, page in [*blocks, (full, own)]]

    def cover(self, slot: int, positions: int) -> bool:
        """Whether the slot now has room for so many positions; it keeps what it was given on the way."""
        part = self.part(slot)
        while len(self._of_slot[slot]) * self._size < positions:
            if not self._free[part]:
                return False
            self._give(slot, [self._take(part)])
        return True

    def leave(self, slot: int) -> None:
        """What the slot had is free again, but for what others share."""
        self._drop(self.part(slot), self._of_slot[slot])
        self._of_slot[slot] = []
        self._table[slot] = self._share

    def forget_rows(self, *, but: int | None = None) -> None:
        """Rows mean other contexts from now on, or all but one have no samples to come."""
        for part, row in [known for known in self._of_row if known[1] != but]:
            self._drop(part, self._of_row.pop((part, row)))

    def table(self) -> Int32[np.ndarray, "S M"]:
        """The page of each slot's m-th block, counted within its share; past the last page where it has none."""
        return self._table.copy()  # a call that is on its way may still read it

    def _take(self, part: int) -> int:
        page = self._free[part].pop()
        self._users[part, page] = 1
        return page

    def _give(self, slot: int, pages: Sequence[int]) -> None:
        start = len(self._of_slot[slot])
        self._of_slot[slot] += pages
        self._table[slot, start : start + len(pages)] = pages

    def _drop(self, part: int, pages: Sequence[int]) -> None:
        self._users[part, pages] -= 1
        self._free[part] += [page for page in pages if self._users[part, page] == 0]


def make_room(shape: DecodeShape) -> OwnRows | SharedPages:
    """The cache of a decode shape with nobody in it."""
    return OwnRows() if shape.cache_positions is None else SharedPages(shape)
