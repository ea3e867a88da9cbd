"""Rollouts by an outside engine: what is asked, what is taken for an answer, and what a run makes of it.

The server is `tests/completion_server.py`: tokens from a table made by hand, drawn again here where a test says which
they must be. No vLLM or SGLang was at hand; the answers have the fields that their sources name.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import subprocess
import sys
import threading
import time
import tomllib
import typing
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hptjax.build.method import build_recipe
from hptjax.build.outside import (
    build_outside,
    call_body,
    check_logprobs,
    extra_fields,
    make_connect,
    outside_sampler,
    server_key,
)
from hptjax.build.parts import open_parts
from hptjax.config import Config
from hptjax.config_check import check
from hptjax.config_methods import MethodName, learns_from_rollouts
from hptjax.config_server import ServerCall, ServerConfig
from hptjax.config_text import build
from hptjax.data.tokenizer import decode, load_tokenizer
from hptjax.errors import SamplingFailed
from hptjax.explain import update_lines
from hptjax.losses.estimator import Need
from hptjax.losses.words import words_of
from hptjax.models import decoder
from hptjax.models.folder import load_folder
from hptjax.records import FinishReason, Request, SampleId, Source
from hptjax.rollout.completions import FIELDS, completion_body, kind_of_logprobs, read_completion, seed_of
from hptjax.rollout.outside import make_sample
from hptjax.rollout.post import Attempts, Passing, Refused
from hptjax.train.jsonl import read_rows
from tests import tiny
from tests.child import with_devices
from tests.completion_server import CompletionServer, answer_to, draw, table
from tests.multihost_pair import compiled_once
from tests.outside_pair import served_pair
from tests.test_config import VALID, changed
from tests.test_multihost import free_port

V = 12
ODDS = table(V)


def request(question=0, index=0, visit=0, *, prefix=(), limit=6, stop=(1,), **settings):
    prompt = np.random.default_rng(question).integers(2, V, 4).astype(np.int32)
    return Request(
        SampleId(question, visit, index), prompt, limit, frozenset(stop), np.asarray(prefix, np.int32), **settings
    )


def engine(server, *, attempts=3, **changes):
    config = server.config(**changes)
    connect = make_connect(config, server_key(config), vocab_size=V, run_seed=5)
    return make_sample(connect, concurrency=config.concurrency, attempts=Attempts(attempts, first_wait_s=0.01))


def reply(content, status=200, **headers):
    return status, headers, content if isinstance(content, bytes) else json.dumps(content).encode()


REQUESTS = [request(q, i, limit=5 + q) for q in range(3) for i in range(4)]


def same(left, right):
    assert [s.sample_id for s in left] == [s.sample_id for s in right]
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(one.completion_tokens, other.completion_tokens)
        np.testing.assert_array_equal(one.sampler_logprobs, other.sampler_logprobs)
        assert one.finish_reason == other.finish_reason


def drawn_again(asked, run_seed=5):
    """What the table gives for a request, without hptjax: the seed by its formula, the draw by NumPy."""
    question, visit, index = asked.sample_id
    digest = hashlib.sha256(f"{run_seed}/{question}/{visit}".encode()).digest()
    body = {
        "seed": (int.from_bytes(digest[:8], "big") + index) % 2**31,
        "prompt": [*asked.prompt_tokens.tolist(), *asked.prefix_tokens.tolist()],
        "max_tokens": asked.max_completion_tokens - len(asked.prefix_tokens),
        "temperature": asked.temperature,
        "stop_token_ids": list(asked.stop_ids),
        "logprobs": 1,
    }
    return draw(body, ODDS)[:2]


def test_outside_samples_come_in_request_order_whatever_arrives_first():
    found, arrivals = [], []
    waits = [
        lambda body: 0.0,
        lambda body: 0.004 * (12 - body["prompt"][0]) + 0.01 * (body["seed"] % 3),
        lambda body: 0.01 * (body["seed"] % 4),
    ]
    for wait, concurrency in zip(waits, (1, 12, 5), strict=True):
        with CompletionServer(ODDS) as server:
            server.delay, order = wait, []
            sample = engine(server, concurrency=concurrency)
            found.append(sample("w1", REQUESTS, on_finished=lambda done, order=order: order.extend(done)))
            assert server.most <= concurrency
            arrivals.append([s.sample_id for s in order])
    assert arrivals[0] == [r.sample_id for r in REQUESTS]
    assert arrivals[1] != arrivals[0]
    assert sorted(arrivals[1]) == arrivals[0]
    for samples in found:
        assert [s.sample_id for s in samples] == [r.sample_id for r in REQUESTS]
        same(samples, found[0])
    for asked, sample in zip(REQUESTS, found[0], strict=True):
        tokens, logprobs = drawn_again(asked)
        assert sample.completion_tokens.tolist() == tokens
        np.testing.assert_allclose(sample.sampler_logprobs, logprobs, rtol=1e-6)
        assert (sample.finish_reason == FinishReason.STOP) == (tokens[-1] == 1)
        assert sample.decode_shape == "outside w1"
    assert {s.finish_reason for s in found[0]} == set(FinishReason)


def test_outside_seed_follows_from_run_and_id_alone():
    ids = [SampleId(q, v, i) for q in (0, 7, 2**31 - 1) for v in (0, 3) for i in range(8)]
    seeds = {sample_id: seed_of(5, sample_id) for sample_id in ids}
    digest = hashlib.sha256(b"5/7/3").digest()
    assert seeds[SampleId(7, 3, 2)] == (int.from_bytes(digest[:8], "big") + 2) % 2**31
    assert len(set(seeds.values())) == len(ids)
    assert all(0 <= seed < 2**31 for seed in seeds.values())
    assert seed_of(6, ids[0]) != seeds[ids[0]]
    with CompletionServer(ODDS) as server:  # neither place nor company reach the seed
        alone = engine(server)("w", [REQUESTS[7]])
        among = engine(server)("w", REQUESTS[::-1])
    same(alone, [among[4]])
    assert server.asked[0] in server.asked[1:]


def test_outside_body_says_every_setting():
    asked = request(3, 1, 2, prefix=(4, 5), limit=6, stop=(9, 1), temperature=0.5, top_p=0.9)
    body = completion_body(asked, model="m", run_seed=0)
    assert body == {
        "model": "m",
        "prompt": [*asked.prompt_tokens.tolist(), 4, 5],
        "max_tokens": 4,
        "n": 1,
        "stream": False,
        "echo": False,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": seed_of(0, asked.sample_id),
        "stop_token_ids": [1, 9],
        "logprobs": 1,
        "return_token_ids": True,
        "skip_special_tokens": False,
    }
    assert body.keys() == FIELDS
    assert completion_body(request(top_k=7), model="m", run_seed=0)["top_k"] == 7


def test_outside_forced_prefix_is_asked_with_the_prompt_and_kept():
    asked = [request(1, 0, prefix=(4, 5)), request(1, 1, prefix=(4, 1)), request(1, 2, prefix=(4,) * 6)]
    with CompletionServer(ODDS) as server:
        first = []
        samples = engine(server)("w", asked, on_finished=lambda done: first.append([s.sample_id.index for s in done]))
    assert len(server.asked) == 1  # the others need no sampling: they end with a stop token, or at the limit
    assert first == [[1, 2], [0]]
    tokens, logprobs = drawn_again(asked[0])
    assert samples[0].completion_tokens.tolist() == [4, 5, *tokens]
    np.testing.assert_allclose(samples[0].sampler_logprobs, [0, 0, *logprobs], rtol=1e-6)
    assert (samples[0].prefix_len, samples[0].source) == (2, Source.PREFIX)
    assert [s.decode_shape for s in samples] == ["outside w", "", ""]
    assert [s.finish_reason for s in samples[1:]] == [FinishReason.STOP, FinishReason.LENGTH]


FAULTS = {
    "busy": lambda: reply({"error": "busy"}, 503),
    "too many": lambda: reply(b"slow down", 429),
    "cut off": lambda: reply(b'{"choices": [', 200, **{"Content-Length": "4000", "Connection": "close"}),
    "not JSON": lambda: reply(b"<html>hello</html>"),
    "nested": lambda: reply(b"[" * 60_000 + b"]" * 60_000),
    "aborted": lambda: reply({"choices": [{"finish_reason": "abort"}]}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_outside_attempt_that_may_pass_is_made_again_alike(fault):
    with CompletionServer(ODDS) as server:
        server.respond = lambda body, attempt: FAULTS[fault]() if attempt < 2 and body["seed"] % 3 == 0 else None
        samples = engine(server, timeout_s=2.0)("w", REQUESTS)
    counts = Counter(body["seed"] for body in server.asked)
    assert {seed % 3 == 0: count for seed, count in counts.items()} == {True: 3, False: 1}
    assert [s.completion_tokens.tolist() for s in samples] == [drawn_again(r)[0] for r in REQUESTS]


def failing(server, should_stop=lambda: False, **options):
    """The message that a call ends with, and what was kept of it."""
    kept = []
    with pytest.raises(SamplingFailed) as caught:
        engine(server, **options)("w", REQUESTS, should_stop=should_stop, on_finished=kept.extend)
    return str(caught.value), kept


def test_outside_request_that_fails_for_good_ends_the_call_and_the_rest_is_kept():
    bad, failed = seed_of(5, REQUESTS[5].sample_id), []

    def respond(body, attempt):
        failed.extend([attempt] if body["seed"] == bad else [])
        return reply({"message": "out of memory"}, 500) if body["seed"] == bad else None

    def come_late():
        while len(failed) < 3:
            time.sleep(0.01)
        time.sleep(0.1)
        return False

    for should_stop in (lambda: False, come_late):  # late: answers and failure are found together
        failed.clear()
        with CompletionServer(ODDS) as server:
            server.respond = respond
            message, kept = failing(server, should_stop, concurrency=2)
        for word in ["rollout 1/0/1 was not sampled", "expected", "got 500", "out of memory", "tried 3 times"]:
            assert word in message
        assert {s.sample_id for s in kept} >= {r.sample_id for r in REQUESTS[:5]}
        assert len(kept) < len(REQUESTS)
        assert {body["seed"] for body in server.asked} <= {bad} | {seed_of(5, s.sample_id) for s in kept}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (reply({"message": "no such model"}, 404), ["got 404", "no such model", "rollout.server.model"]),
        (reply(b"who are you?", 401), ["got 401", "who are you?", "rollout.server.api_key_env"]),
        (reply(b"bad\x1b[31m top_k\n\n", 400), ["got 400: bad [31m top_k;", "change"]),
        (reply(b"", 302, Location="http://localhost:1/v1/completions"), ["redirects are not followed", "server.url"]),
        (reply(b"x" * 200_000), ["at most", "got a longer one"]),
        (reply(b"x", 200, **{"Content-Encoding": "gzip"}), ["encoded as 'gzip'"]),
    ],
)
def test_outside_server_that_refuses_is_reported_with_what_to_change(fault, words):
    with CompletionServer(ODDS) as server:
        server.respond = lambda body, attempt: fault
        message, kept = failing(server, attempts=1)
    assert kept == []
    for word in [*words, "expected"]:
        assert word in message, message
    assert len(message) < 800
    assert "\x1b" not in message


def test_outside_server_that_is_not_there_or_too_slow_is_named():
    with CompletionServer(ODDS) as server:
        server.delay = lambda body: 0.6
        message, _ = failing(server, attempts=1, timeout_s=0.2)
        gone = server.config()
    assert "within 0.2 s" in message
    assert "raise rollout.server.timeout_s" in message
    connect = make_connect(gone, None, vocab_size=V, run_seed=5)
    sample = make_sample(connect, concurrency=3, attempts=Attempts(2, 0.01))
    with pytest.raises(SamplingFailed, match=r"got ConnectError .*tried 2 times; rollout.server.attempts 2"):
        sample("w", REQUESTS)


def spoiled(change, **settings):
    """An answer to a request, changed, and the request."""
    asked = request(2, 3, limit=8, stop=(), **settings)
    answer = answer_to(completion_body(asked, model="m", run_seed=5), ODDS)
    change(answer, answer["choices"][0])
    return answer, asked


def put(name, value):
    return lambda answer, choice: choice.update({name: value})


def put_logprob(value):
    def change(answer, choice):
        choice["logprobs"]["token_logprobs"][2] = value

    return change


SPOILED = [
    (lambda answer, choice: answer.pop("choices"), "one entry in choices, got nothing|got dict"),
    (lambda answer, choice: answer["choices"].append(choice), "one entry in choices, got a list of 2"),
    (put("finish_reason", None), "finish_reason 'stop' or 'length', got None"),
    (put("finish_reason", "content_filter"), "got 'content_filter'"),
    (put("token_ids", None), "does not know return_token_ids"),
    (put("prompt_token_ids", None), "does not know return_token_ids"),
    (put("prompt_token_ids", [1, 2]), "expected the prompt as it was sent"),
    (put("token_ids", "abc"), "a list of whole numbers, got str"),
    (put("token_ids", [2, 3, True, 4, 5, 6, 7, 8]), "a list of whole numbers"),
    (put("token_ids", [2.0] * 8), "a list of whole numbers"),
    (put("token_ids", []), "1 to 8 token_ids, got 0"),
    (put("token_ids", [2] * 9), "1 to 8 token_ids, got 9"),
    (put("token_ids", [2] * 7 + [V]), "below the vocabulary of 12, got .12.*rollout.server.model"),
    (put("token_ids", [-1] + [2] * 7), "below the vocabulary of 12"),
    (put("logprobs", None), "token_logprobs as a list of numbers, got nothing"),
    (put("logprobs", {"token_logprobs": [-1.0] * 7}), "a log-prob for each of 8 token_ids, got 7"),
    (put_logprob(None), "token_logprobs as a list of numbers"),
    (put_logprob("-1"), "token_logprobs as a list of numbers"),
    (put_logprob(True), "token_logprobs as a list of numbers"),
    (put_logprob(math.nan), "got nan"),
    (put_logprob(-math.inf), "got -inf"),
    (put_logprob(-9999.0), "got -9999"),
    (put_logprob(0.01), r"in \[-1000, 0\], got 0.01"),
    (put("finish_reason", "stop"), "to end with one of .*rollout.stop_ids"),
]


@pytest.mark.parametrize(("change", "words"), SPOILED)
def test_outside_answer_that_is_not_one_is_refused(change, words):
    answer, asked = spoiled(change)
    with pytest.raises((Passing, Refused), match=words):
        read_completion(answer, asked, vocab_size=V, version="w", versioned=False)


def test_outside_answer_that_is_one_passes():
    answer, asked = spoiled(put_logprob(1e-6))
    tokens, logprobs = read_completion(answer, asked, vocab_size=V, version="w", versioned=False)
    assert tokens == answer["choices"][0]["token_ids"]
    assert logprobs[2] == 0.0
    assert len(logprobs) == len(tokens) == 8


def test_outside_completion_must_end_where_the_trainer_says():
    def read(tokens, finish, stop):
        asked = dataclasses.replace(request(2, 3, limit=4), stop_ids=frozenset(stop))
        answer = answer_to(completion_body(asked, model="m", run_seed=5), ODDS)
        logprobs = {"token_logprobs": [-1.0] * len(tokens)}
        answer["choices"][0].update(token_ids=tokens, finish_reason=finish, logprobs=logprobs)
        return read_completion(answer, asked, vocab_size=V, version="w", versioned=False)[0]

    assert read([2, 3, 9], "stop", [9]) == [2, 3, 9]
    assert read([2, 3, 4, 9], "length", [9]) == [2, 3, 4, 9]
    with pytest.raises(Refused, match="got 1 tokens after it: the server does not know stop_token_ids"):
        read([2, 9, 3], "stop", [9])
    with pytest.raises(Refused, match="got 3: the server's context is shorter"):
        read([2, 3, 4], "length", [9])


def test_outside_answer_by_other_weights_is_refused_where_it_says_so():
    answer, asked = spoiled(lambda answer, choice: answer.update(metadata={"weight_version": "w0"}))
    for version, versioned in (("w0", True), ("w1", False)):
        assert read_completion(answer, asked, vocab_size=V, version=version, versioned=versioned)
    with pytest.raises(Refused, match=r"by the weights w1, got one by 'w0'.*rollout.server.updates"):
        read_completion(answer, asked, vocab_size=V, version="w1", versioned=True)


def test_outside_stop_keeps_what_is_done_and_lets_the_rest_go():
    stopping, release = threading.Event(), threading.Event()
    slow = seed_of(5, REQUESTS[3].sample_id)
    with CompletionServer(ODDS) as server:
        server.delay = lambda body: release.wait(10) * 0.0 if body["seed"] == slow else 0.0
        kept = []

        def on_finished(done):
            kept.extend(done)
            if len(kept) >= 3:
                stopping.set()

        start = time.monotonic()
        samples = engine(server, concurrency=1)("w", REQUESTS, should_stop=stopping.is_set, on_finished=on_finished)
        assert time.monotonic() - start < 5
        release.set()
    assert [s.sample_id for s in samples] == [r.sample_id for r in REQUESTS[:3]]
    same(samples, kept)
    assert len(server.asked) == 4


def test_outside_id_that_came_twice_is_refused():
    with CompletionServer(ODDS) as server, pytest.raises(ValueError, match="an id came twice"):
        engine(server)("w", [REQUESTS[0], REQUESTS[0]])


def test_outside_key_travels_in_its_header_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("SERVER_KEY", "s3cret")
    with CompletionServer(ODDS) as server:
        config = server.config(api_key_env="SERVER_KEY")
        server.respond = lambda body, attempt: reply(b"no", 403)
        message, _ = failing(server, api_key_env="SERVER_KEY")
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert server.headers[0]["Accept-Encoding"] == "identity"
    assert "s3cret" not in message
    assert "s3cret" not in json.dumps(dataclasses.asdict(config))
    for wrong in ("", "a\nb", "kéy"):
        monkeypatch.setenv("SERVER_KEY", wrong)
        with pytest.raises(ValueError, match=r"environment variable SERVER_KEY, got.*rollout.server.api_key_env"):
            server_key(config)


@pytest.mark.parametrize(
    ("temperature", "raw", "kind"), [(0.6, False, "after"), (0.6, True, "before"), (1.5, True, "before")]
)
def test_outside_log_probs_before_temperature_are_found_out(temperature, raw, kind):
    asked = request(4, temperature=temperature)
    with CompletionServer(ODDS, raw=raw) as server:
        if kind == "after":
            check_logprobs(server.config(), None, asked)
        else:
            with pytest.raises(ValueError, match=r"--logprobs-mode processed_logprobs.*rollout.temperature to 1"):
                check_logprobs(server.config(), None, asked)
    assert [body["temperature"] for body in server.asked] == [1.0, temperature]


def test_outside_log_probs_that_cannot_be_told_apart_pass():
    def answer(*values):
        return {"choices": [{"logprobs": {"top_logprobs": [{str(i): v for i, v in enumerate(values)}]}}]}

    one = answer(-1.0, -1.5, -2.0, -3.0, -3.0)
    assert kind_of_logprobs(one, answer(-0.5, -1.5, -2.5, -4.5, -4.5), 0.5) == "after"  # 2 nats become 4
    assert kind_of_logprobs(one, one, 0.5) == "before"
    assert kind_of_logprobs(one, one, 0.999) == "unknown"
    assert kind_of_logprobs(answer(*[-2.0] * 5), answer(*[-2.0] * 5), 0.5) == "unknown"
    for strange in (None, "text", {}, {"choices": []}, answer(-1.0), answer(*["x"] * 5), answer(*[math.nan] * 5)):
        assert kind_of_logprobs(one, strange, 0.5) == "unknown"


def test_outside_call_puts_folder_and_version_into_texts_only():
    body = '{"method": "reload", "kwargs": {"path": "{folder}", "list": ["v{version}", 2, null]}, "{folder}": true}'
    filled = call_body(ServerCall("/x", body), Path('/a "b"'), "w1")
    assert filled == {"method": "reload", "kwargs": {"path": '/a "b"', "list": ["vw1", 2, None]}, "{folder}": True}


SERVER = ServerConfig(
    url="http://host:8000/v1", model="m", weights_folder="w", updates=(ServerCall("/take", '{"path": "{folder}"}'),)
)


def with_server(correction="token_tis", **changes) -> Config:
    server = dataclasses.replace(SERVER, **changes)
    return changed(VALID, rollout__engine="server", rollout__server=server, hpt__sampler_correction=correction)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (with_server("none"), ["hpt.sampler_correction", '"none"', "token_tis"]),
        (with_server(url=None), ["rollout.server.url", "none"]),
        (with_server(model=None), ["rollout.server.model"]),
        (with_server(weights_folder=None), ["rollout.server.weights_folder"]),
        (with_server(url="file:///etc/passwd"), ["http://host:port/v1", "file:///etc/passwd"]),
        (with_server(url="http://"), ["http://host:port/v1"]),
        (with_server(url="http://host:99999/v1"), ["http://host:port/v1"]),
        (with_server(url="http://me:word@host/v1"), ["without a user or a password", "rollout.server.api_key_env"]),
        (with_server(url="http://host/v1?key=1"), ["without ? and #"]),
        (with_server(updates=()), ["{folder}", "got none", "docs/outside_engine.md"]),
        (with_server(updates=(ServerCall("/reset"),)), ["{folder}", "got /reset"]),
        (with_server(updates=(ServerCall("//elsewhere", '"{folder}"'),)), ["'//elsewhere'", "rollout.server.updates"]),
        (with_server(updates=(ServerCall("/take", "{folder}"),)), ["JSON in the body of /take"]),
        (with_server(extra_body="[1]"), ["a JSON object in rollout.server.extra_body"]),
        (with_server(concurrency=0), ["rollout.server.concurrency at least 1"]),
        (with_server(attempts=0), ["rollout.server.attempts at least 1"]),
        (with_server(timeout_s=0.0), ["rollout.server.timeout_s above 0"]),
        (changed(VALID, rollout__server=SERVER), ['rollout.engine "server" beside rollout.server.url']),
    ],
)
def test_outside_config_says_expected_got_and_what_to_change(config, words):
    with pytest.raises(ValueError) as caught:
        check(config)
    for word in [*words, "expected", "got", "change"]:
        assert word in str(caught.value), str(caught.value)


def test_outside_config_never_shows_what_might_be_a_key():
    with pytest.raises(ValueError, match=r"rollout.server.api_key_env as the name") as caught:
        check(with_server(api_key_env="sk-1234"))
    assert "1234" not in str(caught.value)


def test_outside_config_that_can_run_passes():
    check(with_server())
    check(changed(with_server("none"), method="sft"))
    assert "by the server at http://host:8000/v1, 64 at a time" in "\n".join(update_lines(with_server()))
    assert extra_fields(dataclasses.replace(SERVER, extra_body='{"no_stop_trim": true}')) == {"no_stop_trim": True}
    with pytest.raises(ValueError, match="got seed, temperature"):
        extra_fields(dataclasses.replace(SERVER, extra_body='{"temperature": 0, "seed": 1}'))


@pytest.mark.parametrize("method", [name for name in typing.get_args(MethodName) if learns_from_rollouts(name)])
def test_outside_every_method_weighs_its_rollouts_by_the_correction(method):
    config = changed(with_server(), method=method, model__teacher="t", model__demonstration_author="a")
    learning = [part for part in build_recipe(config, method, 64).method.parts if part.name == "rl"]
    assert learning
    for part in learning:
        assert part.sources == {Source.ROLLOUT, Source.PREFIX}
        assert part.row.needs >= {Need.SAMPLER_LOGPROBS, Need.ROLLOUT_LOGPROBS}
        assert "min(rho, 2)" in [words_of(weight, "") for weight in part.row.weights]


def served(folder, server, *, steps=2, **changes):
    """A tiny run whose rollouts come from a server. The cap is low enough to be met."""
    config = tiny.tiny_config(folder, method="dr_grpo")
    fields = {
        "rollout__engine": "server",
        "rollout__server": server.config(
            weights_folder=str(folder / "weights"), weights_dtype="float32", attempts=1, concurrency=8
        ),
        "hpt__sampler_correction": "token_tis",
        "hpt__correction_cap": 1.25,
        "train__steps": steps,
        "train__eval_every": 0,
        "eval__questions": 1,
        "eval__train_questions": 0,
        "train__panel_questions": 1,
        "data__validation_questions": 1,
        "data__test_questions": 1,
    }
    return changed(config, **{**fields, **changes})


@pytest.fixture(scope="module")
def shared():
    """The runs below are made of the same compiled programs."""
    with compiled_once():
        yield


@pytest.fixture(scope="module")
def parts(tmp_path_factory, shared):
    with CompletionServer() as server, open_parts(served(tmp_path_factory.mktemp("parts"), server)) as opened:
        yield opened


def with_config(parts, server, folder, **changes):
    config = served(folder, server, **changes)
    return dataclasses.replace(parts, config=config)


def test_outside_publishing_writes_a_folder_that_loads_and_names_it_by_its_weights(parts, tmp_path):
    with CompletionServer() as server:
        engine = build_outside(with_config(parts, server, tmp_path))
        params, names = parts.policy.params, []
        for scale in (1.0, 2.0, 1.0, 3.0):
            names.append(engine.publish(jax.tree.map(lambda leaf, scale=scale: scale * leaf, params)))
            folder = tmp_path / "weights" / f"tiny-{names[-1]}"
            shape, loaded = load_folder(folder)
            assert shape == parts.policy.config
            np.testing.assert_array_equal(loaded["embedding"], scale * np.asarray(params["embedding"]))
            assert server.told[-1] == ("/take", {"model_path": str(folder.resolve()), "names": [names[-1], 1, None]})
    assert names[0] == names[2]
    assert len(set(names)) == 3
    left = {path.name for path in (tmp_path / "weights").iterdir()}
    assert left == {f"tiny-{names[2]}", f"tiny-{names[3]}"}


def test_outside_publishing_goes_on_only_where_the_server_has_taken_the_weights(parts, tmp_path):
    with CompletionServer() as server:
        engine = build_outside(with_config(parts, server, tmp_path))
        for answer, words in (
            (reply({"success": False, "message": "shape mismatch"}), "to succeed, got .*shape mismatch"),
            (reply({"error": "no"}), "to succeed, got .*no"),
            (reply({"detail": "Not Found"}, 404), "got 404.*rollout.server.updates"),
            (reply(b"dead", 500), "got 500: dead"),
        ):
            server.update = lambda path, body, answer=answer: answer
            with pytest.raises(SamplingFailed, match=f"was not given the weights: .*{words}"):
                engine.publish(parts.policy.params)
        for answer in (reply(b""), reply(b"Cache flushed."), reply({"results": [None]})):
            server.update = lambda path, body, answer=answer: answer
            engine.publish(parts.policy.params)
    engine = build_outside(with_config(parts, server, tmp_path))
    with pytest.raises(SamplingFailed, match=r"rollout.server.url"):
        engine.publish(parts.policy.params)


def test_outside_weights_are_published_once_and_again_when_they_change(parts, tmp_path):
    with CompletionServer() as server:
        sample = outside_sampler(with_config(parts, server, tmp_path))
        params = parts.policy.params
        asked = [request(q) for q in range(2)]
        for weights, told in ((params, 1), (dict(params), 1), (jax.tree.map(lambda leaf: leaf + 0, params), 2)):
            shapes = {s.decode_shape for s in sample(weights, asked)}
            assert len(server.told) == told
            assert shapes == {f"outside {server.weights[-1][0]}"}
    assert server.weights[0][0] == server.weights[1][0]


# A whole run


def hand_norms(config, server, shape):
    """The norm of each step's gradient, by hand: one sequence at a time, weights in float64, no packing, no loss table.

    dr_grpo: grad of -sum over rollouts i, tokens t of (r_i - mean of the group) min(rho_it, cap) logp_it / (N L), where
    rho = p / q: p the trainer's probability, q the server's; N rollouts, L the limit. And the same without the weights.
    """
    tokenizer, limit = load_tokenizer(config.model.tokenizer), config.rollout.max_completion_tokens
    norms, cut = [], []
    for step, (_, params) in enumerate(server.weights):
        drawn = [(tuple(body["prompt"]), *draw(body, server.odds)[:2]) for body in server.asked[24 * step :][:24]]
        rewards = {}
        for prompt, tokens, _ in drawn:
            digest = hashlib.sha256(decode(tokenizer, np.asarray(tokens)).encode()).digest()
            rewards.setdefault(prompt, []).append(float(digest[0] % 3 == 0))
        assert [len(group) for group in rewards.values()] == [4] * 6
        sums, left = [0.0, 0.0], {prompt: list(group) for prompt, group in rewards.items()}
        for prompt, tokens, logprobs in drawn:
            advantage = left[prompt].pop(0) - sum(rewards[prompt]) / 4
            own, gradient = token_gradients(params, shape, prompt, tokens)
            rho = np.exp(own - np.asarray(logprobs))
            cut.extend(rho > 1.25)
            for place, weights in enumerate((np.minimum(rho, 1.25), np.ones_like(rho))):
                sums[place] = sums[place] + gradient(-advantage * weights / (24 * limit))
        norms.append([float(np.linalg.norm(whole)) for whole in sums])
    assert 0.05 < sum(cut) / len(cut) < 0.95
    return norms


@functools.cache
def sequence_programs(shape):
    """Log-probs of one sequence's tokens, and the gradient of their weighted sum."""

    def logprobs(params, tokens, targets):
        positions, ones = jnp.arange(tokens.shape[1])[None, :], jnp.ones_like(tokens)
        hidden = decoder.forward(params, tokens, positions, ones, config=shape, compute_dtype=jnp.float32)
        scores = jax.nn.log_softmax(hidden @ decoder.unembedding(params, shape), axis=-1)
        return jnp.take_along_axis(scores, targets[..., None], axis=-1)[0, :, 0]

    def weighted(params, tokens, targets, weights):
        return jnp.sum(weights * logprobs(params, tokens, targets))

    return jax.jit(logprobs), jax.jit(jax.grad(weighted))


