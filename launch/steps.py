"""What a launcher does, as data: the same list of steps is printed by `--dry-run` and carried out without it."""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import time
from collections.abc import Sequence

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
    """Runs the steps in order; the exit status of the first that fails, else 0."""
    for step in steps:
        status = _wait(step) if isinstance(step, Wait) else _run(step)
        if status:
            return status
    return 0


def _run(step: Command) -> int:
    text = None if step.stdin is None else step.stdin.rstrip() + "\n"
    environment = {**os.environ, **dict(step.environment)}
    done = subprocess.run(step.argv, input=text, text=True, env=environment, check=False)
    return done.returncode


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
