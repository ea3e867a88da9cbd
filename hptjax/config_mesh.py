"""The devices: how many along each axis, what is cut over which, and the processes that they belong to."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from hptjax.config_text import struct_list


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """One line of a sharding table: a logical axis and the mesh axes it is cut over, the slowest first."""

    axis: str  # a name of the tables in sharding/rules.py
    over: tuple[str, ...]  # replica, data, fsdp, sequence, tensor; empty: a copy on every device


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis, and what is cut over which. The product is the number of devices, or 1: the first."""

    replica: int = 1  # slices of a multi-slice pod; only gradients travel between them
    data: int = 1  # parts of a batch's rows
    fsdp: int = 1  # parts of rows, and of weights, sums and moments
    sequence: int = 1  # parts of a row's time axis, for long responses
    tensor: int = 1  # parts of heads, mlp and vocabulary
    devices: int | None = None  # how many of the devices are used, the first ones; None: all, or one where all is 1
    rules: Literal["fsdp", "replicated", "decode"] = "fsdp"  # the table of training, see sharding/rules.py
    axes: Annotated[tuple[RuleConfig, ...], struct_list(RuleConfig)] = ()  # lines that replace those of the table
    rollout_rules: Literal["fsdp", "replicated", "decode"] | None = None  # None: as in training, `axes` included
    rollout_axes: Annotated[tuple[RuleConfig, ...], struct_list(RuleConfig)] = ()  # likewise, for `rollout_rules`


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Several processes that train one model together, usually one per host; each is started with the same config."""

    mode: Literal["none", "auto", "slurm", "tpu", "explicit"] = "none"  # how they find each other
    coordinator: str | None = None  # host:port of process 0, for "explicit"
    processes: int | None = None  # how many, for "explicit"
    process: int | None = None  # which of them this is, from 0, for "explicit"
    timeout_s: float = 300.0  # a process that is waited for longer ends the run, by name
