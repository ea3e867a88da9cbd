"""Every config field that a message of the package names exists: the texts are read from the sources by ast."""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import re

import pytest

from hptjax.config import Config, StageConfig
from hptjax.config_rollout import RewardFunction
from hptjax.config_text import dotted_paths

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "hptjax"
FIELDS = set(dotted_paths(Config))
SECTIONS = {field.split(".")[0] for field in FIELDS if "." in field} | {"stages"}
NO_SECTIONS = {  # names that a section might have had
    "rewards",
    "gate",
    "gates",
    "sampling",
    "loss",
    "losses",
    "models",
    "sharding",
    "config",
    "optim",
}
DOTTED = re.compile(r"(?<![\w./{-])([a-z_]+(?:\.[a-z0-9_{}]+)+)(?![\w/(])")
HOLE = "{}"  # where an f-string puts a value
FILES = {"json", "jsonl", "toml", "txt", "md", "png", "py", "safetensors"}
LIST_ENTRY = re.compile(r"^(stages|reward\.functions)\.(?:\d+|\{\})(?:\.(\w+))?$")
ENTRY_FIELDS = {
    name: {field.name for field in dataclasses.fields(entry)}
    for name, entry in {"stages": StageConfig, "reward.functions": RewardFunction}.items()
}


def texts(source: str) -> list[tuple[int, str, bool]]:
    """(line, text, whether it is a docstring) of every string; `{}` stands for what an f-string puts in."""
    tree = ast.parse(source)
    docstrings, parts = set(), set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            docstrings.add(id(body[0].value))
        if isinstance(node, ast.JoinedStr):
            parts |= {id(value) for value in ast.walk(node) if value is not node}
    found = []
    for node in ast.walk(tree):
        if id(node) in parts:
            continue
        if isinstance(node, ast.JoinedStr):
            text = "".join(v.value if isinstance(v, ast.Constant) else HOLE for v in node.values)
            found.append((node.lineno, text, False))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append((node.lineno, node.value, id(node) in docstrings))
    return found


def exists(name: str) -> bool:
    """Whether a dotted name is a field or section, a list entry of one, or, with a hole, could be one."""
    entry = LIST_ENTRY.match(name)
    if entry:
        return entry[2] is None or entry[2] in ENTRY_FIELDS[entry[1]]
    pattern = re.compile(re.escape(name).replace(re.escape(HOLE), "[a-z0-9_]+"))
    return any(pattern.fullmatch(field) for field in FIELDS)


def is_module(name: str) -> bool:
    """Whether a dotted name is a module of the package, or something in one, such as `train.state`."""
    path = PACKAGE.joinpath(*name.split(".")[:2])
    return path.with_suffix(".py").exists() or path.is_dir()


def unknown_fields(source: str) -> list[str]:
    """The names in messages (and, in docstrings, under a config section) that are no field of the config."""
    found = []
    for line, text, docstring in texts(source):
        if not docstring and " " not in text:
            continue  # a key, a path or a format, not a sentence
        for match in DOTTED.finditer(text):
            name = match[1]
            if (
                name.split(".")[0] not in (SECTIONS if docstring else SECTIONS | NO_SECTIONS)
                or name.rsplit(".", 1)[-1] in FILES
            ):
                continue
            if not exists(name) and not (docstring and is_module(name)):
                found.append(f"line {line}: {name}")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_messages_name_fields_that_exist(path):
    assert unknown_fields(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("message", "name"),
    [
        ("change gate.threshold", "gate.threshold"),
        ("change rewards.functions", "rewards.functions"),
        ("set model.folder to a folder", "model.folder"),
        ("raise rollout.max_stop_ids, please", "rollout.max_stop_ids"),
        ("see data.{name}_rows", "data.{}_rows"),
        ("stages.{i}.rate is too high", "stages.{}.rate"),
    ],
)
def test_messages_that_name_no_field_are_found(message, name):
    assert unknown_fields(f"raise ValueError(f{message!r})") == [f"line 1: {name}"]


@pytest.mark.parametrize(
    "message",
    ["change hpt.gate.", "task.{name} <= 3", "write metrics.jsonl in data.json", "e.g. this", "stages.{i}.steps 0"],
)
def test_messages_that_name_a_field_pass(message):
    assert unknown_fields(f"raise ValueError(f{message!r})") == []
