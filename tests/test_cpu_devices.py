"""A CPU as several devices: how many, and threads for them to wait in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from hptjax.build.mesh import offer_cpu_devices
from hptjax.config import Config
from hptjax.config_text import build

CORES = os.cpu_count() or 1
REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("edits", "said", "threads"),
    [
        ({"mesh.data": 2}, None, None),
        ({"mesh.data": 2, "model.remat": "full"}, None, max(4, CORES)),
        ({"mesh.data": 2, "model.logprob_chunk_tokens": 2047}, None, max(4, CORES)),
        ({"mesh.data": 2, "model.shape.num_layers": 17}, None, max(4, CORES)),
        ({"mesh.fsdp": 2}, None, max(4, CORES)),
        ({"mesh.data": 1, "model.remat": "full"}, None, None),
        ({"mesh.data": 2, "model.remat": "full"}, "5", 5),
        ({"mesh.data": 8 * CORES, "model.remat": "full"}, None, None),  # of a pod: no host's pool grows with it
    ],
)
@pytest.mark.skipif(CORES < 2, reason="one core is one device")
def test_cpu_devices_have_threads_to_wait_in_where_loops_hold_collectives(edits, said, threads, monkeypatch):
    """A collective in a loop and one outside it, met in another order by two devices, stopped two threads for ever."""
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    if said is not None:
        monkeypatch.setenv("PJRT_NPROC", said)
    offer_cpu_devices(small_config(edits))
    assert os.environ.get("PJRT_NPROC") == (threads and str(threads))


@pytest.mark.skipif(CORES < 2 or not Path("/proc/self/task").is_dir(), reason="counts threads of two cores, on Linux")
@pytest.mark.parametrize(("remat", "threads"), [("full", max(4, CORES)), ("none", CORES)])
def test_cpu_devices_have_these_threads_in_a_process(remat, threads):
    code = (
        "import jax, pathlib\n"
        "from hptjax.build.mesh import offer_cpu_devices\n"
        "from tests.test_cpu_devices import small_config\n"
        f"offer_cpu_devices(small_config({{'mesh.data': 2, 'model.remat': '{remat}'}}))\n"
        "jax.devices()\n"
        "tasks = pathlib.Path('/proc/self/task').glob('*/comm')\n"
        "print(sum(task.read_text().strip() == 'tf_XLAEigen' for task in tasks))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
    environment |= {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == threads


def small_config(edits):
    values = {"model": {"remat": "none", "logprob_chunk_tokens": 2048}, "batch": {"rows": 8, "row_tokens": 256}}
    for name, value in edits.items():
        *sections, field = name.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = value
    return build(Config, values, source="test")


@pytest.mark.parametrize(
    ("mesh", "flags", "devices"),
    [
        ("mesh.data=2", "", min(2, CORES)),
        ("mesh.data=1", "", 1),
        (f"mesh.data={8 * CORES}", "", 1),
        ("mesh.data=2", "--xla_force_host_platform_device_count=4", 4),
    ],
)
def test_cpu_is_as_many_devices_as_the_mesh_has_up_to_its_cores(mesh, flags, devices):
    name, size = mesh.removeprefix("mesh.").split("=")
    code = (
        "import dataclasses, jax\n"
        "from hptjax.build.mesh import offer_cpu_devices\n"
        "from hptjax.config import Config, MeshConfig\n"
        f"config = dataclasses.replace(Config(), mesh=MeshConfig({name}={size}))\n"
        "offer_cpu_devices(config)\n"
        "print(jax.device_count())\n"
        "offer_cpu_devices(config)\n"  # too late, and no error
    )
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == devices
