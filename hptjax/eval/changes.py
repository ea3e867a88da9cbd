"""What changed between two evaluations of the same questions: paired figures, and the questions won and lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hptjax.eval.figures import Paired, paired
from hptjax.eval.samples import FILTERS, Graded, by_question
from hptjax.eval.store import MANIFEST, read_rows_file

TASK_PREFIX = "samples_"


@dataclasses.dataclass(frozen=True, eq=False)
class Change:
    """Of one task: (k, policy) -> after minus before; the evaluation before, for reading single questions."""

    pairs: Mapping[tuple[int, str], Paired]
    before: Sequence[Graded]

    def as_json(self) -> dict[str, Any]:
        """JSON values: "pass@k,policy" -> difference, standard error, interval, p, questions won and lost."""
        return {
            f"pass@{k},{policy}": {
                "difference": told.difference.value,
                "stderr": told.difference.se,
                "ci95": [told.difference.low, told.difference.high],
                "method": told.difference.method,
                "p": told.p,
                "won": told.won,
                "lost": told.lost,
            }
            for (k, policy), told in self.pairs.items()
        }


def read_evaluation(folder: Path) -> dict[str, list[Graded]]:
    """The judged samples of an evaluation's folder, by task. Nothing in it is changed.

    Raises a folder that holds none, a damaged row -> ValueError.
    """
    files = sorted(folder.glob(f"{TASK_PREFIX}*.jsonl"))
    if not (folder / MANIFEST).is_file() or not files:
        raise ValueError(f"expected the folder of an evaluation (manifest.json, samples_<task>.jsonl), got '{folder}'")
    return {path.stem.removeprefix(TASK_PREFIX): read_rows_file(path) for path in files}


def changes(before: Mapping[str, Sequence[Graded]], after: Mapping[str, Sequence[Graded]]) -> dict[str, Change]:
    """The changes of the tasks that both have, for pass@1 and the largest power of two that both have samples for.

    Questions that only one of them was asked take no part where the others are the same.
    Raises no common task; other questions in one of them -> ValueError.
    """
    common = [name for name in after if name in before]
    if not common:
        raise ValueError(
            f"expected evaluations with a task in common, got {sorted(before)} and {sorted(after)}; evaluate both on "
            "the same suites or files"
        )
    found = {}
    for name in common:
        places = {entry.question for entry in before[name]} & {entry.question for entry in after[name]}
        left, right = ([entry for entry in side[name] if entry.question in places] for side in (before, after))
        n = min(len(by_question(side)[0]) for side in (left, right))
        ks = sorted({1, 1 << (n.bit_length() - 1)})
        pairs = {(k, policy): paired(left, right, k, policy=policy) for k in ks for policy in FILTERS}
        found[name] = Change(pairs, left)
    return found


def changes_table(told: Mapping[str, Change]) -> str:
    """The changes as Markdown, a row each."""
    lines = ["| Tasks | Filter | Metric | after - before | Stderr | 95 % | p | won | lost |", "|" + "---|" * 9]
    for name, change in told.items():
        for (k, policy), pair in change.pairs.items():
            d = pair.difference
            lines.append(
                f"| {name} | {policy} | pass@{k} | {d.value:+.4f} | {d.se:.4f} | {d.low:+.4f} to {d.high:+.4f} | "
                f"{pair.p:.3f} | {len(pair.won)} | {len(pair.lost)} |"
            )
    return "\n".join(lines)
