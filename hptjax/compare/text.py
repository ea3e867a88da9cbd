"""A comparison as Markdown: the figure that counts first, then every budget, then what became of the questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hptjax.masked import mean


def as_text(report: dict[str, Any]) -> str:
    """The whole report."""
    return "\n\n".join([headline(report), settings(report), as_table(report), question_table(report)])


def headline(report: dict[str, Any]) -> str:
    """The difference that was named before anything ran, for every arm, and nothing else."""
    metric, axis, first = report["counts_by"]["metric"], report["counts_by"]["axis"], report["first_arm"]
    lines = [f"Said before the runs: {metric} at equal {axis}, minus {first}, over {len(report['seeds'])} seeds."]
    for arm, row in report["figures"][axis].items():
        if arm != first:
            figure = row[metric]
            low, high = figure["minus_first_ci95"]
            verdict = "above" if low > 0 else "below" if high < 0 else "no difference seen"
            lines.append(f"- {arm}: {interval(figure['minus_first'], low, high, sign=True)} points, {verdict}")
    return "\n".join(lines)


def settings(report: dict[str, Any]) -> str:
    """With what every arm ran, and how long."""
    arms = [
        f"{arm} {choice['learning_rate']:g}" + (f" after SFT of {choice['sft_share']:g}" * bool(choice["sft_share"]))
        for arm, choice in report["tuned"].items()
    ]
    seconds = np.asarray(list(report["seconds"].values()))
    return (
        f"Learning rates (SFT before it as a share of the arm's steps): {', '.join(arms)}. {seconds.size} runs, "
        f"{np.median(seconds):.0f} s in the middle and {seconds.max():.0f} s at the most, {seconds.sum() / 60:.0f} "
        "minutes together."
    )


def as_table(report: dict[str, Any]) -> str:
    """Every arm within every budget, as a Markdown table in per cent: the figure that counts and the largest k."""
    names = list(dict.fromkeys([report["counts_by"]["metric"], f"pass@{report['ks'][-1]}"]))
    first = report["first_arm"]
    lines = [
        "| equal | arm | steps | " + " | ".join(f"{name} | minus {first}" for name in names) + " |",
        "|---|---|---|" + "---|---|" * len(names),
        "| - | base | 0 | "
        + " | ".join(
            interval(report["base"][n]["value"], report["base"][n]["low"], report["base"][n]["high"]) + " | "
            for n in names
        )
        + "|",
    ]
    for axis, arms in report["figures"].items():
        for arm, row in arms.items():
            cells = [
                f"{interval(row[name]['value'], *row[name]['ci95'])} | "
                + (
                    ""
                    if arm == first
                    else interval(row[name]["minus_first"], *row[name]["minus_first_ci95"], sign=True)
                )
                for name in names
            ]
            steps = [
                f"{step:.0f}{'*' if short else ''}"
                for step, short in zip(row["steps"], row["ended_before"], strict=True)
            ]
            lines.append(f"| {axis} | {arm} | {', '.join(steps)} | {' | '.join(cells)} |")
    if any(any(row["ended_before"]) for arms in report["figures"].values() for row in arms.values()):
        lines.append("\n`*` the run ended before it had spent this budget and is read at its end.")
    return "\n".join(lines)


def question_table(report: dict[str, Any]) -> str:
    """What became of the test questions since the base: means over seeds, in questions."""
    lines = [
        f"Test questions at the evaluation nearest to equal {report['counts_by']['axis']}, mean over seeds; solved: at "
        "least one sample. Certain: Fisher's test, 5 % false discoveries.",
        "",
        "| arm | kept | gained | lost | never | certain gains, losses | solved by it alone | forgotten, points |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, entry in report["questions"].items():
        changes = entry["transitions"]
        cells = [_mean([change[kind] for change in changes]) for kind in ("kept", "gained", "lost", "never")]
        certain = [_mean([change["certain"][kind] for change in changes]) for kind in ("gained", "lost")]
        forgotten = 100 * entry["forgotten_mean"]
        lines.append(
            f"| {arm} | {' | '.join(cells)} | {', '.join(certain)} | {_mean(entry['exclusive'])} | {forgotten:.1f} |"
        )
    levels = list(next(iter(report["questions"].values()))["transitions"][0]["by_level"])
    lines += ["", "| arm | " + " | ".join(f"level {level}: gained, lost" for level in levels) + " |"]
    lines += ["|---|" + "---|" * len(levels)]
    for arm, entry in report["questions"].items():
        cells = [
            ", ".join(_mean([t["by_level"][level][kind] for t in entry["transitions"]]) for kind in ("gained", "lost"))
            for level in levels
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: Sequence[float | int]) -> str:
    return f"{mean(np.asarray(values, np.float64)):.1f}"


def interval(value: float, low: float, high: float, *, sign: bool = False) -> str:
    """A share as per cent with its interval."""
    form = "+.1f" if sign else ".1f"
    return f"{100 * value:{form}} [{100 * low:{form}}, {100 * high:{form}}]"
