"""Host decisions that every process must share: the gate, the number of micro-batches, when to stop, errors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from hptjax.sharding.peers import gather, is_first, several

Item = TypeVar("Item")
Result = TypeVar("Result")


def first(values: np.ndarray) -> np.ndarray:
    """Process 0's value: for decisions that any one process may take for all."""
    return np.asarray(values[0])


def anyone(values: np.ndarray) -> np.ndarray:
    """True where any process says so: for stops and errors."""
    return np.asarray(values.any(axis=0))


def agree(value: Any, choose: Callable[[np.ndarray], np.ndarray] = first, *, what: str = "a decision") -> Any:
    """The one value that all processes go on with; the identity on one process.

    Every process must call it at the same place with values of the same shapes and dtypes. The bytes travel, so 64-bit
    counts and floats arrive exactly.

    Args
      value: a pytree of bools, ints, floats and host arrays.
      choose: (values [processes, ...]) -> the agreed one, for each leaf.
      what: in words, for messages.
    """
    if not several():
        return value
    leaves, treedef = jax.tree.flatten(value)
    own = [np.asarray(leaf) for leaf in leaves]
    received = gather(b"".join(leaf.tobytes() for leaf in own), what)
    agreed, start = [], 0
    for leaf, array in zip(leaves, own, strict=True):
        parts = [np.frombuffer(part, array.dtype, array.size, start).reshape(array.shape) for part in received]
        chosen = np.asarray(choose(np.stack(parts)))
        agreed.append(chosen if isinstance(leaf, np.ndarray) else chosen.item())
        start += array.nbytes
    return jax.tree.unflatten(treedef, agreed)


def from_first(function: Callable[[], Any], what: str) -> Any:
    """What `function`, called in process 0 alone, returns; in JSON values. The others wait for it."""
    if not several():
        return function()
    own = json.dumps(function() if is_first() else None)
    return json.loads(gather(own.encode(), what)[0])


def in_shares(
    items: Sequence[Item],
    work: Callable[[Sequence[Item]], Sequence[Result]],
    what: str,
    *,
    encode: Callable[[Result], Any],
    decode: Callable[[Item, Any], Result],
) -> list[Result]:
    """`work` on all items, each process doing every n-th of them; the results of all, in the order of the items.

    Args
      items: the same in every process. work: items -> a result for each.
      encode, decode: a result to JSON values, and (item, JSON values) back.
    """
    if not several():
        return list(work(items))
    count = jax.process_count()
    own = items[jax.process_index() :: count]
    done = [encode(result) for result in work(own)] if own else []
    shares = [json.loads(part) for part in gather(json.dumps(done).encode(), what)]
    return [decode(item, shares[place % count][place // count]) for place, item in enumerate(items)]


def check_same(value: Any, what: str, change: str) -> None:
    """Raises ValueError, naming the processes, where `value` (JSON) is not that of process 0.

    Args
      what: that must be the same, in words. change: what to do about it.
    """
    if not several():
        return
    digests = gather(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest().encode(), what)
    other = [index for index, digest in enumerate(digests) if digest != digests[0]]
    if other:
        raise ValueError(
            f"expected {what} to be the same in every process, got another than that of process 0 in process "
            f"{', '.join(map(str, other))}; {change}"
        )
