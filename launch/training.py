"""The training command that every launcher starts, and what is checked before anything is rented."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hptjax.build.mesh import check_mesh
from hptjax.config_batch import mesh_devices, mesh_sizes, mesh_words
from hptjax.config_load import load_config

SHARED = "/shared"  # the shared folder, as a container sees it: run folders, checkpoints, models
GRACE_S = 120  # seconds between SIGTERM and SIGKILL where we may choose them: one micro-batch and one checkpoint


def training(
    config: str, overrides: Sequence[str], *, mode: str | None = None, runs_dir: str | None = None
) -> tuple[str, ...]:
    """The arguments of `hptjax train`. Mode: how its processes find each other; None: there is only one."""
    placed = () if runs_dir is None else ("--runs_dir", runs_dir)
    distributed = () if mode is None else ("--distributed.mode", mode)
    return ("hptjax", "train", config, *distributed, *placed, *overrides)


def in_container(arguments: Sequence[str]) -> tuple[str, ...]:
    """The command of a container: a run that was asked to stop does not count as finished."""
    return ("python", "-m", "launch.until_done", *arguments)


def check_config(path: str, overrides: Sequence[str], *, devices: int, where: str, slices: int = 1) -> None:
    """Nothing, where `hptjax train` with these arguments would accept its config on that many devices.

    Raises ValueError: fields that contradict each other, a mesh that is not the machine, what does not divide over it.
    """
    config = load_config(path, overrides)
    axes, size = mesh_sizes(config), mesh_devices(config)
    if config.mesh.devices not in (None, devices):
        raise ValueError(
            f"expected mesh.devices to be the {devices} devices of {where}, got {config.mesh.devices}; leave it out or "
            "take another machine"
        )
    if size != devices:
        others = size // axes["fsdp"]
        remedy = f"--mesh.fsdp {devices // others}" if devices % others == 0 else "other mesh axes"
        raise ValueError(
            f"expected a mesh of the {devices} devices of {where}, got {mesh_words(config)}, which is {size}; add -- "
            f"{remedy}, or take another machine"
        )
    if axes["replica"] % slices:
        raise ValueError(
            f"expected mesh.replica to be a multiple of the {slices} slices, got {axes['replica']}; the slow "
            f"network between slices carries replicas only; add -- --mesh.replica {slices}"
        )
    check_mesh(config)


def check_name(name: str) -> None:
    """Raises ValueError for a name that Kubernetes or Compute Engine would refuse."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise ValueError(
            f"expected a name of at most 40 lower-case letters, digits and '-' that starts with a letter, got "
            f"'{name}'; change --name"
        )


def check_words(**given: str) -> None:
    """Raises ValueError for a value that would be more than one word of a command, or an option of its own."""
    for name, value in given.items():
        if not re.fullmatch(r"([A-Za-z0-9_./][\w.:/@,+=%-]*)?", value, re.ASCII):
            raise ValueError(
                f"expected one word of letters, digits and . : / @ _ - + , = %, beginning with no sign but . / or _, "
                f"got {value!r}; change --{name}"
            )


def required(**given: str) -> None:
    """Raises ValueError that names what is missing and where it is found."""
    hints = {
        "project": "the Google Cloud project that pays; `gcloud projects list` shows yours",
        "zone": "where the TPUs are, such as us-central1-a",
        "location": "the zone or region of the cluster; `gcloud container clusters list` shows it",
        "cluster": "the GKE cluster with the TPU node pool; `gcloud container clusters list` shows yours",
        "image": "the container made from launch/container/, such as us-docker.pkg.dev/PROJECT/REPOSITORY/hptjax:1",
        "namespace": "where in the cluster the JobSet goes; `default`, if nobody made another",
        "claim": "a ReadWriteMany volume claim: all hosts write one checkpoint together, and it outlives them",
        "nfs": "SERVER:/PATH of a shared folder: all hosts write one checkpoint together, and it outlives them",
    }
    missing = [name for name, value in given.items() if not value]
    if missing:
        lines = "; ".join(f"--{name} is {hints[name]}" for name in missing)
        raise ValueError(f"expected --{' and --'.join(missing)}: {lines}")
