"""What the loss layer costs: `python benchmarks/loss_layer.py [--rounds 30] [--rows 8] [--tokens 256]`.

The loss layer is everything of a micro-step but the model call and the add: views, masks, denominators, sums of the
term planes, statistics, and the gradient of all that in the log-probs. It is timed alone, on arrays of the real
micro-batch, beside the whole micro-step of a 10 M parameter decoder (forward, backward, add, evidence; no update), one
after the other in every round. Prints the median share with quartiles for several methods.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hptjax.build.method import Recipe, build_recipe, stability_mask
from hptjax.build.policy import from_scratch
from hptjax.config import Config
from hptjax.config_model import ShapeConfig
from hptjax.losses.estimator import Need
from hptjax.losses.logprobs import TokenStats, token_logprobs
from hptjax.models import decoder
from hptjax.train.objective import make_losses
from hptjax.train.state import init_state
from hptjax.train.step import make_micro_step
from hptjax.types import MicroBatch, TermPlane

SHAPE = ShapeConfig(
    hidden_size=256, num_layers=11, num_heads=4, num_kv_heads=2, head_dim=64, mlp_size=768, max_positions=512
)
VOCAB, SEGMENTS, MICRO_BATCHES = 4096, 4, 16
METHODS = ("sft", "grpo", "gspo", "hpt", "pear_token", "dpo", "srft", "kdrl", "prefix_rft")


def make_batch(recipe: Recipe, rows: int, tokens: int) -> MicroBatch:
    """A full micro-batch of random tokens in segments of equal length, every plane on three quarters of them."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB, (rows, tokens + 1)).astype(np.int32)
    segment = tokens // SEGMENTS
    positions = np.tile(np.arange(tokens, dtype=np.int32) % segment, (rows, 1))
    live = positions >= segment // 4
    planned = np.zeros(MICRO_BATCHES, np.int32)
    planned[0] = live.sum()

    def logprobs() -> np.ndarray:
        return (-8.3 + 0.1 * rng.normal(size=(rows, tokens))).astype(np.float32)

    def plane() -> TermPlane:
        advantages = np.repeat(rng.choice([-1.0, 1.0], (rows, SEGMENTS)), segment, axis=1)
        return TermPlane(weights=(live / live.sum()).astype(np.float32), advantages=advantages.astype(np.float32))

    return MicroBatch(
        input_tokens=ids[:, :-1],
        target_tokens=ids[:, 1:],
        positions=positions,
        segment_ids=np.repeat(np.tile(np.arange(1, SEGMENTS + 1, dtype=np.int32), (rows, 1)), segment, axis=1),
        completion_mask=live,
        planes={name: plane() for name in recipe.token_losses},
        sampler_logprobs=logprobs(),
        rollout_logprobs=logprobs(),
        reference_logprobs=logprobs(),
        teacher_logprobs=logprobs(),
        demonstration_logprobs=logprobs(),
        pair_ids=np.tile(np.array([1, 1, 2, 2], np.int32), (rows, 1)),
        temperature=np.ones((rows, SEGMENTS), np.float32),
        sample_index=np.arange(rows * SEGMENTS, dtype=np.int32).reshape(rows, SEGMENTS),
        sample_hash=np.zeros((rows, SEGMENTS, 2), np.uint32),
        source=np.zeros((rows, SEGMENTS), np.int32),
        micro_index=np.zeros((), np.int32),
        planned_tokens=planned,
        planned_digest=np.zeros((MICRO_BATCHES, 2), np.uint32),
    )


def recipe_of(name: str) -> Recipe:
    """The method's recipe in a later update of a rollout batch, where ratios are not 1."""
    config = Config()
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, teacher="teacher", demonstration_author="author"),
        train=dataclasses.replace(config.train, updates_per_rollout_batch=2),
    )
    return build_recipe(config, name, 64)  # type: ignore[arg-type]


def make_forms(name: str, rows: int, tokens: int) -> tuple[Callable[[], None], Callable[[], None], int]:
    """(run the whole micro-step once, run the loss layer once, planes) of a method."""
    recipe = recipe_of(name)
    entropy = Need.ENTROPY in recipe.needs
    shape = from_scratch(SHAPE, VOCAB)
    params = jax.jit(lambda key: decoder.init_params(key, shape))(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, make_batch(recipe, rows, tokens))

    def token_stats(params: Any, batch: MicroBatch) -> TokenStats:
        hidden = decoder.forward(
            params, batch.input_tokens, batch.positions, batch.segment_ids, config=shape, compute_dtype=jnp.float32
        )
        return token_logprobs(
            hidden,
            decoder.unembedding(params, shape),
            batch.target_tokens,
            jnp.ones(batch.target_tokens.shape, jnp.float32),
            chunk_tokens=2048,
            want_entropy=entropy,
            live=batch.completion_mask,
        )

    choices = {"scored": recipe.scores, "stability_mask": stability_mask(recipe)}
    losses = make_losses(token_stats, recipe.token_losses, **choices)  # type: ignore[arg-type]
    optimizer = optax.adamw(1e-4)
    step = jax.jit(make_micro_step(losses, {"policy": optimizer}), donate_argnums=0)
    stats = jax.eval_shape(losses, {"policy": params}, batch)[1]
    state = init_state({"policy": params}, {"policy": optimizer}, stats, MICRO_BATCHES)
    given = jax.jit(token_stats)(params, batch)

    def of_given(given: Any, batch: MicroBatch) -> Any:
        # the "model" of this policy is its own log-probs and entropy
        named, stats = make_losses(lambda given, batch: given, recipe.token_losses, **choices)(  # type: ignore[arg-type]
            {"policy": given}, batch
        )
        return sum(named.values()), stats

    alone = jax.jit(jax.grad(of_given, has_aux=True))
    held = {"state": state}

    def whole() -> None:
        held["state"] = jax.block_until_ready(step(held["state"], batch, jnp.asarray(False)))

    return whole, lambda: jax.block_until_ready(alone(given, batch)), len(recipe.token_losses)


def main() -> None:
    """Runs the rounds and prints seconds and shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--methods", default=",".join(METHODS))
    options = parser.parse_args()
    for name in options.methods.split(","):
        whole, alone, planes = make_forms(name, options.rows, options.tokens)
        pairs = []
        for round_index in range(options.rounds + 2):  # two rounds to warm up
            marks = [time.perf_counter()]
            for run in (whole, alone):
                run()
                marks.append(time.perf_counter())
            if round_index >= 2:
                pairs.append((marks[1] - marks[0], marks[2] - marks[1]))
        low, middle, high = statistics.quantiles([layer / step for step, layer in pairs], n=4)
        step, layer = (statistics.median(values) for values in zip(*pairs, strict=True))
        print(
            f"{name:12s} {planes} plane(s)   micro-step {step:.3f} s   loss layer {1e3 * layer:6.2f} ms   "
            f"{middle:.2%} [{low:.2%}, {high:.2%}]",
            flush=True,
        )
    arrays = jax.eval_shape(lambda key: decoder.init_params(key, from_scratch(SHAPE, VOCAB)), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(arrays))
    print(f"{count / 1e6:.1f} M parameters, {options.rows} x {options.tokens} tokens per micro-batch")


if __name__ == "__main__":
    main()
