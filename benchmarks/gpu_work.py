"""The work of `benchmarks/gpu.py` by hptjax's own parts, one case per process, at whatever device jax finds."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hptjax.bench.account import decode_bytes, training_flops
from hptjax.bench.point import WARM, point_config
from hptjax.bench.sizes import SPECIALS
from hptjax.bench.work import random_questions, time_steps
from hptjax.build.data import request_maker
from hptjax.build.policy import Policy, build_policy
from hptjax.build.stages import build_stage
from hptjax.config import Config, StageConfig
from hptjax.config_text import build
from hptjax.data.tokenizer import make_character_tokenizer
from hptjax.hpt.gate import demonstration_sample
from hptjax.model_shape import adapter_count, asked_adapter
from hptjax.models.presets import PRESETS
from hptjax.sharding.mesh import put_micro_batch
from hptjax.train.accumulate import Status

PRESET = {"0.6B": "qwen3-0.6b", "1.5B": "qwen2.5-math-1.5b", "7B": "qwen2.5-math-7b"}
SYMBOLS = 125  # of the tokenizer; a preset's vocabulary is larger, and its other tokens are only numbers
TINY = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_size": 64}
TOKENS_PER_CALL = 64  # as in configs/hpt_qwen2.5_math_1.5b.toml
BF16_BYTES = 2


def work(case: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a case, by its kind."""
    kinds: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
        "ceiling": time_ceiling,
        "training": time_training,
        "decoding": time_decoding,
        "step": time_step,
    }
    return {"device": jax.devices()[0].device_kind, **kinds[case["kind"]](case)}


