"""Checkpoints: the whole state of a run in one place, written in the background and read back to the bit.

A checkpoint is a folder named by an *ordinal* that only grows, never by the training step: a save on SIGTERM at a step
that was already saved is simply the next ordinal. It holds the device state (parameters, optimizer, open
sums, counters), the host state (JSON: data position, counters, the open step with its samples and verdicts) and host
arrays (a score pass's log-probs). Orbax writes into a
temporary folder and commits by one rename, so a process killed during a save leaves the earlier checkpoints whole.

The state is copied on the devices before the background write begins: the trainer donates its buffers to the next
update, and a CPU array handed to a background thread may share memory with them. Each leaf also carries a checksum,
computed on the devices at the save and again after a restore, so that damage which still decodes is found too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from hptjax.errors import first_line
from hptjax.sharding.peers import several, waiting
from hptjax.train.checkpoint_content import (
    as_json,
    as_leaf,
    check_json,
    checksums,
    copied,
    describe,
    differences,
    empty,
    is_key,
    named_leaves,
    pack_arrays,
    refuse,
    target,
    unpack_arrays,
)
from hptjax.train.checkpoint_manager import Retention, close_failed, make_manager, quiet_orbax, remove_unfinished

STATE_ITEM, RECORD_ITEM = "state", "record"


class CheckpointFailed(RuntimeError):
    """A checkpoint could not be written. The earlier ones stand, and training may go on."""


class CheckpointUnreadable(RuntimeError):
    """There are checkpoints, and none of them can be read."""


class Restored(NamedTuple):
    """What a checkpoint gives back. `host["step"]` is the training step of the save."""

    state: Any
    host: dict[str, Any]
    arrays: dict[str, np.ndarray]


class Entry(NamedTuple):
    """One checkpoint on disk: its ordinal, its training step, and its validation metric, if it had one."""

    ordinal: int
    step: int
    metric: float | None


@dataclasses.dataclass(eq=False)
class Checkpoints:
    """A run's checkpoints. Make it with `open_checkpoints`; use it as a context manager, or call `close`.

    `manager` is replaced after a failed save, because the old one may still hold errors of it. Where there are several
    processes it is left as it is: the others are inside the same save, and any manager would wait for them.
    """

    folder: pathlib.Path
    fingerprint: Mapping[str, Any]
    manager: ocp.CheckpointManager
    retention: Retention
    report: Callable[[str], None]
    quiet: contextlib.ExitStack
    read_only: bool = False
    left_alone: bool = False

    def save(
        self,
        step: int,
        state: Any,
        host: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray] | None = None,
        *,
        metric: float | None,
        wait: bool = False,
    ) -> None:
        """Starts the next checkpoint and returns while it is being written, or after it where `wait`.

        Args
          step: training step of the save, handed back as `host["step"]`.
          state: pytree of jax arrays; copied before this returns, so its buffers may be donated at once.
          host: JSON values (a tuple comes back as a list). arrays: NumPy arrays by name.
          metric: validation metric, larger is better; None or NaN: no candidate for the best.
        Raises
          host or arrays that cannot be written, or a state leaf that is no jax array -> ValueError naming it.
          this save's start, or the end of the save before it, failed (disk full, no permission) -> CheckpointFailed.
        """
        if host.get("step", step) != step:
            raise ValueError(f"host['step'] is {host['step']}, but the checkpoint is of step {step}: leave it out")
        host = {**host, "step": step}
        check_json(host, "host")
        check_json(dict(self.fingerprint), "fingerprint")
        packed = pack_arrays(arrays or {})
        leaves = named_leaves(state)
        self.wait()  # a failed background write is reported here, before anything of this save exists
        ordinal = self._next_ordinal()
        rank = None if metric is None or math.isnan(metric) else float(metric)
        record = {
            "step": step,
            "metric": rank,
            "fingerprint": self.fingerprint,
            "leaves": {name: describe(leaf) for name, leaf in leaves.items()},
            "key_implementations": {n: str(jax.random.key_impl(leaf)) for n, leaf in leaves.items() if is_key(leaf)},
            "host": host,
            "arrays_bytes": int(packed.size),
        }
        copies = {name: copied(leaf) for name, leaf in leaves.items() if leaf.size}
        tree = {"leaves": copies, "checksums": checksums(copies), "arrays": packed}
        items = {STATE_ITEM: ocp.args.StandardSave(tree), RECORD_ITEM: ocp.args.JsonSave(record)}
        if rank is not None:
            self.retention.metrics[ordinal] = rank
        try:
            with waiting():
                self.manager.save(ordinal, args=ocp.args.Composite(**items))
        except Exception as error:  # orbax and tensorstore raise many kinds; all mean that nothing was committed
            raise self._failed(error) from error
        if wait:
            self.wait()

    def wait(self) -> None:
        """Blocks until no save is under way.

        Raises: the save failed -> CheckpointFailed; what it had written is removed.
        """
        try:
            with waiting():
                self.manager.wait_until_finished()
        except Exception as error:  # as in `save`
            raise self._failed(error) from error

    def close(self) -> None:
        """Ends the last save and frees the background threads. Raises: the save failed -> CheckpointFailed."""
        with self.quiet:
            if self.left_alone:
                return
            try:
                self.wait()
            finally:
                if not self.left_alone:
                    self.manager.close()

    def entries(self) -> list[Entry]:
        """The checkpoints that can be listed, oldest first; one without a readable record is left out."""
        found = []
        for ordinal in sorted(self.manager.all_steps()):
            record = self._record(ordinal)
            if record is not None:
                found.append(Entry(ordinal, record["step"], record["metric"]))
        return found

    def restore_latest(self, template: Any) -> Restored | None:
        """The newest checkpoint that can be read; None where there is none at all.

        Args
          template: pytree of jax arrays or `jax.ShapeDtypeStruct`s; each leaf is restored into its shape, dtype and
            sharding (and stays uncommitted to a device where the template's leaf is). Or a function of the
            checkpoint's `host` that makes it, where the state's structure depends on where the run stood.
        Raises
          the checkpoint is of another run or model -> ValueError naming the fields that differ.
          every checkpoint is damaged -> CheckpointUnreadable. A damaged one with an older good one behind it is
          reported, renamed to `unreadable-<ordinal>`, and passed over; with several processes it raises at once,
          because they would have to agree on the next.
        """
        self.wait()
        return self._restore(sorted(self.manager.all_steps(), reverse=True), template)

    def restore_best(self, template: Any) -> Restored | None:
        """The checkpoint of largest metric that can be read, as `restore_latest`; None where none has a metric."""
        self.wait()
        metrics = self.retention.metrics
        ordinals = [n for n in self.manager.all_steps() if n in metrics]
        return self._restore(sorted(ordinals, key=lambda n: (metrics[n], n), reverse=True), template)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _restore(self, ordinals: Sequence[int], template: Any) -> Restored | None:
        damaged: list[int] = []
        for ordinal in ordinals:
            restored = self._read(ordinal, template)
            if restored is not None:
                if not self.read_only:
                    self._set_aside(damaged)
                if damaged:
                    self.report(
                        f"checkpoint {', '.join(map(str, damaged))} in {self.folder} cannot be read (truncated or "
                        f"damaged); going on from checkpoint {ordinal}, step {restored.host['step']}"
                    )
                return restored
            if jax.process_count() > 1:
                raise CheckpointUnreadable(f"checkpoint {ordinal} in {self.folder} cannot be read; move it away")
            damaged.append(ordinal)
        if damaged:
            raise CheckpointUnreadable(
                f"expected a readable checkpoint in {self.folder}; {', '.join(map(str, damaged))} "
                "cannot be read (truncated or damaged). Start in another run folder, or put back a copy"
            )
        return None

    def _read(self, ordinal: int, template: Any) -> Restored | None:
        """One checkpoint, or None where it is damaged. Raises ValueError where it is good and of something else."""
        record = self._record(ordinal)
        if record is None:
            return None
        where = f"checkpoint {ordinal} in {self.folder}"
        refuse(differences(record["fingerprint"], as_json(self.fingerprint)), where, "run")
        template = template(record["host"]) if callable(template) else template
        leaves = named_leaves(template)
        refuse(differences(record["leaves"], {name: describe(leaf) for name, leaf in leaves.items()}), where, "model")
        targets = {name: target(leaf) for name, leaf in leaves.items() if leaf.size}
        tree = {
            "leaves": targets,
            "checksums": np.zeros((len(targets),), np.uint32),
            "arrays": np.zeros((record["arrays_bytes"],), np.uint8),
        }
        try:
            items = {STATE_ITEM: ocp.args.StandardRestore(tree)}
            found = self.manager.restore(ordinal, args=ocp.args.Composite(**items))[STATE_ITEM]
            arrays = unpack_arrays(found["arrays"])
        except Exception:  # a damaged file shows as any of a dozen kinds
            return None
        if not np.array_equal(checksums(found["leaves"]), found["checksums"]):
            return None
        implementations = record["key_implementations"]
        values = [
            as_leaf(found["leaves"][name], implementations.get(name)) if leaf.size else empty(leaf)
            for name, leaf in leaves.items()
        ]
        return Restored(jax.tree.unflatten(jax.tree.structure(template), values), record["host"], arrays)

    def _record(self, ordinal: int) -> dict[str, Any] | None:
        try:
            items = {RECORD_ITEM: ocp.args.JsonRestore()}
            record = self.manager.restore(ordinal, args=ocp.args.Composite(**items))[RECORD_ITEM]
        except Exception:  # truncated JSON, a missing file, a folder that orbax does not know
            return None
        return record if isinstance(record, dict) and "leaves" in record else None

    def _next_ordinal(self) -> int:
        aside = [int(p.name.rpartition("-")[2]) for p in self.folder.glob("unreadable-*")]
        return 1 + max([-1, *self.manager.all_steps(), *aside])

    def _set_aside(self, ordinals: Sequence[int]) -> None:
        """Renames damaged checkpoints, so that they take no place among the last n."""
        for ordinal in ordinals:
            (self.folder / str(ordinal)).rename(self.folder / f"unreadable-{ordinal}")
            self.retention.metrics.pop(ordinal, None)
        if ordinals:
            self.manager.reload()

    def _failed(self, error: Exception) -> CheckpointFailed:
        """Starts afresh after a failed save, removing what it wrote (a full disk gets its space back)."""
        self.left_alone = several()
        if not self.left_alone:
            close_failed(self.manager)
            remove_unfinished(self.folder)
            self.manager = make_manager(self.folder, self.retention)
        present = set(self.manager.all_steps())
        for ordinal in set(self.retention.metrics) - present:
            del self.retention.metrics[ordinal]
        last = max(present, default=None)
        kept = "there is no earlier one" if last is None else f"the last good one is {last}"
        return CheckpointFailed(
            f"a checkpoint could not be written to {self.folder} ({kept}): {type(error).__name__}: {first_line(error)}"
        )


def open_checkpoints(
    folder: str | pathlib.Path,
    *,
    keep_last: int,
    keep_best: int,
    fingerprint: Mapping[str, Any],
    report: Callable[[str], None] = print,
    read_only: bool = False,
) -> Checkpoints:
    """The checkpoints of a run folder, made if absent; folders of saves that were killed half-way are removed.

    Args
      keep_last: >= 1, the newest n stay. keep_best: >= 0, so do the n of largest metric.
      fingerprint: JSON values that a checkpoint must share with this run to be restored (model, tokenizer, method).
      report: gets a line of text when a damaged checkpoint is passed over.
      read_only: leaves the folder as it is: it may be that of a run under way, whose half-written save is no rest.
    Raises: a count out of range, or a fingerprint that is not JSON -> ValueError.
    """
    if keep_last < 1 or keep_best < 0:
        raise ValueError(
            f"expected checkpoint.keep_last >= 1 and checkpoint.keep_best >= 0, got {keep_last} and {keep_best}"
        )
    check_json(dict(fingerprint), "fingerprint")
    path = pathlib.Path(folder).resolve()
    retention = Retention(keep_last, keep_best, {})
    quiet = contextlib.ExitStack()
    quiet.enter_context(quiet_orbax())
    manager = make_manager(path, retention, read_only=read_only)
    checkpoints = Checkpoints(path, dict(fingerprint), manager, retention, report, quiet, read_only)
    retention.metrics.update(
        {entry.ordinal: entry.metric for entry in checkpoints.entries() if entry.metric is not None}
    )
    return checkpoints
