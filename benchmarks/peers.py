"""hptjax beside its peers in one run: `python benchmarks/peers.py --out runs.jsonl [--sizes XS S M] [--rounds 2]`.

One process at a time, the peers in turn within each round, each with an empty compilation cache; what else used the CPU
meanwhile is kept with each record. Prints ratios against the goals, of medians over all rounds, with their range over
rounds. The harness's folder is $PEER_BENCH, the peers' interpreters $TORCH_PYTHON and $JAX_PYTHON (`make bench-peers`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TORCH, JAX, OURS = "TORCH_PYTHON", "JAX_PYTHON", "hptjax"
SCRIPTS = {  # task -> (script, whose interpreter)
    "train": {"jax_min.py": JAX, "tunix_peer.py": JAX, "torch_min.py": TORCH, "trl_peer.py": TORCH},
    "gen": {"jax_min.py": JAX, "tunix_peer.py": JAX, "hf_peer.py": TORCH},
    "grpo": {"tunix_peer.py": JAX, "trl_peer.py": TORCH},
    "hpt": {},
}
OWN_SCRIPT = "hptjax_peer.py"
GOALS = [  # what, task, ours is compared by, with whom ("max": the fastest of them), goal per size
    ("GRPO step against tunix", "grpo", ["tunix"], (1.5, 1.5, 1.5)),
    ("GRPO step against the faster of TRL and tunix", "grpo", ["tunix", "trl"], (1.0, 1.25, 1.15)),
    ("HPT step against that GRPO step", "hpt", ["tunix", "trl"], (1.7, 2.2, 2.0)),
    ("rollout tokens/s against the faster of transformers and tunix", "gen", ["hf", "tunix"], (1.2, 1.2, 1.2)),
    ("rollout tokens/s against the hand-written loop", "gen", ["jax-min"], (1.0, 1.0, 1.0)),
    ("training tokens/s against the hand-written JAX", "train", ["jax-min"], (1.3, 1.2, 1.1)),
    ("training tokens/s against tunix", "train", ["tunix"], (1.3, 1.3, 1.3)),
    ("training tokens/s against torch", "train", ["torch-min"], (None, None, None)),
    ("training tokens/s against TRL", "train", ["trl"], (None, None, None)),
]
SIZES = ("XS", "S", "M")


def jobs(sizes: Sequence[str], tasks: Sequence[str]) -> list[tuple[str, str, str, int]]:
    """(script, task, size, accumulation) of one round, ours next to the peers of the same work."""
    found = []
    for size in sizes:
        for task in tasks:
            for accum in (1, 4) if task == "train" else (1,):
                found += [(script, task, size, accum) for script in [OWN_SCRIPT, *SCRIPTS[task]]]
    return found


def busy_seconds() -> float:
    """CPU seconds of the whole machine that were not idle, so far."""
    words = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]
    ticks = [int(word) for word in words]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def measure(
    job: tuple[str, str, str, int], *, cache: str | None = None, steps: int | None = None, timeout: float = 1800.0
) -> dict[str, Any]:
    """One process: its own record, and how much of the machine something else used meanwhile.

    Args
      cache: folder of compiled programs; None: an empty one. steps: how many are measured; None: as the harness says.
    """
    script, task, size, accum = job
    own = script == OWN_SCRIPT
    python = sys.executable if own else os.environ[SCRIPTS[task][script]]
    path = HERE / script if own else Path(os.environ["PEER_BENCH"]) / script
    scratch = tempfile.mkdtemp()
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TORCHINDUCTOR_CACHE_DIR": scratch,
        "JAX_COMPILATION_CACHE_DIR": cache or scratch,
        "BENCH_T0": repr(time.time()),
        **({} if steps is None else {"BENCH_STEPS": str(steps)}),
    }
    before, children, began = busy_seconds(), os.times(), time.time()
    words = [python, str(path), task, size, *(["--accum", str(accum)] if accum > 1 else [])]
    try:
        done = subprocess.run(
            words, env=environment, capture_output=True, text=True, timeout=timeout, cwd=scratch, check=False
        )
        said, status = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired:
        said, status = "", 124
    wall, after = time.time() - began, os.times()
    shutil.rmtree(scratch, ignore_errors=True)
    used = after.children_user + after.children_system - children.children_user - children.children_system
    other = max(0.0, busy_seconds() - before - used) / wall / (os.cpu_count() or 1)
    record = {"script": script, "task": task, "size": size, "accum": accum, "other_cpu": round(other, 3)}
    lines = [line for line in said.splitlines() if line.startswith("{") and '"peer"' in line]
    if status or not lines:
        return {**record, "error": said[-600:], "status": status}
    return {**json.loads(lines[-1]), **record, "wall_s": round(wall, 1)}


def measurements(job: tuple[str, str, str, int]) -> Iterator[dict[str, Any]]:
    """The record of a job; of our GRPO step also that of a second start, with the compiled programs of the first."""
    script, task, _, _ = job
    if script != OWN_SCRIPT or task != "grpo":
        yield measure(job)
        return
    with tempfile.TemporaryDirectory() as cache:
        yield measure(job, cache=cache)
        yield {**measure(job, cache=cache, steps=1), "again": True}


def speeds(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, int, str], list[float]]:
    """(task, size, accumulation, peer) -> steps per second, the median of each round."""
    found: dict[tuple[str, str, int, str], list[float]] = defaultdict(list)
    for record in records:
        if "error" not in record and not record.get("again"):
            key = (record["task"], record["size"], record["accum"], record["peer"])
            found[key].append(1.0 / statistics.median(record["times"]))
    return found


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The goals, and what was measured: ratio of medians over rounds, with the range of the rounds' own ratios."""
    known = speeds(records)
    lines = ["| work | size | accum | goal | measured | range over rounds |", "|---|---|---|---|---|---|"]
    for what, task, peers, goals in GOALS:
        for size, goal in zip(SIZES, goals, strict=True):
            for accum in (1, 4) if task == "train" else (1,):
                ours = known.get((task, size, accum, OURS), [])
                there = "grpo" if task == "hpt" else task
                theirs = [known[key] for peer in peers if (key := (there, size, accum, peer)) in known]
                if ours and theirs:
                    best = max(theirs, key=statistics.median)
                    each = [mine / other for mine, other in zip(ours, best, strict=False)]
                    ratio = statistics.median(ours) / statistics.median(best)
                    wanted = "-" if goal is None else f"{goal:g}"
                    lines.append(
                        f"| {what} | {size} | {accum} | {wanted} | {ratio:.2f} | {min(each):.2f} to {max(each):.2f} |"
                    )
    return "\n".join([*lines, "", *_memory_and_start(records), "", *_first_losses(records)])