def token_gradients(params, shape, prompt, tokens):
    """Log-probs of a completion [c], and weights [c] -> gradient of their weighted sum, flat; float64."""
    forward, backward = sequence_programs(shape)
    whole = np.zeros((1, 49), np.int32)
    whole[0, : len(prompt) + len(tokens)] = [*prompt, *tokens]
    written = slice(len(prompt) - 1, len(prompt) - 1 + len(tokens))

    def gradient(weights):
        spread = np.zeros(48, np.float32)
        spread[written] = weights
        leaves = jax.tree.leaves(backward(params, whole[:, :-1], whole[:, 1:], spread))
        return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves])

    return np.asarray(forward(params, whole[:, :-1], whole[:, 1:]), np.float64)[written], gradient


@dataclasses.dataclass
class Run:
    """A run of two steps, and its server."""

    config: Config
    server: CompletionServer

    def rows(self, name):
        return read_rows(Path(self.config.runs_dir) / "tiny" / name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shared):
    with CompletionServer() as server:
        config = served(tmp_path_factory.mktemp("whole"), server)
        tiny.train(config)
    return Run(config, server)


def test_outside_run_learns_by_the_corrected_gradient(whole, parts):
    names = [name for name, _ in whole.server.weights]
    assert len(names) == len(set(names)) == 2
    assert len(whole.server.asked) == 48
    found = [row["grad_norm"]["policy"] for row in whole.rows("ledger.jsonl")]
    norms = hand_norms(whole.config, whole.server, parts.policy.config)
    np.testing.assert_allclose(found, [corrected for corrected, _ in norms], rtol=1e-4)
    for norm, (_, plain) in zip(found, norms, strict=True):
        assert abs(norm / plain - 1) > 0.01  # the weights matter here
    gaps = [row for row in whole.rows("metrics.jsonl") if "rollout/logp_diff_mean" in row]
    assert len(gaps) == 2
    assert all(0.05 < row["rollout/logp_diff_mean"] < row["rollout/logp_diff_max"] < 5 for row in gaps)


