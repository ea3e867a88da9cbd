"""hptjax on an accelerator: `python benchmarks/gpu.py [--only training decoding step] [--json FILE] [--docs PAGE]`.

    ceiling    the largest matmul rate in bf16 and the largest copy bandwidth that this device gives jax
    training   an accumulated update of SFT on 4k and 8k packed tokens, bf16, for 0.6B, 1.5B and 7B shapes with random
               weights: MFU against that ceiling, attention counted as causal and within samples, of
               which four share a row; goal 50 %
    decoding   the rollout engine at 64 and 256 rows: tokens/s against the floor of reading all weights once and the
               cache, at that bandwidth; goal 60 %
    step       a whole step of HPT at the 1.5B shape with its split
    torch      the first two beside it by torch and transformers, where torch sees a device

Each case runs in a process of its own; where one does not fit, the next variant of it is tried, and the row says so.
`--tiny` runs all of it at the smallest shapes on whatever there is. With `--json` finished cases are kept, and not run
again. `benchmarks/gpu_work.py` and `benchmarks/gpu_torch.py` do the work.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hptjax.bench.page import expect_page, write_between
from hptjax.bench.record import code_digest, spread, surroundings

HERE = Path(__file__).resolve().parent
MARKERS = ("<!-- gpu: benchmarks/gpu.py -->", "<!-- end of gpu -->")
GOALS = {"training": 0.5, "decoding": 0.6}
KINDS = ("training", "decoding", "step", "torch")
LIMIT_S = 1800.0
SHAPES = ("0.6B", "1.5B", "7B")  # gpu_work.py says which presets these are
VARIANTS: dict[str, list[dict[str, Any]]] = {  # tried in this order until one fits
    "0.6B": [{"remat": "dots_no_batch"}, {"remat": "full"}],
    "1.5B": [{"remat": "dots_no_batch"}, {"remat": "full"}],
    "7B": [{"remat": "full"}, {"remat": "dots_no_batch", "lora": 64}, {"remat": "full", "lora": 64}],
    "tiny": [{"remat": "none"}, {"remat": "full"}],
}


def cases(*, tiny: bool, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """What is run, in this order; the ceiling first, which the others are compared with."""
    shapes = ("tiny",) if tiny else SHAPES
    lengths = [32] if tiny else [4096, 8192]
    batches = [4] if tiny else [64, 256]
    found: list[dict[str, Any]] = [{"kind": "ceiling", "side": 128 if tiny else 8192, "mib": 4 if tiny else 1024}]
    training = [
        {"shape": shape, "row_tokens": tokens, "rows": 2 if tiny else 16_384 // tokens, "segments": 4, "micro": 2}
        for shape in shapes
        for tokens in lengths
    ]
    middle = "tiny" if tiny else "1.5B"
    prompt, short, long = (8, 4, 12) if tiny else (256, 128, 1024)
    decoding = [{"shape": middle, "slots": rows, "prompt": prompt, "short": short, "long": long} for rows in batches]
    step = {"questions": 2 if tiny else 16, "group": 2 if tiny else 8, "prompt": prompt, "long": long}
    by_kind = {
        "training": [{"kind": "training", **one} for one in training],
        "decoding": [{"kind": "decoding", **one} for one in decoding],
        "step": [{"kind": "step", "shape": middle, **step}],
        "torch": [{"kind": "torch training", **one} for one in training]
        + [{"kind": "torch decoding", **one} for one in decoding],
    }
    return [*found, *(case for kind in kinds for case in by_kind[kind])]


def run_case(case: Mapping[str, Any], repeats: int, *, child: Sequence[str]) -> dict[str, Any]:
    """A case in a process of its own, by the first of its variants that fits."""
    failed: list[str] = []
    tried = VARIANTS[case["shape"]] if case["kind"].endswith("training") or case["kind"] == "step" else [{}]
    for variant in tried:
        asked = {**case, **variant, "repeats": repeats}
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", **os.environ}
        try:
            done = subprocess.run(
                [*child, "--case", json.dumps(asked)],
                env=environment,
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
                check=False,
            )
            said, errors = done.stdout, done.stderr.strip()
        except subprocess.TimeoutExpired:
            said, errors = "", f"no answer within {LIMIT_S:.0f} s"
        found = [line for line in said.splitlines() if line.startswith("{")]
        if found:
            return {**json.loads(found[-1]), "variant": variant, "failed": failed}
        failed.append(f"{variant}: {_reason(errors)}")
    return {"failed": failed}


def measured(
    case: Mapping[str, Any], repeats: int, known: Sequence[Mapping[str, Any]], torch: str | None
) -> Mapping[str, Any]:
    """The record of a case: one that is known, if the code is the same, else a new one."""
    asked = {"case": dict(case), "repeats": repeats, "code": code_digest()}
    for record in known:
        if all(record[name] == value for name, value in asked.items()):
            return record
    script = [torch or "", str(HERE / "gpu_torch.py")] if "torch" in case["kind"] else [sys.executable, __file__]
    found = run_case(case, repeats, child=script)
    if "seconds" in found:
        found["seconds"] = spread(found["seconds"])
    return {**asked, **found, "around": surroundings(), "date": time.strftime("%Y-%m-%d")}


def _reason(errors: str) -> str:
    """Out of memory, or the last words."""
    short = ("RESOURCE_EXHAUSTED", "out of memory", "OutOfMemory", "Out of memory")
    return "out of memory" if any(word in errors for word in short) else errors[-300:]


def torch_python(*, tiny: bool) -> str | None:
    """The interpreter for torch: $TORCH_PYTHON, or this one; None where it has no torch, or torch sees no device."""
    python = os.environ.get("TORCH_PYTHON") or (sys.executable if importlib.util.find_spec("torch") else None)
    if python is None:
        return None
    ask = "import torch, transformers, sys; sys.exit(0 if torch.cuda.is_available() or sys.argv[1] == '1' else 1)"
    seen = subprocess.run([python, "-c", ask, str(int(tiny))], capture_output=True, check=False)
    return None if seen.returncode else python


def row_of(record: Mapping[str, Any], ceiling: Mapping[str, Any]) -> list[str]:
    """The cells of a record: work, variant, seconds, tokens/s, share of what the device could do, goal."""
    case, kind = record["case"], record["case"]["kind"]
    what = {
        "training": "{shape}, {micro} x {rows} rows of {row_tokens} tokens",
        "decoding": "{shape}, {slots} rows, {prompt} + {long} tokens",
        "step": "{shape}, {questions} questions x {group} rollouts of {long} tokens",
    }[kind.removeprefix("torch ")].format(**case)
    if "seconds" not in record:
        return [kind, what, "; ".join(record["failed"]), "-", "-", "-", "-"]
    variant = ", ".join(f"{name} {value}" for name, value in record["variant"].items()) or "-"
    seconds = record["seconds"]
    noise = f"{seconds['median']:.4g} [{seconds['min']:.4g}, {seconds['max']:.4g}]"
    if seconds["median"] <= 0:  # of a difference that is smaller than its noise
        return [kind, what, variant, noise, "-", "too little to tell", "-"]
    share, goal = "-", "-"
    if "flops" in record:
        share = f"{record['flops'] / seconds['median'] / 1e12 / ceiling['tflops']:.0%} of the matmul ceiling"
    if "bytes" in record:
        share = f"{record['bytes'] / seconds['median'] / 1e9 / ceiling['gb_per_s']:.0%} of the bandwidth"
    if kind in GOALS:
        goal = f"{GOALS[kind]:.0%}"
    if "split" in record:
        share = ", ".join(f"{name} {value:.3g} s" for name, value in record["split"].items())
    return [kind, what, variant, noise, f"{record['tokens'] / seconds['median']:,.0f}", share, goal]


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """All rows, after a line on the device."""
    ceiling = next(record for record in records if record["case"]["kind"] == "ceiling")
    around, commit = ceiling["around"], ceiling["around"]["commit"]
    versions = ", ".join(f"{name} {number}" for name, number in around["versions"].items())
    head = (
        f"{ceiling['device']}: {ceiling['tflops']:.4g} TFLOP/s in bf16 matmuls, {ceiling['gb_per_s']:.4g} GB/s in "
        f"copies, both measured; {versions}; commit {(commit or 'unknown')[:7]}; {ceiling['date']}. Random weights. "
        "Median [least, largest]."
    )
    names = ["what", "work", "variant", "seconds", "tokens/s", "of what the device could do", "goal"]
    rows = [names, ["---"] * len(names)]
    rows += [row_of(record, ceiling) for record in records if record["case"]["kind"] != "ceiling"]
    return "\n".join([head, "", *(f"| {' | '.join(cells)} |" for cells in rows)])


def main() -> None:
    """Runs the cases that are missing; prints the table, and writes it where a page is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="raw figures, and where to go on from")
    parser.add_argument("--docs", type=Path, help="page with the marks of the GPU table")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        from gpu_work import work  # beside this file

        print(json.dumps(work(json.loads(options.case))))
        return
    if options.docs is not None:
        expect_page(options.docs, MARKERS)
    known: list[dict[str, Any]] = []
    if options.json is not None and options.json.exists():
        known = json.loads(options.json.read_text(encoding="utf-8"))
    torch = torch_python(tiny=options.tiny)
    asked = [case for case in cases(tiny=options.tiny, kinds=options.only) if torch or "torch" not in case["kind"]]
    records = []
    for case in asked:
        record = measured(case, options.repeats, known, torch)
        records.append(record)
        print(json.dumps({name: record.get(name) for name in ("case", "variant", "seconds", "failed")}), flush=True)
        if case["kind"] == "ceiling" and "tflops" not in record:
            sys.exit(f"expected the device's ceiling, got {record['failed']}")
        known = [*(one for one in known if one["case"] != case), record]
        if options.json is not None:
            options.json.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    text = table(records)
    print(
        text
        if torch
        else f"{text}\n\ntorch and transformers: no torch that sees a device here (TORCH_PYTHON names one)."
    )
    if options.docs is not None:
        write_between(options.docs, MARKERS, text)


if __name__ == "__main__":
    main()
