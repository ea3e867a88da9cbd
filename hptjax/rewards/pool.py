"""Reward functions run in worker processes that can be killed; a completion gets a verdict whatever its function does.

A function that hangs, dies, raises or answers nonsense costs its completion the reward and is counted by the verdict's
reason: "timeout", "crashed", "raised: <exception>". The run goes on. The deadline is per completion and starts when
the worker turns to it, not when it is queued. From the first kill on, one more worker is kept ready with everything
imported, so that a completion that hangs costs its deadline and not a start.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import selectors
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from hptjax.records import RewardFunction, Verdict
from hptjax.rewards.functions import UserReward, cannot_load, import_path, raised, verdict_of
from hptjax.rewards.process import WorkerProcess

TIMEOUT = Verdict(0.0, False, "timeout")
CRASHED = Verdict(0.0, False, "crashed")
MAX_OWED = 64  # requests on the way to one worker at most: enough to keep it busy, few to hand on when it dies
MAX_LOAD_FAILURES = 3
GATHER_S = 0.001  # replies are taken this far apart while a worker has plenty to do: looking costs more than they do


@dataclasses.dataclass(frozen=True)
class _Load:
    """A request to import a function; `users`: it is the user's own and takes the prompt too."""

    path: str
    users: bool


@dataclasses.dataclass(frozen=True)
class _Item:
    """A request to judge: which completion, by which function; `message` is all but the request's id."""

    completion: int
    function: int
    load: _Load
    message: bytes


