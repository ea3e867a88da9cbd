"""Rollouts by an outside engine: the protocol, and the adapter to a server with OpenAI's API for completions.

The trainer asks two things of whoever samples in its place:

    publish(params) -> version                                           takes the weights, and gives them a name
    sample(version, requests, *, should_stop, on_finished) -> samples    samples by the weights of that name

and `sample` keeps the contract of `rollout.engine`: samples in request order; fewer only where it was told to stop;
`on_finished` has each of them before the call ends, also where it ends by an error; a seed per sample that follows from
its id. Two things differ. A sample is not a function of its id and the weights alone: what a server computes depends on
who else asks, and on its own kernels. And its log-probs are another program's, so `hpt.sampler_correction` weighs every
sample by how far the trainer's are from them (`losses/weights.py`). Each sample has `outside VERSION` as its
`decode_shape`, so that the weights it came from are known for as long as it is kept.

Of several processes the first asks, and the others hear of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import numpy as np

from hptjax.errors import SamplingFailed
from hptjax.records import Request, Sample
from hptjax.rollout.engine import never
from hptjax.rollout.post import Attempts, Refused, attempted
from hptjax.rollout.requests import needs_sampling, sample_of
from hptjax.sharding.agree import from_first
from hptjax.sharding.peers import is_first
from hptjax.types import Params

POLL_S = 0.5  # between two questions whether to stop

Answer = tuple[list[int], list[float]]
"""The tokens that were sampled, and their log-probs."""

Ask = Callable[[Request, str], Awaitable[Answer]]
"""A request and the version of the weights -> its answer. Raises post.Passing or post.Refused."""


@dataclasses.dataclass(frozen=True, eq=False)
class OutsideEngine:
    """The protocol.

    Args
      publish: the decoder's parameters -> the name of these weights, once the engine has them.
      sample: (version, requests, *, should_stop, on_finished) -> samples. Both raise SamplingFailed where the engine
        cannot go on.
    """

    publish: Callable[[Params], str]
    sample: Callable[..., list[Sample]]


def make_sample(
    connect: Callable[[], AbstractAsyncContextManager[Ask]], *, concurrency: int, attempts: Attempts
) -> Callable[..., list[Sample]]:
    """The `sample` of an engine that answers one request at a time.

    Args
      connect: opens whatever it takes to ask. concurrency: requests under way at the same time. attempts: per request.

    After a request has failed for good nothing new is asked; what is under way may end, is kept, and SamplingFailed is
    raised.
    """

    def sample(
        version: str,
        requests: Sequence[Request],
        *,
        should_stop: Callable[[], bool] = never,
        on_finished: Callable[[list[Sample]], None] | None = None,
    ) -> list[Sample]:
        if len({request.sample_id for request in requests}) < len(requests):
            raise ValueError("an id came twice; expected a different (question, round, index) for each request")
        samples: dict[int, Sample] = {}

        def keep(answers: Sequence[tuple[int, list[int], list[float]]]) -> None:
            done = {
                place: _sampled(requests[place], tokens, logprobs, version)
                for place, tokens, logprobs in sorted(answers, key=lambda answer: answer[0])
            }
            samples.update(done)
            if done and on_finished is not None:
                on_finished(list(done.values()))

        keep([(place, [], []) for place, request in enumerate(requests) if not needs_sampling(request)])
        places = [place for place, request in enumerate(requests) if needs_sampling(request)]

        async def work(put: Callable[[Any], None]) -> None:
            await _ask_all(places, requests, version, connect, concurrency, attempts, put)

        with under_way(work) if places and is_first() else contextlib.nullcontext() as results:
            going = bool(places)
            while going:
                stopping = should_stop()
                said = from_first(lambda: _taken(results, 0.0 if stopping else POLL_S), "sampling by a server")  # noqa: B023
                keep(said["answers"])
                if said["failed"] is not None:
                    raise SamplingFailed(said["failed"])
                going = not (stopping or said["ended"])
        return [samples[place] for place in sorted(samples)]

    return sample


def _sampled(request: Request, tokens: Sequence[int], logprobs: Sequence[float], version: str) -> Sample:
    decode_shape = f"outside {version}" if needs_sampling(request) else ""
    new_tokens, new_logprobs = np.asarray(tokens, np.int32), np.asarray(logprobs, np.float32)
    return sample_of(request, new_tokens, new_logprobs, decode_shape=decode_shape)


async def _ask_all(
    places: Sequence[int],
    requests: Sequence[Request],
    version: str,
    connect: Callable[[], AbstractAsyncContextManager[Ask]],
    concurrency: int,
    attempts: Attempts,
    put: Callable[[Any], None],
) -> None:
    """Puts (place, tokens, log-probs) for each request as it is done; at the end the message of the first failure."""
    waiting, failures = deque(places), list[str]()

    async def asking(ask: Ask) -> None:
        while waiting and not failures:
            place = waiting.popleft()
            request = requests[place]
            try:
                answer = await attempted(lambda: ask(request, version), attempts, lambda: not failures)  # noqa: B023
            except Refused as error:
                failures.append(f"rollout {request.sample_id} was not sampled: {error}")
                return
            put((place, *answer))

    async with connect() as ask, asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(places))):
            group.create_task(asking(ask))
    if failures:
        put(failures[0])


@contextlib.contextmanager
def under_way(work: Callable[[Callable[[Any], None]], Awaitable[None]]) -> Iterator[queue.SimpleQueue[Any]]:
    """Around the block an event loop in a thread of its own does `work(put)`; the block takes what it puts.

    The last thing in the queue is None, or the error that the work ended by. What is still under way at the end of the
    block is cancelled.
    """
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    ended: list[Any] = [None]

    async def main() -> None:
        await work(results.put)

    loop = asyncio.new_event_loop()
    task = loop.create_task(main())

    def run() -> None:
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            return
        except BaseException as error:
            ended[0] = error
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            results.put(ended[0])

    thread = threading.Thread(target=run, name="outside engine", daemon=True)
    thread.start()
    try:
        yield results
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.close()


def _taken(results: queue.SimpleQueue[Any] | None, wait_s: float) -> dict[str, Any]:
    """What is in the queue, waiting for the first entry: answers, the failure where there is one, whether it is all."""
    assert results is not None
    answers, failed, found = [], None, []
    with contextlib.suppress(queue.Empty):
        found.append(results.get(timeout=wait_s) if wait_s else results.get_nowait())
        while found[-1] is not None and not isinstance(found[-1], BaseException):
            found.append(results.get_nowait())
    for entry in found:
        if isinstance(entry, BaseException):
            raise entry
        if isinstance(entry, str):
            failed = entry
        elif entry is not None:
            answers.append(entry)
    return {"answers": answers, "failed": failed, "ended": bool(found) and found[-1] is None}


def wait_for(work: Callable[[], Awaitable[Any]]) -> Any:
    """What a coroutine returns, run beside whatever loop this thread may have (a notebook has one)."""

    async def report(put: Callable[[Any], None]) -> None:
        put([await work()])

    with under_way(report) as results:
        found = results.get()
    if isinstance(found, BaseException):
        raise found
    return found[0]
