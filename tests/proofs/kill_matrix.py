"""The kill matrix: every mutant against every layer; `python -m tests.proofs.kill_matrix` writes docs/proofs.md.

Exit status 1 where a mutant lives, is not seen by the layer that is named for it, or changes the mathematical sum by
less than 100 times the bound that the right code keeps.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

import multiprocessing
import pathlib
import sys
from typing import NamedTuple

from tests.proofs import layers, mutants

PAGE = pathlib.Path(__file__).resolve().parent.parent.parent / "docs" / "proofs.md"
BEGIN, END = "<!-- kill matrix: make kill-matrix -->", "<!-- end of the kill matrix -->"
GAP_RULE = 100.0
COLUMNS = ("P1 structure", "P2 influence", "P3 integers", "P3 two devices", "P6 run time", "P7 reference")


class Row(NamedTuple):
    """A mutant, what each layer saw of it, and its margin."""

    mutant: str
    seen: dict[str, str | None]
    margin: float | None


def row(name: str) -> Row:
    """All layers on one mutant."""
    mutant = next(mutant for mutant in mutants.MUTANTS if mutant.name == name)
    with mutants.broken(mutant):
        return Row(name, layers.verdicts(layers.LAYERS, devices=mutant.devices), mutants.margin(mutant))


def complaints_of_the_right_code() -> list[str]:
    """Layers that fail where nothing is broken: their kills would be accidents."""
    return [f"{name} fails on the right code: {seen}" for name, seen in layers.verdicts(layers.LAYERS).items() if seen]


def complaints(rows: list[Row]) -> list[str]:
    """What would make the matrix no proof."""
    found = []
    by_name = {mutant.name: mutant for mutant in mutants.MUTANTS}
    for entry in rows:
        mutant = by_name[entry.mutant]
        if entry.seen[mutant.killed_by] is None:
            found.append(f"{mutant.name}: {mutant.killed_by} did not see it")
        if mutant.kind == "sum" and not (entry.margin is not None and entry.margin >= GAP_RULE):
            found.append(f"{mutant.name}: margin {entry.margin}, expected at least {GAP_RULE:g}")
    return found


def cell(name: str, seen: str | None) -> str:
    """x where the layer saw the fault; for the run-time evidence, which part of it did."""
    if seen is None:
        return ""
    if name != layers.RUN_TIME:
        return "x"
    return next((part for part in ("witness", "checksum", "digest") if seen.startswith(part)), "counts")


def as_markdown(rows: list[Row]) -> str:
    """The table."""
    lines = [
        f"| mutant | seen in | class | margin | {' | '.join(COLUMNS)} | other tests | named killer |",
        "|---|---|---|---|" + "---|" * (len(COLUMNS) + 2),
    ]
    by_name = {mutant.name: mutant for mutant in mutants.MUTANTS}
    for entry in rows:
        mutant = by_name[entry.mutant]
        cells = [cell(name, entry.seen[name]) for name in COLUMNS]
        others = [name.split()[0] for name, seen in entry.seen.items() if name not in COLUMNS and seen is not None]
        far = "-" if entry.margin is None else f"{entry.margin:.2g}"
        lines.append(
            f"| {mutant.name} | {mutant.source} | {mutant.kind} | {far} | {' | '.join(cells)} | {', '.join(others)} | "
            f"{mutant.killed_by} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Runs the matrix on all cores and writes it."""
    names = [mutant.name for mutant in mutants.MUTANTS]
    if found := complaints_of_the_right_code():
        print("\n".join(found))
        return 1
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, 8)) as pool:
        rows = []
        for entry in pool.imap(row, names):
            rows.append(entry)
            seen = [name for name, message in entry.seen.items() if message is not None]
            print(f"{entry.mutant}: {', '.join(seen) or 'LIVES'}", flush=True)
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    errors = mutants.first_and_last_by_size([1, 2, 3, 4, 7, 16])
    shown = ", ".join(f"{error:.0%} at k = {k}" for k, error in errors.items())
    note = f"Error of the sum under `first + last` by window size: {shown}. At 1 and 2 it is right to the bit."
    PAGE.write_text(f"{before}{BEGIN}\n{as_markdown(rows)}\n\n{note}\n{END}{after}")
    found = complaints(rows)
    print(
        "\n".join(found)
        or f"{len(rows)} mutants, all killed by the layer that is named for them; {PAGE.name} is written"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
