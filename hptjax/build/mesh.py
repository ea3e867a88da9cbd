"""The mesh that a config asks for: its sizes, its two tables, and whether everything divides over it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import jax

from hptjax.build.sampler import FEW_LAYERS
from hptjax.config import Config
from hptjax.config_batch import mesh_devices, mesh_sizes, mesh_words
from hptjax.config_mesh import RuleConfig
from hptjax.model_shape import decoder_shape
from hptjax.models.presets import PRESETS
from hptjax.models.shape import DecoderConfig
from hptjax.sharding.mesh import make_mesh
from hptjax.sharding.rules import Rules, axes_that_divide, make_rules, parts

DEVICE_FLAG = "xla_force_host_platform_device_count"
THREADS = "PJRT_NPROC"  # what jax's CPU client reads for the size of the pool in which all its devices compute
THREADS_PER_DEVICE = 2  # one to wait in inside a loop, one outside


def offer_cpu_devices(config: Config) -> None:
    """Lets the CPU be as many devices as the mesh has, up to its cores, where nobody has said how many it is.

    To be called before jax looks for its devices; afterwards it does nothing. Where an accelerator is found they are
    not used. Devices share a batch with less waiting than threads share each operation.

    A collective holds a thread of the pool until the other devices come to the same one, and XLA's CPU runs one inside
    a loop and one outside in either order: with as many threads as devices, two that wait at different ones stop the
    process. Where that may be, the pool is made larger, which slows small operations. A size the user has set stays.
    """
    wanted, cores = mesh_devices(config), os.cpu_count() or 1
    said = DEVICE_FLAG in os.environ.get("XLA_FLAGS", "") or jax.config.values["jax_num_cpu_devices"] > 0
    offered = 1 < wanted <= cores and config.distributed.mode == "none" and not said
    if (offered or (said and wanted > 1)) and _waits_in_loops(config):
        os.environ.setdefault(THREADS, str(max(cores, THREADS_PER_DEVICE * wanted)))
    if offered:
        with contextlib.suppress(RuntimeError):  # jax has looked already
            jax.config.update("jax_num_cpu_devices", wanted)


def _waits_in_loops(config: Config) -> bool:
    """Whether a loop of a train step may hold a collective: of layers, of chunks of the loss, or with weights cut."""
    model, batch = config.model, config.batch
    chunked = batch.rows * batch.row_tokens > model.logprob_chunk_tokens
    scanned = model.remat != "none" or decoder_shape(config, lambda: 1).num_layers > FEW_LAYERS
    return chunked or scanned or mesh_devices(config) > config.mesh.data


def build_mesh(config: Config, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh of the config, on these devices or on all there are.

    Raises ValueError where the product of the mesh is not their number, or `mesh.devices`. A mesh of one device takes
    the first of several, unless several processes must share it.
    """
    mesh, wanted = config.mesh, mesh_devices(config)
    available = list(jax.devices() if devices is None else devices)
    used = len(available) if mesh.devices is None else mesh.devices
    alone = wanted == 1 and mesh.devices is None and len({device.process_index for device in available}) == 1
    if not 1 <= used <= len(available):
        raise ValueError(f"expected mesh.devices in 1..{len(available)}, the devices there are, got {mesh.devices}")
    if wanted != used and not alone:
        works = [f"mesh.{axis} {size}" for axis, size in _sizes_that_fit(config, used).items()]
        works.append(f"mesh.devices {wanted}" if wanted <= len(available) else f"{wanted} devices")
        raise ValueError(
            f"expected a mesh of {used} devices, got {mesh_words(config)}, which is {wanted}; what would work: "
            f"{' or '.join(works)}"
        )
    return make_mesh(
        mesh.data,
        mesh.tensor,
        replica=mesh.replica,
        fsdp=mesh.fsdp,
        sequence=mesh.sequence,
        devices=available[:wanted],
    )


