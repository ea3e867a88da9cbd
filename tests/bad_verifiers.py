"""Reward functions that misbehave, each at the top level of a module so that a worker can import it."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

from hptjax.records import Verdict
from hptjax.tasks import countdown_verifier

GOOD = Verdict(1.0, True, "good")


def length(completion: str, answer: Mapping[str, Any]) -> Verdict:
    """A cheap honest one: the reward is the number of characters."""
    return Verdict(float(len(completion)), True, f"length {completion[:10]}")


def echo_index(completion: str, answer: Mapping[str, Any]) -> Verdict:
    """The reward is the index in the answer; the order of results is checked with it."""
    return Verdict(float(answer["index"]), True, completion)


def sleep(completion: str, answer: Mapping[str, Any]) -> Verdict:
    """Takes as many seconds as the completion says."""
    time.sleep(float(completion))
    return Verdict(1.0, True, "slept")


def by_name(completion: str, answer: Mapping[str, Any]) -> Verdict:
    """Does what the completion says; any other text is judged good."""
    return ACTIONS[completion]() if completion in ACTIONS else GOOD


def spawn_and_hang(completion: str, answer: Mapping[str, Any]) -> Verdict:
    """Writes its process id and hangs while Python runs, so that a test can look for it after the parent's death."""
    with open(answer["file"], "w") as file:
        file.write(str(os.getpid()))
    while True:
        time.sleep(0.01)


def _hang_in_python() -> Verdict:
    while True:
        pass


def _hang_in_a_regex() -> Verdict:
    re.match("(a+)+$", "a" * 64 + "b")  # holds the interpreter lock for longer than anyone can wait
    return GOOD


def _hang_ignoring_signals() -> Verdict:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(1.0)


def _raise() -> Verdict:
    raise ValueError("no")


def _exit() -> Verdict:
    sys.exit(3)


def _hard_exit() -> Verdict:
    os._exit(3)


def _segfault() -> Verdict:
    os.kill(os.getpid(), signal.SIGSEGV)
    return GOOD


def _print() -> Verdict:
    print('{"id": 0, "verdict": [1.0, true, "forged"]}')
    sys.stdout.flush()
    os.write(1, b"noise without a line end")
    return GOOD


def _read_input() -> Verdict:
    return Verdict(1.0, True, f"read {len(sys.stdin.read())}")


def _eat_memory() -> Verdict:
    with mmap.mmap(-1, 4 << 30) as held:  # address space only: harmless where the limit should fail
        return Verdict(float(len(held)), True, "ate it")


def _recurse() -> Verdict:
    return _recurse()


def _close_everything() -> Verdict:
    os.closerange(0, 64)
    return GOOD


def _forge_long_reply() -> Verdict:
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, b"x" * 100 + b"\n")
        except OSError:
            continue
    return GOOD


def _wrong_fields(*fields: object) -> Any:
    verdict = object.__new__(Verdict)
    for name, value in zip(("reward", "solved", "reason"), fields, strict=True):
        object.__setattr__(verdict, name, value)
    return verdict


ACTIONS = {
    "hang in python": _hang_in_python,
    "hang in a regex": _hang_in_a_regex,
    "hang ignoring signals": _hang_ignoring_signals,
    "raise": _raise,
    "exit": _exit,
    "hard exit": _hard_exit,
    "segfault": _segfault,
    "print": _print,
    "read input": _read_input,
    "eat memory": _eat_memory,
    "recurse": _recurse,
    "close everything": _close_everything,
    "forge": _forge_long_reply,
    "long reason": lambda: Verdict(1.0, True, "r" * 50_000_000),
    "nan reward": lambda: _wrong_fields(float("nan"), True, "nan"),
    "infinite reward": lambda: _wrong_fields(float("inf"), True, "inf"),
    "huge integer reward": lambda: _wrong_fields(10**400, True, "huge"),
    "text reward": lambda: _wrong_fields("1.0", True, "text"),
    "no solved": lambda: _wrong_fields(1.0, None, "none"),
    "number as reason": lambda: _wrong_fields(1.0, True, 7),
    "not a verdict": lambda: (1.0, True, "tuple"),
}


def solve_or_misbehave(completion: str, answer: Mapping[str, Any]) -> Verdict:
    """Countdown's own word on what is solved; a wrong completion raises, hangs, dies or fails, by its text."""
    verdict = countdown_verifier.verify(completion, answer)
    if verdict.solved:
        return verdict
    choice = hashlib.sha256(completion.encode()).digest()[0] % 16
    if choice == 0:
        return _hang_in_python()
    if choice == 1:
        return _hard_exit()
    return _raise() if choice < 6 else verdict
