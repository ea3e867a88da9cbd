"""Starts a training run where there is room for it: `python -m launch COMMAND CONFIG [OPTIONS] [-- FIELDS]`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from launch.gke import Gke, gke_steps
from launch.machine import Laptop, Node, laptop_steps, node_steps
from launch.pod import Pod, pod_steps
from launch.slurm import Slurm, slurm_steps
from launch.steps import Step, as_script, carry_out

BAD_INPUT = 2
INTERRUPTED = 130
HELP = """\
usage: python -m launch COMMAND CONFIG.toml [OPTIONS] [-- FIELDS OF THE CONFIG]

commands
  laptop    on this machine's CPU
  node      on this machine's GPUs
  slurm     on GPU nodes under Slurm
  pod       on a TPU pod, by queued resources
  gke       on TPUs of a GKE cluster, as a JobSet

  python -m launch pod --help                     its options
  python -m launch pod CONFIG ... --dry-run       prints what would be run, as a shell script, and runs nothing
  python -m launch node CONFIG --gpus 8 -- --mesh.fsdp 8 --train.steps 100

Config and mesh are checked before anything starts.
"""

COMMANDS: dict[str, tuple[type, Callable[[Any, Sequence[str]], list[Step]]]] = {
    "laptop": (Laptop, laptop_steps),
    "node": (Node, node_steps),
    "slurm": (Slurm, slurm_steps),
    "pod": (Pod, pod_steps),
    "gke": (Gke, gke_steps),
}


def run(arguments: Sequence[str]) -> int:
    """Launches; the exit status of the first step that failed, 0 where none did, 2 for bad input."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else BAD_INPUT
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"launch: unknown command '{command}'; expected one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return BAD_INPUT
    cut = rest.index("--") if "--" in rest else len(rest)
    kind, steps_of = COMMANDS[command]
    options: Any = tyro.cli(
        kind, args=rest[:cut], prog=f"python -m launch {command}", config=(tyro.conf.FlagCreatePairsOff,)
    )
    try:
        steps = steps_of(options, rest[cut + 1 :])
        if options.dry_run:
            print(as_script(steps), end="")
            return 0
        return carry_out(steps)
    except (ValueError, OSError) as error:
        print(f"launch {command}: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
