"""One compiled program of a plan as plain numbers, kept on disk so that it is compiled once.

The key is everything that the program depends on: the config, the topology, the versions of the compiler and the
sources of this package.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from hptjax.config import Config, resolved
from hptjax.errors import first_line
from hptjax.plan.traffic import Moved, traffic
from hptjax.rundir import environment

PACKAGE = pathlib.Path(__file__).resolve().parent.parent
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
NEEDED = re.compile(r"(?:\(|Used )([\d.]+)([KMGT])\)? (?:exceeds available HBM \(|of )([\d.]+)([KMGT])")
WITHOUT_EFFECT = (
    "name",
    "runs_dir",
    "telemetry",
    "eval",
    "checkpoint",
    "task",
    "reward",
    "data",
)


@dataclasses.dataclass(frozen=True)
class Exchanged:
    """The collectives of one kind and group size: how many run in a call, and the bytes of their arrays.

    Args
      devices: of a group. slices: that it spans. times: runs in one call.
      bytes: of the gathered or reduced arrays, all runs together. ici_bytes, dcn_bytes: that one device sends within
        its slice and to others, by ring algorithms.
      update: whether they belong to the optimizer's update.
    """

    kind: str
    devices: int
    slices: int
    times: int
    bytes: float
    ici_bytes: float
    dcn_bytes: float
    update: bool


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler and the compiled text say of one program, per device and call.

    Args
      refused: the compiler's word where the program does not fit, else empty. needed_bytes: what it then wanted.
      argument_bytes ... code_bytes: the compiler's memory analysis. alias_bytes: outputs in the place of arguments.
      memory_bytes: read and written in a call; update_memory_bytes: in the update besides.
      largest: (bytes, type, place in the traced program) of the largest intermediate arrays.
      unknown_loops: loops whose turns were assumed.
    """

    refused: str = ""
    needed_bytes: float = 0.0
    argument_bytes: float = 0.0
    output_bytes: float = 0.0
    alias_bytes: float = 0.0
    temp_bytes: float = 0.0
    code_bytes: float = 0.0
    memory_bytes: float = 0.0
    update_memory_bytes: float = 0.0
    exchanged: tuple[Exchanged, ...] = ()
    largest: tuple[tuple[float, str, str], ...] = ()
    unknown_loops: int = 0
    compile_s: float = 0.0

    @property
    def peak_bytes(self) -> float:
        """The most that the program holds at a time, arguments included."""
        held = self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes + self.code_bytes
        return max(held, self.needed_bytes)


def compile_program(
    lower: Callable[[], jax.stages.Lowered], *, slice_of: Sequence[int], turns: Sequence[int], has_update: bool
) -> Compiled:
    """Compiles a program and reads its numbers; a program too large for the memory is an answer, not an error."""
    began = time.monotonic()
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = NEEDED.search(str(error))
        needed = float(found[1]) * UNITS[found[2]] if found else 0.0
        return Compiled(refused=first_line(error), needed_bytes=needed, compile_s=time.monotonic() - began)
    memory: Any = compiled.memory_analysis()
    moved = traffic(compiled.as_text() or "", turns=turns, has_update=has_update)
    return Compiled(
        argument_bytes=float(memory.argument_size_in_bytes),
        output_bytes=float(memory.output_size_in_bytes),
        alias_bytes=float(memory.alias_size_in_bytes),
        temp_bytes=float(memory.temp_size_in_bytes),
        code_bytes=float(memory.generated_code_size_in_bytes),
        memory_bytes=moved.always.memory_bytes,
        update_memory_bytes=moved.update.memory_bytes,
        exchanged=(*exchanged(moved.always, slice_of, update=False), *exchanged(moved.update, slice_of, update=True)),
        largest=tuple((buffer.bytes, buffer.type, buffer.where) for buffer in moved.largest),
        unknown_loops=moved.whole.unknown_loops,
        compile_s=time.monotonic() - began,
    )


def exchanged(moved: Moved, slice_of: Sequence[int], *, update: bool) -> list[Exchanged]:
    """The collectives of a computation, alike ones together, most bytes first."""
    sums: dict[tuple[str, int, int], Exchanged] = {}
    for entry in moved.collectives:
        slices = len({slice_of[place] for place in entry.group if place < len(slice_of)}) or 1
        if entry.between_slices:
            slices = len(set(slice_of))
            entry = dataclasses.replace(entry, group=tuple(range(slices)))
        key = (entry.kind, len(entry.group), slices)
        before = sums.get(key, Exchanged(*key, 0, 0.0, 0.0, 0.0, update))
        sent = entry.wire_bytes
        # a group over several slices works within each slice first: only its share of the array goes to the others
        outside = sent if entry.kind == "collective-permute" else _between_slices(entry.kind, entry.bytes, key)
        outside = outside * (1 if entry.kind == "collective-permute" else entry.times) if slices > 1 else 0.0
        sums[key] = dataclasses.replace(
            before,
            times=before.times + entry.times,
            bytes=before.bytes + entry.bytes * entry.times,
            ici_bytes=before.ici_bytes + max(sent - outside, 0.0),
            dcn_bytes=before.dcn_bytes + outside,
        )
    return sorted(sums.values(), key=lambda entry: -entry.bytes)


def _between_slices(kind: str, size: float, key: tuple[str, int, int]) -> float:
    _, devices, slices = key
    return size * slices / devices * (slices - 1) / slices * (2 if kind == "all-reduce" else 1)


def kept(folder: pathlib.Path | None, key: str, make: Callable[[], Compiled]) -> Compiled:
    """The numbers under a key: from the folder if they are there, else made and put there. None keeps nothing."""
    if folder is None:
        return make()
    path = folder / f"{key}.json"
    if path.is_file():
        try:
            return from_json(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, LookupError, AttributeError):
            pass  # cut short or changed by someone: made again, and replaced
    made = make()
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False, encoding="utf-8") as file:
        json.dump(dataclasses.asdict(made), file)
    os.replace(file.name, path)  # whole or not at all, whoever else plans
    return made


def from_json(values: dict[str, Any]) -> Compiled:
    """The record of `dataclasses.asdict`."""
    exchanged = tuple(Exchanged(**entry) for entry in values["exchanged"])
    largest = tuple((entry[0], entry[1], entry[2]) for entry in values["largest"])
    return Compiled(**{**values, "exchanged": exchanged, "largest": largest})


def key_of(config: Config, topology: str, program: str, shape: Any) -> str:
    """A digest of everything that a program's numbers depend on."""
    fields = {name: value for name, value in resolved(config).items() if name not in WITHOUT_EFFECT}
    fields["data"] = {"questions_per_step": config.data.questions_per_step}
    content = json.dumps([fields, topology, program, dataclasses.asdict(shape), _software()], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:24]


@functools.cache
def _software() -> list[str]:
    sources = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        sources.update(path.read_bytes())
    packages = environment()["packages"]
    flags = [f"{name}={os.environ.get(name)}" for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    return [
        sources.hexdigest(),
        *flags,
        *(f"{name} {packages.get(name)}" for name in ("jax", "jaxlib", "libtpu", "optax")),
    ]
