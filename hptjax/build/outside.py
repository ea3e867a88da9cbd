"""The outside engine of a run: weights into a folder, a word to the server, completions for rollouts.

weights_folder/NAME-DIGEST    a Hugging Face folder; complete before the server hears of it
rollout.server.updates        the POSTs that make the server take it, in order
rollout.server.url            + /completions: one request per sample
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import urllib.parse
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx2
import jax

from hptjax.build.parts import Parts
from hptjax.build.weights import export
from hptjax.config_server import ServerCall, ServerConfig
from hptjax.errors import SamplingFailed
from hptjax.records import Request, Sample
from hptjax.rollout.completions import (
    FIELDS,
    completion_body,
    kind_of_logprobs,
    longest_answer,
    probe_body,
    read_completion,
)
from hptjax.rollout.outside import Answer, Ask, OutsideEngine, make_sample, wait_for
from hptjax.rollout.post import Attempts, Refused, attempted, connected, post_json, shown
from hptjax.sharding.agree import from_first
from hptjax.sharding.host import to_host
from hptjax.sharding.peers import phase
from hptjax.types import Params

DIGEST_DIGITS = 12  # of a version
UPDATE_ANSWER_BYTES = 1 << 20
READ_BYTES = 1 << 22


def outside_sampler(parts: Parts) -> Callable[..., list[Sample]]:
    """What the loop samples by, where a server does it: (params, requests, **options) -> samples.

    The server is given the weights before the first sample by them. Raises ValueError: the key is not in its
    environment variable, a field of rollout.server.extra_body that is ours to set, log-probs before temperature.
    """
    engine = build_outside(parts)
    config, server, key = parts.config, parts.config.rollout.server, server_key(parts.config.rollout.server)
    current: list[Any] = []  # the arrays that the server has, and their version
    looked = False

    def sample(params: Params, requests: Sequence[Request], **options: Any) -> list[Sample]:
        nonlocal looked
        leaves = jax.tree.leaves(params)
        if not current or any(old is not new for old, new in zip(current[0], leaves, strict=True)):
            current[:] = [leaves, engine.publish(params)]
            phase("rollout")
        if not looked and requests and config.rollout.temperature != 1.0:
            from_first(lambda: check_logprobs(server, key, requests[0]), "asking what the server's log-probs are")
        looked = looked or bool(requests)
        return engine.sample(current[1], requests, **options)

    return sample


def build_outside(parts: Parts) -> OutsideEngine:
    """The protocol of `rollout.outside` for the server of a config."""
    config, server = parts.config, parts.config.rollout.server
    key = server_key(server)
    ours = re.compile(rf"{re.escape(config.name)}-[0-9a-f]{{{DIGEST_DIGITS}}}")

    def publish(params: Params) -> str:
        phase("giving the server new weights")
        arrays = to_host(params)
        said = from_first(lambda: _tried(lambda: write_and_tell(arrays)), "giving the server new weights")
        if said["failed"] is not None:
            raise SamplingFailed(f"the server was not given the weights: {said['failed']}")
        return said["done"]

    def write_and_tell(arrays: Params) -> str:
        above = Path(server.weights_folder or "").resolve()
        version, folder = write_version(
            above, config.name, lambda path: export(parts, arrays, path, dtype=server.weights_dtype)
        )
        wait_for(lambda: tell(server, key, folder, version))
        known = sorted((path for path in above.iterdir() if ours.fullmatch(path.name)), key=lambda p: p.stat().st_mtime)
        for path in known[:-2]:  # the server may still be reading the one before
            shutil.rmtree(path, ignore_errors=True)
        return version

    connect = make_connect(server, key, vocab_size=parts.policy.config.vocab_size, run_seed=config.seed)
    return OutsideEngine(
        publish, make_sample(connect, concurrency=server.concurrency, attempts=Attempts(server.attempts))
    )


def make_connect(
    server: ServerConfig, key: str | None, *, vocab_size: int, run_seed: int
) -> Callable[[], AbstractAsyncContextManager[Ask]]:
    """Opens connections to the server, by which one request at a time is asked and its answer checked."""
    extra, url = extra_fields(server), completions_url(server)
    versioned = any("{version}" in call.body for call in server.updates)

    @contextlib.asynccontextmanager
    async def connect() -> AsyncIterator[Ask]:
        async with connected(key, server.concurrency) as client:

            async def ask(request: Request, version: str) -> Answer:
                answer = await post_json(
                    client,
                    url,
                    extra | completion_body(request, model=server.model or "", run_seed=run_seed),
                    timeout_s=server.timeout_s,
                    max_bytes=longest_answer(request),
                    limit_field="rollout.server.timeout_s",
                )
                return read_completion(answer, request, vocab_size=vocab_size, version=version, versioned=versioned)

            yield ask

    return connect


def completions_url(server: ServerConfig) -> str:
    """Where completions are asked for."""
    return f"{(server.url or '').rstrip('/')}/completions"


def server_key(server: ServerConfig) -> str | None:
    """The server's key, from the environment variable that the config names. Raises ValueError: there is none."""
    if server.api_key_env is None:
        return None
    key = os.environ.get(server.api_key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ValueError(
            f"expected the server's key in the environment variable {server.api_key_env}, got "
            f"{'none' if not key else 'one with characters that no header may have'}; set it, or change "
            "rollout.server.api_key_env"
        )
    return key


def extra_fields(server: ServerConfig) -> dict[str, Any]:
    """The user's own fields of a request. Raises ValueError for one that the request has already."""
    extra = json.loads(server.extra_body)
    taken = sorted(FIELDS & extra.keys())
    if taken:
        raise ValueError(
            f"expected fields in rollout.server.extra_body that a request does not have yet, got {', '.join(taken)}; "
            "change rollout.temperature, rollout.top_p, rollout.top_k or rollout.stop_ids instead"
        )
    return extra


def write_version(above: Path, name: str, write: Callable[[Path], None]) -> tuple[str, Path]:
    """A folder of weights, named by what is in it; it is there whole or not at all.

    Args
      above: what it is put into. write: fills an empty folder.
    """
    partial = above / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    version = weights_digest(partial)
    folder = above / f"{name}-{version}"
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return version, folder


def weights_digest(folder: Path) -> str:
    """SHA-256 over config.json and every byte of the weights in a model folder; its first digits."""
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while part := file.read(READ_BYTES):
                digest.update(part)
    return digest.hexdigest()[:DIGEST_DIGITS]


async def tell(server: ServerConfig, key: str | None, folder: Path, version: str) -> None:
    """Asks the server to take the weights in a folder. Raises Refused where it says, in any way, that it has not."""
    async with connected(key, 1) as client:
        for call in server.updates:
            url = root_of(server.url or "") + call.path
            body = call_body(call, folder, version)
            post = functools.partial(
                post_json,
                client,
                url,
                body,
                timeout_s=server.update_timeout_s,
                max_bytes=UPDATE_ANSWER_BYTES,
                limit_field="rollout.server.update_timeout_s",
            )
            answer = await attempted(post, Attempts(server.attempts), lambda: True)
            if isinstance(answer, dict) and (answer.get("success") is False or answer.get("error")):
                raise Refused(
                    f"expected {url} to succeed, got {shown(json.dumps(answer))}; check rollout.server.updates, and "
                    f"that the server can read {folder}"
                )


def call_body(call: ServerCall, folder: Path, version: str) -> Any:
    """The JSON values of a call's body, with folder and version put into its texts."""

    def filled(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("{folder}", str(folder)).replace("{version}", version)
        if isinstance(value, list):
            return [filled(entry) for entry in value]
        return {name: filled(entry) for name, entry in value.items()} if isinstance(value, dict) else value

    return filled(json.loads(call.body))


def root_of(url: str) -> str:
    """Scheme, host and port of an address."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def check_logprobs(server: ServerConfig, key: str | None, request: Request) -> None:
    """Raises ValueError where two probes show that the server's log-probs are those before temperature.

    It asks for the likeliest first tokens at temperature 1 and at the run's. A server that does not name them, or whose
    tokens are too much alike, cannot be told: then rollout/logp_diff_mean is what shows it.
    """

    async def probes() -> list[Any]:
        async with connected(key, 1) as client:
            return [await probe(client, temperature) for temperature in (1.0, request.temperature)]

    async def probe(client: httpx2.AsyncClient, temperature: float) -> Any:
        post = functools.partial(
            post_json,
            client,
            completions_url(server),
            extra_fields(server) | probe_body(request, temperature, model=server.model or ""),
            timeout_s=server.timeout_s,
            max_bytes=longest_answer(request),
            limit_field="rollout.server.timeout_s",
        )
        return await attempted(post, Attempts(server.attempts), lambda: True)

    try:
        at_one, at_other = wait_for(probes)
    except Refused as error:
        raise SamplingFailed(f"the server did not say what its log-probs are: {error}") from None
    if kind_of_logprobs(at_one, at_other, request.temperature) == "before":
        raise ValueError(
            f"expected log-probs after rollout.temperature ({request.temperature:g}), got those before it; start vLLM "
            "with --logprobs-mode processed_logprobs, SGLang without SGLANG_RETURN_ORIGINAL_LOGPROB, or change "
            "rollout.temperature to 1"
        )


def _tried(work: Callable[[], str]) -> dict[str, Any]:
    """What the work gives, or the message of its failure: JSON values, for all processes to end alike."""
    try:
        return {"done": work(), "failed": None}
    except (Refused, OSError) as error:
        return {"done": None, "failed": f"{error}"}
