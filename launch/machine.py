"""Training on this machine: a laptop, or a node with GPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from launch.steps import Command, Step
from launch.training import GRACE_S, SHARED, check_config, check_words, in_container, training

Config = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG", help="a file of configs/")]


@dataclasses.dataclass(frozen=True)
class Laptop:
    """On the CPU of this machine. What follows -- goes to `hptjax train`."""

    config: Config
    dry_run: bool = False  # print what would be run


@dataclasses.dataclass(frozen=True)
class Node:
    """On this machine's GPUs, as one process. What follows -- goes to `hptjax train`."""

    config: Config
    gpus: int = 8  # of this machine; the mesh must have as many devices
    image: str = ""  # run in this container (launch/container/Dockerfile.gpu); empty: in this environment
    shared: str = ""  # with image: a folder of this machine, /shared in the container; runs go into its `runs`
    dry_run: bool = False  # print what would be run


def laptop_steps(options: Laptop, overrides: Sequence[str]) -> list[Step]:
    """Training on the CPU, where an accelerator is present too."""
    check_config(options.config, overrides, devices=1, where="one CPU")
    return [Command(training(options.config, overrides), environment=(("JAX_PLATFORMS", "cpu"),))]


def node_steps(options: Node, overrides: Sequence[str]) -> list[Step]:
    """Training on all GPUs of one machine."""
    if options.gpus < 1:
        raise ValueError(f"expected at least 1 GPU, got {options.gpus}; change --gpus")
    check_config(options.config, overrides, devices=options.gpus, where=f"a node with {options.gpus} GPUs")
    if not options.image:
        if options.shared:
            raise ValueError(f"expected --image where --shared is given, got --shared {options.shared} alone")
        return [Command(training(options.config, overrides))]
    check_words(image=options.image)
    if not options.shared.startswith("/"):
        raise ValueError(
            f"expected the absolute path of an existing folder, or the run dies with the container, got "
            f"'{options.shared}'; change --shared"
        )
    inside = in_container(training(options.config, overrides, runs_dir=f"{SHARED}/runs"))
    docker = ("docker", "run", "--rm", "--init", "--gpus", str(options.gpus), "--shm-size", "8g")
    placed = ("--stop-timeout", str(GRACE_S), "--volume", f"{options.shared}:{SHARED}")
    return [Command((*docker, *placed, options.image, *inside))]
