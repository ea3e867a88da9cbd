"""A question asked in a child process that is killed when it takes too long; the parent keeps all that it imported.

For sympy, which may compute for ever on a short formula: killing the child costs nothing else, where killing the
worker would cost it its imports. A fork takes some milliseconds, so only the last route pays for it.
"""

from __future__ import annotations

import os
import select
import signal
import warnings
from collections.abc import Callable

_SAID = {b"t": True, b"f": False, b"n": None}


class Overdue(Exception):
    """The child was still at it when the time was up."""


def asked_apart(question: Callable[[], bool | None], seconds: float) -> bool | None:
    """The answer of a question that a forked child is asked; None too where the child dies of it.

    Raises
      no answer within `seconds` -> Overdue; the child is dead by then.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads, which the child does not have
        child = os.fork()
    if child == 0:
        _answer(question, writing, seconds)
    os.close(writing)
    try:
        ready, _, _ = select.select([reading], [], [], max(seconds, 0.0))
        if not ready:
            raise Overdue
        return _SAID.get(os.read(reading, 1))
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _answer(question: Callable[[], bool | None], writing: int, seconds: float) -> None:
    """In the child: one byte, and out, past everything that the parent would do at its end."""
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.0) + 1.0)  # the end of a child whose parent is gone
        said = question()
        os.write(writing, next(key for key, value in _SAID.items() if value is said))
    finally:
        os._exit(0)
