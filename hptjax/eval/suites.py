"""The evaluation sets that this field reports, as rows: where each lies, how its rows read, and how many there are.

Ids, fields and counts are those of `spec/diagnostics.md` 9; what is unverified there is not `counted` here. AMC with 83
problems and AMC23 with 40, OlympiadBench with 675 and with 674, are different sets: results on them do not compare.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

Kind = Literal["math", "choice", "countdown"]
LETTERS = "ABCDEFGHIJ"


@dataclasses.dataclass(frozen=True)
class Item:
    """A question of a suite.

    Args
      problem: with the options of a choice. gold: the right answer; a letter for a choice. kind: who verifies it.
    """

    problem: str
    gold: str
    kind: Kind


@dataclasses.dataclass(frozen=True)
class Suite:
    """An evaluation set.

    Args
      name: as `--suite` and the local file call it. hub, subset, split: where `datasets` finds it.
      size: rows; counted: whether somebody has counted them.
      read: a row -> the item; KeyError, TypeError or ValueError where the row is not of its form.
      samples: per question, as HPT and LUFFY report it. note: what a reader of its figures must know.
    """

    name: str
    hub: str
    subset: str | None
    split: str
    size: int
    read: Callable[[Mapping[str, Any]], Item]
    counted: bool = True
    samples: int = 1
    note: str = ""


def _math(problem: str, answer: str) -> Callable[[Mapping[str, Any]], Item]:
    def read(row: Mapping[str, Any]) -> Item:
        gold = row[answer]
        if isinstance(gold, (list, tuple)):  # OlympiadBench: a list of one
            (gold,) = gold
        return Item(_text(row[problem]), _text(str(gold)), "math")

    return read


def _gsm8k(row: Mapping[str, Any]) -> Item:
    """The answer stands after the last ####, with commas in thousands."""
    _, mark, gold = _text(row["answer"]).rpartition("####")
    if not mark:
        raise ValueError("an answer without ####")
    return Item(_text(row["question"]), gold.strip().replace(",", ""), "math")


def _arc(row: Mapping[str, Any]) -> Item:
    """Labels are A-D or 1-4; they become A-D."""
    labels = list(row["choices"]["label"])
    return choice(row["question"], row["choices"]["text"], labels.index(row["answerKey"]))


def _gpqa(row: Mapping[str, Any]) -> Item:
    """The options stand in an order that the question itself decides, so that it is the same in every run."""
    question = _text(row["Question"])
    options = [row["Correct Answer"], *(row[f"Incorrect Answer {number}"] for number in (1, 2, 3))]
    seed = int.from_bytes(hashlib.sha256(question.encode("utf-8", "surrogatepass")).digest()[:8], "big")
    order = np.random.default_rng(seed).permutation(len(options)).tolist()
    return choice(question, [options[place] for place in order], order.index(0))


def _mmlu_pro(row: Mapping[str, Any]) -> Item:
    return choice(row["question"], row["options"], row["answer_index"])


def _countdown(row: Mapping[str, Any]) -> Item:
    """Numbers and target in the form of the task here: ascending numbers, then the target."""
    numbers = sorted(int(number) for number in row["nums"])
    return Item(f"{','.join(map(str, numbers))}={int(row['target'])}", str(int(row["target"])), "countdown")


def choice(question: str, options: Sequence[str], right: int) -> Item:
    """A question with lettered options.

    Raises no options, more than ten, a right one that is not there -> ValueError.
    """
    if not 2 <= len(options) <= len(LETTERS) or not 0 <= right < len(options):
        raise ValueError(f"expected 2 to {len(LETTERS)} options and the right one among them, got {len(options)}")
    lines = [f"{letter}. {_text(option).strip()}" for letter, option in zip(LETTERS, options, strict=False)]
    return Item("\n".join([_text(question).strip(), *lines]), LETTERS[right], "choice")


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected text, got {value!r}")
    return value


