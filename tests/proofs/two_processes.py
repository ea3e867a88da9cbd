"""What one of two processes computes on the mesh that they form together, written to a file.

`test_processes.py` starts it twice, and calls the same functions in its own, single process for what to expect.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hptjax.build.policy import build_policy
from hptjax.build.stages import build_stages
from hptjax.config import Config, MeshConfig
from hptjax.config_model import ShapeConfig
from hptjax.eval.evaluate import heldout_demonstration_nll
from hptjax.sharding.host import to_host
from hptjax.sharding.mesh import make_mesh, put_micro_batch
from hptjax.sharding.rules import replicated
from hptjax.train.state import init_state, jit_step, placed, state_shardings
from hptjax.train.step import make_micro_step
from hptjax.types import MicroBatch
from tests import recorded, tiny, toys

DEVICES_EACH = 4  # of a mesh of eight
ROWS = 24  # of every toy micro-batch: three for each of eight data shards
SHAPE = ShapeConfig(hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=32)
UPDATES = {"hpt": (8, 8), "sft": (36, 0), "grpo": (0, 12)}  # questions gated to a demonstration, and rolled out
Arrays = dict[str, np.ndarray]


def cut(lengths: list[int]) -> list[list[int]]:
    """Consecutive rows, so many for each micro-batch."""
    edges = np.cumsum([0, *lengths])
    return [list(range(a, b)) for a, b in itertools.pairwise(edges)]


# name -> (rows per micro-batch, places by which they are moved from the front: three rows lie on each data shard)
WINDOWS = {
    "one": ([24], 0),
    "three": ([1, 19, 4], 5),
    "four, one of them empty": ([10, 0, 1, 13], 2),
    "seven": ([1, 2, 3, 4, 5, 6, 3], 13),
    "eight, each on the first device": ([3] * 8, 0),
    "eight, each on the last device": ([3] * 8, 21),
}


def toy_rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, mask, integer weights) of the 24 rows; some rows have no live token."""
    rng = np.random.default_rng(41)
    tokens, mask = toys.rows_of(rng, ROWS)
    return tokens, mask, rng.integers(0, 5, tokens.shape)


def toy_window(name: str) -> list[MicroBatch]:
    """The micro-batches of a window, their rows moved as `WINDOWS` says."""
    lengths, moved = WINDOWS[name]
    batches = toys.window(*toy_rows(), cut(lengths), pad_rows=ROWS)

    def turned(leaf):
        return np.roll(leaf, moved, axis=0) if leaf.shape[:1] == (ROWS,) else leaf

    return [jax.tree.map(turned, batch) for batch in batches]


def integer_answer() -> np.ndarray:
    """The gradient of every window, by int64 arithmetic."""
    tokens, mask, weights = toy_rows()
    factors = np.where(mask, weights, 0).astype(np.int64)
    return np.einsum("bt,btf->f", factors, toys.FEATURE_TABLE[tokens].astype(np.int64))


def toy_problem(mesh, losses, params, optimizer):
    """(micro-step, function that makes a fresh state) of a toy problem, compiled as the product compiles its own."""
    optimizers = {"policy": optimizer}
    stats = jax.eval_shape(losses, params, toy_window("one")[0])[1]
    shapes = jax.eval_shape(lambda: init_state(params, optimizers, stats, toys.MAX_MICRO))
    places = state_shardings(
        shapes, {"policy": jax.tree.map(lambda _: replicated(mesh), params["policy"])}, replicated(mesh)
    )
    step = jit_step(make_micro_step(losses, optimizers), places)
    return step, lambda: placed(init_state(jax.tree.map(jnp.copy, params), optimizers, stats, toys.MAX_MICRO), places)


