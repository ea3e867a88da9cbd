"""Runs a command; the status is 75 where it ended well only because it was asked to stop.

`hptjax train` answers SIGTERM with a checkpoint and status 0, as it should. A scheduler takes 0 for "finished": since
Kubernetes 1.27 a pod that is evicted and ends with 0 has succeeded, and nobody starts it again. As the first process
of a container, this one passes the signal on and says "come back" instead:

    python -m launch.until_done hptjax train CONFIG
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

COME_BACK = 75  # EX_TEMPFAIL of sysexits.h: not finished, the same command continues
USAGE = 64
NOT_FOUND = 127  # as a shell says it


def run(arguments: Sequence[str]) -> int:
    """The command's exit status; 75 in the place of 0 where it had been asked to stop."""
    asked = []
    child: subprocess.Popen[bytes] | None = None

    def stop(number: int, frame: Any) -> None:
        asked.append(number)
        if child is not None and child.poll() is None:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        child = subprocess.Popen(list(arguments), start_new_session=True)  # Ctrl-C then comes once, from here
    except OSError as error:
        print(f"launch.until_done: expected a program to run, got {error}", file=sys.stderr)
        return NOT_FOUND
    if asked:  # between the handler and the start
        child.send_signal(asked[0])
    status = child.wait()
    if asked and status in (0, -asked[0], 128 + asked[0]):
        return COME_BACK
    return status if status >= 0 else 128 - status


def main() -> None:
    """Exits with the status of the command in the arguments."""
    if len(sys.argv) < 2:
        print("usage: python -m launch.until_done COMMAND [ARGUMENTS]", file=sys.stderr)
        sys.exit(USAGE)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
