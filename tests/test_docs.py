"""What README and docs/ name exists: files, links, commands, make targets, config fields, tests."""

from __future__ import annotations

import pathlib
import re

import pytest

from hptjax.cli import COMMANDS
from hptjax.config import Config
from hptjax.config_text import dotted_paths

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "launch" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FIELDS = set(dotted_paths(Config))
SECTIONS = {field.split(".")[0] for field in FIELDS if "." in field}
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"(?:[\w.-]+/)*[\w.-]+\.(?:py|md|toml|txt)|(?:[\w-]+/)+")
FIELD = re.compile(r"(?:--)?([a-z_]+(?:\.[a-z_0-9]+)+)")
MADE_BY_A_RUN = ("runs/",)


def page_texts(pages: list[pathlib.Path]) -> list:
    return [pytest.param(page.read_text(encoding="utf-8"), id=str(page.relative_to(ROOT))) for page in pages]


def fragments(text: str) -> list[str]:
    """Code in backticks and in indented or fenced blocks, a line each."""
    blocks = [line for line in text.splitlines() if line.startswith("    ")]
    return [*CODE.findall(text), *blocks]


def missing_paths(text: str) -> list[str]:
    """Paths in backticks that are neither in the repository nor, shortened, in `hptjax/`. Globs are not looked at."""
    names = {code.split(":")[0] for code in CODE.findall(text) if PATH.fullmatch(code)}
    return sorted(
        name
        for name in names
        if not name.startswith(MADE_BY_A_RUN) and not (ROOT / name).exists() and not (ROOT / "hptjax" / name).exists()
    )


def broken_links(text: str, folder: pathlib.Path) -> list[str]:
    return [link for link in LINK.findall(text) if "://" not in link and not (folder / link.split("#")[0]).exists()]


def unknown_commands(text: str) -> list[str]:
    """`hptjax X` and `make X` in code where X is neither a command nor a target."""
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    found = []
    for code in fragments(text):
        called = re.match(r"\s*(?:\S*bin/)?hptjax ([a-z]\w*)", code)
        made = re.match(r"\s*make ([a-z][\w.-]*)", code)
        found += [code] if called and called[1] not in COMMANDS else []
        found += [code] if made and made[1] not in targets else []
    return found


def unknown_fields(text: str) -> list[str]:
    """Dotted names in code that begin like a config section and are no field, and options that set none."""
    found = []
    for code in fragments(text):
        words = [code] if " " not in code.strip() else re.findall(r"--[a-z_]+(?:\.[a-z_0-9]+)+", code)
        for word in words:
            field = FIELD.fullmatch(word.strip())
            if field and field[1].split(".")[0] in SECTIONS and field[1] not in FIELDS and not PATH.fullmatch(field[1]):
                found.append(field[1])
    return found


@pytest.mark.parametrize("text", page_texts(PAGES))
def test_docs_paths_exist(text):
    assert missing_paths(text) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_docs_links_resolve(page):
    assert broken_links(page.read_text(encoding="utf-8"), page.parent) == []


@pytest.mark.parametrize("text", page_texts(PAGES))
def test_docs_commands_exist(text):
    assert unknown_commands(text) == []


@pytest.mark.parametrize("text", page_texts(PAGES))
def test_docs_config_fields_exist(text):
    assert unknown_fields(text) == []


def test_docs_readme_lists_every_command_and_every_page():
    readme = PAGES[0].read_text(encoding="utf-8")
    assert [command for command in COMMANDS if f"`hptjax {command}" not in readme] == []
    assert [page.name for page in PAGES[2:] if f"`docs/{page.name}`" not in readme] == []


def test_docs_named_tests_exist():
    """A `test_name` or `test_prefix_*` in the proofs stands in some test file."""
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    names = {
        code for page in PAGES for code in CODE.findall(page.read_text(encoding="utf-8")) if code.startswith("test_")
    }
    assert names
    assert [name for name in sorted(names) if f"def {name.rstrip('*')}" not in sources] == []


def unnamed_tests(text: str) -> list[str]:
    """Rows of the table of proofs, `| T5 | ... | files |`, whose files hold no test of the row's name."""
    found = []
    for row in re.findall(r"^\| (T\d+[^|]*)\|.*\|([^|]*)\|$", text, re.MULTILINE):
        ids = re.findall(r"T(\d+)", row[0])
        for path in CODE.findall(row[1]):
            source = (ROOT / path).read_text(encoding="utf-8")
            if not any(re.search(rf"def test_\w*t{number}_", source) for number in ids):
                found.append(f"{row[0].strip()}: {path}")
    return found


def test_docs_every_proof_stands_in_the_files_of_its_row():
    text = (ROOT / "docs" / "proofs.md").read_text(encoding="utf-8")
    assert unnamed_tests(text) == []
    assert {f"T{number}" for number in range(1, 33)} <= set(
        re.findall(r"T\d+", "".join(re.findall(r"^\| T[^|]*", text, re.M)))
    )
    assert unnamed_tests("| T31 | one step | `tests/test_docs.py` |") == ["T31: tests/test_docs.py"]


def test_docs_faults_are_found():
    assert missing_paths("see `docs/absent.md` and `hpt/gate.py`") == ["docs/absent.md"]
    assert broken_links("[a](absent.md) [b](https://x.org) [c](proofs.md#bounds)", ROOT / "docs") == ["absent.md"]
    assert unknown_commands("`hptjax fly x` `make test`\n    make coffee") == ["hptjax fly x", "    make coffee"]
    assert unknown_fields("`gate.threshold` `hpt.threshold` `hpt.gate`\n    hptjax train c --eval.k 1") == [
        "hpt.threshold",
        "eval.k",
    ]
