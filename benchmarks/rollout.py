"""What continuous batching brings: `python benchmarks/rollout.py [--sizes XS S] [--rounds 5] [--json FILE]`.

The same requests, sampled by one engine in two ways, one after the other in every round:

    continuous  all requests at once: finished rows leave, waiting ones enter
    static      `slots` requests at a time, the next ones when the last of them is done

`mixed`: geometric lengths with a mean of about a quarter of the limit (a share of 4 / limit of the vocabulary stops a
completion, and random weights of this scale choose nearly evenly). `fixed`: every completion runs to the limit.
Prompts in groups of 8. Prints medians with quartiles of times and of the ratios of a round; the samples of both ways
are compared bit for bit.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hptjax.models import decoder, decoder_apart
from hptjax.models.shape import DecoderConfig
from hptjax.records import Request, Sample, SampleId
from hptjax.rollout.engine import make_engine

SIZES = {  # the shapes of the peer benchmark
    "XS": {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "mlp_size": 512, "vocab_size": 128},
    "S": {"hidden_size": 320, "num_layers": 6, "num_heads": 5, "num_kv_heads": 1, "mlp_size": 1280, "vocab_size": 4096},
}
PROMPT, LIMIT, GROUP = 32, 128, 8


def make_config(size: str) -> DecoderConfig:
    """The decoder of a size."""
    sizes = SIZES[size]
    head_dim = sizes["hidden_size"] // sizes["num_heads"]
    return DecoderConfig(**sizes, head_dim=head_dim, attention_bias=True, tie_embeddings=True)


def make_requests(config: DecoderConfig, count: int, *, mixed: bool) -> list[Request]:
    """Groups of GROUP samples of random prompts; `mixed` stops at one token in LIMIT / 4."""
    stops = frozenset(range(config.vocab_size * 4 // LIMIT)) if mixed else frozenset()
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (-(-count // GROUP), PROMPT)).astype(np.int32)
    return [Request(SampleId(n // GROUP, 0, n % GROUP), prompts[n // GROUP], LIMIT, stops) for n in range(count)]


def build(config: DecoderConfig, options: argparse.Namespace) -> Callable[..., list[Sample]]:
    """The engine of a size."""
    bound: dict[str, Any] = {"config": config, "compute_dtype": jnp.float32}
    return make_engine(
        prefill=functools.partial(decoder_apart.prefill_apart, **bound),
        decode_step=functools.partial(decoder_apart.decode_step_apart, **bound),
        unembedding=functools.partial(decoder.unembedding, config=config),
        prepare=decoder_apart.layers_apart,
        position_axis=decoder_apart.POSITION_AXIS,
        vocab_size=config.vocab_size,
        slots=options.slots,
        prefill_rows=options.slots // GROUP,
        prompt_buckets=(PROMPT,),
        cache_capacity=PROMPT + LIMIT,
        tokens_per_call=options.tokens_per_call,
        pad_id=0,
        max_stop_ids=max(1, config.vocab_size * 4 // LIMIT),
    )


def in_waves(sample: Callable[..., list[Sample]], slots: int) -> Callable[..., list[Sample]]:
    """The same engine, given `slots` requests at a time."""

    def static(params: Any, requests: list[Request], key: Any) -> list[Sample]:
        waves = [requests[at : at + slots] for at in range(0, len(requests), slots)]
        return [done for wave in waves for done in sample(params, wave, key)]

    return static


def spread(values: list[float]) -> list[float]:
    """[lower quartile, median, upper quartile]."""
    if len(values) < 2:
        return values * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, middle, high]


def measure(size: str, work: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table: seconds of both ways and the ratio static / continuous, with quartiles over the rounds."""
    config = make_config(size)
    params = decoder.init_params(jax.random.key(0), config)
    sample, key = build(config, options), jax.random.key(1)
    requests = make_requests(config, options.requests, mixed=work == "mixed")
    ways = {"continuous": sample, "static": in_waves(sample, options.slots)}
    done = {name: way(params, requests, key) for name, way in ways.items()}  # compiles
    for left, right in zip(*done.values(), strict=True):
        assert np.array_equal(left.completion_tokens, right.completion_tokens)
        assert np.array_equal(left.sampler_logprobs.view(np.uint32), right.sampler_logprobs.view(np.uint32))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.rounds):
        for name in sorted(ways, reverse=bool(number % 2)):
            start = time.perf_counter()
            ways[name](params, requests, key)
            seconds[name].append(time.perf_counter() - start)
    tokens = [len(one.completion_tokens) for one in done["static"]]
    return {
        "size": size,
        "work": work,
        "requests": len(requests),
        "slots": options.slots,
        "tokens_per_call": options.tokens_per_call,
        "limit": LIMIT,
        "mean_tokens": statistics.fmean(tokens),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "tokens_per_s": {name: sum(tokens) / statistics.median(values) for name, values in seconds.items()},
        "ratio": spread([slow / fast for slow, fast in zip(seconds["static"], seconds["continuous"], strict=True)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=sorted(SIZES), default=list(SIZES))
    parser.add_argument("--work", nargs="+", choices=["mixed", "fixed"], default=["mixed", "fixed"])
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--tokens-per-call", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json")
    options = parser.parse_args()
    rows = []
    for size in options.sizes:
        for work in options.work:
            row = measure(size, work, options)
            rows.append(row)
            low, middle, high = row["ratio"]
            speeds = ", ".join(f"{name} {value:,.0f} tokens/s" for name, value in row["tokens_per_s"].items())
            what = f"{size:2} {work:5} {row['requests']} requests in {row['slots']} slots"
            lengths = f"mean {row['mean_tokens']:.1f} of {LIMIT} tokens"
            print(f"{what}, {lengths}: {speeds}; ratio {middle:.2f} [{low:.2f}, {high:.2f}]", flush=True)
    if options.json:
        machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "jax": jax.__version__}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "date": time.strftime("%Y-%m-%d"), "rows": rows}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
