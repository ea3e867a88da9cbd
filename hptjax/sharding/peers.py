"""The other processes of the run: what each says at a meeting, and where each of them stands.

Everything here travels through the key-value store of jax's coordination service, on the host's network and never
through the accelerators: so it has time limits, and a process that is stuck inside a program can still be told.
`sharding/watchdog.py` looks after the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # the public module does not show the key-value store

from hptjax.errors import CRASHED, FailedElsewhere

BEAT_S = 1.0  # between two words of where a process stands


@dataclasses.dataclass
class Place:
    """Where this process stands. There is one of it, as there is one jax.distributed in a process.

    Args
      run: which run of this process, counted; what earlier ones have left in the store is not seen. meetings: how many
        it has come to. what: its phase or meeting, in words. waits: how many waits for others are under way.
      changes: of the above. since: the last change, monotonic s.
      timeout_s: how long others are waited for. failed: the run has failed, here or elsewhere. lost: what this process
        has said of others that did not come to a meeting; it may still wait for them on its way out.
      changing: held by the thread that notes a change; there may be one with rollouts beside the main thread.
    """

    run: int = 0
    meetings: int = 0
    what: str = "start"
    waits: int = 0
    changes: int = 0
    since: float = dataclasses.field(default_factory=time.monotonic)
    timeout_s: float = 300.0
    failed: bool = False
    lost: FailedElsewhere | None = None
    changing: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False)

    def change(self, *, what: str | None = None, waits: int = 0) -> None:
        """Notes another phase, or a wait begun or ended."""
        with self.changing:
            self.what = self.what if what is None else what
            self.waits += waits
            self.changes += 1
            self.since = time.monotonic()

    def begin(self, timeout_s: float) -> None:
        """Begins another run."""
        self.run += 1
        self.meetings, self.waits, self.failed, self.lost, self.timeout_s = 0, 0, False, None, timeout_s
        self.change(what="start")


HERE = Place()


def key(*path: Any) -> str:
    """A key of the present run in the store."""
    return "/".join(["hptjax", str(HERE.run), *map(str, path)])


def several() -> bool:
    """Whether this process is one of several."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0


def others() -> list[int]:
    """The other processes."""
    return [process for process in range(jax.process_count()) if process != jax.process_index()]


def phase(what: str) -> None:
    """Says where this process is from now on, for the messages of the others."""
    HERE.change(what=what)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Around a wait for devices or for other processes, so that the watchdog knows who waits."""
    HERE.change(waits=1)
    try:
        yield
    finally:
        HERE.change(waits=-1)


def gather(payload: bytes, what: str) -> list[bytes]:
    """The bytes of every process, in the order of the processes; on one process its own.

    Every process must call it at the same place with the same `what`.

    Raises FailedElsewhere: another process has failed, or did not come within the limit; the message names it.
      RuntimeError: another one came with another `what`.
    """
    if not several():
        return [payload]
    index, count = jax.process_index(), jax.process_count()
    HERE.meetings += 1
    meeting = key("meeting", HERE.meetings)
    store().key_value_set_bytes(f"{meeting}/{index}", pack([what.encode(), payload]))
    before = HERE.what
    HERE.change(what=what)
    with waiting():
        if is_first():
            brought = [_awaited(f"{meeting}/{other}", meeting) for other in range(count)]
            store().key_value_set_bytes(f"{meeting}/all", pack(brought))
            store().key_value_delete(key("meeting", HERE.meetings - 1, ""))  # everyone is past it
        else:
            brought = unpack(_awaited(f"{meeting}/all", meeting))
    HERE.change(what=before)
    parts = [unpack(part) for part in brought]
    for other, (name, _) in enumerate(parts):
        if name != what.encode():
            raise RuntimeError(
                f"process {other} is at '{name.decode()}' where process {index} is at '{what}': they took different "
                "decisions. This is a fault of the program; keep the run folder and report it"
            )
    return [part for _, part in parts]


def _awaited(name: str, meeting: str) -> bytes:
    """The value of a key, once it is there."""
    # process 0 gives up first, so that all hear the same names from it
    end = time.monotonic() + HERE.timeout_s + (0.0 if is_first() else 3 * BEAT_S)
    while True:
        try:
            return store().blocking_key_value_get_bytes(name, int(BEAT_S * 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if known := failure():
            raise known
        if time.monotonic() > end:
            came = {other.rpartition("/")[2] for other, _ in store().key_value_dir_get_bytes(f"{meeting}/")}
            HERE.lost = missing([other for other in range(jax.process_count()) if str(other) not in came] or [0])
            report_failure(str(HERE.lost), HERE.lost.status)
            raise HERE.lost


def missing(processes: Sequence[int], limit_s: float | None = None) -> FailedElsewhere:
    """The error of a wait for these processes that has lasted too long."""
    known = places()
    seen = [
        f"process {process} was last at '{known[process]['what']}'"
        if process in known
        else f"process {process} has not begun"
        for process in processes
    ]
    return FailedElsewhere(
        f"process {jax.process_index()} waited {HERE.timeout_s if limit_s is None else limit_s:g} s at '{HERE.what}' "
        f"for process{'es' if len(processes) > 1 else ''} {', '.join(map(str, processes))} (distributed.timeout_s): "
        f"{'; '.join(seen)}. Start all processes again: they go on from the last checkpoint",
        CRASHED,
    )


def report_failure(message: str, status: int) -> None:
    """Tells the others that the run has failed here, and with which status they are to end."""
    note = json.dumps({"message": message, "what": HERE.what, "status": status})
    store().key_value_set(key("failed", jax.process_index()), note, allow_overwrite=True)


def failure() -> FailedElsewhere | None:
    """What another process has reported, as this one's error."""
    for name, note in store().key_value_dir_get(key("failed", "")):
        process, said = int(name.rpartition("/")[2]), json.loads(note)
        if process != jax.process_index():
            return FailedElsewhere(f"process {process} failed at '{said['what']}': {said['message']}", said["status"])
    return None


def say_place(beat: int) -> None:
    """Tells the others where this process stands. `beat` must grow."""
    place = {"what": HERE.what, "waits": HERE.waits, "meetings": HERE.meetings, "changes": HERE.changes, "beat": beat}
    store().key_value_set(key("place", jax.process_index()), json.dumps(place), allow_overwrite=True)


def places() -> dict[int, dict[str, Any]]:
    """Where every process said last that it stands."""
    return {
        int(name.rpartition("/")[2]): json.loads(place) for name, place in store().key_value_dir_get(key("place", ""))
    }


def store() -> Any:
    """The key-value store that all processes share."""
    client = jax_distributed.global_state.client
    if client is None:
        raise RuntimeError("expected jax.distributed to be initialised where there are several processes")
    return client


def pack(parts: Sequence[bytes]) -> bytes:
    """Byte strings as one."""
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def unpack(packed: bytes) -> list[bytes]:
    """The inverse of `pack`."""
    parts, start = [], 0
    while start < len(packed):
        end = start + 8 + int.from_bytes(packed[start : start + 8], "big")
        parts.append(packed[start + 8 : end])
        start = end
    return parts
