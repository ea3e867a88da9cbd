"""What a launcher does, as data: the same list of steps is printed by `--dry-run` and carried out without it."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Any

END = "END_OF_INPUT"  # closes the text that a printed command reads


@dataclasses.dataclass(frozen=True)
class Command:
    """One program with its arguments; a failure ends the launch."""

    argv: tuple[str, ...]
    stdin: str | None = None  # what it reads
    environment: tuple[tuple[str, str], ...] = ()  # set beside what the shell has


@dataclasses.dataclass(frozen=True)
class Wait:
    """A program that is run again until it prints one of `wanted`."""

    argv: tuple[str, ...]
    wanted: tuple[str, ...]
    hopeless: tuple[str, ...]  # what it prints when waiting longer makes no sense
    every_s: int = 30


Step = Command | Wait


def as_script(steps: Sequence[Step]) -> str:
    """The steps as a shell script that does the same."""
    return "\n".join(["set -e", *(_as_shell(step) for step in steps)]) + "\n"


def _as_shell(step: Step) -> str:
    line = shlex.join(step.argv)
    if isinstance(step, Wait):
        return (
            f'while :; do state="$({line})"; case "$state" in {"|".join(step.wanted)}) break ;; '
            f'{"|".join(step.hopeless)}) echo "$state" >&2; exit 1 ;; esac; sleep {step.every_s}; done'
        )
    line = " ".join([*(f"{name}={shlex.quote(value)}" for name, value in step.environment), line])
    if step.stdin is None:
        return line
    if END in step.stdin.splitlines():
        raise ValueError(f"expected no line '{END}' in what {step.argv[0]} reads; it marks the end of the input")
    return f"{line} <<'{END}'\n{step.stdin.rstrip()}\n{END}"


def carry_out(steps: Sequence[Step]) -> int:
    """Runs the steps in order; the exit status of the first that fails, else 0. None begins after a signal.

    Raises ValueError, before anything is run, where a program is not there.
    """
    for name in dict.fromkeys(step.argv[0] for step in steps):
        if shutil.which(name) is None:
            raise ValueError(
                f"expected the program '{name}' on this machine, got none in PATH; install it, or activate the "
                "environment that has it. --dry-run prints what to run elsewhere"
            )
    told: list[int] = []
    for step in steps:
        if told:
            return 128 + told[0]
        status = _wait(step) if isinstance(step, Wait) else _run(step, told)
        if status:
            return status
    return 0


def _run(step: Command, told: list[int]) -> int:
    """Runs a program to its own end, because it may have something to save; signals that come meanwhile go to `told`.

    Ctrl-C reaches the program by itself, from the terminal; SIGTERM is passed on.
    """
    text = None if step.stdin is None else step.stdin.rstrip() + "\n"
    environment = {**os.environ, **dict(step.environment)}
    program: subprocess.Popen[str] | None = None

    def stop(number: int, frame: Any) -> None:
        told.append(number)
        if number == signal.SIGTERM and program is not None and program.poll() is None:
            program.send_signal(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        stdin = None if text is None else subprocess.PIPE
        program = subprocess.Popen(step.argv, stdin=stdin, text=True, env=environment)
        if signal.SIGTERM in told:  # between the handler and the start
            program.send_signal(signal.SIGTERM)
        program.communicate(text)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return program.returncode if program.returncode >= 0 else 128 - program.returncode


def _wait(step: Wait) -> int:
    while True:
        done = subprocess.run(step.argv, stdout=subprocess.PIPE, text=True, check=False)
        state = done.stdout.strip()
        if done.returncode or state in step.wanted:
            return done.returncode
        if state in step.hopeless:
            print(f"launch: {shlex.join(step.argv)} says {state}; it was to become {' or '.join(step.wanted)}.")
            return 1
        time.sleep(step.every_s)
