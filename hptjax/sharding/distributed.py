"""How several processes become one run: jax.distributed started from addresses, from Slurm or from TPU metadata."""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from hptjax.errors import BAD_INPUT, first_line

HEARTBEAT_MARGIN_S = 60  # jax's own heartbeats end a process without names; hptjax's watchdog must come first
SLURM_FIELDS = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
MODES = ("none", "auto", "slurm", "tpu", "explicit")


def initialize(
    mode: str,
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout_s: float = 300.0,
    connect_s: float = 300.0,
) -> None:
    """Joins the other processes, before anything touches a device; nothing where `mode` is "none".

    Called again in a process that has joined, it does nothing. On CPU devices collectives go through gloo.

    Args
      mode: one of `MODES`. "explicit" takes the next three; elsewhere jax finds them in the environment.
      coordinator: host:port of process 0. processes: how many. process: which of them this is, from 0.
      timeout_s: of the watchdog; jax's heartbeats wait longer than it. connect_s: how long the others are waited for.

    Raises ValueError, naming the field: values that do not fit the mode, nothing found in the environment, a port that
      is taken, or a program that has used its devices already. Where the others do not come in time it says so and ends
      the process with status 2: jax would abort, and a thread that waits in it cannot be reached.
    """
    check_fields(mode, coordinator, processes, process, os.environ)
    if mode == "none" or jax.distributed.is_initialized():
        return
    if mode == "explicit" and process == 0:
        _check_port_is_free(str(coordinator))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # jax's own handler would swallow SIGTERM before the run listens for it
    jax.config.update("jax_enable_preemption_service", False)
    options: dict[str, Any] = {
        "initialization_timeout": math.ceil(connect_s) + HEARTBEAT_MARGIN_S,
        "heartbeat_timeout_seconds": math.ceil(timeout_s) + HEARTBEAT_MARGIN_S,
        "shutdown_timeout_seconds": math.ceil(timeout_s),
    }
    if mode == "explicit":
        options |= {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
        options["cluster_detection_method"] = "deactivate"
    elif mode == "slurm":
        options |= {"cluster_detection_method": "slurm", "local_device_ids": slurm_local_devices(os.environ)}
    try:
        with _in_time(mode, connect_s):
            jax.distributed.initialize(**options)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"expected to join the other processes by distributed.mode = '{mode}', got: {first_line(error)}; "
            f"{_HINTS[mode]}"
        ) from error


_HINTS = {
    "auto": "no cluster was recognised, or it does not answer: use distributed.mode = 'explicit' with "
    "distributed.coordinator, processes and process",
    "slurm": "check that every task of the step was started by srun and can reach the first node",
    "tpu": "check that the same command runs on every host of the slice",
    "explicit": "check that distributed.coordinator is host:port of process 0, that the port is free there, and that "
    "all of distributed.processes were started",
}


@contextlib.contextmanager
def _in_time(mode: str, limit_s: float) -> Iterator[None]:
    """Ends the process, with words, where the block takes longer."""

    def give_up() -> None:
        print(
            f"hptjax: expected to join the other processes by distributed.mode = '{mode}' within {limit_s:g} s, got no "
            f"answer from all of them; {_HINTS[mode]}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(BAD_INPUT)

    timer = threading.Timer(limit_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check_port_is_free(coordinator: str) -> None:
    """Raises ValueError where another program listens at the port; jax may end by a segmentation fault."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        with socket.create_server(("", int(coordinator.rpartition(":")[2])), family=family, dualstack_ipv6=both):
            pass
    except OSError as error:
        raise ValueError(
            f"expected a free port of this host, where process 0 listens, got '{coordinator}': {error}; change "
            "distributed.coordinator in all processes, or end the program that has the port"
        ) from None


def check_fields(
    mode: str, coordinator: str | None, processes: int | None, process: int | None, environment: Mapping[str, str]
) -> None:
    """Raises ValueError, naming the field, where the values do not fit the mode."""
    if mode not in MODES:
        raise ValueError(f"expected distributed.mode to be one of {', '.join(MODES)}, got '{mode}'")
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    if mode != "explicit":
        if named := [f"distributed.{name}" for name, value in given.items() if value is not None]:
            raise ValueError(
                f"expected {', '.join(named)} only with distributed.mode = 'explicit', got '{mode}'; set the mode, or "
                "leave them out"
            )
        if mode == "slurm" and (absent := [name for name in SLURM_FIELDS if name not in environment]):
            raise ValueError(
                f"expected a Slurm step for distributed.mode = 'slurm', got none of {', '.join(absent)} in the "
                "environment; start the command by srun, or change distributed.mode"
            )
        if mode == "slurm":
            _check_slurm(environment)
        return
    if absent := [f"distributed.{name}" for name, value in given.items() if value is None]:
        raise ValueError(f"expected {', '.join(absent)} with distributed.mode = 'explicit', got nothing; set them")
    shaped = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]]+):([0-9]{1,5})", str(coordinator))
    if not shaped or not 1 <= int(shaped[2]) <= 65535:
        raise ValueError(f"expected host:port of process 0, got '{coordinator}'; change distributed.coordinator")
    if processes is None or processes < 1:
        raise ValueError(f"expected distributed.processes >= 1, got {processes}")
    if process is None or not 0 <= process < processes:
        raise ValueError(
            f"expected distributed.process in 0..{processes - 1} (distributed.processes is {processes}), got {process}"
        )


def _check_slurm(environment: Mapping[str, str]) -> None:
    """Raises ValueError, naming the variable, where srun would have written something else."""
    forms = dict.fromkeys(("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"), r"[0-9]+")
    forms |= {"SLURM_STEP_NODELIST": r"[^\s,\[]+.*"}
    optional = {"SLURM_GPUS_ON_NODE": r"[0-9]+", "SLURM_STEP_TASKS_PER_NODE": r"[0-9]+.*"}
    forms |= {name: form for name, form in optional.items() if name in environment}
    for name, form in forms.items():
        if not re.fullmatch(form, environment[name]):
            raise ValueError(
                f"expected {name} as srun sets it for distributed.mode = 'slurm', got '{environment[name]}'; start the "
                "command by srun, or change distributed.mode"
            )
    if int(environment["SLURM_PROCID"]) >= int(environment["SLURM_NTASKS"]):
        raise ValueError(
            f"expected SLURM_PROCID below SLURM_NTASKS ({environment['SLURM_NTASKS']}), got "
            f"{environment['SLURM_PROCID']}; start the command by srun, or change distributed.mode"
        )


def slurm_local_devices(environment: Mapping[str, str]) -> list[int] | None:
    """Which of the visible GPUs are this task's; None where there are none, as on a CPU node.

    jax would give every task the one GPU of its local number; a task that has a node to itself gets all of them here.
    Where Slurm has bound GPUs to tasks, each sees its own only and takes all that it sees.
    """
    listed = environment.get("CUDA_VISIBLE_DEVICES", "")
    on_node = int(environment.get("SLURM_GPUS_ON_NODE", "0"))
    visible = len(listed.split(",")) if listed else on_node
    tasks = int(re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0])  # type: ignore[index]
    if not visible:
        return None
    if visible < on_node or tasks == 1:
        return list(range(visible))
    if visible % tasks:
        raise ValueError(
            f"expected the {visible} GPUs of a node to divide over its {tasks} tasks, got a rest; change "
            "--ntasks-per-node or --gpus-per-task"
        )
    each = visible // tasks
    place = int(environment["SLURM_LOCALID"])
    return list(range(place * each, (place + 1) * each))