class RewardPool:
    """Worker processes for reward functions. A context manager; `close` may be called more than once."""

    def __init__(
        self,
        *,
        workers: int = 2,
        deadline_s: float = 5.0,
        load_s: float = 120.0,
        memory_bytes: int = 2 << 30,
        show_output: bool = False,
    ):
        """
        Args
          workers: processes. deadline_s: s per completion and function.
          load_s: s for starting a worker and importing a function, once each.
          memory_bytes: address space of a worker.
          show_output: whether what functions print goes to this process's standard error; dropped if not.
        """
        if workers < 1:
            raise ValueError(f"expected reward.workers >= 1, got {workers}")
        if not (math.isfinite(deadline_s) and deadline_s > 0.0):
            raise ValueError(f"expected reward.deadline_s > 0, got {deadline_s}")
        self._deadline_s = deadline_s
        self._load_s = load_s
        self._start = partial(WorkerProcess, deadline_s=deadline_s, memory_bytes=memory_bytes, show_output=show_output)
        self._identities = itertools.count()
        self._requests: dict[int, _Load | _Item] = {}
        self._known: set[_Load] = set()  # what some worker has imported
        self._reserve: WorkerProcess | None = None
        self._load_failures = 0
        self._closed = False
        self._streaming = False
        self._workers = [self._start() for _ in range(workers)]

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers."""
        self._closed = True
        for worker in self._processes():
            worker.kill()
        self._workers, self._reserve = [], None

    @property
    def process_ids(self) -> list[int]:
        """The workers' process ids."""
        return [worker.process.pid for worker in self._workers]

    def load(self, functions: Sequence[RewardFunction | UserReward]) -> None:
        """Imports functions in all workers, so that a wrong name is an error at the start. Raises as `stream` does."""
        self._check_idle()
        for worker in self._workers:
            for function in functions:
                self._send_load(worker, _load_of(function))
            worker.flush()
        while any(worker.owed for worker in self._workers):
            self._turn(deque())

    def score(
        self,
        functions: Sequence[RewardFunction | UserReward],
        completions: Sequence[str],
        answers: Sequence[Mapping[str, Any]],
        prompts: Sequence[str] | None = None,
    ) -> list[list[Verdict]]:
        """Verdicts [completion][function], in the order given. Arguments and errors are those of `stream`."""
        verdicts: list[list[Verdict]] = [[] for _ in completions]
        for index, row in self.stream(functions, completions, answers, prompts):
            verdicts[index] = row
        return verdicts

    def judge(
        self,
        function: RewardFunction | UserReward,
        completions: Sequence[str],
        answers: Sequence[Mapping[str, Any]],
        prompts: Sequence[str] | None = None,
    ) -> list[Verdict]:
        """Verdicts of one function, in the order given. Arguments and errors are those of `stream`."""
        return [row[0] for row in self.score([function], completions, answers, prompts)]

    def stream(
        self,
        functions: Sequence[RewardFunction | UserReward],
        completions: Sequence[str],
        answers: Sequence[Mapping[str, Any]],
        prompts: Sequence[str] | None = None,
    ) -> Iterator[tuple[int, list[Verdict]]]:
        """(index of a completion, its verdicts by function) as they come in, each index once.

        Args
          prompts: one per completion; needed where a function is the user's own.
        Raises
          a function that workers cannot import by name -> ValueError, before anything is judged by it; never for
          anything that a function does with a completion.
        """
        self._check_idle()
        if len(completions) != len(answers):
            raise ValueError(f"expected one answer per completion, got {len(answers)} for {len(completions)}")
        if prompts is not None and len(prompts) != len(completions):
            raise ValueError(f"expected one prompt per completion, got {len(prompts)} for {len(completions)}")
        loads = [_load_of(function) for function in functions]
        if not loads:
            raise ValueError("expected at least one reward function in reward.functions, got none")
        if prompts is None and any(load.users for load in loads):
            raise ValueError("expected prompts for the user's own reward in reward.functions, got none")
        return self._stream(loads, completions, answers, prompts or [""] * len(completions))

    def _check_idle(self) -> None:
        if self._closed or self._streaming:
            state = "closed" if self._closed else "still at an earlier stream"
            raise ValueError(f"expected an open and idle RewardPool, got one that is {state}")

    def _stream(
        self,
        loads: list[_Load],
        completions: Sequence[str],
        answers: Sequence[Mapping[str, Any]],
        prompts: Sequence[str],
    ) -> Iterator[tuple[int, list[Verdict]]]:
        rows: dict[int, list[Verdict | None]] = {}
        waiting: deque[_Item] = deque()
        finished: list[tuple[_Item, Verdict]] = []
        for index, (completion, answer) in enumerate(zip(completions, answers, strict=True)):
            rows[index] = [None] * len(loads)
            for function, load in enumerate(loads):
                request = {"function": load.path, "completion": completion}
                if load.users:
                    request["prompt"] = prompts[index]
                try:
                    body = json.dumps({**request, "answer": dict(answer)}).encode()
                except (TypeError, ValueError) as error:
                    finished.append((_Item(index, function, load, b""), raised(type(error).__name__)))
                    continue
                waiting.append(_Item(index, function, load, body[1:]))
        try:
            self._streaming = True
            for slot, worker in enumerate(self._workers):
                if worker.process.poll() is not None:  # it died idle: no completion is to blame
                    self._replace(slot)
            while rows:
                for item, verdict in finished:
                    row = rows[item.completion]
                    row[item.function] = verdict
                    if None not in row:
                        yield item.completion, rows.pop(item.completion)
                finished = self._turn(waiting) if rows else []
        finally:
            self._streaming = False
            for slot, worker in enumerate(self._workers):
                stale = [identity for identity in worker.owed if self._requests[identity] not in self._known]
                if stale and not self._closed:  # abandoned half-way: their answers belong to nobody
                    self._replace(slot)

    def _turn(self, waiting: deque[_Item]) -> list[tuple[_Item, Verdict]]:
        """Hands out work, waits until something happens, and returns what was decided."""
        for worker in self._workers:
            self._hand_out(worker, waiting)
        if any(len(worker.owed) > MAX_OWED // 4 for worker in self._workers):
            time.sleep(GATHER_S)
        readable, writable = self._wait()
        decided: list[tuple[_Item, Verdict]] = []
        for slot, worker in enumerate(self._processes()):
            if slot in writable:
                worker.flush()
            if slot in readable:
                decided += self._take_replies(worker, worker.read())
            if worker.dead:
                decided += self._bury(slot, waiting, CRASHED)
            elif slot not in readable and worker.owed and time.monotonic() > worker.since + self._limit_s(worker):
                decided += self._bury(slot, waiting, TIMEOUT)
        return decided

    def _hand_out(self, worker: WorkerProcess, waiting: deque[_Item]) -> None:
        """Sends work, a part of what waits, and none to a worker that still imports: the others do it meanwhile."""
        room = min(MAX_OWED, max(2, len(waiting) // (2 * len(self._workers))))
        if len(worker.owed) > room // 2 or self._imports(worker):
            return
        items: list[_Item] = []
        while waiting and len(worker.owed) + len(items) < room and waiting[0].load.path in worker.loaded:
            items.append(waiting.popleft())
        self._send(worker, items, [item.message for item in items])
        if waiting and len(worker.owed) < room:  # the next one's function is new to it
            self._send_load(worker, waiting[0].load)
        worker.flush()

    def _imports(self, worker: WorkerProcess) -> bool:
        return bool(worker.owed) and isinstance(self._requests[worker.owed[-1]], _Load)

    def _send_load(self, worker: WorkerProcess, load: _Load) -> None:
        """Has a function imported, unless the worker was told to before."""
        if load.path in worker.loaded:
            return
        worker.loaded.add(load.path)
        folders = [*sys.path, os.getcwd()] if load.users else list(sys.path)  # a user's module may lie where it is run
        request = {"load": load.path, "users": load.users, "sys_path": folders, "limit_s": self._load_s}
        self._send(worker, [load], [json.dumps(request).encode()[1:]])

    def _send(self, worker: WorkerProcess, requests: Sequence[_Load | _Item], bodies: Sequence[bytes]) -> None:
        identities = list(itertools.islice(self._identities, len(requests)))
        self._requests.update(zip(identities, requests, strict=True))
        worker.send(identities, b"".join(b'{"id": %d, %b\n' % each for each in zip(identities, bodies, strict=True)))

    def _limit_s(self, worker: WorkerProcess) -> float:
        return self._load_s if isinstance(self._requests[worker.owed[0]], _Load) else self._deadline_s

    def _wait(self) -> tuple[set[int], set[int]]:
        """Which workers can be read and written, after waiting at most until the next deadline."""
        busy = [worker for worker in self._processes() if worker.owed]
        ends = [worker.since + self._limit_s(worker) for worker in busy]
        timeout = max(0.0, min(ends) - time.monotonic()) + 0.001 if ends else 0.0
        with selectors.PollSelector() as selector:  # nothing is kept between turns, and it is one system call
            for slot, worker in enumerate(self._processes()):
                selector.register(worker.output, selectors.EVENT_READ, slot)
                if worker.wants_to_write:
                    selector.register(worker.input, selectors.EVENT_WRITE, slot)
            events = selector.select(timeout)
        readable = {key.data for key, mask in events if mask & selectors.EVENT_READ}
        return readable, {key.data for key, mask in events if mask & selectors.EVENT_WRITE}

    def _take_replies(self, worker: WorkerProcess, lines: Sequence[bytes]) -> list[tuple[_Item, Verdict]]:
        """Decides the oldest owed requests by their replies; one that does not fit marks the worker dead."""
        decided: list[tuple[_Item, Verdict]] = []
        for line in lines:
            try:
                reply = json.loads(line)
                fits = isinstance(reply, dict) and bool(worker.owed) and reply.get("id") == worker.owed[0]
            except (ValueError, RecursionError):
                fits = False
            if worker.dead or not fits:
                worker.dead = True
                break
            request = self._requests[worker.owed[0]]
            if isinstance(request, _Item):
                decided.append((request, verdict_of(reply)))
            elif "loaded" in reply:
                self._known.add(request)
                self._load_failures = 0
            elif request in self._known:
                worker.dead = True
                break
            else:
                raise ValueError(cannot_load(request.path, str(reply.get("failed"))))
            del self._requests[worker.owed[0]]
            worker.answered()
        return decided

    def _bury(self, slot: int, waiting: deque[_Item], verdict: Verdict) -> list[tuple[_Item, Verdict]]:
        """Replaces a worker. What it was at gets the verdict; what it had not begun goes back to the queue."""
        worker = self._processes()[slot]
        owed = [self._requests[identity] for identity in worker.owed]
        load = owed[0] if owed and isinstance(owed[0], _Load) else None
        items = [request for request in owed if isinstance(request, _Item)]
        self._replace(slot)
        if load is not None and load not in self._known:
            raise ValueError(cannot_load(load.path, f"{verdict.reason} while it was imported"))
        if load is None:
            waiting.extendleft(reversed(items[1:]))
            return [(item, verdict) for item in items[:1]]
        self._load_failures += 1
        able = any(load.path in other.loaded and not self._imports(other) for other in self._workers)
        first = next((item for item in waiting if item.load == load), None)
        if self._load_failures < MAX_LOAD_FAILURES or able or first is None:
            return []
        waiting.remove(first)  # a function that cannot be loaded again and again must not keep the run waiting for ever
        return [(first, verdict)]

    def _replace(self, slot: int) -> None:
        """Kills a worker and puts the reserve in its place, or a new worker where the reserve is not ready."""
        worker = self._processes()[slot]
        for identity in worker.owed:
            self._requests.pop(identity, None)
        worker.kill()
        if slot == len(self._workers):
            self._reserve = None
            return
        ready = self._reserve
        if ready is not None and not ready.owed and not ready.dead and ready.process.poll() is None:
            self._workers[slot], self._reserve = ready, None
        else:
            self._workers[slot] = self._start()
        if self._reserve is None:
            self._reserve = self._start()
            for load in self._known:
                self._send_load(self._reserve, load)
            self._reserve.flush()

    def _processes(self) -> list[WorkerProcess]:
        """The workers by slot, and the reserve last where there is one."""
        return [*self._workers, *([] if self._reserve is None else [self._reserve])]


def _load_of(function: RewardFunction | UserReward) -> _Load:
    return _Load(import_path(function), isinstance(function, UserReward))
