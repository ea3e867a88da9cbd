"""What moving the weights to the layout of rollouts costs: `python benchmarks/reshard.py [--rounds 20]`.

A 100 M parameter decoder on eight fake CPU devices (data 2, fsdp 4), from the table `fsdp` to `decode`, cast to
bfloat16 on the way. Prints the median seconds of the move alone and with its checksum, with quartiles. On fake devices
every byte stays in one memory, so the figures say what the checksum adds, not what a network would.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp

from hptjax.build.policy import from_scratch
from hptjax.config_model import ShapeConfig
from hptjax.models import decoder
from hptjax.sharding.mesh import make_mesh
from hptjax.sharding.reshard import make_reshard
from hptjax.sharding.rules import make_rules, named_shardings, shard_tree

SHAPE = ShapeConfig(hidden_size=640, num_layers=16, num_heads=8, num_kv_heads=4, head_dim=80, mlp_size=1920)
VOCAB = 32_000


def main() -> None:
    """Runs both forms in turn and prints one line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    config = from_scratch(SHAPE, VOCAB)
    axes, shapes = decoder.logical_axes(config), decoder.param_shapes(config)
    mesh = make_mesh(2, fsdp=4)
    source, target = (named_shardings(mesh, axes, shapes, make_rules(name)) for name in ("fsdp", "decode"))
    params = shard_tree(decoder.init_params(jax.random.key(0), config), source)

    def narrow(tree: dict) -> dict:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)

    forms = {"move": jax.jit(narrow, out_shardings=target), "move, checked": make_reshard(target, narrow)}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds + 1):
        for name, form in forms.items():
            began = time.perf_counter()
            jax.block_until_ready(form(params))
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - began)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{size:,} parameters, mesh {dict(mesh.shape)}, {rounds} rounds")
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4)
        print(f"{name:14s} {middle:7.3f} s  [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
