"""A report as a table with a paragraph per finding, and as JSON."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from hptjax.audit.effects import EFFECTS
from hptjax.audit.findings import Finding
from hptjax.audit.kit import Report

COLOURS = {"pass": "green", "note": "yellow", "finding": "bold red", "not run": "dim"}
OWN_OPTIMIZER = (
    "The optimizer is the trainer's own: no micro-batch can be named, and what is wrong alike in the whole window and "
    "in its parts cannot be seen: a factor that the optimizer divides out (1/k, the number of workers), gradients left "
    "over from the window before, updates that come one window late."
)
MOST_PLACES = 4  # of a finding that are printed; the JSON has all


def to_json(report: Report) -> str:
    """Everything in the report, with the paragraph of every code."""
    return json.dumps(to_plain(report), indent=2) + "\n"


def to_plain(report: Report) -> dict[str, Any]:
    """The report as plain values."""
    return {
        "target": report.target,
        "model": report.model,
        "own_optimizer": report.own_optimizer,
        "injected_drop": report.injected_drop,
        "verdict": "fault" if report.faults else "pass",
        "probes": [dataclasses.asdict(result) for result in report.probes],
        "findings": [
            {**dataclasses.asdict(finding), "micro_batches": list(finding.micro_batches)} for finding in report.findings
        ],
        "effects": {finding.code: EFFECTS[finding.code] for finding in report.findings},
        "remarks": list(report.remarks),
        "versions": dict(report.versions),
    }


def print_report(report: Report, file: Any = None) -> None:
    """The table, a paragraph per finding, the versions and the verdict, on a text file or the terminal.

    Raises
      BrokenPipeError: the reader has gone.
    """
    try:
        _print(report, file)
    except SystemExit as error:  # how rich ends where the pipe is closed, with the status of a fault
        raise BrokenPipeError from error


def _print(report: Report, file: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=file, highlight=False)
    way = "its own optimizer: updates are compared" if report.own_optimizer else "SGD: weights of tokens are read"
    drop = ", with a drop injected" if report.injected_drop else ""
    table = Table(title=f"audit of {report.target}{drop} ({report.model} model, {way})", title_justify="left")
    for heading in ("probe", "what is asked", "outcome", ""):
        table.add_column(heading)
    for row in report.probes:
        table.add_row(Text(row.probe), Text(row.asked), Text(row.outcome, style=COLOURS[row.outcome]), Text(row.detail))
    console.print(table)
    if report.own_optimizer:
        console.print(Text(OWN_OPTIMIZER))
    for code in dict.fromkeys(finding.code for finding in report.findings):
        console.print()
        places = [finding for finding in report.findings if finding.code == code]
        console.print(
            Text(f"{code} ({places[0].level})", style=COLOURS["finding" if places[0] in report.faults else "note"])
        )
        for line in _lines(places):
            console.print(Text(f"  {line}"))
        console.print(Text(EFFECTS[code]))
    for remark in report.remarks:
        console.print()
        console.print(Text(remark))
    console.print()
    console.print(Text(", ".join(f"{name} {version}" for name, version in report.versions.items())))
    console.print(Text(summary(report)))


def summary(report: Report) -> str:
    """The verdict and how the probes came out, in one line."""
    kinds = len({finding.code for finding in report.faults})
    verdict = "no fault" if not kinds else "1 kind of fault" if kinds == 1 else f"{kinds} kinds of fault"
    count = collections.Counter(row.outcome for row in report.probes)
    parts = [f"{count['pass']} passed"]
    parts += [f"{count['finding']} failed"] if count["finding"] else []
    parts += [f"{count['note']} {'note' if count['note'] == 1 else 'notes'}"] if count["note"] else []
    parts += [f"{count['not run']} not run"] if count["not run"] else []
    return f"{verdict}; of {len(report.probes)} probes: {', '.join(parts)}"


def _lines(places: Sequence[Finding]) -> list[str]:
    """One line per probe, its first window; probes with the same words share a line."""
    first: dict[str, str] = {}
    for finding in places:
        first.setdefault(finding.probe, finding.evidence)
    words: dict[str, list[str]] = {}
    for probe, evidence in first.items():
        words.setdefault(evidence, []).append(probe)
    lines = [f"{'; '.join(filter(None, probes))}: {evidence}" for evidence, probes in words.items()]
    more = len(lines) - MOST_PLACES
    return [*lines[:MOST_PLACES], *([f"and {more} more, in the JSON"] if more > 1 else lines[MOST_PLACES:])]
