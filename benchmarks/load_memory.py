"""Peak anonymous memory of loading a model folder: `python benchmarks/load_memory.py --preset qwen2.5-math-1.5b`.

Makes a folder of random bf16 weights in the published shape (3.1 GB on disk for 1.5 B parameters, removed at the end),
loads it in a process of its own onto its devices as float32, and watches RssAnon in /proc/self/status every 10 ms. File
pages, which the kernel can drop, are not counted. `--devices 4` cuts the weights over four fake CPU devices.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time

PARAMETER_BYTES = 4
WATCH_S = 0.01


def make_folder(folder: pathlib.Path, preset: str) -> None:
    """Random weights in a preset's shape; norms near 1, biases and matrices small."""
    import ml_dtypes
    import numpy as np

    from hptjax.models.folder import expected_shapes
    from hptjax.models.folder_config import CONFIG_FILE, family, write_config
    from hptjax.models.folder_write import write_weights
    from hptjax.models.presets import PRESETS

    config = PRESETS[preset]
    shapes = expected_shapes(family(config)[1], config)
    rng = np.random.default_rng(0)

    def tensor(name: str) -> np.ndarray:
        value = 0.02 * rng.standard_normal(shapes[name], np.float32) + ("norm" in name)
        return value.astype(ml_dtypes.bfloat16)

    sizes = {name: 2 * int(np.prod(shape)) for name, shape in shapes.items()}
    documents = {CONFIG_FILE: write_config(config, "bfloat16", {})}
    write_weights(folder, sizes, tensor, documents, shard_bytes=10**9)


def anonymous_bytes() -> int:
    """Resident anonymous memory of this process."""
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.findall(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)[0])


def load(folder: pathlib.Path, devices: int) -> dict[str, float]:
    """Loads the folder; bytes before it, at the peak and after it, and seconds."""
    import jax

    from hptjax.models import decoder
    from hptjax.models.folder_slices import folder_shape, load_placed
    from hptjax.sharding.mesh import make_mesh
    from hptjax.sharding.rules import named_shardings

    shape = folder_shape(folder)
    mesh = make_mesh(fsdp=devices, devices=jax.devices()[:devices])
    shardings = named_shardings(mesh, decoder.logical_axes(shape), decoder.param_shapes(shape))
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(WATCH_S):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    params = jax.block_until_ready(load_placed(folder, shardings))
    seconds = time.monotonic() - began
    done.set()
    watcher.join()
    after = anonymous_bytes()
    held = sum(leaf.size for leaf in jax.tree.leaves(params)) * PARAMETER_BYTES
    return {"parameters": held, "before": before, "peak": max(peak[0], after), "after": after, "seconds": seconds}


def main() -> None:
    """Makes the folder, loads it in another process, prints a line per figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="qwen2.5-math-1.5b")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices that the weights are cut over")
    parser.add_argument("--folder", type=pathlib.Path, help="load this one instead of a random one")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_this_process:
        print(json.dumps(load(options.folder, options.devices)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or pathlib.Path(scratch)
        if options.folder is None:
            make_folder(folder, options.preset)
        flag = f"--xla_force_host_platform_device_count={options.devices}"
        again = [sys.executable, __file__, "--folder", str(folder), "--devices", str(options.devices)]
        done = subprocess.run(
            [*again, "--in-this-process"],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag},
            check=True,
            capture_output=True,
            text=True,
        )
    found = json.loads(done.stdout.splitlines()[-1])
    gib = {name: found[name] / 2**30 for name in ("parameters", "before", "peak", "after")}
    print(f"parameters, float32   {gib['parameters']:.2f} GiB on {options.devices} device(s)")
    print(
        f"anonymous memory      {gib['before']:.2f} GiB before, {gib['peak']:.2f} at the peak, {gib['after']:.2f} after"
    )
    print(f"peak / parameters     {found['peak'] / found['parameters']:.3f}")
    print(f"seconds               {found['seconds']:.1f}")


if __name__ == "__main__":
    main()
