"""Rewards such as a user writes: (prompt, completion, answer) -> float or Verdict, at the top level of a module."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import numpy as np

from hptjax.records import Grade, Verdict

VALUES: dict[str, Any] = {
    "one": 1,
    "half": 0.5,
    "minus": -1.0,
    "true": True,
    "float32": np.float32(0.25),
    "bool_": np.bool_(True),
    "nan": float("nan"),
    "inf": float("inf"),
    "huge": 10**400,
    "text": "1.0",
    "none": None,
    "complex": 1j,
    "decimal": Decimal(1),
    "list": [1.0],
    "array": np.ones(1),
    "verdict": Verdict(0.5, True, "mine"),
    "graded": Verdict(0.5, True, "mine", (Grade("mine", True, "exact", "ok", "5", "5"),)),
    "nan verdict": Verdict(float("nan"), True, "mine"),
    "false grades": Verdict(0.5, True, "mine", ("no grade",)),  # type: ignore[arg-type]
    "false grade": Verdict(0.5, True, "mine", (Grade("mine", "yes", "exact", "ok"),)),  # type: ignore[arg-type]
}


def by_name(prompt: str, completion: str, answer: Mapping[str, Any]) -> Any:
    """Returns the value that the completion names."""
    return VALUES[completion]


def echo(prompt: str, completion: str, answer: Mapping[str, Any]) -> float:
    """1 if the three arguments are what the test sent."""
    return float((prompt, completion, answer["answer"]) == (f"p{completion}", completion, completion))


def ends_like_its_prompt(prompt: str, completion: str, answer: Mapping[str, Any]) -> bool:
    """Whether the completion asks back, under a prompt that a template has written out."""
    return "[turn]user\nWhat is" in prompt and completion.startswith("What is")


def hang(prompt: str, completion: str, answer: Mapping[str, Any]) -> float:
    """Never comes back."""
    while True:
        pass


def two_arguments(completion: str, answer: Mapping[str, Any]) -> float:
    """Not the signature of a user's reward."""
    return 1.0


async def later(prompt: str, completion: str, answer: Mapping[str, Any]) -> float:
    """A coroutine and no number."""
    return 1.0


def several(prompt: str, completion: str, answer: Mapping[str, Any]) -> Any:
    """A generator and no number."""
    yield 1.0


class Judge:
    """A class: calling it gives an instance and no number."""

    def __init__(self, prompt: str, completion: str, answer: Mapping[str, Any]):
        self.reward = 1.0


not_a_function = 3
