"""From the config's data files to the examples of each split."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from hptjax.config import Config
from hptjax.data import importers
from hptjax.data.identity import content_ids
from hptjax.data.imported import FileCount, read_examples
from hptjax.data.importers import Importer
from hptjax.data.row_fields import Row
from hptjax.data.split import split_by_canonical, split_position
from hptjax.records import Example

FORMATS: Mapping[str, Importer] = {
    "verl": importers.verl,
    "prompt_completion": importers.prompt_completion,
    "messages": importers.messages,
    "native": importers.native,
    "problem_answer": importers.problem_answer,
    "alpaca": importers.alpaca,
}
COLUMNS: Mapping[str, tuple[frozenset[str], ...]] = {  # format -> columns that tell it, one of the sets; first fit
    "verl": (frozenset({"prompt", "reward_model"}),),
    "prompt_completion": (frozenset({"prompt", "completion"}),),
    "messages": (frozenset({"messages"}),),
    "native": (frozenset({"prompt", "demo"}), frozenset({"prompt", "answer"})),
    "problem_answer": tuple(
        frozenset({question, answer}) for question in ("problem", "question") for answer in ("answer", "final_answer")
    ),
    "alpaca": (frozenset({"instruction", "output"}),),
}
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, eq=False)
class FileExamples:
    """The examples of data files.

    Args
      splits: train, validation and test; no problem is in two of them, and question ids are unique over all.
      left_out: split -> reason -> how many of its examples are not among them.
      files: what became of the rows of each file.
      repeated_problems: problems that several distinct examples have.
    """

    splits: Mapping[str, list[Example]]
    left_out: Mapping[str, Mapping[str, int]]
    files: Sequence[FileCount]
    repeated_problems: int


def file_examples(config: Config) -> FileExamples:
    """The examples of `data.files`, `data.validation_files` and `data.test_files`, split where a split has no files.

    Equal rows count once. A problem of a held-out file is learned from nowhere: the training example is left out, and
    counted. Splits, ids and order depend on what the rows say and `data.split_seed`, not on the order of the rows.

    Raises
      files that cannot be read, or a split without examples -> ValueError or FileNotFoundError.
    """
    data = config.data
    named = {"train": data.files, "validation": data.validation_files, "test": data.test_files}
    read: dict[str, list[Example]] = {}
    counts: list[FileCount] = []
    for split, names in named.items():
        read[split], of_files = read_examples(names, functools.partial(choose_importer, data.format))
        counts += of_files
        if names and not read[split]:
            raise ValueError(f"expected rows that can be used in {list(names)}, got none: {_told(of_files)}")
    left_out: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    distinct = _distinct(read, left_out)
    whole = _without_held_out(distinct, left_out)
    if not whole["train"]:
        raise ValueError("expected training problems beside the held-out ones, got none; change data.files")
    splits = _shared_out(config, whole, left_out)
    for split, limit in (
        ("train", data.train_questions),
        ("validation", data.validation_questions),
        ("test", data.test_questions),
    ):
        left_out[split]["over_limit"] = len(splits[split]) - len(splits[split][:limit])
        splits[split] = splits[split][:limit]
    problems = [example.canonical for examples in distinct.values() for example in examples]
    return FileExamples(splits, left_out, counts, len(problems) - len(set(problems)))


def whole_examples(config: Config) -> FileExamples:
    """The distinct examples of `data.files`, all of them as training questions."""
    read, counts = read_examples(config.data.files, functools.partial(choose_importer, config.data.format))
    if not read:
        raise ValueError(f"expected rows that can be used in {list(config.data.files)}, got none: {_told(counts)}")
    left_out: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    examples = _distinct({"train": read, "validation": [], "test": []}, left_out)["train"]
    repeated = len(examples) - len({example.canonical for example in examples})
    return FileExamples({"train": examples}, left_out, counts, repeated)


def choose_importer(format: str, row: Row) -> tuple[str, Importer] | None:
    """(name of the format, importer): the one of the config, or by the columns of a row; None where no format has them.

    Args
      format: `data.format`.
    """
    columns = {str(column).lower() for column in row}
    fitting = [name for name, sets in COLUMNS.items() if any(needed <= columns for needed in sets)]
    chosen = next(iter(fitting), None) if format == "auto" else format
    return None if chosen is None else (chosen, FORMATS[chosen])


def _distinct(read: Mapping[str, list[Example]], left_out: Mapping[str, dict[str, int]]) -> dict[str, list[Example]]:
    """The examples with ids by content, each content once per split, in the order of the ids."""
    ids = iter(content_ids([example for split in SPLITS for example in read[split]]))
    distinct: dict[str, list[Example]] = {}
    for split in SPLITS:
        by_id: dict[int, Example] = {}
        for example in read[split]:
            by_id.setdefault(number := next(ids), dataclasses.replace(example, question_id=number))
        distinct[split] = [by_id[number] for number in sorted(by_id)]
        left_out[split]["duplicate"] = len(read[split]) - len(distinct[split])
    return distinct


def _without_held_out(
    distinct: Mapping[str, list[Example]], left_out: Mapping[str, dict[str, int]]
) -> dict[str, list[Example]]:
    """The splits without the problems of the splits after them."""
    kept: dict[str, list[Example]] = {}
    taken: dict[str, str] = {}
    for split in reversed(SPLITS):
        kept[split] = []
        for example in distinct[split]:
            where = taken.get(example.canonical, split)
            if where == split:
                kept[split].append(example)
            else:
                left_out[split][f"also_in_{where}"] = left_out[split].get(f"also_in_{where}", 0) + 1
        taken |= {example.canonical: split for example in kept[split]}
    return kept


def _shared_out(
    config: Config, whole: Mapping[str, list[Example]], left_out: Mapping[str, dict[str, int]]
) -> dict[str, list[Example]]:
    """Each split in the fair order of its problems; one without files of its own has its share of the training's."""
    data = config.data
    shares = dataclasses.asdict(data.fractions)
    train = shares.pop("base") + shares.pop("train")
    own = {"validation": data.validation_files, "test": data.test_files}
    train += sum(shares[name] for name, files in own.items() if files)
    fractions = {"train": train, **{name: shares[name] for name, files in own.items() if not files}}
    # the shares may add up to 1.0000000000000002
    splits = split_by_canonical(whole["train"], seed=data.split_seed, fractions={**fractions, "train": min(train, 1.0)})
    left_out["train"]["outside_fractions"] = len(whole["train"]) - sum(map(len, splits.values()))
    for name, files in own.items():
        if files:
            splits[name] = sorted(
                whole[name], key=lambda e: (split_position(e.canonical, data.split_seed), e.canonical)
            )
    return splits


def _told(counts: Sequence[FileCount]) -> str:
    """Rows and reasons of some files, for a message."""
    parts = [
        f"'{count.name}' has {count.rows} rows"
        + "".join(f", {n} {reason} (first: row {count.first[reason]})" for reason, n in count.dropped.items())
        for count in counts
    ]
    return "; ".join(parts) + "; change the files or data.format"


def files_record(found: FileExamples) -> list[dict[str, Any]]:
    """What became of the rows, as JSON values."""
    return [dataclasses.asdict(count) for count in found.files]
