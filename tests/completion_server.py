"""A small server with OpenAI's API for completions, on this machine: tokens drawn from a table that is made by hand.

The next token's log-odds depend on the last token alone. What the server draws follows from a request's seed and
prompt, so that a test can draw it again. Every way to misbehave is a function that a test puts in.
"""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from hptjax.config import RolloutConfig
from hptjax.config_server import ServerCall, ServerConfig
from hptjax.models.folder import load_folder


def log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max()
    return shifted - np.log(np.exp(shifted).sum())


def table(vocab_size: int) -> np.ndarray:
    """Log-odds of each next token, by the last token; [V V]."""
    return np.random.default_rng(7).normal(0.0, 0.7, (vocab_size, vocab_size))


def draw(body: dict[str, Any], odds: np.ndarray, *, raw: bool = False) -> tuple[list[int], list[float], list[dict]]:
    """Tokens, their log-probs, and the likeliest at each place; `raw` gives log-probs before temperature."""
    rng = np.random.default_rng(body["seed"])
    last, tokens, logprobs, likeliest = body["prompt"][-1], [], [], []
    while len(tokens) < body["max_tokens"]:
        scaled = log_softmax(odds[last] / body["temperature"])
        reported = log_softmax(odds[last]) if raw else scaled
        last = int(rng.choice(len(scaled), p=np.exp(scaled)))
        tokens.append(last)
        logprobs.append(float(reported[last]))
        best = np.argsort(-reported)[: body["logprobs"]]
        likeliest.append({f"token_id:{token}": float(reported[token]) for token in best})
        if last in body["stop_token_ids"]:
            break
    return tokens, logprobs, likeliest


def answer_to(body: dict[str, Any], odds: np.ndarray, *, raw: bool = False) -> dict[str, Any]:
    """What vLLM answers, as far as the trainer reads it, and some more."""
    tokens, logprobs, likeliest = draw(body, odds, raw=raw)
    choice = {
        "index": 0,
        "text": "...",
        "finish_reason": "stop" if tokens[-1] in body["stop_token_ids"] else "length",
        "stop_reason": None,
        "token_ids": tokens,
        "prompt_token_ids": body["prompt"],
        "logprobs": {"token_logprobs": logprobs, "tokens": ["x"] * len(tokens), "top_logprobs": likeliest},
    }
    return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice], "usage": {}}


class CompletionServer:
    """The server, in threads of its own, for the time of a `with` block.

    Args
      odds: the table; None makes one for the vocabulary of the weights that it is given.
      raw: log-probs before temperature.

    asked: the bodies of all requests for completions, as they came. headers: theirs. told: (path, body) of the others.
    weights: (version, parameters) of every folder that it was told of. most: requests under way at the same time.
    delay: body -> seconds. respond: (body, attempt from 0) -> (status, headers, content) instead of an answer, or None.
    update: (path, body) -> the same for the others.
    """

    def __init__(self, odds: np.ndarray | None = None, *, raw: bool = False):
        self.odds, self.raw = odds, raw
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.told: list[tuple[str, Any]] = []
        self.weights: list[tuple[str, Any]] = []
        self.delay: Callable[[dict[str, Any]], float] = lambda body: 0.0
        self.respond: Callable[[dict[str, Any], int], Any] = lambda body, attempt: None
        self.update: Callable[[str, Any], Any] = lambda path, body: (200, {}, b'{"success": true}')
        self.most = self._now = 0
        self._attempts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __enter__(self) -> CompletionServer:
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, headers, content = outer._answer(self.path, body, dict(self.headers))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: Any) -> None:
                """Says nothing."""

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads, block_on_close = True, False
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Says nothing: a client that goes away is what some tests are about."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def config(self, **changes: Any) -> ServerConfig:
        """The config's section for this server."""
        call = ServerCall("/take", '{"model_path": "{folder}", "names": ["{version}", 1, null]}')
        fields = {"url": f"{self.root}/v1", "model": "tiny", "updates": (call,), "timeout_s": 20.0}
        return ServerConfig(**{**fields, **changes})

    def rollout(self, rollout: RolloutConfig, **changes: Any) -> dict[str, Any]:
        """The fields of a rollout config by which this server samples."""
        return {"engine": "server", "server": self.config(**changes)}

    def _answer(self, path: str, body: Any, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        if path != "/v1/completions":
            self.told.append((path, body))
            answer = self.update(path, body)
            if answer[0] == 200 and "model_path" in (body or {}):
                shape, params = load_folder(body["model_path"])
                self.weights.append((body["names"][0], params))
                self.odds = table(shape.vocab_size) if self.odds is None else self.odds
            return answer
        with self._lock:
            self.asked.append(body)
            self.headers.append(headers)
            attempt = self._attempts[json.dumps(body, sort_keys=True)]
            self._attempts[json.dumps(body, sort_keys=True)] += 1
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            time.sleep(self.delay(body))
            said = self.respond(body, attempt)
            if said is None:
                said = (200, {}, json.dumps(answer_to(body, self.odds, raw=self.raw)).encode())
            return said
        finally:
            with self._lock:
                self._now -= 1
