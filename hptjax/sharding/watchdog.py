"""An error, a death or a hang of one process becomes an error of all, in bounded time and by name.

Inside `shared_fate` a thread of each process tells the others once a second where this one stands. It ends the process

- where another has failed and this one does not come to a meeting where it would be told,
- where another says nothing for a minute (or the limit, if that is shorter), as a killed or stopped process does,
- where this one has waited for the limit and another has not moved for as long.

A second thread, in all but process 0, ends it where process 0, which holds what they tell each other, does not answer
for a minute (or the limit): the first one is then stuck in a question to it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from hptjax.errors import CRASHED, FailedElsewhere, exit_status, raised_here
from hptjax.sharding.peers import (
    BEAT_S,
    HERE,
    failure,
    is_first,
    key,
    missing,
    others,
    places,
    report_failure,
    say_place,
    several,
    store,
)

GRACE_S = 10.0  # for a process to come to a meeting and end by itself, once another has failed
SILENT_S = 6.0  # an error that nobody explains is laid to a process that says nothing for so long
LOST_S = 60.0  # a process that says nothing for so long has ended or was stopped, whatever the limit for waiting is


@contextlib.contextmanager
def shared_fate(timeout_s: float) -> Iterator[None]:
    """Inside the block an error in one process ends all of them; nothing on one process.

    Args
      timeout_s: how long another process is waited for.

    Raises FailedElsewhere in the processes where nothing was wrong, naming the one where it was.
    """
    if not several():
        yield
        return
    HERE.begin(timeout_s)
    over = threading.Event()
    answered = [time.monotonic()]
    thread = threading.Thread(target=_watch, args=(over, answered), name="hptjax-watchdog", daemon=True)
    thread.start()
    if not is_first():  # process 0 holds the store, and stays with it until the others have gone
        threading.Thread(target=_watch_store, args=(over, answered), name="hptjax-store", daemon=True).start()
    try:
        yield
    except SystemExit:  # a clean stop, which all have agreed on
        raise
    except BaseException as error:
        HERE.failed = True
        cause = _cause(error)
        if cause is None:
            report_failure(f"{type(error).__name__}: {str(error).strip()}", exit_status(error))
            raise
        if cause is error:
            raise
        raise cause from error
    finally:
        over.set()
        thread.join()


def leave(status: int) -> None:
    """Ends this process at once where the run of several has failed; jax's own end would wait for the others.

    Process 0 holds the key-value store, so it goes last: when the others have gone or say nothing any more.
    """
    if not HERE.failed:
        return
    with contextlib.suppress(Exception):
        store().key_value_set(key("left", jax.process_index()), "")
        end = time.monotonic() + GRACE_S + 5 * BEAT_S
        seen, heard = places(), dict.fromkeys(others(), time.monotonic())
        while is_first() and time.monotonic() < end:
            left = {int(name.rpartition("/")[2]) for name, _ in store().key_value_dir_get(key("left", ""))}
            now = places()
            heard |= {other: time.monotonic() for other in others() if now.get(other) != seen.get(other)}
            seen = now
            if all(other in left or time.monotonic() - heard[other] > 3 * BEAT_S for other in others()):
                break
            time.sleep(BEAT_S / 4)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def _cause(error: BaseException) -> FailedElsewhere | None:
    """The failure of another process that an error here comes from: a collective breaks when one of them dies."""
    if isinstance(error, FailedElsewhere):
        if failure() is None:  # nobody has failed, so somebody is missing: this process says so first
            report_failure(str(error), error.status)
        return error
    if (known := failure()) is not None or raised_here(error):
        return known
    before, end = places(), time.monotonic() + SILENT_S
    while time.monotonic() < end:
        if (known := failure()) is not None:
            return known
        time.sleep(BEAT_S / 2)
    now = places()
    silent = [other for other in others() if now.get(other) == before.get(other)]
    if not silent:
        return None
    lost = missing(silent, SILENT_S)
    report_failure(str(lost), lost.status)
    return lost


def _watch(over: threading.Event, answered: list[float]) -> None:
    """The watchdog's thread: until the run is over, or until there is a reason to end the process.

    Args
      answered: gets the time at which the store answered last, monotonic s.
    """
    beat, failed_since = 0, None
    seen: dict[int, tuple[Any, Any]] = {}
    moved = dict.fromkeys(others(), time.monotonic())
    heard = dict(moved)
    while not over.wait(BEAT_S):
        beat += 1
        try:
            say_place(beat)
            now, known = places(), failure()
        except jax.errors.JaxRuntimeError:  # process 0 is gone, and the store with it: jax ends this process
            continue
        answered[0] = time.monotonic()
        for other in others():
            said = now.get(other, {})
            old_beat, old_changes = seen.get(other, (None, None))
            if said.get("beat") != old_beat:
                heard[other] = time.monotonic()
            if said.get("changes") != old_changes:
                moved[other] = time.monotonic()
            seen[other] = (said.get("beat"), said.get("changes"))
        if known is not None:
            failed_since = time.monotonic() if failed_since is None else failed_since
            if time.monotonic() - failed_since > GRACE_S:
                _end(known)
            continue
        late = _late(now, heard, moved)
        if late:
            last = max(min(heard[other], moved[other]) for other in late)
            lost = HERE.lost or missing(late, round(time.monotonic() - last))
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                report_failure(str(lost), lost.status)
            _end(lost)


def _watch_store(over: threading.Event, answered: list[float]) -> None:
    """Ends the process where the store has not answered for too long: process 0 is frozen, or out of reach."""
    while not over.wait(BEAT_S):
        limit_s = min(HERE.timeout_s + 4 * BEAT_S, LOST_S)
        if time.monotonic() - answered[0] > limit_s:
            print(
                f"hptjax: process {jax.process_index()} had at '{HERE.what}' no answer from process 0 for "
                f"{limit_s:g} s (distributed.timeout_s). Start all processes again: they go on from the last "
                "checkpoint",
                file=sys.stderr,
                flush=True,
            )
            os._exit(CRASHED)


def _late(now: Mapping[int, Mapping[str, Any]], heard: Mapping[int, float], moved: Mapping[int, float]) -> list[int]:
    """The processes that this one has waited for beyond the limit.

    One that waits at the same place, or further on, is not late: then the work itself is long.
    """
    limit_s, clock = HERE.timeout_s + 4 * BEAT_S, time.monotonic()  # a meeting that notices it first ends more cleanly
    silent = [other for other in others() if clock - heard[other] > min(limit_s, LOST_S)]
    if silent or not HERE.waits or clock - HERE.since < limit_s:
        return silent
    return [
        other
        for other in others()
        if clock - moved[other] > limit_s
        and (not now.get(other, {}).get("waits") or now[other]["meetings"] < HERE.meetings)
    ]


def _end(error: FailedElsewhere) -> None:
    """Ends the process from the watchdog's thread; the main thread cannot be reached."""
    HERE.failed = True
    print(f"hptjax: {error}", file=sys.stderr)
    leave(error.status)
