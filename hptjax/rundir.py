"""The run folder: what was asked for, with which software; a folder is never used for two different configs.

runs/<name>/config.json    every field with its value
runs/<name>/versions.json  one entry per distinct environment that the run was started in, oldest first
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any

from hptjax.config import Config, changed_fields, resolved

PACKAGES = (
    "jax jaxlib flax optax orbax-checkpoint numpy transformers tokenizers datasets grain safetensors tyro rich "
    "tensorboardX jaxtyping matplotlib libtpu"
).split()
SHOWN_CHANGES = 12
LOCK_FILE = "lock"
MARK_FILE = "started"  # of several processes: what the first has written there, the others must find


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
    """Inside the block no other process can hold this run folder; a process that ends, in any way, lets go of it.

    Raises ValueError where another process holds it. Where files cannot be locked, nothing is held.
    """
    with contextlib.ExitStack() as files:
        # no locks on this file system, or a folder that cannot be made: then the first write says so
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            file = files.enter_context((folder / LOCK_FILE).open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"expected run folder '{folder}' to be free, got one that another process is training in; wait for "
                    "it, stop it, or give the run another name (--name)."
                ) from None
        yield


def mark(folder: pathlib.Path) -> str:
    """Writes a sign of this start into the run folder, and returns it."""
    sign = uuid.uuid4().hex
    write_json(folder / MARK_FILE, sign)
    return sign


def check_seen(folder: pathlib.Path, sign: str) -> None:
    """Raises ValueError where this process does not see the folder that `mark` has written its sign into.

    Each process writes its own parts of a checkpoint: in different folders they would make none.
    """
    try:
        seen = read_json(folder / MARK_FILE)
    except (OSError, ValueError):
        seen = None
    if seen != sign:
        raise ValueError(
            f"expected every process to see the run folder that process 0 has opened, got another one, or none, at "
            f"'{folder.absolute()}' on {platform.node()}; set runs_dir to a folder that all hosts share, an absolute "
            "path where the processes start in different folders."
        )


def open_run_folder(config: Config) -> pathlib.Path:
    """The run folder of a config, made if absent, with `config.json` and `versions.json` written.

    Raises
      ValueError: the folder belongs to a run with another config (the message names the fields that differ), or its
        config.json is lost or cannot be read.
    """
    folder = run_folder(config)
    record = folder / "config.json"
    if has_begun(folder):
        if not record.exists():
            raise ValueError(
                f"expected the config of the run that has begun in '{folder}', got no config.json; put it back, give "
                "the run another name (--name), or remove the folder."
            )
        recorded = read_json(record)
        refuse_changes(recorded, config, folder)
        if recorded == resolved(config):
            note_versions(folder / "versions.json")
            return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"expected to make the run folder '{folder}', got {error}; change runs_dir.") from None
    write_json(record, resolved(config))
    note_versions(folder / "versions.json")
    return folder


def has_begun(folder: pathlib.Path) -> bool:
    """Whether the run has measured or saved anything: a start that failed before that binds nobody to its config."""
    metrics = folder / "metrics.jsonl"
    measured = metrics.exists() and metrics.stat().st_size > 0
    return measured or any(path.name.isdigit() for path in folder.glob("checkpoints/*"))


def run_folder(config: Config) -> pathlib.Path:
    """Where the run of a config lives."""
    return pathlib.Path(config.runs_dir) / config.name


def refuse_changes(recorded: dict[str, Any], config: Config, folder: pathlib.Path) -> None:
    """Nothing, where `config` is the recorded one; a ValueError that names the fields otherwise."""
    changes = changed_fields(recorded, resolved(config))
    if not changes:
        return
    listed = changes[:SHOWN_CHANGES] + (
        [f"and {len(changes) - SHOWN_CHANGES} more"] if len(changes) > SHOWN_CHANGES else []
    )
    raise ValueError(
        f"expected the config that run folder '{folder}' was started with, got changed fields (recorded -> now): "
        f"{'; '.join(listed)}; change these back, give the run another name (--name), or remove the folder."
    )


def compile_cache_folder() -> pathlib.Path:
    """Where compiled programs are kept between runs: JAX_COMPILATION_CACHE_DIR, else the user's cache folder."""
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if chosen:
        return pathlib.Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "hptjax" / "jax"


def note_versions(path: pathlib.Path) -> None:
    """Adds the present environment to `versions.json` unless it is the newest entry already."""
    entries = read_json(path) if path.exists() else []
    present = environment()
    if not entries or entries[-1] != present:
        write_json(path, [*entries, present])


def environment() -> dict[str, Any]:
    """Python, platform, package versions and the git commit of this checkout."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": package_versions(),
        "git": git_state(pathlib.Path(__file__).resolve().parent.parent),
    }


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that a run's numbers depend on; absent ones are left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_state(folder: pathlib.Path) -> dict[str, Any] | None:
    """Commit of the checkout at `folder`, and whether tracked files differ from it; None where there is none."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True, timeout=20
        ).stdout.strip()

    try:
        if pathlib.Path(git("rev-parse", "--show-toplevel")).resolve() != folder:
            return None  # installed inside another project's checkout
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def read_json(path: pathlib.Path) -> Any:
    """The value of a JSON file; a ValueError that names the file where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"expected JSON in '{path}', got something else ({error}); remove the run folder.") from None


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file so that a reader, or a run killed here, sees the old one or the new one and no mixture."""
    half = path.with_name(path.name + ".part")
    with half.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, sort_keys=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)
