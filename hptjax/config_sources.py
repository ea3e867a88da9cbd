"""Who has set a field: the config file or the command line. What neither sets has its default."""

from __future__ import annotations

import pathlib
import tomllib
from collections.abc import Mapping, Sequence

from hptjax.config import Config, flatten, resolved

FILE, COMMAND_LINE = "file", "command line"


def field_sources(path: str | pathlib.Path, arguments: Sequence[str]) -> dict[str, str]:
    """Dotted field -> who has set it; fields that nobody has set are not in it.

    Args
      path: of a config file that can be read. arguments: those after it, as `--train.steps 50` or `--train.steps=50`.
    """
    fields = flatten(resolved(Config()))
    in_file = flatten(tomllib.loads(pathlib.Path(path).read_text(encoding="utf-8")))
    named = [word[2:].split("=")[0].replace("-", "_") for word in arguments if word.startswith("--")]
    found: Mapping[str, str] = dict.fromkeys(in_file, FILE) | dict.fromkeys(named, COMMAND_LINE)
    return {name: source for name, source in found.items() if name in fields}
