"""A report as a table with a paragraph per finding, and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from hptjax.audit.effects import EFFECTS
from hptjax.audit.findings import Finding
from hptjax.audit.kit import ProbeResult, Report

COLOURS = {"pass": "green", "note": "yellow", "finding": "bold red", "not run": "dim"}
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


def from_plain(values: dict[str, Any]) -> Report:
    """The report of `to_plain`'s values."""
    return Report(
        target=values["target"],
        model=values["model"],
        own_optimizer=values["own_optimizer"],
        injected_drop=values["injected_drop"],
        probes=tuple(ProbeResult(**row) for row in values["probes"]),
        findings=tuple(Finding(**{**row, "micro_batches": tuple(row["micro_batches"])}) for row in values["findings"]),
        remarks=tuple(values["remarks"]),
        versions=values["versions"],
    )


def print_report(report: Report, file: Any = None) -> None:
    """The table, a paragraph per finding, the versions and the verdict, on a text file or the terminal."""
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
        console.print("The optimizer is the trainer's own: no micro-batch can be named.")
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
    passed = sum(row.outcome in ("pass", "note") for row in report.probes)
    skipped = sum(row.outcome == "not run" for row in report.probes)
    kinds = len({finding.code for finding in report.faults})
    verdict = f"{kinds or 'no'} {'kinds of fault' if kinds > 1 else 'kind of fault' if kinds else 'fault'}"
    console.print(Text(f"{verdict}; {passed} of {len(report.probes)} probes passed, {skipped} not run"))


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
