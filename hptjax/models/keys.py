"""One row of a checkpoint's key table, and the layout change between a Hugging Face tensor and ours."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class CheckpointKey:
    """Where a parameter stands in a Hugging Face checkpoint.

    Args
      path: its place in our tree. Under "layers" one stacked array stands for one tensor per layer.
      key: its name there; `{layer}` is the layer's number.
      input_axes: for a matrix stored as [outputs, inputs]: how many leading axes of ours are its inputs.
        None where the layout is the same.
    """

    path: tuple[str, ...]
    key: str
    input_axes: int | None = None

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape there of a parameter (of one layer) that has `shape` here."""
        if self.input_axes is None:
            return shape if len(shape) < 2 or not self.key.endswith(".bias") else (int(np.prod(shape)),)
        return int(np.prod(shape[self.input_axes :])), int(np.prod(shape[: self.input_axes]))

    def to_stored(self, value: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Our array (of one layer) in the checkpoint's layout."""
        stored = self.stored_shape(value.shape)
        return value.reshape(stored) if self.input_axes is None else value.reshape(stored[::-1]).T

    def from_stored(self, value: Float[np.ndarray, "..."], shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
        """The checkpoint's tensor in our layout."""
        return (value if self.input_axes is None else value.T).reshape(shape)
