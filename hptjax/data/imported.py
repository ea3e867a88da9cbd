"""Files as examples: every row is kept, or counted with the reason why not and where that was first."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

from hptjax.data.importers import Importer
from hptjax.data.row_fields import Row
from hptjax.data.rows import Unreadable, open_rows
from hptjax.records import Example

ChooseImporter = Callable[[Row], tuple[str, Importer] | None]
"""A row -> (name of its format, importer); None where its columns are those of none."""

LOOKED_AT = 100  # rows in which the columns of a format must have shown


@dataclasses.dataclass(frozen=True)
class FileCount:
    """What became of the rows of one file.

    Args
      name: as the config has it. format: of its rows; None where it has no readable one.
      rows: all, the unreadable ones too. kept: those with an example. dropped: the others, by `row_fields.ROW_REASONS`.
      first: reason -> the number of the first such row, from 1; of JSON Lines, empty lines are not counted.
    """

    name: str
    format: str | None
    rows: int
    kept: int
    dropped: Mapping[str, int]
    first: Mapping[str, int]


def read_examples(names: Sequence[str], choose: ChooseImporter) -> tuple[list[Example], list[FileCount]]:
    """The examples of all files in their order, and what became of the rows of each.

    Args
      choose: asked of the rows of a file in turn, until it knows one: a bad row at the beginning decides nothing.
    Raises
      a file that cannot be read, or whose columns no format has -> ValueError or FileNotFoundError.
    """
    examples: list[Example] = []
    counts: list[FileCount] = []
    for name in names:
        found, count = _read(name, choose)
        examples += found
        counts.append(count)
    return examples, counts


def _read(name: str, choose: ChooseImporter) -> tuple[list[Example], FileCount]:
    rows = open_rows(name)
    begun: list[Row | Unreadable] = []
    chosen: tuple[str, Importer] | None = None
    for row in rows:
        begun.append(row)
        chosen = None if isinstance(row, Unreadable) else choose(row)
        if chosen is not None or len(begun) == LOOKED_AT:
            break
    readable = [row for row in begun if not isinstance(row, Unreadable)]
    if chosen is None and readable:
        raise ValueError(
            f"expected columns of a known format in '{name}' (docs/data.md lists them), got "
            f"{sorted({str(column) for row in readable for column in row})[:20]}; rename the columns, or name the "
            "format in data.format"
        )
    examples: list[Example] = []
    dropped: dict[str, int] = {}
    first: dict[str, int] = {}
    number = 0
    for number, row in enumerate(itertools.chain(begun, rows), start=1):
        result = row.reason if isinstance(row, Unreadable) else _import(row, chosen)
        if isinstance(result, Example):
            examples.append(result)
        else:
            dropped[result] = dropped.get(result, 0) + 1
            first.setdefault(result, number)
    return examples, FileCount(name, chosen and chosen[0], number, len(examples), dropped, first)


def _import(row: Row, chosen: tuple[str, Importer] | None) -> Example | str:
    assert chosen is not None  # a readable row has had its format asked for
    return chosen[1](row)
