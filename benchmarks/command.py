"""Wall time and peak memory of whole commands: `python benchmarks/command.py [-n RUNS] -- COMMAND [ARG ...]`.

Prints the median with minimum and maximum over the runs. Peak memory is the largest resident set of any one process of
the command, as the kernel counted it.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import time


def measure(command: list[str]) -> tuple[float, float, int]:
    """(wall seconds, peak MiB of the largest process so far, exit status) of one run."""
    began = time.monotonic()
    status = subprocess.run(command, check=False).returncode
    return time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, status


def main() -> None:
    """Runs the command and prints one line per figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=1, help="runs")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    runs = [measure(command) for _ in range(options.n)]
    for name, values, unit in (
        ("wall", [run[0] for run in runs], "s"),
        ("peak memory", [run[1] for run in runs], "MiB"),
    ):
        print(f"{name:12s} {statistics.median(values):8.1f} {unit}  [{min(values):.1f}, {max(values):.1f}]")
    print(f"exit status  {sorted({run[2] for run in runs})}, {options.n} run(s) of: {' '.join(command)}")


if __name__ == "__main__":
    main()
