"""JSON by POST to a server that nobody vouches for: limits on time, size and attempts, and no redirects.

Neither proxies nor passwords are taken from the environment. Nothing is decompressed, so that a limit in bytes is one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import httpx2

T = TypeVar("T")
SHOWN = 300  # characters of a server's own words in a message of ours
PASSING_STATUS = (408, 425, 429)  # and all from 500
LONGEST_WAIT_S = 30.0  # between two attempts


class Passing(Exception):
    """An attempt failed for a reason that may pass: no connection, a busy server, an answer that makes no sense."""


class Refused(Exception):
    """The server will not do it, or has failed too often; another attempt is of no use."""


@dataclasses.dataclass(frozen=True)
class Attempts:
    """How often something is tried.

    Args
      count: attempts in all. first_wait_s: before the second one; doubled before each later one.
    """

    count: int
    first_wait_s: float = 0.5


@contextlib.asynccontextmanager
async def connected(key: str | None, connections: int) -> AsyncIterator[httpx2.AsyncClient]:
    """A client for `post_json`, with at most so many connections.

    Args
      key: goes into the header Authorization; it is in no message.
    """
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
    async with httpx2.AsyncClient(
        headers=headers, limits=limits, timeout=None, follow_redirects=False, trust_env=False
    ) as client:
        yield client


async def post_json(
    client: httpx2.AsyncClient, url: str, body: Any, *, timeout_s: float, max_bytes: int, limit_field: str
) -> Any:
    """What a server answers to JSON, as JSON values; None for an empty answer, a text for one that is not JSON.

    Args
      timeout_s: from the first byte sent to the last one received. limit_field: the config field that sets it.
      max_bytes: of the answer; the rest is not read.

    Raises Passing: no answer, one that is too long or too late, a status that may pass. Refused: any other status.
    """
    try:
        async with asyncio.timeout(timeout_s), client.stream("POST", url, json=body) as response:
            content = await _content(response, url, max_bytes)
    except TimeoutError:
        raise Passing(
            f"expected an answer of {url} within {timeout_s:g} s, got none; raise {limit_field}, or lower "
            "rollout.server.concurrency"
        ) from None
    except httpx2.HTTPError as error:
        raise Passing(
            f"expected an answer of {url}, got {type(error).__name__} ({shown(str(error))}); start the server, or "
            "change rollout.server.url"
        ) from None
    if not 200 <= response.status_code < 300:
        _refuse(response.status_code, url, content)
    if not content.strip():
        return None
    try:
        return json.loads(content, parse_constant=_no_number)
    except RecursionError:
        raise Passing(f"expected an answer of {url} that can be read, got one that is nested too deeply") from None
    except ValueError:  # UnicodeDecodeError among them
        return content.decode(errors="replace")


async def attempted(attempt: Callable[[], Awaitable[T]], attempts: Attempts, going: Callable[[], bool]) -> T:
    """What `attempt` returns, tried again while it raises Passing and `going()`.

    Raises Refused: an attempt raised it, or the last one failed.
    """
    for number in range(attempts.count):
        try:
            return await attempt()
        except Passing as error:
            if number + 1 == attempts.count or not going():
                times = "once" if number == 0 else f"{number + 1} times"
                raise Refused(f"{error} (tried {times}; rollout.server.attempts {attempts.count})") from None
        await asyncio.sleep(min(attempts.first_wait_s * 2**number, LONGEST_WAIT_S))
    raise AssertionError("expected at least one attempt")


def shown(text: str) -> str:
    """A server's words for a message of ours: one line of printable characters, not too long."""
    words = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * SHOWN]).split())
    return words if len(words) <= SHOWN else f"{words[:SHOWN]} ..."


async def _content(response: httpx2.Response, url: str, max_bytes: int) -> bytes:
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise Passing(f"expected an answer of {url} as it is, got one encoded as {shown(encoding)!r}")
    parts, size = [], 0
    async for part in response.aiter_raw():
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            raise Passing(f"expected an answer of {url} of at most {max_bytes:,} bytes, got a longer one")
    return b"".join(parts)


def _refuse(status: int, url: str, content: bytes) -> NoReturn:
    said = shown(content.decode(errors="replace"))
    got = f"expected {url} to answer with status 200, got {status}" + (f": {said}" if said else "")
    if status >= 500 or status in PASSING_STATUS:
        raise Passing(got)
    if 300 <= status < 400:
        raise Refused(f"{got}; redirects are not followed: change rollout.server.url to the last address")
    change = {
        401: "rollout.server.api_key_env, or the key in it",
        403: "rollout.server.api_key_env, or the key in it",
        404: "rollout.server.url, rollout.server.model or rollout.server.updates",
    }
    raise Refused(f"{got}; change {change.get(status, 'what it names, in the config or in how the server is started')}")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
