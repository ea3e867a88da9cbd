"""What the evidence of a step costs: `python benchmarks/evidence.py [--pairs 30] [--rows 8] [--tokens 256]`.

A 100 M parameter decoder does SFT steps of one micro-batch and one AdamW update in three forms, one after the other in
every round: without any evidence, with witness, digest and ledger counts, and with the checksum of every leaf as well.
Prints the median ratio of the paired times with quartiles, and the same by counting operations.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hptjax.build.policy import from_scratch
from hptjax.config_model import ShapeConfig
from hptjax.losses.logprobs import token_logprobs
from hptjax.models import decoder
from hptjax.train.state import init_state
from hptjax.train.step import make_micro_step
from hptjax.types import MicroBatch, TermPlane

SHAPE = ShapeConfig(
    hidden_size=640, num_layers=16, num_heads=10, num_kv_heads=5, head_dim=64, mlp_size=1920, max_positions=1024
)
VOCAB = 32_000
MICRO_BATCHES = 16


def make_batch(rows: int, tokens: int) -> MicroBatch:
    """One full micro-batch of random tokens, one segment per row."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB, (rows, tokens + 1)).astype(np.int32)
    zeros, ones = np.zeros((rows, tokens), np.float32), np.ones((rows, tokens), bool)
    planned = np.zeros(MICRO_BATCHES, np.int32)
    planned[0] = rows * tokens
    return MicroBatch(
        input_tokens=ids[:, :-1],
        target_tokens=ids[:, 1:],
        positions=np.tile(np.arange(tokens, dtype=np.int32), (rows, 1)),
        segment_ids=np.ones((rows, tokens), np.int32),
        completion_mask=ones,
        planes={"sft": TermPlane(weights=zeros + np.float32(1 / (rows * tokens)), advantages=zeros)},
        sampler_logprobs=zeros,
        rollout_logprobs=zeros,
        reference_logprobs=zeros,
        temperature=np.ones((rows, 1), np.float32),
        sample_index=np.arange(rows, dtype=np.int32)[:, None],
        sample_hash=np.zeros((rows, 1, 2), np.uint32),
        source=np.zeros((rows, 1), np.int32),
        micro_index=np.zeros((), np.int32),
        planned_tokens=planned,
        planned_digest=np.zeros((MICRO_BATCHES, 2), np.uint32),
    )


def make_forms(rows: int, tokens: int) -> dict[str, tuple[Callable, Any]]:
    """Name -> (step, state): the three forms of the same step, each with a state of its own."""
    config = from_scratch(SHAPE, VOCAB)
    params = jax.jit(lambda key: decoder.init_params(key, config))(jax.random.key(0))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))

    def sft_loss(params: Any, batch: MicroBatch) -> Any:
        hidden = decoder.forward(
            params,
            batch.input_tokens,
            batch.positions,
            batch.segment_ids,
            config=config,
            compute_dtype=jnp.float32,
        )
        stats = token_logprobs(
            hidden,
            decoder.unembedding(params, config),
            batch.target_tokens,
            jnp.ones(batch.target_tokens.shape, jnp.float32),
            chunk_tokens=2048,
            want_entropy=False,
            live=batch.completion_mask,
        )
        return -jnp.sum(stats.logprobs * batch.planes["sft"].weights)

    def losses(params: Any, batch: MicroBatch) -> Any:
        return {"sft": sft_loss(params["policy"], batch)}, {}

    def plain_step(state: Any, batch: MicroBatch, is_last: Any) -> Any:
        params, sums, optimizer_state = state
        gradients = jax.grad(sft_loss)(params, batch)
        sums = jax.tree.map(jnp.add, sums, gradients)

        def flush(params: Any, sums: Any, optimizer_state: Any) -> Any:
            updates, optimizer_state = optimizer.update(sums, optimizer_state, params)
            return optax.apply_updates(params, updates), jax.tree.map(jnp.zeros_like, sums), optimizer_state

        return jax.lax.cond(is_last, flush, lambda *state: state, params, sums, optimizer_state)

    def copied() -> Any:
        return jax.tree.map(jnp.copy, params)

    forms: dict[str, tuple[Callable, Any]] = {
        "no evidence": (
            jax.jit(plain_step, donate_argnums=0),
            (copied(), jax.tree.map(jnp.zeros_like, params), optimizer.init(params)),
        )
    }
    for name, every in (("witness and digest", 1_000_000_000), ("and checksum", 1)):
        step = make_micro_step(losses, {"policy": optimizer}, checksum_every=every)
        state = init_state({"policy": copied()}, {"policy": optimizer}, {}, MICRO_BATCHES)
        forms[name] = (jax.jit(step, donate_argnums=0), state)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{count / 1e6:.1f} M parameters, {rows} x {tokens} tokens per micro-batch, {jax.default_backend()}")
    share = 8 / (6 * rows * tokens)  # per parameter: 8 operations for the checksum, 6 per token for the step
    print(f"checksum by operation count: {share:.4%}")
    return forms


def main() -> None:
    """Runs the rounds and prints seconds and paired ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    batch = jax.tree.map(jnp.asarray, make_batch(options.rows, options.tokens))
    last = jnp.asarray(True)
    forms = make_forms(options.rows, options.tokens)
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for round_index in range(options.pairs + 2):  # two rounds to warm up
        for name in forms:
            step, state = forms[name]
            began = time.perf_counter()
            state = jax.block_until_ready(step(state, batch, last))
            if round_index >= 2:
                seconds[name].append(time.perf_counter() - began)
            forms[name] = (step, state)
    base = seconds["no evidence"]
    for name, values in seconds.items():
        ratios = sorted(value / reference - 1 for value, reference in zip(values, base, strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        print(f"{name:20s} {statistics.median(values):7.3f} s   {middle:+.2%} [{low:+.2%}, {high:+.2%}]")


if __name__ == "__main__":
    main()
