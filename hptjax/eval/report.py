"""report.md and report.html: the table, lengths, and the conversations of the hardest questions.

The page is one file without scripts from elsewhere; model output and data are escaped, so that none of it is markup.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from hptjax.eval.changes import Change, changes_table
from hptjax.eval.figures import Figure
from hptjax.eval.harness import TaskResult, table
from hptjax.eval.samples import Graded, by_question
from hptjax.masked import ratio

SHOWN_QUESTIONS, SHOWN_SAMPLES, SHOWN_CHARACTERS = 10, 2, 6_000

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1b1b1b; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .2rem .7rem; text-align: right; }
th { cursor: pointer; border-bottom: 2px solid #888; } td { border-bottom: 1px solid #ddd; }
th:nth-child(-n+3), td:nth-child(-n+3) { text-align: left; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f2; padding: .8rem; border-radius: .3rem; }
details { margin: .4rem 0; } summary { cursor: pointer; } .right { color: #176b2c; } .wrong { color: #a02515; }
"""
SORT = """
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
    const down = head.dataset.down !== "1";
    head.dataset.down = down ? "1" : "0";
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows);
  }));
}
"""


def markdown(title: str, tasks: Sequence[TaskResult], told: Mapping[str, Change] | None = None) -> str:
    """The text of report.md.

    Args
      told: the changes since another evaluation, by task.
    """
    parts = [f"# {title}", table(tasks)]
    parts += [f"{task.name}: {note}." for task in tasks for note in task.notes]
    if told:
        parts += ["## Against the other evaluation", changes_table(told)]
        parts.append("Intervals by a paired bootstrap over questions, p by flipping signs.")
    parts += ["Lengths in tokens: completions, mean, median.", _length_lines(tasks)]
    methods = sorted({figure.estimate.method for task in tasks for figure in task.figures})
    parts.append(
        "Stderr is over questions; the 95 % interval is by " + " or ".join(methods) + ". results.json also has the "
        "standard error for these very questions."
    )
    return "\n\n".join(parts) + "\n"


def _length_lines(tasks: Sequence[TaskResult]) -> str:
    lines = ["| Tasks | all | right | wrong |", "|---|---|---|---|"]
    for task in tasks:
        cells = [f"{told.count}, {told.mean_tokens:.1f}, {told.median_tokens:.1f}" for told in task.lengths.values()]
        lines.append(f"| {task.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(
    title: str,
    tasks: Sequence[TaskResult],
    samples: Mapping[str, Sequence[Graded]],
    told: Mapping[str, Change] | None = None,
) -> str:
    """The text of report.html.

    Args
      samples: task -> its judged completions; of the questions with the fewest right ones some are shown in full.
      told: the changes since another evaluation, by task; the most changed questions are shown from both sides.
    """
    body = [f"<h1>{html.escape(title)}</h1>", _figure_table(tasks)]
    for task in tasks:
        name = html.escape(task.name)
        body += [f"<p>{name}: {html.escape(note)}.</p>" for note in task.notes]
        shown = _changed(told[task.name], samples[task.name]) if told and task.name in told else []
        body += [f"<h2>{name}: its most changed questions, before and after</h2>", *shown] if shown else []
        body.append(f"<h2>{name}: its hardest questions</h2>")
        body += [_question(group) for group in hardest(samples[task.name])]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + f"\n<script>{SORT}</script></body></html>\n"
    )


def hardest(samples: Sequence[Graded]) -> list[list[Graded]]:
    """The groups of the questions with the fewest right samples, in order of the questions where equal."""
    return sorted(by_question(samples), key=lambda group: sum(sample.strict for sample in group))[:SHOWN_QUESTIONS]


def _changed(change: Change, after: Sequence[Graded]) -> list[str]:
    """The questions with the largest change of pass@1 by the strict policy, each before and after."""
    pair = change.pairs[1, "strict"]
    sides = [{group[0].question: group for group in by_question(side)} for side in (change.before, after)]
    shown = [("won", place) for place in pair.won[: SHOWN_QUESTIONS // 2]]
    shown += [("lost", place) for place in pair.lost[: SHOWN_QUESTIONS // 2]]
    return [f"<p>{kind}</p>{''.join(_question(side[place]) for side in sides)}" for kind, place in shown]


def _figure_table(tasks: Sequence[TaskResult]) -> str:
    heads = ("task", "filter", "metric", "value", "stderr", "low", "high", "Q", "n")
    rows = [_figure_row(task.name, figure) for task in tasks for figure in task.figures]
    return (
        '<table class="sortable"><thead><tr>'
        + "".join(f"<th>{head}</th>" for head in heads)
        + f"</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _figure_row(task: str, figure: Figure) -> str:
    told = figure.estimate
    words = "".join(f"<td>{html.escape(word)}</td>" for word in (task, figure.filter, figure.name))
    numbers = "".join(
        f'<td data-value="{value!r}">{value:.4f}</td>' for value in (told.value, told.se, told.low, told.high)
    )
    return f"<tr>{words}{numbers}<td>{told.questions}</td><td>{told.samples}</td></tr>"


def _question(group: Sequence[Graded]) -> str:
    first, right = group[0], sum(sample.strict for sample in group)
    share = ratio(100.0 * right, len(group))
    shown = "".join(_completion(sample) for sample in group[:SHOWN_SAMPLES])
    return (
        f"<details><summary>question {first.question}: {right} of {len(group)} right ({share:.0f} %), answer "
        f"{html.escape(_cut(first.gold, 80))}</summary><pre>{html.escape(_cut(first.problem))}</pre>{shown}</details>"
    )


def _completion(sample: Graded) -> str:
    kind = "right" if sample.strict else "wrong"
    answer = "no answer" if sample.answer is None else html.escape(_cut(sample.answer, 80))
    return (
        f'<p class="{kind}">sample {sample.index}: {kind}, {html.escape(sample.reason)}; read: {answer}; '
        f"{sample.length} tokens, {sample.finish_reason}</p><pre>{html.escape(_cut(sample.completion))}</pre>"
    )


def _cut(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """The start and the end of a long text."""
    return text if len(text) <= limit else f"{text[: limit // 2]} [...] {text[-limit // 2 :]}"
