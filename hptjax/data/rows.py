"""Rows of a local file, a folder, or a data set of the hub, one after the other. Nothing is held but a batch.

Parquet, Arrow, folders and the hub are read by `datasets` in streaming mode. JSON Lines and CSV files are read here:
`datasets` refuses a whole file for one bad line, and what is bad is to be counted; and of a table in text it makes
numbers, which rounds long ones and loses an answer such as None. Of CSV files in a folder or on the hub it is told that
every column is text. No code of a data set is ever run: `datasets` knows no loading scripts since version 4.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import itertools
import json
import logging
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hptjax.errors import first_line

BATCH_ROWS = 256
LINE_FILES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
TABLE_FILES = {".parquet": "parquet", ".arrow": "arrow"}
CELL_CHARACTERS = 1 << 30  # of a CSV file; the standard library's own limit is 131,072
HUB_NAME = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:@(?P<split>[\w.-]+))?")
SUFFIX = re.compile(r"(?P<path>.+?)(?::(?P<config>[\w.-]+))?(?:@(?P<split>[\w.-]+))?")


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """A row that is none, for one of `row_fields.ROW_REASONS`."""

    reason: str


def open_rows(name: str) -> Iterator[Mapping[str, Any] | Unreadable]:
    """The rows of `name`, in order; a row that cannot be read is an `Unreadable` and the others go on.

    Args
      name: a file (.parquet, .jsonl, .json, .csv, .arrow, the JSON ones also as .gz), a folder as `datasets` or the hub
        lays it out, or the name of a data set on the hub. A folder or a name may be followed by `:config` and `@split`:
        `openai/gsm8k:main@test`.
    Raises
      nothing there, not reachable, several splits and none named, or a file that breaks off or is no table
      -> FileNotFoundError or ValueError that names it.
    """
    path = Path(name)
    if name.strip() and _exists(path):
        return _file_rows(path) if path.is_file() else _set_rows(name, str(path.resolve()), None, None)
    suffixed = SUFFIX.fullmatch(name)
    if suffixed and _exists(Path(suffixed["path"])) and Path(suffixed["path"]).is_dir():
        return _set_rows(name, *suffixed.group("path", "config", "split"))
    hub = HUB_NAME.fullmatch(name)
    if hub and not path.suffix:
        return _set_rows(name, *hub.group("path", "config", "split"))
    raise FileNotFoundError(
        f"expected a data file, a folder, or a data set of the hub (owner/name, owner/name:config@split), found no "
        f"'{name}' from {Path.cwd()}; change data.files, data.validation_files or data.test_files"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for a file
        return False


def _file_rows(path: Path) -> Iterator[Mapping[str, Any] | Unreadable]:
    if path.name.endswith(LINE_FILES):
        return _line_rows(path)
    if path.name.endswith((".json", ".json.gz")):
        return _json_rows(path)
    if path.suffix == ".csv":
        return _csv_rows(path)
    if path.suffix in TABLE_FILES:
        options = {"batch_size": BATCH_ROWS} if path.suffix == ".parquet" else {}  # else no rows are an error
        return _table_rows(str(path), _streamed(str(path), TABLE_FILES[path.suffix], data_files=str(path), **options))
    raise ValueError(
        f"expected a data file that ends with one of {', '.join([*LINE_FILES, '.json', '.csv', *TABLE_FILES])}, "
        f"got '{path}'; rename or convert it"
    )


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield from file
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"expected to read '{path}' to its end, got {type(error).__name__}: {first_line(error)}; copy it again"
        ) from None


def _line_rows(path: Path) -> Iterator[Mapping[str, Any] | Unreadable]:
    for number, line in enumerate(_lines(path)):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
        if line.strip():
            yield _json_row(line)


def _json_rows(path: Path) -> Iterator[Mapping[str, Any] | Unreadable]:
    """A `.json` file: one list of rows, or JSON Lines by another name."""
    first = next((line for line in _lines(path) if line.strip()), b"")
    if not first.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
        yield from _line_rows(path)
        return
    try:
        rows = json.loads(b"".join(_lines(path)))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"expected a JSON list of rows in '{path}', got {type(error).__name__}: {first_line(error)}; JSON Lines "
            "(one row per line, .jsonl) would lose only the bad rows"
        ) from None
    for row in rows:
        yield _checked(row) if isinstance(row, dict) else Unreadable("not_a_record")


def _csv_rows(path: Path) -> Iterator[Mapping[str, Any] | Unreadable]:
    """The lines under the names of the columns; every cell a text, an empty one None."""
    csv.field_size_limit(max(csv.field_size_limit(), CELL_CHARACTERS))
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = csv.reader(file, strict=True)
        try:
            names = next(lines, [])
            if len(set(names)) < len(names):
                raise ValueError(f"expected columns of different names in '{path}', got {names[:20]}; rename them")
            yield from (_csv_row(names, cells) for cells in lines if cells)
        except csv.Error as error:
            raise ValueError(
                f"expected CSV in '{path}', got in line {lines.line_num}: {error}; correct the quotes there"
            ) from None
        except OSError as error:
            raise ValueError(f"expected to read '{path}' to its end, got {first_line(error)}; copy it again") from None


def _csv_row(names: list[str], cells: list[str]) -> Mapping[str, Any] | Unreadable:
    if len(cells) > len(names):
        return Unreadable("not_a_record")
    return _checked({name: cell or None for name, cell in itertools.zip_longest(names, cells)})


def _json_row(line: bytes) -> Mapping[str, Any] | Unreadable:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return Unreadable("not_utf8")
    except (ValueError, RecursionError):
        return Unreadable("not_json")
    if not isinstance(row, dict):
        return Unreadable("not_a_record")
    return _checked(row) if b"\\ud" in line.lower() else row


def _checked(row: Mapping[str, Any]) -> Mapping[str, Any] | Unreadable:
    """The row, unless it holds half of a surrogate pair: no text that can be encoded."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return Unreadable("not_utf8")
    return row