def test_outside_run_whose_server_fails_is_taken_up_again_to_the_same_end(tmp_path, whole, capsys):
    answered, places = [], itertools.count()

    def respond(body, attempt):
        if next(places) >= 33:  # in the second step
            return reply(b"gone", 500)
        return answered.append(body["seed"])

    with CompletionServer() as server:
        run = Run(served(tmp_path, server), server)
        server.respond = respond
        with pytest.raises(SamplingFailed, match="got 500: gone"):
            tiny.train(run.config)
        assert "sampling failed in step 2; what was sampled is saved" in capsys.readouterr().err
        server.asked.clear()
        server.respond = lambda body, attempt: None
        tiny.train(run.config)
    again = {body["seed"] for body in server.asked}
    assert len(server.asked) == len(again) == 48 - len(answered)
    assert not again & set(answered)
    assert run.rows("ledger.jsonl") == whole.rows("ledger.jsonl")
    assert [name for name, _ in server.weights] == [
        name for name, _ in (*whole.server.weights, whole.server.weights[1])
    ]


@pytest.mark.slow
def test_outside_two_processes_hear_of_the_same_samples_and_the_same_failure(tmp_path):
    """Process 0 asks; a request that fails ends both, with what was sampled saved, and both go on from it."""
    places, failed = itertools.count(), []

    def respond(body, attempt):
        if next(places) == 9:
            failed.append(body["seed"])
            return reply(b"gone", 500)
        return None

    with CompletionServer() as server:
        server.respond = respond
        served_pair(tmp_path, server.root)  # the tokenizer, before two processes would write it
        port = free_port()
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.outside_pair", str(tmp_path), port, str(index), f"{server.root}/v1"],
                cwd=Path(__file__).resolve().parents[1],
                env=with_devices(1),
            )
            for index in range(2)
        ]
        try:
            assert [process.wait(400) for process in processes] == [0, 0]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    for index in range(2):
        first, second = json.loads((tmp_path / f"outcome_{index}.json").read_text())
        assert (first["status"], second["status"]) == (2, 0)
        assert "SamplingFailed: rollout" in first["message"]  # of the other process, where that ended first
        assert "got 500: gone" in first["message"]
    counts = Counter(body["seed"] for body in server.asked)
    assert len(counts) == 24
    assert {seed for seed, count in counts.items() if count > 1} == set(failed)
    assert len({name for name, _ in server.weights}) == 1
    rows = read_rows(tmp_path / "runs" / "tiny" / "ledger.jsonl")
    assert [row["sequences"] for row in rows] == [24]


def test_outside_settings_of_the_docs_are_accepted(repository):
    """The TOML of docs/outside_engine.md, as a config has it, for both servers."""
    page = (repository / "docs" / "outside_engine.md").read_text()
    lines = [line[4:] for line in page.splitlines() if line.startswith("    ")]
    start = lines.index("[rollout]")
    text = "\n".join(lines[start : lines.index('sampler_correction = "token_tis"') + 1])
    (sglang,) = [line for line in lines if line.startswith("updates = [{")]
    for updates in ({}, tomllib.loads(sglang)):
        values = tomllib.loads(text) | {"model": {"tokenizer": "somewhere"}}
        values["rollout"]["server"] |= updates
        config = build(Config, values, source="docs")
        check(config)
        assert "/w/x" in json.dumps(call_body(config.rollout.server.updates[0], Path("/w/x"), "v"))