def toy_results(data: int, tensor: int) -> Arrays:
    """Gradient, witness, tokens and loss of every toy window, one after the other through the product's step."""
    mesh = make_mesh(data, tensor)
    step, fresh = toy_problem(mesh, toys.linear_losses, toys.linear_params(), optax.sgd(1.0))
    state, found = fresh(), {}
    for name in WINDOWS:
        before = to_host(state.params["policy"]["theta"])
        batches = [put_micro_batch(mesh, batch) for batch in toy_window(name)]
        state = toys.run_window(step, state, batches)
        found[f"{name}/gradient"] = before - to_host(state.params["policy"]["theta"])
        found |= report_arrays(name, state.report)
    return found


def report_arrays(name: str, report) -> Arrays:
    """What a flush reports, as arrays under `name`."""
    report = to_host(report)
    fields = ("status", "witness", "micro_batches", "tokens")
    stats = {
        f"{name}/stats/{key}": np.stack([stat.total, stat.count])
        for key, stat in report.stats.items()
        if hasattr(stat, "count")
    }
    return {f"{name}/{field}": np.asarray(getattr(report, field)) for field in fields} | stats


def decoder_config(folder: Path, data: int, tensor: int) -> Config:
    """The tiny run with heads and rows that every mesh of eight devices can cut."""
    config = tiny.tiny_config(folder)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, shape=SHAPE),
        rollout=dataclasses.replace(config.rollout, prefill_rows=8),
        batch=dataclasses.replace(config.batch, rows=8),
        mesh=MeshConfig(data=data, tensor=tensor, devices=data * tensor),
    )


def decoder_parts(folder: Path, data: int, tensor: int):
    """(policy, stage) of the real decoder on a mesh."""
    config = decoder_config(folder, data, tensor)
    policy = build_policy(config)
    return policy, build_stages(config, policy, recorded.questions())[-1]


def added(policy, stage, batches, *, flush: bool, state=None):
    """A state, or a fresh one, after these micro-batches; `flush` ends the window with the last of them."""
    state = stage.start({"policy": policy.params}, None) if state is None else state
    for index, batch in enumerate(batches):
        last = jax.device_put(np.asarray(flush and index == len(batches) - 1), replicated(policy.mesh))
        state = stage.micro_step(state, put_micro_batch(policy.mesh, batch), last)
    return state


def leaf_arrays(name: str, tree) -> Arrays:
    """The leaves of a tree, whole, in the tree's order."""
    return {f"{name}/{place:03d}": leaf for place, leaf in enumerate(to_host(jax.tree.leaves(tree)))}


def decoder_results(policy, stage, updates: Mapping[str, tuple[int, int]]) -> Arrays:
    """Summed gradients, parameters after the update and reports of recorded updates, and a held-out loss."""
    found: Arrays = {}
    for name, (gated, rolled) in updates.items():
        batches = stage.assemble(recorded.mixed(gated, rolled), frozenset()).micro_batches
        found |= leaf_arrays(f"{name}/sums", added(policy, stage, batches, flush=False).chains["policy"].sums.gradients)
        state = added(policy, stage, batches, flush=True)
        found |= leaf_arrays(f"{name}/params", state.params) | report_arrays(name, state.report)
    score = jax.jit(lambda params, batch: policy.token_stats(False)(params, batch).logprobs)
    demonstrations = stage.assemble(recorded.mixed(16, 0), frozenset()).micro_batches
    loss = heldout_demonstration_nll(
        policy.params, [put_micro_batch(policy.mesh, batch) for batch in demonstrations], score
    )
    return found | {"held out": np.asarray([loss.nll_sum, loss.tokens], np.float64)}


def main(mesh: str, port: str, index: int, folder: Path) -> None:
    """Everything, on a mesh of `data`x`tensor`, written to `folder`/process_<index>.npz."""
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
    if (jax.process_count(), jax.device_count(), jax.local_device_count()) != (2, 2 * DEVICES_EACH, DEVICES_EACH):
        raise RuntimeError(f"expected two processes of {DEVICES_EACH} devices, got {jax.devices()}")
    data, tensor = map(int, mesh.split("x"))
    found = toy_results(data, tensor) | decoder_results(*decoder_parts(folder, data, tensor), UPDATES)
    np.savez(folder / f"process_{index}.npz", **found)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