def _set_rows(name: str, path: str, config: str | None, split: str | None) -> Iterator[Mapping[str, Any] | Unreadable]:
    """A folder or a data set of the hub: its only split, or the one that is named."""
    saved = Path(path, "state.json").is_file() or Path(path, "dataset_dict.json").is_file()
    found = _loaded_from_disk(path) if saved else _streamed(name, path, name=config)
    if not hasattr(found, "keys"):
        return _table_rows(name, found)
    if split is None and len(found) == 1:
        (split,) = found
    if split not in found:
        raise ValueError(
            f"expected one of the splits {sorted(found)} of '{name}', got {'none' if split is None else split!r}; "
            f"name it, as in '{path}{f':{config}' if config else ''}@{min(found)}'"
        )
    if not saved and found[split].info.builder_name == "csv":
        return _table_rows(name, _as_texts(name, path, config, split, found[split]))
    return _table_rows(name, found[split])


def _as_texts(shown: str, path: str, config: str | None, split: str | None, found: Any) -> Any:
    """A set of CSV files again, every cell a text as it is written; an empty one is None, as in `_csv_row`."""
    import datasets

    first = next(_table_rows(shown, found.take(1)), None)
    if not isinstance(first, Mapping):
        return found
    texts = datasets.Features({name: datasets.Value("string") for name in first})
    options = {"name": config, "split": split, "features": texts, "keep_default_na": False, "na_values": [""]}
    return _streamed(shown, path, **options)


def _streamed(shown: str, path: str, **options: Any) -> Any:
    """`datasets.load_dataset` in streaming mode, its errors in our words; `shown` is the name in them."""
    import datasets
    import huggingface_hub

    local = "data_files" in options or Path(path).exists()
    loud = {module: module.get_verbosity() for module in (datasets.utils.logging, huggingface_hub.utils.logging)}
    try:
        for module in loud:
            module.set_verbosity(logging.CRITICAL)  # they would say the same beside us
        found = datasets.load_dataset(path, streaming=True, **options)
    except Exception as error:  # what datasets, pyarrow, the hub's client and the network raise
        said = f"{type(error).__name__}: {first_line(error)}"
        if local:
            raise ValueError(f"expected a data set in '{shown}', got {said}; change the path or the file") from None
        raise ValueError(
            f"expected the data set '{shown}' from the hub, got {said}. Where there is no network, fetch it elsewhere "
            f"with `hf download {path} --repo-type dataset --local-dir {path.split('/')[-1]}`, bring the folder here "
            "and name it instead; a gated data set needs its terms accepted and `hf auth login` there"
        ) from None
    finally:
        for module, level in loud.items():
            module.set_verbosity(level)
    return found["train"] if "data_files" in options else found


def _loaded_from_disk(path: str) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(path)
    except Exception as error:
        raise ValueError(
            f"expected a data set saved by `datasets` in '{path}', got {type(error).__name__}: {first_line(error)}"
        ) from None


def _table_rows(name: str, found: Any) -> Iterator[Mapping[str, Any] | Unreadable]:
    """The rows of a data set, a batch at a time; a batch with bytes that are no text is taken row by row."""
    batches = found.with_format("arrow").iter(batch_size=BATCH_ROWS)
    while True:
        try:
            table = next(batches, None)
        except Exception as error:  # a page that is cut off or does not decompress
            raise ValueError(
                f"expected to read '{name}' to its end, got {type(error).__name__}: {first_line(error)}; copy it again"
            ) from None
        if table is None:
            return
        try:
            yield from table.to_pylist()
        except UnicodeDecodeError:
            yield from (_table_row(table, place) for place in range(table.num_rows))


def _table_row(table: Any, place: int) -> Mapping[str, Any] | Unreadable:
    try:
        return table.slice(place, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return Unreadable("not_utf8")