def time_ceiling(case: Mapping[str, Any]) -> dict[str, Any]:
    """The best of several: 2 s^3 operations of a bf16 matmul, and bytes read and written by a copy."""
    side = case["side"]
    a, b = (jax.random.normal(jax.random.key(n), (side, side), jnp.bfloat16) for n in (0, 1))
    whole = jnp.zeros(case["mib"] * 2**20 // 4, jnp.float32)

    def best(call: Callable[[], Any], inner: int = 10) -> float:
        jax.block_until_ready(call())
        seconds = []
        for _ in range(max(3, case["repeats"])):
            began = time.perf_counter()
            jax.block_until_ready([call() for _ in range(inner)])
            seconds.append((time.perf_counter() - began) / inner)
        return min(seconds)

    multiply, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    return {
        "tflops": 2 * side**3 / best(lambda: multiply(a, b)) / 1e12,
        "gb_per_s": 2 * whole.nbytes / best(lambda: copy(whole)) / 1e9,
    }


def make_config(folder: Path, case: Mapping[str, Any], longest: int, **sections: dict[str, Any]) -> Config:
    """A run at the case's shape, in bf16, with random weights."""
    make_character_tokenizer("".join(chr(0x4E00 + n) for n in range(SYMBOLS)), folder / "tokenizer")
    values: dict[str, Any] = {
        "name": "gpu",
        "runs_dir": str(folder / "runs"),
        "model": {"tokenizer": str(folder / "tokenizer"), **model_values(case, longest)},
        "lora": {"rank": case["lora"]} if "lora" in case else {},
        **sections,
    }
    return build(Config, values, source="benchmarks/gpu.py")


def model_values(case: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """The model section: a preset, or the tiny shape, with a context that holds the longest sample."""
    common = {"compute_dtype": "bfloat16", "remat": case.get("remat", "none")}
    if case["shape"] == "tiny":
        return {**common, "shape": {**TINY, "max_positions": longest}}
    preset = PRESET[case["shape"]]
    return {**common, "preset": preset, "max_positions": max(longest, PRESETS[preset].max_positions)}


def time_training(case: Mapping[str, Any]) -> dict[str, Any]:
    """Updates of `micro` full micro-batches, assembled, accumulated and applied with all evidence."""
    rows, tokens, segments, micro = case["rows"], case["row_tokens"], case["segments"], case["micro"]
    length, count = tokens // segments, case["rows"] * case["segments"] * case["micro"]
    with tempfile.TemporaryDirectory() as name:
        config = make_config(
            Path(name),
            case,
            tokens,
            batch={"rows": rows, "row_tokens": tokens, "max_segments": segments, "max_micro_batches": micro},
            data={"max_prompt_tokens": 1, "questions_per_step": count},
            rollout={"max_completion_tokens": length - 1},
        )
        policy = build_policy(config)
    drawn = np.random.default_rng(0).integers(SPECIALS, policy.config.vocab_size, (count, length)).astype(np.int32)
    questions = [
        dataclasses.replace(question, prompt_tokens=row[:1], demonstration_tokens=row[1:])
        for question, row in zip(random_questions(count, 1, SPECIALS + 1), drawn, strict=True)
    ]
    stage = build_stage(config, StageConfig(method="sft", steps=1), policy, questions, index=0)
    state = stage.start({"policy": policy.params}, None)
    samples = [demonstration_sample(question) for question in questions]
    seconds = []
    for _ in range(case["repeats"] + 1):
        began = time.perf_counter()
        micro_batches = stage.assemble(samples, frozenset()).micro_batches
        assert len(micro_batches) == micro, len(micro_batches)
        for number, one in enumerate(micro_batches):
            placed = put_micro_batch(policy.mesh, one, policy.rules)
            state = stage.micro_step(state, placed, np.asarray(number == micro - 1))
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - began)
        assert int(state.report.status) == Status.UPDATED, int(state.report.status)
    lora = asked_adapter(config)
    adapters = None if lora is None else adapter_count(policy.config, lora)
    targets = [length - 1] * count
    flops = training_flops(policy.config, targets, adapters)
    return {"seconds": seconds[1:], "tokens": sum(targets), "flops": flops, "first_s": seconds[0], **memory()}


def time_decoding(case: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of the tokens between a short and a long limit, so that prefill and start are not among them."""
    slots, prompt, short, long = case["slots"], case["prompt"], case["short"], case["long"]
    group = min(8, slots)
    with tempfile.TemporaryDirectory() as name:
        rollout = {
            "group_size": group,
            "max_completion_tokens": long,
            "slots": slots,
            "prefill_rows": max(1, slots // group),
            "prompt_buckets": [prompt],
            "cache_capacity": prompt + long,
            "tokens_per_call": min(TOKENS_PER_CALL, short),
        }
        config = make_config(
            Path(name),
            case,
            prompt + long,
            rollout=rollout,
            data={"max_prompt_tokens": prompt, "questions_per_step": 1},
        )
        policy = build_policy(config)
    seconds = {limit: _sampling_seconds(policy, slots // group, group, prompt, limit, case) for limit in (short, long)}
    apart = [slow - fast for slow, fast in zip(seconds[long], seconds[short], strict=True)]
    steps = long - short
    read = steps * decode_bytes(policy.config, rows=slots, cached=prompt + (short + long) / 2, item=BF16_BYTES)
    whole = statistics.median(seconds[long])
    return {"seconds": apart, "tokens": slots * steps, "bytes": read, "whole_s": whole, **memory()}


def _sampling_seconds(
    policy: Policy, prompts: int, group: int, tokens: int, limit: int, case: Mapping[str, Any]
) -> list[float]:
    """Of sampling `prompts` groups to this limit; no token ends a completion."""
    questions = random_questions(prompts, tokens, policy.config.vocab_size)
    make = request_maker(count=group, max_completion_tokens=limit, stop_ids=frozenset(), temperature=1.0)
    seconds = []
    for visit in range(case["repeats"] + 1):
        began = time.perf_counter()
        samples = policy.sample(policy.params, make(questions, visit), jax.random.key(0))
        seconds.append(time.perf_counter() - began)
        assert all(len(sample.completion_tokens) == limit for sample in samples)
    return seconds[1:]


def time_step(case: Mapping[str, Any]) -> dict[str, Any]:
    """Steps of the training loop: rollouts, verdicts, half of the questions gated, one update."""
    questions, group, prompt, long = case["questions"], case["group"], case["prompt"], case["long"]
    total, rows = prompt + long, max(1, min(8, questions))
    values = {
        "method": "hpt",
        "model": model_values(case, total),
        "data": {"max_prompt_tokens": prompt, "questions_per_step": questions},
        "rollout": {
            "group_size": group,
            "max_completion_tokens": long,
            "slots": questions * group,
            "prefill_rows": questions,
            "prompt_buckets": [prompt],
            "cache_capacity": total,
            "tokens_per_call": TOKENS_PER_CALL,
        },
        "batch": {
            "rows": rows,
            "row_tokens": total,
            "max_segments": 1,
            "max_micro_batches": -(-questions * group // rows),
        },
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = point_config(folder, values, vocabulary=SYMBOLS + SPECIALS, steps=WARM + case["repeats"])
        figures, counts = time_steps(config, folder, warm=WARM, on_warm=lambda: None)
    split = {name: statistics.median(values) for name, values in figures.items() if name != "step"}
    tokens = counts["generated_tokens"] + counts["trained_tokens"]
    return {"seconds": figures["step"], "split": split, "tokens": tokens, "counts": counts, **memory()}


def memory() -> dict[str, float]:
    """The device's own peak, where it says."""
    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_gib": stats["peak_bytes_in_use"] / 2**30} if "peak_bytes_in_use" in stats else {}
