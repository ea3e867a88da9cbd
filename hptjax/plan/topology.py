"""An absent TPU's devices, and the mesh on them: the compiler needs no chip to compile for one."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from hptjax.build.mesh import build_mesh
from hptjax.config import Config, MeshConfig
from hptjax.config_batch import MESH_AXES, mesh_devices, mesh_words
from hptjax.errors import first_line
from hptjax.plan.chips import Slices


def compile_only_devices(slices: Slices) -> list[Any]:
    """Devices that can be compiled for and nothing else.

    Raises libtpu absent or unable to describe the slice -> RuntimeError that says what to install.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError(
            f"expected libtpu, which compiles for {slices.name} without having one, found none; install it with "
            "pip install 'hptjax[tpu]'"
        )
    options = {"num_slices": slices.count} if slices.count > 1 else {}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{slices.chip.name}:{slices.layout}", **options
        )
    except (RuntimeError, NotImplementedError, ImportError) as error:
        raise RuntimeError(
            f"expected libtpu to describe {slices.name}, got: {first_line(error)}; set JAX_PLATFORMS=cpu, or install "
            "another version of it (pip install -U 'hptjax[tpu]')"
        ) from None
    if len(found.devices) != slices.chips:
        raise RuntimeError(
            f"expected {slices.chips} devices for {slices.name}, got {len(found.devices)} from libtpu; "
            "choose another --topology"
        )
    return list(found.devices)


def with_mesh(config: Config, sizes: MeshConfig) -> Config:
    """The config with other mesh sizes; its tables stay."""
    axes = {axis: getattr(sizes, axis) for axis in MESH_AXES}
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, devices=None, **axes))


def mesh_for(config: Config, slices: Slices) -> Config:
    """The config with the mesh to plan: its own; where it sets neither replica nor fsdp, they are filled up.

    Slices become replicas and the chips that `data`, `sequence` and `tensor` leave over become fsdp.
    Raises a mesh whose product is not the number of chips -> ValueError with what would work.
    """
    others = config.mesh.data * config.mesh.sequence * config.mesh.tensor
    if config.mesh.replica == config.mesh.fsdp == 1 and slices.chips_per_slice % others == 0:
        sizes = dataclasses.replace(config.mesh, replica=slices.count, fsdp=slices.chips_per_slice // others)
        return with_mesh(config, sizes)
    if mesh_devices(config) != slices.chips:
        others *= config.mesh.replica
        fits = f"--mesh.fsdp {slices.chips // others}"
        if slices.chips % others or config.mesh.replica % slices.count:
            fits = f"mesh.replica {slices.count} and mesh.fsdp {slices.chips_per_slice} alone"
        raise ValueError(
            f"expected a mesh of {slices.chips} devices for {slices.name}, got {mesh_words(config)} = "
            f"{mesh_devices(config)}; change it ({fits} would fit), or leave out mesh.replica and mesh.fsdp: "
            "slices are then replicas and the rest is fsdp"
        )
    if config.mesh.replica % slices.count:
        raise ValueError(
            f"expected mesh.replica to be a multiple of the {slices.count} slices of {slices.name}, got "
            f"{config.mesh.replica}: only replicas may lie on different slices; change mesh.replica"
        )
    return config


def mesh_on(config: Config, devices: Sequence[Any]) -> jax.sharding.Mesh:
    """The config's mesh on these devices, slices one after the other."""
    return build_mesh(config, sorted(devices, key=lambda device: (getattr(device, "slice_index", 0) or 0, device.id)))
