"""What an error is to the shell: whether hptjax itself raised it, and the status that the process ends with."""

from __future__ import annotations

import pathlib
import traceback

PACKAGE = pathlib.Path(__file__).resolve().parent
CRASHED, BAD_INPUT, INTERRUPTED = 1, 2, 130
LINE = 300  # characters of another library's error in a message of ours
INPUT_ERRORS = (ValueError, OSError, RuntimeError, FloatingPointError)


class FailedElsewhere(RuntimeError):
    """Another process of the run has failed, or does not answer; this one ends with it, and with the same status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class SamplingFailed(RuntimeError):
    """Who samples for this run cannot go on. What was sampled is kept, so that the run can be taken up again."""


def raised_here(error: BaseException) -> bool:
    """Whether the error was raised by hptjax itself: its message then names the field, and a traceback adds nothing."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and PACKAGE in pathlib.Path(frames[-1][0].f_code.co_filename).resolve().parents


def exit_status(error: BaseException) -> int:
    """The status of a process that ends by this error."""
    if isinstance(error, FailedElsewhere):
        return error.status
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return BAD_INPUT if isinstance(error, INPUT_ERRORS) and raised_here(error) else CRASHED


def first_line(error: BaseException) -> str:
    """The first line of an error's text; of a long one its start and its end, where the reason often stands."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= LINE else f"{line[: LINE // 2]} ... {line[-LINE // 2 :]}"
