"""A run's checkpoints read from outside the run: which there are, and some of their leaves, as host arrays.

Nothing of the run has to be built for it: no data, no mesh, no optimizer. The checksums that the save has written are
compared, so what is read is what was saved.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp

from hptjax.sharding.words import host_word_sum
from hptjax.train.checkpoint_manager import quiet_orbax

RECORD, STATE = pathlib.PurePath("record", "metadata"), "state"  # within a checkpoint's folder


class SavedCheckpoint(NamedTuple):
    """What a checkpoint says of itself. `leaves`: name -> dtype and shape as text, such as `float32[4,128]`."""

    path: pathlib.Path
    step: int
    metric: float | None
    fingerprint: Mapping[str, Any]
    leaves: Mapping[str, str]

    @property
    def ordinal(self) -> int:
        """Its number among the run's saves."""
        return int(self.path.name)


def saved_checkpoints(folder: pathlib.Path) -> list[SavedCheckpoint]:
    """The checkpoints in a run's folder of them whose record can be read, oldest first."""
    paths = sorted((path for path in folder.glob("*") if path.name.isdigit()), key=lambda path: int(path.name))
    return [saved for saved in map(read_record, paths) if saved is not None]


def read_record(path: pathlib.Path) -> SavedCheckpoint | None:
    """The record of one checkpoint; None where there is none, or one that is cut off."""
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        return SavedCheckpoint(path, record["step"], record["metric"], record["fingerprint"], record["leaves"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def chosen_leaves(
    folder: pathlib.Path, checkpoint: str, wanted: Callable[[str], bool], *, report: Callable[[str], None] = print
) -> tuple[SavedCheckpoint, dict[str, np.ndarray]]:
    """The leaves of the last checkpoint that can be read, or of the one with the best metric.

    Args
      folder: of the run's checkpoints. checkpoint: "last" or "best". report: is told of those passed over.
    Raises no such checkpoint, or none that can be read -> ValueError.
    """
    found = saved_checkpoints(folder)
    if checkpoint == "best":
        found = sorted((s for s in found if s.metric is not None), key=lambda s: (s.metric, s.ordinal))
    for saved in reversed(found):
        try:
            return saved, read_leaves(saved, [name for name in saved.leaves if wanted(name)])
        except ValueError as error:
            report(f"{error}; going on to an earlier one")
    raise ValueError(
        f"expected a {checkpoint} checkpoint that can be read in {folder}, found none; train first, or choose another "
        "with --checkpoint"
    )


def read_leaves(saved: SavedCheckpoint, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Leaves of a checkpoint by name, on the host; random keys as their words.

    Raises a checkpoint that is damaged -> ValueError.
    """
    written = [name for name in sorted(saved.leaves) if _size(saved.leaves[name])]
    wanted = [name for name in written if name in set(names)]
    as_arrays = ocp.RestoreArgs(restore_type=np.ndarray)
    tree = {"leaves": {name: np.zeros(0) for name in wanted}, "checksums": np.zeros(0)}
    arguments = {"leaves": dict.fromkeys(wanted, as_arrays), "checksums": as_arrays}
    try:
        with quiet_orbax(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            found = reader.restore(
                saved.path.resolve() / STATE,
                args=ocp.args.PyTreeRestore(item=tree, restore_args=arguments, partial_restore=True),
            )
    except Exception as error:  # a damaged file shows as any of a dozen kinds
        raise ValueError(f"checkpoint {saved.ordinal} in {saved.path.parent} cannot be read: it is damaged") from error
    leaves = {name: np.asarray(found["leaves"][name]) for name in wanted}
    promised = {name: int(found["checksums"][written.index(name)]) for name in wanted}
    wrong = [name for name in wanted if host_word_sum(leaves[name]) != promised[name]]
    if wrong:
        raise ValueError(
            f"checkpoint {saved.ordinal} in {saved.path.parent} is damaged: the checksum of {wrong[0]} is not that of "
            "the save"
        )
    return {name: leaves[name] if name in leaves else np.zeros(_shape(saved.leaves[name])) for name in names}


def _shape(described: str) -> tuple[int, ...]:
    (inside,) = re.findall(r"\[([\d,]*)\]$", described)
    return tuple(int(size) for size in inside.split(",") if size)


def _size(described: str) -> int:
    return int(np.prod(_shape(described), dtype=np.int64))