def _memory_and_start(records: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| GRPO step | size | peak memory, MB | start to the end of the first step, s |", "|---|---|---|---|"]
    for size in SIZES:
        for peer, again in (("hptjax", False), ("hptjax", True), ("tunix", False), ("trl", False)):
            chosen = [
                r
                for r in records
                if "error" not in r and (r["task"], r["size"], r["peer"]) == ("grpo", size, peer)
                if r.get("again", False) == again
            ]
            if chosen:
                memory = statistics.median(r["rss_mb"] for r in chosen)
                start = statistics.median(r["cold_s"] for r in chosen)
                name = f"{peer}, programs compiled before" if again else peer
                lines.append(f"| {name} | {size} | {memory:.0f} | {start:.1f} |")
    return lines


def _first_losses(records: Sequence[Mapping[str, Any]]) -> list[str]:
    found = {
        (r["size"], r["peer"]): r["losses"]
        for r in records
        if r.get("losses") and r["task"] == "train" and r["accum"] == 1
    }
    return [f"first losses, {size} {peer}: " + ", ".join(f"{x:.5f}" for x in v) for (size, peer), v in found.items()]


def main() -> None:
    """Runs the rounds, or prints the table of an earlier run again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--sizes", nargs="+", default=["XS", "S"], choices=SIZES)
    parser.add_argument("--tasks", nargs="+", default=list(SCRIPTS), choices=list(SCRIPTS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only-table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    for number in range(0 if options.only_table else options.rounds):
        for job in jobs(options.sizes, options.tasks):
            for measured in measurements(job):
                record = {**measured, "round": number, "at": time.strftime("%Y-%m-%dT%H:%M:%S")}
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                median = statistics.median(record.get("times") or [float("nan")])
                print(
                    *job,
                    f"median {median:.3f} s, other {record['other_cpu']:.3f}",
                    record.get("error", "")[-200:],
                    flush=True,
                )
    print(table([json.loads(line) for line in options.out.read_text(encoding="utf-8").splitlines()]))


if __name__ == "__main__":
    main()
