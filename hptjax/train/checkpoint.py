"""Checkpoints: the whole state of a run in one place, written in the background and read back to the bit.

A checkpoint is a folder named by an *ordinal* that only grows, never by the training step: a save on SIGTERM at a step
that was already saved is simply the next ordinal. It holds the device state (parameters, optimizer, accumulator, keys),
the host state (JSON: data position, counters) and host arrays (pending samples and verdicts). Orbax writes into a
temporary folder and commits by one rename, so a process killed during a save leaves the earlier checkpoints whole.

The state is copied on the devices before the background write begins: the trainer donates its buffers to the next
update, and a CPU array handed to a background thread may share memory with them. Each leaf also carries a checksum,
computed on the devices at the save and again after a restore, so that damage which still decodes is found too.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import UInt

from hptjax.sharding.host import to_host
from hptjax.types import Array

STATE_ITEM, RECORD_ITEM = "state", "record"
SHOWN_DIFFERENCES = 6  # how many differing fields an error message spells out


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


@dataclasses.dataclass(frozen=True)
class Retention:
    """Keeps the `keep_last` newest checkpoints and the `keep_best` of largest metric (of equals, the newer)."""

    keep_last: int
    keep_best: int
    metrics: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Which checkpoints stay, in the order given. The signature is orbax's `PreservationPolicy`."""
        del context
        ordinals = sorted(checkpoint.step for checkpoint in checkpoints)
        ranked = sorted((self.metrics[n], n) for n in ordinals if n in self.metrics)
        kept = set(ordinals[-self.keep_last :]) | {n for _, n in ranked[len(ranked) - self.keep_best :]}
        return [checkpoint.step in kept for checkpoint in checkpoints]


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoints:
    """A run's checkpoints. Make it with `open_checkpoints`; use it as a context manager, or call `close`."""

    folder: pathlib.Path
    fingerprint: Mapping[str, Any]
    manager: ocp.CheckpointManager
    retention: Retention
    report: Callable[[str], None]

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
        ranked = metric is not None and not math.isnan(metric)
        record = {
            "step": step,
            "metric": float(metric) if ranked else None,
            "fingerprint": self.fingerprint,
            "leaves": {name: describe(leaf) for name, leaf in leaves.items()},
            "key_implementations": {n: str(jax.random.key_impl(leaf)) for n, leaf in leaves.items() if is_key(leaf)},
            "host": host,
            "arrays_bytes": int(packed.size),
        }
        copies = {name: copied(leaf) for name, leaf in leaves.items() if leaf.size}
        tree = {"leaves": copies, "checksums": checksums(copies), "arrays": packed}
        items = {STATE_ITEM: ocp.args.StandardSave(tree), RECORD_ITEM: ocp.args.JsonSave(record)}
        if ranked:
            self.retention.metrics[ordinal] = float(metric)
        try:
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
            self.manager.wait_until_finished()
        except Exception as error:  # as in `save`
            raise self._failed(error) from error

    def close(self) -> None:
        """Ends the last save and frees the background threads. Raises: the save failed -> CheckpointFailed."""
        try:
            self.wait()
        finally:
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
            sharding (and stays uncommitted to a device where the template's leaf is).
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
        if not np.array_equal(to_host(checksums(found["leaves"])), found["checksums"]):
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
        """Clears what a failed save left behind, so that a full disk gets its space back, and says what happened."""
        if jax.process_index() == 0:
            for path in ocp.utils.tmp_checkpoints(self.folder):
                shutil.rmtree(self.folder / path, ignore_errors=True)
        self.manager.reload()
        present = set(self.manager.all_steps())
        for ordinal in set(self.retention.metrics) - present:
            del self.retention.metrics[ordinal]
        last = max(present, default=None)
        kept = "there is no earlier one" if last is None else f"the last good one is {last}"
        return CheckpointFailed(f"a checkpoint could not be written to {self.folder} ({kept}): {first_line(error)}")


def open_checkpoints(
    folder: str | pathlib.Path,
    *,
    keep_last: int,
    keep_best: int,
    fingerprint: Mapping[str, Any],
    report: Callable[[str], None] = print,
) -> Checkpoints:
    """The checkpoints of a run folder, made if absent; folders of saves that were killed half-way are removed.

    Args
      keep_last: >= 1, the newest n stay. keep_best: >= 0, so do the n of largest metric.
      fingerprint: JSON values that a checkpoint must share with this run to be restored (model, tokenizer, method).
      report: gets a line of text when a damaged checkpoint is passed over.
    Raises: a count out of range, or a fingerprint that is not JSON -> ValueError.
    """
    if keep_last < 1 or keep_best < 0:
        raise ValueError(
            f"expected checkpoint.keep_last >= 1 and checkpoint.keep_best >= 0, got {keep_last} and {keep_best}"
        )
    check_json(dict(fingerprint), "fingerprint")
    path = pathlib.Path(folder).resolve()
    retention = Retention(keep_last, keep_best, {})
    options = ocp.CheckpointManagerOptions(
        enable_async_checkpointing=True, cleanup_tmp_directories=True, preservation_policy=retention
    )
    manager = ocp.CheckpointManager(path, options=options)
    checkpoints = Checkpoints(path, dict(fingerprint), manager, retention, report)
    retention.metrics.update({entry.ordinal: entry.metric for entry in checkpoints.entries() if entry.metric is not None})
    return checkpoints


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their dotted path, in tree order. Raises: a leaf without shape, dtype and sharding -> ValueError."""
    named = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or leaf.sharding is None:
            raise ValueError(f"state leaf '{name}': expected a jax array (or a shape with a sharding), got {type(leaf)}")
        if name in named:
            raise ValueError(f"state has two leaves of the name '{name}'")
        named[name] = leaf
    return named


def is_key(leaf: Any) -> bool:
    """Whether a leaf holds typed random keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe(leaf: Any) -> str:
    """Dtype and shape as text, such as `float32[4,128]` or `key<fry>[2]`."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def copied(leaf: Any) -> Any:
    """The array that is written for a leaf (the uint32 words of random keys), safe from a later donation.

    On an accelerator orbax waits for the transfer to the host before `save` returns, and that transfer is the copy. On
    a CPU the transfer may be a view of the same memory, so it is copied here.
    """
    array = jax.random.key_data(leaf) if is_key(leaf) else leaf
    return jnp.copy(array) if any(device.platform == "cpu" for device in array.devices()) else array


def target(leaf: Any) -> Any:
    """What orbax restores a leaf as: into its sharding, or as NumPy where the template is not committed to a device."""
    like = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    words = jax.eval_shape(jax.random.key_data, like) if is_key(leaf) else like
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return np.zeros(words.shape, words.dtype)
    return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=leaf.sharding)


def empty(leaf: Any) -> Any:
    """A leaf of no entries, which orbax does not write."""
    return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)


def as_leaf(value: Any, implementation: str | None) -> Any:
    """A restored array as the leaf it was; `implementation` names the generator of random keys."""
    array = jnp.asarray(value)
    return array if implementation is None else jax.random.wrap_key_data(array, impl=implementation)


@jax.jit
def checksums(leaves: dict[str, Any]) -> UInt[Array, " n"]:
    """One number per leaf, in the order of the names: sum over entries i of word_i * (2 i + 1), modulo 2^32.

    The factors are odd, so a change of any single word changes it; integer sums do not depend on the sharding.
    """
    return jnp.stack([checksum(leaves[name]) for name in sorted(leaves)])


def checksum(array: Any) -> UInt[Array, ""]:
    """The sum of `checksums` for one array of 1, 2 or 4 byte entries; an 8 byte entry counts as two words."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    width = min(array.dtype.itemsize, 4)
    words = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(words * (place * np.uint32(2) + np.uint32(1)), dtype=jnp.uint32)


def pack_arrays(arrays: Mapping[str, np.ndarray]) -> UInt[np.ndarray, " bytes"]:
    """Arrays as the bytes of one npz file, whose entries carry CRCs. Raises: not NumPy, or objects -> ValueError."""
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.hasobject:
            raise ValueError(f"arrays['{name}']: expected a NumPy array of plain values, got {type(array).__name__}")
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{f"array {name}": array for name, array in arrays.items()})
    return np.frombuffer(buffer.getvalue(), np.uint8)


