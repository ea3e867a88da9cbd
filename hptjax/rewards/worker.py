"""The process that runs reward functions: `python -m hptjax.rewards.worker`, JSON lines in, JSON lines out.

It trusts nothing that it runs. The functions' standard input is empty and their standard output is standard error, so
the protocol has its two pipes to itself. Whatever a function raises becomes a reply. The process ends with its parent:
at the end of its input, by a thread that watches the parent, and, where a function keeps the interpreter lock, by a
limit on CPU time per request.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import numbers
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from hptjax.records import Verdict

MAX_REASON = 200  # characters of a verdict's reason that travel back


def main(arguments: list[str]) -> None:
    """Answers requests until the input ends. `arguments`: the parent's process id, deadline in s, memory in bytes."""
    parent, deadline_s, memory_bytes = int(arguments[0]), float(arguments[1]), int(arguments[2])
    requests, replies = _take_pipes()
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # not every system limits address space; the deadline still holds
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    functions: dict[str, Callable[..., Any]] = {}
    for line in requests:
        request = json.loads(line)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, request.get("limit_s", deadline_s) * 2.0 + 1.0)
        reply = _load(request, functions) if "load" in request else _judge(request, functions)
        _write(replies, json.dumps({"id": request["id"], **reply}).encode() + b"\n")


def _take_pipes() -> tuple[Any, int]:
    """The protocol's two pipes, moved out of reach of `input` and `print`."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _load(request: dict[str, Any], functions: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    """Imports a function by its path; the parent's import path comes with the request."""
    path = request["load"]
    sys.path.extend(entry for entry in request["sys_path"] if entry not in sys.path)
    module, _, name = path.partition(":")
    try:
        functions[path] = getattr(importlib.import_module(module), name)
    except BaseException as error:
        return {"failed": f"{type(error).__name__}: {error}"[:MAX_REASON]}
    return {"loaded": path}


def _judge(request: dict[str, Any], functions: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    try:
        return {"verdict": _checked(functions[request["function"]](request["completion"], request["answer"]))}
    except BaseException as error:
        return {"raised": type(error).__name__[:MAX_REASON]}


def _checked(verdict: object) -> list[object]:
    """The three fields of a verdict as JSON values, refused unless they are what they should be."""
    if not isinstance(verdict, Verdict):
        raise TypeError(f"expected a Verdict, got {type(verdict).__name__}")
    if not isinstance(verdict.reward, numbers.Real) or not isinstance(verdict.reason, str):
        raise TypeError("expected a Verdict with a real reward and a text for reason")
    if type(verdict.solved).__name__ not in ("bool", "bool_"):
        raise TypeError("expected a Verdict whose solved is a bool")
    reward = float(verdict.reward)
    if not math.isfinite(reward):
        raise ValueError("expected a finite reward")
    return [reward, bool(verdict.solved), str(verdict.reason[:MAX_REASON])]


if __name__ == "__main__":
    main(sys.argv[1:])
