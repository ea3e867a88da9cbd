"""TOML file -> Config -> command-line overrides -> checked Config."""

from __future__ import annotations

import os
import pathlib
import tomllib
from collections.abc import Sequence

from hptjax import config_text
from hptjax.config import Config
from hptjax.config_check import check


def load_config(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> Config:
    """The checked config of a file, with `overrides` as on the command line: `["--train.steps", "50"]`.

    Raises
      FileNotFoundError: no such file.
      ValueError: not TOML, an unknown key, a value of another type, or fields that contradict each other.
    """
    config = read_file(path)
    if overrides:
        config = config_text.command_line(config, overrides, prog=f"hptjax ... {path}")
    check(config)
    return config


def read_file(path: str | pathlib.Path) -> Config:
    """The config of a TOML file, not yet checked."""
    path = pathlib.Path(path)
    if not os.path.isfile(path):  # pathlib raises where a name is too long
        nearby = sorted(str(other) for other in path.parent.glob("*.toml")) if os.path.isdir(path.parent) else []
        listing = f" Files there: {', '.join(nearby)}." if nearby else ""
        raise FileNotFoundError(f"no config file at '{path}' (a TOML file was expected).{listing}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"expected a config file that can be read, got {error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from None
    return config_text.build(Config, values, source=str(path))
