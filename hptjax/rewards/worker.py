"""The process that runs reward functions: `python -m hptjax.rewards.worker`, JSON lines in, JSON lines out.

It trusts nothing that it runs. The functions' standard input is empty and their standard output is standard error, so
the protocol has its two pipes to itself. Whatever a function raises becomes a reply. The process ends with its parent:
at the end of its input, by a thread that watches the parent, and, where a function keeps the interpreter lock, by a
limit on CPU time per request.

A module of reward functions may have a `prepare_worker(deadline_s)`, called when a function of it is loaded and before
any deadline starts: the place for slow imports and for models that judge.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
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

from hptjax.records import Grade, Verdict, verdict_to_json

MAX_REASON = 200  # characters of a verdict's reason that travel back
SOLVED = 1.0  # a user's reward given as a number counts as solved from here up


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
        reply = _load(request, functions, deadline_s) if "load" in request else _judge(request, functions)
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


def _load(request: dict[str, Any], functions: dict[str, Callable[..., Any]], deadline_s: float) -> dict[str, Any]:
    """Imports a function by its path; the parent's import path comes with the request."""
    path = request["load"]
    sys.path.extend(entry for entry in request["sys_path"] if entry not in sys.path)
    place, _, name = path.partition(":")
    try:
        module = importlib.import_module(place)
        function = getattr(module, name)
        if request.get("users"):
            _check_signature(function)
        if hasattr(module, "prepare_worker"):
            module.prepare_worker(deadline_s)
        functions[path] = function
    except BaseException as error:
        return {"failed": f"{type(error).__name__}: {error}"[:MAX_REASON]}
    return {"loaded": path}


def _check_signature(function: Callable[..., Any]) -> None:
    for unfit, kind in (
        (inspect.isclass, "a class"),
        (inspect.iscoroutinefunction, "an async function"),
        (inspect.isgeneratorfunction, "a generator"),
        (inspect.isasyncgenfunction, "an async generator"),
    ):
        if unfit(function):
            raise TypeError(f"expected a function that returns a number or a Verdict, got {kind}")
    try:
        inspect.signature(function).bind("prompt", "completion", {})
    except TypeError as error:
        raise TypeError(f"expected a function of (prompt, completion, answer), {error}") from None


def _judge(request: dict[str, Any], functions: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    function, users = functions[request["function"]], "prompt" in request
    try:
        given = [request["prompt"]] if users else []
        said = function(*given, request["completion"], request["answer"])
        return {"verdict": _checked(_scored(said) if users else said)}
    except BaseException as error:
        return {"raised": type(error).__name__[:MAX_REASON]}


def _scored(said: object) -> object:
    """A number of a user's reward as a verdict, solved from 1 upwards; anything else as it is."""
    if isinstance(said, numbers.Real) or type(said).__name__ in ("bool", "bool_"):
        return Verdict(float(said), bool(said >= SOLVED), "scored")  # type: ignore[arg-type,operator]
    return said


def _checked(verdict: object) -> list[object]:
    """The fields of a verdict as JSON values, refused unless they are what they should be."""
    if not isinstance(verdict, Verdict):
        raise TypeError(f"expected a Verdict, got {type(verdict).__name__}")
    if not isinstance(verdict.reward, numbers.Real) or not isinstance(verdict.reason, str):
        raise TypeError("expected a Verdict with a real reward and a text for reason")
    if type(verdict.solved).__name__ not in ("bool", "bool_"):
        raise TypeError("expected a Verdict whose solved is a bool")
    reward = float(verdict.reward)
    if not math.isfinite(reward):
        raise ValueError("expected a finite reward")
    if not isinstance(verdict.grades, tuple) or not all(isinstance(grade, Grade) for grade in verdict.grades):
        raise TypeError("expected a Verdict whose grades are a tuple of Grade")
    return verdict_to_json(Verdict(reward, bool(verdict.solved), str(verdict.reason[:MAX_REASON]), verdict.grades))


if __name__ == "__main__":
    main(sys.argv[1:])
