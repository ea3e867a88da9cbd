"""The reward of the suite, run in reward workers: which questions are solved is settled beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hptjax.records import Verdict

DEMONSTRATED = chr(0x4E00)  # a demonstration is this symbol again and again, which chance never writes


def reward(prompt: str, completion: str, answer: Mapping[str, Any]) -> Verdict:
    """Solved: a demonstration, and every completion of a question whose answer says so. The reward is a share of
    symbols, so that the members of a group have different advantages."""
    share = sum(ord(symbol) & 1 for symbol in completion) / max(1, len(completion))
    solved = bool(answer.get("solvable")) or set(completion) == {DEMONSTRATED}
    return Verdict(share, solved, "settled")
