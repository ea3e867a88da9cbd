"""The questions of `hptjax eval --suite` and `--data`: where they lie, how they are put, and who judges the answers."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hptjax.build.files import choose_importer
from hptjax.config import Config
from hptjax.data.identity import canonical_text
from hptjax.data.imported import read_examples
from hptjax.data.rows import Unreadable, open_rows
from hptjax.eval.samples import digest
from hptjax.eval.suites import Item, Suite, chosen_suites, fetch_words, read_rows
from hptjax.records import Example

LOCAL_FORMS = (".parquet", ".jsonl")
CHOICE = "Choose the right option, and end with a line `ANSWER: X`, where X is its letter.\n\n{problem}"
COUNTDOWN = (
    "Use each of the numbers {numbers} once, with + - * / and brackets, to make {target}. Put the expression, and "
    "nothing else, between <answer> and </answer>, as in <answer>(1 + 2) / 3</answer>."
)
HELD = "duplicate"  # why a row of a file is not asked: it says the same as an earlier one


@dataclasses.dataclass(frozen=True, eq=False)
class EvalSet:
    """A set of questions.

    Args
      name: of the task. source: file or hub id.
      items: as the report shows them. examples: as they are put to the model, one per item, before any template.
      own: judged by the first of `reward.functions`; else by both policies of the answer verifier.
      samples: completions per question that published figures are made of; None for data of the user's own.
      dropped: rows that are no question, by reason. note: what a reader of its figures must know.
    """

    name: str
    source: str
    items: Sequence[Item]
    examples: Sequence[Example]
    own: bool = False
    samples: int | None = None
    dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    note: str = ""

    @property
    def data_hash(self) -> str:
        """Of what is asked and what is right, in order."""
        said = [[list(example.messages), example.prompt, dict(example.answer)] for example in self.examples]
        return digest(json.dumps(said, sort_keys=True))


def suite_sets(name: str, folder: str | None, *, as_task: bool) -> list[EvalSet]:
    """The sets of a suite or a group of them.

    Args
      folder: with `<suite>.parquet` or `<suite>.jsonl` each; None: the hub.
      as_task: countdown is put as the task of this project writes it, for models that were trained on that.
    Raises an unknown suite; sets that are not there, all of them in one message; other rows than the set has
      -> ValueError.
    """
    suites = chosen_suites(name)
    found = {suite.name: _local(suite, folder) for suite in suites} if folder is not None else {}
    if missing := [suite for suite in suites if folder is not None and found[suite.name] is None]:
        raise ValueError(fetch_words(missing, str(folder)))
    try:
        return [_suite_set(suite, found.get(suite.name), as_task) for suite in suites]
    except (ValueError, OSError) as error:
        if folder is not None:
            raise
        raise ValueError(f"{error}. Or name a folder by --suites: {fetch_words(suites, 'it')}") from None


def _local(suite: Suite, folder: str | None) -> Path | None:
    paths = [Path(folder or ".") / f"{suite.name}{form}" for form in LOCAL_FORMS]
    return next((path for path in paths if path.is_file()), None)


def _suite_set(suite: Suite, path: Path | None, as_task: bool) -> EvalSet:
    subset = "" if suite.subset is None else f":{suite.subset}"
    source = f"{suite.hub}{subset}@{suite.split}" if path is None else str(path)
    rows = list(open_rows(source))
    if bad := next((number for number, row in enumerate(rows, start=1) if isinstance(row, Unreadable)), None):
        raise ValueError(f"expected rows of {suite.name} in {source}, got none in row {bad}; fetch the set again")
    items = read_rows(suite, [row for row in rows if not isinstance(row, Unreadable)])
    write = _task_example if as_task else turn_example
    examples = [write(item) for item in items]
    return EvalSet(suite.name, source, items, examples, samples=suite.samples, note=suite.note)


def turn_example(item: Item) -> Example:
    """An item as a user's turn, and what its verifier needs."""
    if item.kind == "countdown":
        said, _, target = item.problem.rpartition("=")
        numbers = [int(number) for number in said.split(",")]
        asked = COUNTDOWN.format(numbers=", ".join(map(str, numbers)), target=target)
        return _turn(asked, {"numbers": numbers, "target": int(target)})
    if item.kind == "choice":
        return _turn(CHOICE.format(problem=item.problem), {"answer": item.gold, "how": "choice"})
    return _turn(item.problem, {"answer": item.gold})


def _turn(said: str, answer: Mapping[str, Any]) -> Example:
    turn = {"role": "user", "content": said}
    return Example(0, said, "", answer, canonical_text(said), messages=(turn,))


def _task_example(item: Item) -> Example:
    """Countdown as `tasks.countdown` writes it."""
    if item.kind != "countdown":
        raise ValueError(
            "expected --suite countdown for a model that was trained on the task of this project, got another suite; "
            "it has no chat template that could put other questions"
        )
    said, _, target = item.problem.rpartition("=")
    answer = {"numbers": [int(number) for number in said.split(",")], "target": int(target)}
    return Example(0, f"{item.problem}:", "", answer, canonical_text(item.problem))


def file_sets(config: Config, names: Sequence[str]) -> list[EvalSet]:
    """A set per file, as `data.files` are read; rows without an answer are dropped, equal ones asked once.

    Raises two files of one name, a file that cannot be read or has no questions -> ValueError, FileNotFoundError.
    """
    titles = [_title(name) for name in names]
    if twice := [title for title, count in Counter(titles).items() if count > 1]:
        raise ValueError(f"expected files of different names, got several called {twice}; rename them for --data")
    return [_file_set(config, name, title) for name, title in zip(names, titles, strict=True)]


def _title(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in Path(name).name.split(".")[0]) or "data"


def _file_set(config: Config, name: str, title: str) -> EvalSet:
    read, (count,) = read_examples([name], functools.partial(choose_importer, config.data.format))
    dropped = Counter(count.dropped)
    kept: dict[str, Example] = {}
    for example in read:
        if not example.answer:
            dropped["no_answer"] += 1
            continue
        said = json.dumps([list(example.messages), list(example.tools), dict(example.answer)], sort_keys=True)
        dropped[HELD] += said in kept
        kept.setdefault(said, dataclasses.replace(example, demonstration=""))
    examples = list(kept.values())
    if not examples:
        raise ValueError(f"expected questions with answers in '{name}', got none: {dict(dropped)}; change --data")
    items = [Item(example.prompt, _gold(example.answer), "math") for example in examples]
    own = config.reward.functions[0].name not in ("verify", "math_strict")
    if not own:
        _check_answers(name, examples)
    return EvalSet(title, name, items, examples, own, dropped={key: n for key, n in dropped.items() if n})


def _check_answers(name: str, examples: Sequence[Example]) -> None:
    """Raises ValueError where our verifiers cannot judge all rows: they want answers, or all of them countdown's."""
    kinds = (frozenset({"answer"}), frozenset({"numbers", "target"}))
    if any(all(kind <= example.answer.keys() for example in examples) for kind in kinds):
        return
    keys = sorted({", ".join(sorted(map(str, example.answer))) for example in examples})
    raise ValueError(
        f"expected answers in '{name}' that are texts or numbers, or all of them numbers with a target (countdown), "
        f"got objects with {' and with '.join(keys[:4])}; name a function that judges them in reward.functions"
    )


def _gold(answer: Mapping[str, Any]) -> str:
    """The gold answer as the report shows it."""
    only = answer.get("answer")
    return only if isinstance(only, str) else json.dumps(dict(answer), sort_keys=True)
