"""What several commands need of their arguments: the config with its options, and what is refused before any work."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import TypeVar

from hptjax.config import Config
from hptjax.config_load import read_file
from hptjax.config_text import command_line

T = TypeVar("T")


def parse(
    command: str,
    arguments: list[str],
    with_config: Callable[[Config], T],
    read: Callable[[str], Config] = read_file,
) -> T:
    """The command's options, with the fields of the config file as defaults; tyro prints help and complaints.

    Raises
      FileNotFoundError, ValueError: no config file was named, or it cannot be read.
    """
    prog = f"hptjax {command}"
    if arguments and not arguments[0].startswith("-"):
        path, rest = arguments[0], arguments[1:]
        default = with_config(read(path))
        prog += f" {path}"
    elif any(argument in ("-h", "--help") for argument in arguments):
        prog, default, rest = f"{prog} CONFIG.toml", with_config(Config()), arguments
    else:
        raise ValueError(f"expected a config file first, such as `{prog} configs/quickstart.toml`, got {arguments}.")
    return command_line(default, rest, prog=prog)


def refuse_processes(command: str, config: Config) -> None:
    """Raises ValueError where a command that runs in one process is given several."""
    if config.distributed.mode != "none":
        raise ValueError(
            f"expected one process for `hptjax {command}`, got distributed.mode = '{config.distributed.mode}'; "
            "change it to 'none'. Only `hptjax train` runs on several."
        )


def expect_writable(path: pathlib.Path | None, flag: str = "--json") -> None:
    """Raises ValueError where the file of a flag cannot be written; asked before the work is done."""
    if path is None:
        return
    folder = path.resolve().parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"expected the path of a file in an existing folder, got '{path}'; change {flag}.")


def as_switch(arguments: list[str], option: str) -> list[str]:
    """The arguments with `true` after an option that stands without a value."""
    given = [*arguments, "--"]
    places = [place for place, word in enumerate(arguments) if word == option and given[place + 1].startswith("-")]
    return [part for place, word in enumerate(arguments) for part in ([word, "true"] if place in places else [word])]
