"""`hptjax plan`: topologies and meshes in, tables and a status out."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence

from rich.console import Console

from hptjax.config import Config
from hptjax.plan.chips import parse_topology
from hptjax.plan.model import decoder_shape
from hptjax.plan.plan import Plan, make_plan
from hptjax.plan.report import print_plan, to_json
from hptjax.rundir import compile_cache_folder

# libtpu looks for the chips of this machine, and complains of each thing that it does not find
WITHOUT_CHIPS = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def plan_command(
    config: Config,
    topologies: Sequence[str],
    *,
    slices: int = 1,
    largest: bool = True,
    search: bool = False,
    cache: pathlib.Path | None = None,
    json_path: pathlib.Path | None = None,
) -> int:
    """Prints the plans of a config on some topologies; 0 where all fit, 1 where one does not.

    Args
      topologies: such as v5e:4x4. slices: of each, where the name does not say. largest: look for the largest batch.
      search: try other meshes, rows and remat policies. cache: folder of results; None: beside the compiled programs.
    """
    wanted = [parse_topology(text) for text in topologies]
    wanted = [dataclasses.replace(one, count=slices) if one.count == 1 else one for one in wanted]
    for name, value in WITHOUT_CHIPS.items():
        os.environ.setdefault(name, value)
    from hptjax.plan.topology import compile_only_devices, mesh_for

    shape = decoder_shape(config)
    folder = cache or compile_cache_folder() / "plan"
    console = Console(stderr=True, highlight=False)
    plans: list[Plan] = []
    configs = [(one, config if search else mesh_for(config, one)) for one in wanted]
    for one, its_config in configs:
        devices = compile_only_devices(one)
        with console.status("compiling") as status:
            say = status.update if console.is_terminal else lambda line: print(f"compiling {line}", file=sys.stderr)
            plans.append(make_plan(its_config, shape, one, devices, cache=folder, say=say))
        print_plan(plans[-1], sys.stdout)
    if json_path is not None:
        json_path.write_text(to_json(plans), encoding="utf-8")
    return 1 if any(plan.too_large() for plan in plans) else 0
