"""The part of a page that is written by a program: between two lines that stay."""

from __future__ import annotations

import os
import pathlib


def expect_page(path: pathlib.Path, markers: tuple[str, str], flag: str = "--docs") -> None:
    """Raises ValueError where a page is not there, cannot be written, or lacks one of the two lines."""
    if not path.is_file() or not os.access(path, os.W_OK):
        raise ValueError(f"expected a page that can be written, got '{path}'; change {flag}.")
    _parts(path.read_text(encoding="utf-8"), path, markers, flag)


def write_between(path: pathlib.Path, markers: tuple[str, str], text: str, flag: str = "--docs") -> None:
    """Puts `text` between the two lines, in place of what was there. Raises as `expect_page`."""
    before, after = _parts(path.read_text(encoding="utf-8"), path, markers, flag)
    half = path.with_name(path.name + ".part")
    half.write_text(f"{before}{markers[0]}\n\n{text.strip()}\n\n{markers[1]}{after}", encoding="utf-8")
    half.replace(path)


def _parts(page: str, path: pathlib.Path, markers: tuple[str, str], flag: str) -> tuple[str, str]:
    first, last = markers
    if page.count(first) != 1 or page.count(last) != 1 or page.index(first) > page.index(last):
        raise ValueError(
            f"expected '{first}' and below it '{last}' once each in '{path}', got no such page; change {flag}."
        )
    return page[: page.index(first)], page[page.index(last) + len(last) :]
