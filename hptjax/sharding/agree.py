"""Host decisions that every process must share: the gate, the number of micro-batches, when to stop, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def first(values: np.ndarray) -> np.ndarray:
    """Process 0's value: for decisions that any one process may take for all."""
    return np.asarray(values[0])


def anyone(values: np.ndarray) -> np.ndarray:
    """True where any process says so: for stops and errors."""
    return np.asarray(values.any(axis=0))


def agree(value: Any, choose: Callable[[np.ndarray], np.ndarray] = first) -> Any:
    """The one value that all processes go on with; the identity on one process.

    Every process must call it at the same place with values of the same shapes and dtypes. The bytes travel, so 64-bit
    counts and floats arrive exactly.

    Args
      value: a pytree of bools, ints, floats and host arrays.
      choose: (values [processes, ...]) -> the agreed one, for each leaf.
    """
    if jax.process_count() == 1:
        return value
    return jax.tree.map(lambda leaf: _agree_leaf(leaf, choose), value)


def _agree_leaf(leaf: Any, choose: Callable[[np.ndarray], np.ndarray]) -> Any:
    own = np.asarray(leaf)
    sent = np.frombuffer(own.tobytes(), np.uint8)
    received = np.ascontiguousarray(multihost_utils.process_allgather(sent)).reshape(-1, sent.size)
    agreed = np.asarray(choose(received.view(own.dtype).reshape(received.shape[0], *own.shape)))
    return agreed if isinstance(leaf, np.ndarray) else agreed.item()
