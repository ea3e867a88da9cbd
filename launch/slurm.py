"""Training on GPU nodes under Slurm: one batch script, which asks to be started again where it was stopped."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence

from launch.machine import Config
from launch.steps import Command, Step
from launch.training import GRACE_S, check_config, check_name, check_words, training


@dataclasses.dataclass(frozen=True)
class Slurm:
    """On GPU nodes under Slurm, from a folder that all nodes see. What follows -- goes to `hptjax train`."""

    config: Config
    nodes: int = 1
    gpus_per_node: int = 8
    time: str = "24:00:00"  # limit of one start; the run continues in the next
    partition: str = ""  # empty: the cluster's default
    account: str = ""  # empty: yours
    cpus_per_task: int = 16  # one task per node: the loaders' and verifiers' processors
    environment: str = ".venv"  # the environment that `make venv ACCEL=cuda13` made, seen by all nodes
    name: str = "hptjax"  # of the job
    grace_s: int = GRACE_S  # seconds before the limit at which the run saves
    dry_run: bool = False  # print what would be run


def slurm_steps(options: Slurm, overrides: Sequence[str]) -> list[Step]:
    """The batch script handed to sbatch."""
    check_name(options.name)
    check_words(time=options.time, partition=options.partition, account=options.account)
    for field in ("nodes", "gpus_per_node", "cpus_per_task", "grace_s"):
        if dataclasses.asdict(options)[field] < 1:
            raise ValueError(
                f"expected --{field.replace('_', '-')} of at least 1, got {dataclasses.asdict(options)[field]}"
            )
    check_config(
        options.config,
        overrides,
        devices=options.nodes * options.gpus_per_node,
        where=f"{options.nodes} nodes with {options.gpus_per_node} GPUs",
    )
    return [Command(("sbatch",), stdin=batch_script(options, overrides))]


def batch_script(options: Slurm, overrides: Sequence[str]) -> str:
    """The script. SIGTERM comes `grace_s` before the limit, to this shell alone; it goes on to the tasks once.

    A run that was asked to stop ends with 0 after its checkpoint; then the job is put back into the queue. A lost node
    ends the step (--kill-on-bad-exit), and Slurm requeues the job by itself.
    """
    settings = {
        "job-name": options.name,
        "nodes": options.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": options.gpus_per_node,
        "cpus-per-task": options.cpus_per_task,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "signal": f"B:TERM@{options.grace_s}",
        "open-mode": "append",
        "output": f"{options.name}-%j.log",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in settings.items() if value != ""]
    program, *arguments = training(options.config, overrides, mode="slurm")
    # since Slurm 22.05 a step does not take over --cpus-per-task by itself
    srun = ["srun", "--kill-on-bad-exit=1", f"--cpus-per-task={options.cpus_per_task}"]
    step = shlex.join([*srun, f"{options.environment}/bin/{program}", *arguments])
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "#SBATCH --requeue",
            "stopped=no",
            "trap 'stopped=yes; trap \"\" TERM; scancel --signal=TERM $SLURM_JOB_ID' TERM",
            f"{step} &",
            "running=$!",
            'wait "$running"',
            "status=$?",
            'if [ "$stopped" = yes ] && [ "$status" -gt 128 ]; then wait "$running"; status=$?; fi',
            'if [ "$stopped" = yes ] && [ "$status" -eq 0 ]; then exec scontrol requeue "$SLURM_JOB_ID"; fi',
            'exit "$status"',
            "",
        ]
    )
