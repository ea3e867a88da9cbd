"""How long a save holds up training, beside the whole of it: `python benchmarks/checkpoint.py --parameters 215000`.

Parameters, two moments and open sums in float32, as after every step of a run, into a folder of its own; the write goes
on in the background after `save` has returned.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time


def seconds_of_saves(parameters: int, repeats: int) -> list[tuple[float, float]]:
    """(until `save` returned, until all was written) of each save but the first."""
    import jax.numpy as jnp

    from hptjax.train.checkpoint import open_checkpoints

    leaves = {name: jnp.ones((parameters,), jnp.float32) for name in ("params", "mu", "nu", "sums")}
    host = {"rows": [[0.5] * 20] * 50}
    found = []
    with (
        tempfile.TemporaryDirectory() as folder,
        open_checkpoints(folder, keep_last=2, keep_best=1, fingerprint={}) as checkpoints,
    ):
        for step in range(repeats + 1):
            began = time.perf_counter()
            checkpoints.save(step, leaves, host, metric=None)
            returned = time.perf_counter()
            checkpoints.wait()
            found.append((returned - began, time.perf_counter() - began))
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=215_000)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error(f"expected --repeats of at least 2, for quartiles, got {options.repeats}")
    saves = seconds_of_saves(options.parameters, options.repeats)
    for name, values in zip(("held up", "until written"), zip(*saves, strict=True), strict=True):
        low, median, high = statistics.quantiles(values, n=4)
        print(f"{name}: {1e3 * median:.1f} ms [{1e3 * low:.1f}, {1e3 * high:.1f}]")


if __name__ == "__main__":
    main()
