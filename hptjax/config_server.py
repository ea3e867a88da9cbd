"""The fields of a server that samples in the place of our own engine, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import json
import re
import urllib.parse
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from hptjax.config_problem import Problem
from hptjax.config_text import struct_list


@dataclasses.dataclass(frozen=True)
class ServerCall:
    """One POST of those by which the server takes new weights."""

    path: str  # from the server's root, such as "/update_weights_from_disk"
    body: str = "{}"  # JSON; {folder} and {version} in its texts stand for the weights' folder and their name


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """An OpenAI-compatible server, asked for the rollouts of training where rollout.engine is "server"."""

    url: str | None = None  # of its API, such as "http://localhost:8000/v1"
    model: str | None = None  # the name that the server knows the model by
    weights_folder: str | None = None  # its weights are written into folders here; it must see them at the same path
    weights_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of what is written
    updates: Annotated[tuple[ServerCall, ...], struct_list(ServerCall)] = ()  # by which it takes them, in this order
    extra_body: str = "{}"  # JSON object: more fields of every request for a completion
    concurrency: int = 64  # requests under way at the same time
    attempts: int = 4  # per request
    timeout_s: float = 600.0  # of one attempt, to the answer's last byte
    update_timeout_s: float = 600.0  # likewise, of each of `updates`
    api_key_env: str | None = None  # name of the environment variable that holds the server's key


def server_problems(server: ServerConfig, *, used: bool, correction: str, learns: bool) -> Iterator[Problem]:
    """What is wrong with these fields.

    Args
      used: rollout.engine is "server". correction: hpt.sampler_correction. learns: some stage learns from rollouts.
    """
    if not used:
        if server.url is not None:
            yield 'rollout.engine "server" beside rollout.server.url', '"own"', "rollout.engine"
        return
    for name in ("url", "model", "weights_folder"):
        if not getattr(server, name):
            yield f'rollout.server.{name} for rollout.engine "server"', "none", f"rollout.server.{name}"
    if server.url:
        yield from _url_problems(server.url)
    if learns and correction == "none":
        yield (
            'hpt.sampler_correction for rollout.engine "server", whose log-probs are not those of the trainer',
            '"none"',
            'hpt.sampler_correction, to "token_tis", "sequence_tis" or "masked_is"',
        )
    if server.api_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", server.api_key_env):
        yield (
            "rollout.server.api_key_env as the name of an environment variable",
            "something else, which is not shown: it might be the key",
            "rollout.server.api_key_env",
        )
    if not isinstance(_json(server.extra_body), dict):
        yield "a JSON object in rollout.server.extra_body", repr(server.extra_body), "rollout.server.extra_body"
    yield from _update_problems(server.updates)


def _url_problems(url: str) -> Iterator[Problem]:
    try:
        parts = urllib.parse.urlsplit(url)
        plain = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        plain = False
    if not plain:
        yield "rollout.server.url as http://host:port/v1 or https://...", repr(url), "rollout.server.url"
    elif parts.username is not None or parts.password is not None:
        yield (
            "rollout.server.url without a user or a password (configs are saved)",
            "one with them",
            "rollout.server.url or rollout.server.api_key_env",
        )
    elif parts.query or parts.fragment:
        yield "rollout.server.url without ? and #", repr(url), "rollout.server.url"


def _update_problems(updates: tuple[ServerCall, ...]) -> Iterator[Problem]:
    for call in updates:
        if not call.path.startswith("/") or call.path.startswith("//") or any(c.isspace() for c in call.path):
            yield (
                "each path of rollout.server.updates from the server's root, with one / before it",
                repr(call.path),
                "rollout.server.updates",
            )
        if _json(call.body) is None:
            yield f"JSON in the body of {call.path}", repr(call.body), "rollout.server.updates"
    if not any("{folder}" in call.body for call in updates):
        yield (
            "a call with {folder} in its body, by which the server takes new weights",
            "none" if not updates else ", ".join(call.path for call in updates),
            "rollout.server.updates (docs/outside_engine.md has those of vLLM and SGLang)",
        )


def _json(text: str) -> Any:
    """The value; None where it is not JSON, or null."""
    try:
        return json.loads(text)
    except ValueError:
        return None
