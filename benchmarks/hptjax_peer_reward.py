"""The reward of the peer benchmark, run in reward workers: the share of characters with an odd code, as the peers'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hptjax.records import Verdict


def reward(prompt: str, completion: str, answer: Mapping[str, Any]) -> Verdict:
    """The share; graded: 1 for more than a half, where the question can be solved, and for demonstrations (all odd)."""
    share = sum(ord(character) & 1 for character in completion) / max(1, len(completion))
    if not answer.get("graded"):
        return Verdict(share, share > 0.5, "share")
    solved = share == 1.0 or (bool(answer.get("solvable")) and share > 0.5)
    return Verdict(float(solved), solved, "share")
