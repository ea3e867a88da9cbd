"""What is inside a checkpoint: named leaves with checksums, NumPy arrays as bytes, JSON, and how two are compared."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt

from hptjax.sharding.host import to_host
from hptjax.sharding.words import word_sum
from hptjax.types import Array

SHOWN_DIFFERENCES = 6  # how many differing fields an error message spells out
PLAIN = frozenset({type(None), str, int, float, bool})  # what JSON gives back as it is


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their dotted path, in tree order. Raises: a leaf without shape, dtype and sharding -> ValueError."""
    named = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or leaf.sharding is None:
            raise ValueError(
                f"state leaf '{name}': expected a jax array (or a shape with a sharding), got {type(leaf)}"
            )
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


def checksums(leaves: Mapping[str, Any]) -> UInt[np.ndarray, " n"]:
    """One `word_sum` per leaf, in the order of the names, on the host.

    One program for all leaves on the same devices: one for each leaf would be sixty programs with collectives in flight
    at once, which `sharding.mesh.one_at_a_time` says why to avoid.
    """
    together: dict[frozenset[jax.Device] | None, list[str]] = {}
    for name in sorted(leaves):
        leaf = leaves[name]
        devices = frozenset(leaf.devices()) if isinstance(leaf, jax.Array) else None
        together.setdefault(devices, []).append(name)
    found = {
        name: value
        for names in together.values()
        for name, value in zip(names, to_host(_checksums([leaves[name] for name in names])), strict=True)
    }
    return np.array([found[name] for name in sorted(leaves)], np.uint32)


@jax.jit
def _checksums(arrays: list[Any]) -> list[UInt[Array, ""]]:
    # moments may lie in the host's memory (`optimizer.host_memory`)
    return [word_sum(jax.device_put(array, jax.memory.Space.Device)) for array in arrays]


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
    """Raises ValueError naming the first value inside that JSON does not give back (tuples pass, as lists).

    Training waits for it, and verdicts come by the thousand: plain values are passed where their container is seen.
    """
    waiting = [(path, value)]  # the next one last
    while waiting:
        path, value = waiting.pop()
        inner: Iterable[tuple[str, Any]] = ()
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    raise ValueError(f"{path}: expected string keys, got {key!r} of {type(key).__name__}")
            inner = ((f"{path}.{key}", each) for key, each in value.items() if type(each) not in PLAIN)
        elif isinstance(value, list | tuple):
            inner = ((f"{path}[{place}]", each) for place, each in enumerate(value) if type(each) not in PLAIN)
        elif value is not None and not isinstance(value, str | int | float):
            raise ValueError(
                f"{path}: expected a JSON value, got {type(value).__name__}; convert it, or pass it in arrays"
            )
        waiting += reversed(list(inner))


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
