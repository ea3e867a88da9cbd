"""What a reward function is to the pool: how a worker finds it, and what its replies may be."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

from hptjax.records import Grade, RewardFunction, Verdict, verdict_from_json

_PATH = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclasses.dataclass(frozen=True)
class UserReward:
    """A reward of the user's own, `module:function`: (prompt, completion, answer) -> float or Verdict.

    Only workers import it. `answer` is the mapping that the example holds, {"answer": gold text} for data sets with
    answers. A float counts as solved from 1 upwards, and its verdict's reason is "scored".
    """

    path: str

    def __post_init__(self) -> None:
        if not _PATH.fullmatch(self.path) or ".py:" in self.path:
            raise ValueError(
                f"expected module:function in reward.functions, such as my_rewards:length, got {self.path!r}"
            )


def import_path(function: RewardFunction | UserReward) -> str:
    """`module:name` of a module-level function, by which a worker imports it.

    Raises
      anything that another process cannot import by name -> ValueError.
    """
    if isinstance(function, UserReward):
        return function.path
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    found = getattr(sys.modules.get(module or ""), name or "", None)
    if not module or not name or module == "__main__" or found is not function:
        raise ValueError(
            f"expected reward.functions to name functions defined at the top level of an importable module, because a "
            f"reward runs in another process, which imports it by name; got {function!r} ({module}:{name}). A lambda, "
            f"a closure, a method, a partial or a function of a script or notebook cell cannot be used: move it into "
            f"a module"
        )
    return f"{module}:{name}"


def verdict_of(reply: Mapping[str, Any]) -> Verdict:
    """The verdict in a worker's reply, checked once more, since the process that wrote it ran foreign code."""
    if "raised" in reply:
        return raised(str(reply["raised"]))
    try:
        verdict = verdict_from_json(reply["verdict"])
    except (KeyError, TypeError, ValueError):
        return raised("TypeError")
    types = [type(field) for field in (verdict.reward, verdict.solved, verdict.reason)]
    if types != [float, bool, str] or not math.isfinite(verdict.reward) or not all(map(_is_grade, verdict.grades)):
        return raised("TypeError")
    return verdict


def _is_grade(grade: Grade) -> bool:
    texts = (grade.policy, grade.reason, grade.status)
    optional = (grade.extracted, grade.canonical)
    return (
        type(grade.correct) is bool
        and all(isinstance(text, str) for text in texts)
        and all(text is None or isinstance(text, str) for text in optional)
    )


def raised(name: str) -> Verdict:
    """The verdict of a function that raised, by the exception's name."""
    return Verdict(0.0, False, f"raised: {name[:100]}")


def cannot_load(path: str, why: str) -> str:
    """The message for a function that no worker can import."""
    return f"expected reward.functions to name functions that a worker can import, got {path}: {why}"