SUITES = (
    Suite("aime24", "HuggingFaceH4/aime_2024", None, "train", 30, _math("problem", "answer"), samples=32),
    Suite("aime25", "yentinglin/aime_2025", None, "train", 30, _math("problem", "answer"), samples=32),
    Suite(
        "amc23",
        "zwhe99/amc23",
        None,
        "test",
        40,
        _math("question", "answer"),
        samples=32,
        note="the 40 that HPT validates on; published AMC figures are of 83",
    ),
    Suite(
        "amc",
        "AI-MO/aimo-validation-amc",
        None,
        "train",
        83,
        _math("problem", "answer"),
        counted=False,
        samples=32,
        note="hub id unverified",
    ),
    Suite("math500", "HuggingFaceH4/MATH-500", None, "test", 500, _math("problem", "answer")),
    Suite("minerva", "zwhe99/simplerl-minerva-math", None, "test", 272, _math("problem", "answer")),
    Suite(
        "olympiadbench",
        "zwhe99/simplerl-OlympiadBench",
        None,
        "test",
        675,
        _math("question", "final_answer"),
        counted=False,
        note="HPT reports on 674 of them",
    ),
    Suite("gsm8k", "openai/gsm8k", "main", "test", 1319, _gsm8k, counted=False),
    Suite("arc_c", "allenai/ai2_arc", "ARC-Challenge", "test", 1172, _arc),
    Suite("gpqa_diamond", "Idavidrein/gpqa", "gpqa_diamond", "train", 198, _gpqa, note="gated: accept its terms first"),
    Suite("mmlu_pro", "TIGER-Lab/MMLU-Pro", None, "test", 12_032, _mmlu_pro, counted=False),
    Suite(
        "countdown",
        "Jiayi-Pan/Countdown-Tasks-3to4",
        None,
        "train",
        1024,
        _countdown,
        note="rows 327,680 to 328,703 of the file, as TinyZero tests",
    ),
)
GROUPS = {
    "math": ("aime24", "aime25", "amc23", "amc", "math500", "minerva", "olympiadbench"),
    "other": ("arc_c", "gpqa_diamond", "mmlu_pro"),
}
ROWS = {"countdown": (327_680, 328_704)}  # where a suite is a part of its file


def chosen_suites(name: str) -> list[Suite]:
    """The suites of a group, or the one of a name. Raises ValueError for a name that is neither."""
    known = {suite.name: suite for suite in SUITES}
    names = GROUPS.get(name, (name,))
    if name not in GROUPS and name not in known:
        raise ValueError(
            f"expected a suite or a group of them, got {name!r}; use one of {', '.join([*GROUPS, *known])} with --suite"
        )
    return [known[each] for each in names]


def read_rows(suite: Suite, rows: Sequence[Mapping[str, Any]]) -> list[Item]:
    """The items of a suite's rows, in order.

    Raises a row of another form, or another number of rows than the suite has, where that was counted -> ValueError.
    """
    start, stop = ROWS.get(suite.name, (0, len(rows)))
    part = rows[start:stop] if len(rows) >= stop else rows
    items = []
    for place, row in enumerate(part):
        try:
            items.append(suite.read(row))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"expected row {place} of {suite.name} to be one of {suite.hub} ({suite.split}), got {error!r}; "
                "fetch the set again"
            ) from error
    if suite.counted and len(items) != suite.size:
        raise ValueError(
            f"expected {suite.size} rows of {suite.name} ({suite.hub}, {suite.split}), got {len(items)}; figures on "
            "another set do not compare. Evaluate a set of your own by --data"
        )
    return items


def fetch_words(suites: Sequence[Suite], folder: str) -> str:
    """How to get suites into a folder, where there is a network."""
    first = f"expected <set>.parquet or <set>.jsonl in {folder} for these; where there is a network:"
    return "\n".join([first, "  import datasets", *(_fetch_line(suite) for suite in suites)])


def _fetch_line(suite: Suite) -> str:
    subset = "" if suite.subset is None else f", {suite.subset!r}"
    line = f"  datasets.load_dataset({suite.hub!r}{subset}, split={suite.split!r}).to_parquet('{suite.name}.parquet')"
    return f"{line}  # {suite.note}" if suite.note else line
