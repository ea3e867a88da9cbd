"""What this machine has and what it lacks, before a run finds out."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import shutil
import sys
from typing import Literal

from hptjax import start
from hptjax.explain import human_bytes
from hptjax.rundir import PACKAGES, compile_cache_folder

Status = Literal["ok", "note", "lacks"]
ENOUGH_MEMORY_BYTES = 4 << 30  # the quickstart's limit
ENOUGH_DISK_BYTES = 2 << 30
OPTIONAL = {"wandb": "telemetry.wandb", "libtpu": "TPU (ACCEL=tpu)", "jax_cuda13_plugin": "NVIDIA GPU (ACCEL=cuda13)"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report. `lacks` means that training cannot run, or not as pinned; `note` is for information."""

    what: str
    status: Status
    detail: str


def examine(*, runs_dir: str = "runs") -> list[Finding]:
    """Every finding about this machine; imports jax to ask for its devices."""
    return [
        python_finding(),
        packages_finding(),
        pins_finding(pathlib.Path(__file__).resolve().parent.parent / "constraints.txt"),
        devices_finding(),
        memory_finding(),
        huge_pages_finding(os.environ.get(start.TUNABLES, ""), start.c_library(), start.modes()),
        Finding("cores", "ok", f"{core_count()} usable of {os.cpu_count()}"),
        disk_finding(pathlib.Path(runs_dir)),
        cache_finding(compile_cache_folder()),
        extras_finding(),
    ]


def report(findings: list[Finding]) -> str:
    """The findings as text, the verdict last."""
    width = max(len(finding.what) for finding in findings)
    lines = [f"{finding.what:<{width}}  {finding.status:<5}  {finding.detail}" for finding in findings]
    lacking = [finding.what for finding in findings if finding.status == "lacks"]
    verdict = f"lacks: {', '.join(lacking)}" if lacking else "this machine can train"
    return "\n".join([*lines, "", verdict])


def python_finding() -> Finding:
    """Whether this Python is 3.11 or newer."""
    version = platform.python_version()
    enough = sys.version_info >= (3, 11)
    return Finding(
        "python", "ok" if enough else "lacks", f"{version}" + ("" if enough else "; 3.11 or newer is needed")
    )


def packages_finding() -> Finding:
    """Whether every package of the base install is there."""
    needed = [name for name in PACKAGES if name != "libtpu"]
    absent = [name for name in needed if installed_version(name) is None]
    if absent:
        return Finding("packages", "lacks", f"{', '.join(absent)}; run `make venv` or pip install -e .")
    shown = ", ".join(f"{name} {installed_version(name)}" for name in ("jax", "flax", "optax", "orbax-checkpoint"))
    return Finding("packages", "ok", shown)


def pins_finding(constraints: pathlib.Path) -> Finding:
    """How the installed versions differ from the pinned ones. Another version may work: it is a note."""
    if not constraints.is_file():
        return Finding("pins", "note", "no constraints.txt beside the package; versions are not compared")
    different = [
        f"{name} {installed_version(name)} (pinned {version})"
        for name, version in read_pins(constraints).items()
        if installed_version(name) not in (None, version)
    ]
    if different:
        return Finding("pins", "note", "; ".join(different))
    return Finding("pins", "ok", "installed versions are the pinned ones")


def read_pins(constraints: pathlib.Path) -> dict[str, str]:
    """name -> version of the `name==version` lines of a constraints file."""
    lines = (line.split("#")[0].strip() for line in constraints.read_text(encoding="utf-8").splitlines())
    return dict(line.split("==", 1) for line in lines if "==" in line)


def installed_version(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices_finding() -> Finding:
    """The devices that jax sees."""
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # a broken driver or plugin raises what it likes
        return Finding("devices", "lacks", f"jax finds none: {type(error).__name__}: {error}")
    kinds = sorted({f"{device.platform} ({device.device_kind})" for device in devices})
    return Finding("devices", "ok", f"{len(devices)} x {', '.join(kinds)}")


def memory_finding() -> Finding:
    """Physical memory, and what is free of it where the system says so."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else None
    detail = human_bytes(total) + (f", {human_bytes(free)} free" if free is not None else "")
    if total < ENOUGH_MEMORY_BYTES:
        return Finding("memory", "note", f"{detail}; the quickstart may take {human_bytes(ENOUGH_MEMORY_BYTES)}")
    return Finding("memory", "ok", detail)


def huge_pages_finding(tunables: str, library: str, modes: str) -> Finding:
    """Whether the C heap of this process lies in huge pages; arguments as in `start.tunables_for_huge_pages`."""
    asked = f"{start.TUNABLE}=1" in tunables.split(":")
    if "[always]" in modes or (asked and start.heeds_asking(library, modes)):
        return Finding("huge pages", "ok", "in use")
    if start.tunables_for_huge_pages(tunables, library, modes) is not None:
        how = f"not in use; `hptjax` asks for them, other commands with {start.TUNABLES}={start.TUNABLE}=1"
        return Finding("huge pages", "note", how)
    return Finding("huge pages", "note", "not in use, or not offered here; without them a CPU trains more slowly")


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def disk_finding(runs_dir: pathlib.Path) -> Finding:
    """Room where the runs go."""
    folder = existing_parent(runs_dir)
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        return Finding("disk", "lacks", f"'{folder}' cannot be written; change runs_dir")
    if free < ENOUGH_DISK_BYTES:
        return Finding("disk", "note", f"{human_bytes(free)} free for '{runs_dir}'; checkpoints may not fit")
    return Finding("disk", "ok", f"{human_bytes(free)} free for '{runs_dir}'")


def cache_finding(folder: pathlib.Path) -> Finding:
    """Whether compiled programs can be kept between runs."""
    if not os.access(existing_parent(folder), os.W_OK):
        return Finding("compile cache", "note", f"'{folder}' cannot be written: every start compiles again")
    entries = sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0
    return Finding("compile cache", "ok", f"'{folder}', {entries} entries")


def existing_parent(path: pathlib.Path) -> pathlib.Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.resolve()
    while not path.is_dir():
        path = path.parent
    return path


def extras_finding() -> Finding:
    """Which optional parts are installed."""
    absent = [f"{name} for {use}" for name, use in OPTIONAL.items() if importlib.util.find_spec(name) is None]
    return Finding("extras", "note", f"not installed: {'; '.join(absent)}" if absent else "all installed")
