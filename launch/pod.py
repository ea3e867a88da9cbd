"""Training on a TPU pod by queued resources: ask, wait, start the container on every host, follow the log."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence

from launch.machine import Config
from launch.steps import Command, Step, Wait
from launch.tpu import Slice, tpu_slice
from launch.training import GRACE_S, SHARED, check_config, check_name, check_words, in_container, required, training

MOUNTED = "/mnt/shared"  # the shared folder, as a host sees it


@dataclasses.dataclass(frozen=True)
class Pod:
    """On a TPU pod by queued resources. What follows -- goes to `hptjax train`."""

    config: Config
    project: str = ""  # the Google Cloud project that pays
    zone: str = ""
    topology: str = "v5e:4x4"
    accelerator_type: str = ""  # as the TPU API says it, v5litepod-16; empty: that of the topology
    slices: int = 1  # several slices are joined by the data-centre network
    image: str = ""  # the container made from launch/container/Dockerfile.tpu
    nfs: str = ""  # SERVER:/PATH of a folder that all hosts share; /shared in the container
    name: str = "hptjax"  # of the queued resource, its nodes and the container
    spot: bool = False  # cheaper, and may be taken away
    replace: bool = False  # delete the queued resource of that name first, such as one that was taken away
    existing: bool = False  # the pod is there already: start at the container
    dry_run: bool = False  # print what would be run


def pod_steps(options: Pod, overrides: Sequence[str]) -> list[Step]:
    """What a pod needs, from the request to the exit status of the first host."""
    pod = check_pod(options, overrides)
    place = ("--zone", options.zone, "--project", options.project)
    queue = ("gcloud", "compute", "tpus", "queued-resources")
    delete = Command((*queue, "delete", options.name, *place, "--force", "--quiet"))
    nodes = (
        ("--node-id", options.name)
        if options.slices == 1
        else ("--node-count", str(options.slices), "--node-prefix", options.name)
    )
    kind = ("--accelerator-type", pod.accelerator_type, "--runtime-version", pod.runtime)
    spot = ("--spot",) if options.spot else ()
    create = Command((*queue, "create", options.name, *place, *kind, *nodes, *spot, "--quiet"))
    wait = Wait(
        (*queue, "describe", options.name, *place, "--format", "value(state.state)"),
        wanted=("ACTIVE",),
        hopeless=("FAILED", "SUSPENDED", "SUSPENDING", "DELETING"),
    )
    ssh = (*queue, "ssh", options.name, *place)
    everywhere = ("--node", "all", "--worker", "all")
    start = Command((*ssh, *everywhere, "--command", start_script(options, overrides)))
    follow = Command((*ssh, "--node", "0", "--worker", "0", "--command", follow_script(options)))
    request: list[Step] = [] if options.existing else [*([delete] if options.replace else []), create, wait]
    return [*request, start, follow]


def check_pod(options: Pod, overrides: Sequence[str]) -> Slice:
    """The slice that is asked for. Raises ValueError for what is missing or clashes."""
    required(project=options.project, zone=options.zone, image=options.image, nfs=options.nfs)
    check_name(options.name)
    check_words(project=options.project, zone=options.zone, image=options.image)
    pod = tpu_slice(options.topology)
    if options.accelerator_type not in ("", pod.accelerator_type):
        raise ValueError(
            f"expected accelerator type {pod.accelerator_type} for {pod.name} ({pod.chips} chips), got "
            f"{options.accelerator_type}; leave out --accelerator-type or change --topology"
        )
    if options.slices < 1:
        raise ValueError(f"expected at least 1 slice, got {options.slices}; change --slices")
    if options.replace and options.existing:
        raise ValueError("expected --replace or --existing, got both: one deletes the pod that the other uses")
    server, _, path = options.nfs.partition(":")
    if not server or server.startswith("-") or not path.startswith("/"):
        raise ValueError(f"expected SERVER:/PATH of a shared folder, got '{options.nfs}'; change --nfs")
    where = f"{options.slices} x {pod.name}"
    check_config(options.config, overrides, devices=options.slices * pod.chips, where=where, slices=options.slices)
    return pod


def start_script(options: Pod, overrides: Sequence[str]) -> str:
    """What every host runs: the shared folder, then the container. It goes on when the connection is lost."""
    inside = in_container(training(options.config, overrides, mode="tpu", runs_dir=f"{SHARED}/runs"))
    machine = ("--privileged", "--network", "host", "--ulimit", "memlock=-1", "--stop-timeout", str(GRACE_S))
    docker = ("sudo", "docker", "run", "--detach", "--name", options.name, *machine, "--volume", f"{MOUNTED}:{SHARED}")
    registry = options.image.split("/")[0]
    login = registry.endswith(("docker.pkg.dev", "gcr.io"))
    return "\n".join(
        [
            "set -e",
            "command -v mount.nfs >/dev/null || { sudo apt-get update -q; sudo apt-get install -qy nfs-common; }",
            f"sudo mkdir -p {MOUNTED}",
            f"mountpoint -q {MOUNTED} || sudo mount -t nfs {shlex.quote(options.nfs)} {MOUNTED}",
            *([f"sudo gcloud auth configure-docker {registry} --quiet"] if login else []),
            f"sudo docker rm --force {options.name} >/dev/null 2>&1 || true",
            shlex.join([*docker, options.image, *inside]),
        ]
    )


def follow_script(options: Pod) -> str:
    """The log of the first host to its end, and then the exit status of its container."""
    return f"sudo docker logs --follow {options.name}; exit $(sudo docker wait {options.name})"
