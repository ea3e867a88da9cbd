"""One worker process as its parent sees it: two non-blocking pipes, and what the worker still owes an answer to."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence

READ_BYTES = 1 << 16
MAX_REPLY_BYTES = 1 << 20  # an honest reply is far below; more without a line end is no reply


class WorkerProcess:
    """A started worker. Nothing here blocks except `kill`, which waits for a killed process to be gone.

    Attributes
      owed: what was sent and not yet answered, oldest first; the worker answers in order.
      since: when the oldest of them had its turn, as far as the parent can tell; monotonic s. Never too early.
      loaded: import paths that were sent to be loaded.
      dead: the pipe is closed or was misused; the process is to be killed.
    """

    def __init__(self, *, deadline_s: float, memory_bytes: int, show_output: bool):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
            "JAX_PLATFORMS": "cpu",  # a reward function that imports jax must not take the accelerator
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        arguments = [str(os.getpid()), str(deadline_s), str(memory_bytes)]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "hptjax.rewards.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if show_output else subprocess.DEVNULL,
            env=environment,
            bufsize=0,
            start_new_session=True,  # so that the children of a reward function can be killed with it
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.input = self.process.stdin.fileno()
        self.output = self.process.stdout.fileno()
        os.set_blocking(self.input, False)
        os.set_blocking(self.output, False)
        self.owed: deque[int] = deque()
        self.since = time.monotonic()
        self.loaded: set[str] = set()
        self.dead = False
        self._outgoing = bytearray()
        self._incoming = bytearray()

    @property
    def wants_to_write(self) -> bool:
        return bool(self._outgoing) and not self.dead

    def send(self, identities: Sequence[int], messages: bytes) -> None:
        """Queues requests; `flush` writes them."""
        if not self.owed:
            self.since = time.monotonic()
        self.owed.extend(identities)
        self._outgoing += messages

    def flush(self) -> None:
        """Writes as much as the pipe takes."""
        while self._outgoing:
            try:
                written = os.write(self.input, self._outgoing)
            except BlockingIOError:
                return
            except OSError:
                # The worker is gone. Its last replies may still be in the other pipe, whose end marks it dead.
                self._outgoing.clear()
                return
            del self._outgoing[:written]
            self.since = time.monotonic()

    def read(self) -> list[bytes]:
        """The replies that have come in, without waiting; marks the worker dead at the end of its output."""
        try:
            data = os.read(self.output, READ_BYTES)
        except BlockingIOError:
            return []
        self.dead = not data
        *lines, rest = (self._incoming + data).split(b"\n")
        self._incoming = bytearray(rest)
        if len(rest) > MAX_REPLY_BYTES:
            self.dead = True
        return [bytes(line) for line in lines]

    def answered(self) -> None:
        """The oldest request has its answer; the next one has its turn from now on."""
        self.owed.popleft()
        self.since = time.monotonic()

    def kill(self) -> None:
        """Ends the worker and its children at once. Harmless when repeated."""
        self.dead = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