def _sizes_that_fit(config: Config, devices: int) -> dict[str, int]:
    """The size of each axis with which the others of this mesh make up the devices, where there is one."""
    sizes, product = mesh_sizes(config), mesh_devices(config)
    fits = {axis: devices * sizes[axis] // product for axis in ("data", "fsdp", "tensor")}
    return {axis: size for axis, size in fits.items() if size * product == devices * sizes[axis] and size}


def training_rules(config: Config) -> Rules:
    """The table that batches, parameters, sums and moments follow."""
    return make_rules(config.mesh.rules, _lines(config.mesh.axes, "mesh.axes"))


def rollout_rules(config: Config) -> Rules:
    """The table that rollouts follow: weights while they sample, slots, and the KV cache.

    The time axis is never cut there, because prompts come in buckets and tokens one at a time.
    Raises a line that cuts it, and what `make_rules` raises -> ValueError.
    """
    field, mesh = "mesh.rollout_axes", config.mesh
    own = _lines(mesh.rollout_axes, field)
    if own.get("time"):
        raise ValueError(f"{field} cannot cut 'time', got over {list(own['time'])}: rollouts never do; leave it out.")
    if mesh.rollout_rules is not None:
        return {**make_rules(mesh.rollout_rules, own, field=field), "time": ()}
    make_rules(mesh.rules, own, field=field)
    return {**make_rules(mesh.rules, {**_lines(mesh.axes, "mesh.axes"), **own}), "time": ()}


def _lines(rules: Sequence[RuleConfig], field: str) -> dict[str, tuple[str, ...]]:
    """Lines of a table by logical axis. Raises two lines for one axis -> ValueError, naming it."""
    names = [rule.axis for rule in rules]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"expected one line per logical axis in {field}, got {len(twice)} for {twice[0]!r}; keep one.")
    return {rule.axis: rule.over for rule in rules}


def check_mesh(config: Config, shape: DecoderConfig | None = None) -> None:
    """Raises ValueError where something does not divide over the mesh: the numbers that clash, and what would work.

    Args
      shape: of the model, where it is known; else the config's own, and of a folder nothing is checked.
    """
    sizes = mesh_sizes(config)
    training, rollout = training_rules(config), rollout_rules(config)
    for name, size, logical, rules in (
        ("batch.rows", config.batch.rows, "batch", training),
        ("batch.row_tokens", config.batch.row_tokens, "time", training),
        ("rollout.slots", config.rollout.slots, "batch", rollout),
        ("rollout.prefill_rows", config.rollout.prefill_rows, "batch", rollout),
    ):
        cut = [f"mesh.{axis} ({sizes[axis]})" for axis in rules[logical] if sizes[axis] > 1]
        if size % parts(sizes, logical, rules):
            near = _nearest_multiples(size, parts(sizes, logical, rules))
            raise ValueError(
                f"expected {name} to be a multiple of {' x '.join(cut)}, got {size}; change {name} (to {near}) or "
                f"{' or '.join(axis.split()[0] for axis in cut)}."
            )
    model = config.model
    if shape is None and model.preset is not None and model.path is None:
        shape = PRESETS[model.preset]
    if shape is None and model.path is not None:
        return  # the folder's own sizes are checked when they are known
    known = model.shape if shape is None else shape
    cut_sizes = [
        ("num_heads", known.num_heads, "heads"),
        ("num_kv_heads", known.num_kv_heads, "kv_heads"),
        ("mlp_size", known.mlp_size, "mlp"),
        ("hidden_size", known.hidden_size, "embed"),
    ]
    if shape is not None:
        cut_sizes.append(("vocab_size", shape.vocab_size, "vocab"))
    owner = "model.path" if model.path is not None else "model.shape" if model.preset is None else "model.preset"
    for rules in (training, rollout):
        for name, size, logical in cut_sizes:
            try:
                axes_that_divide(logical, size, rules[logical], sizes)
            except ValueError as clash:
                raise ValueError(f"{owner}.{name}: {clash}.") from None


def _nearest_multiples(size: int, factor: int) -> str:
    below = size // factor * factor
    return " or ".join(str(multiple) for multiple in (below, below + factor) if multiple)
