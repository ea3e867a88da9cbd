"""Every identity of the methods' spec and every UPGE property of HPT's spec is a test by its number."""

from __future__ import annotations

import ast
import pathlib
import re

TESTS = pathlib.Path(__file__).resolve().parent
IDENTITIES = range(1, 34)  # `spec/methods.md` 11
PROPERTIES = range(1, 12)  # `spec/hpt.md` 6, UPGE


def numbers(pattern: str, *folders: str) -> set[int]:
    """The numbers in the names of the test functions under these folders; slow and fast."""
    found = set()
    for folder in folders:
        for path in (TESTS / folder).rglob("test_*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                    found |= {int(number) for number in re.findall(pattern + r"_(\d\d)(?!\d)", node.name)}
    return found


def test_every_identity_of_the_methods_is_a_test():
    assert sorted(set(IDENTITIES) - numbers("identity", "losses", "hpt")) == []


def test_every_property_of_upge_is_a_test():
    assert sorted(set(PROPERTIES) - numbers("property", ".")) == []