def unpack_arrays(packed: UInt[np.ndarray, " bytes"]) -> dict[str, np.ndarray]:
    """The inverse of `pack_arrays`."""
    with np.load(io.BytesIO(np.asarray(packed).tobytes()), allow_pickle=False) as archive:
        return {name.removeprefix("array "): archive[name] for name in archive.files}


def check_json(value: Any, path: str) -> None:
    """Raises ValueError naming the first value inside that JSON does not give back (tuples pass, as lists)."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{path}: expected string keys, got {key!r} of {type(key).__name__}")
            check_json(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            check_json(inner, f"{path}[{place}]")
    elif value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"{path}: expected a JSON value, got {type(value).__name__}; convert it, or pass it in arrays")


def as_json(value: Any) -> Any:
    """The value as JSON gives it back."""
    return json.loads(json.dumps(value))


def differences(saved: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Fields that differ between two nested mappings, as `name: checkpoint has ..., this run has ...`."""
    found = []
    for name in [*saved, *(name for name in ours if name not in saved)]:
        old, new = saved.get(name, "nothing"), ours.get(name, "nothing")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: checkpoint has {old}, this run has {new}")
    return found


def refuse(found: Sequence[str], where: str, what: str) -> None:
    """Raises ValueError listing the differences, where there are any."""
    if found:
        more = f"; and {len(found) - SHOWN_DIFFERENCES} more" if len(found) > SHOWN_DIFFERENCES else ""
        raise ValueError(
            f"{where} is of another {what} ({'; '.join(found[:SHOWN_DIFFERENCES])}{more}). "
            "Change these fields back, or choose another run folder by `name`"
        )


def first_line(error: BaseException) -> str:
    """An error as one line of at most 300 characters."""
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}"
