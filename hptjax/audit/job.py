"""What the kit asks of a trainer, and what the trainer gives back: NumPy arrays only, whatever it is written in.

A *job* is a small training run: start parameters, a few *windows* of micro-batches (one optimizer update each), plain
SGD with the given learning rates, no momentum, no weight decay, and no clip unless the job names one. Its objective is
the mean over the live tokens of the window,

    loss(window) = sum over its live tokens of token_loss / number of its live tokens

with token_loss = features . theta for a `LinearBatch`, and the next token's negative log-likelihood for a `TokenBatch`.
A *target* is a function `target(job) -> parameters after every update`. It raises `Unsupported` for a job that it
cannot carry out as it is written. A field that it ignores counts as carried out: nothing in what it returns shows how
many workers it used, so a target that never reads `ranks` passes as one that is right with any number of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

IGNORED = -100  # label of a token that is not trained on

Model = Literal["linear", "tokens"]


class Unsupported(Exception):
    """What a target raises where it cannot do what a job asks; that probe is then reported as not run."""


@dataclasses.dataclass(frozen=True, eq=False)
class LinearBatch:
    """One micro-batch of the linear model, whose token loss is features . theta.

    Args
      features: [B T F] float32. mask: [B T], True on live tokens.
      index: place in its window, from 0. is_last: whether it ends the window.
    """

    features: np.ndarray
    mask: np.ndarray
    index: int
    is_last: bool


@dataclasses.dataclass(frozen=True, eq=False)
class TokenBatch:
    """One micro-batch of the table model, logits[b, t] = theta[input_ids[b, t]], for trainers with a loss of their own.

    Args
      input_ids: [B T] int32, in 0..V-1.
      labels: [B T] int32: the token itself where it is trained on, else -100, as in transformers: logits[:, t - 1]
        predict labels[:, t]. attention_mask: [B T] int32, 0 on padding.
      index, is_last: as above.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    attention_mask: np.ndarray
    index: int
    is_last: bool


Batch = LinearBatch | TokenBatch


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A training run to be carried out.

    Args
      model: "linear" (batches are `LinearBatch`, parameters [F]) or "tokens" (`TokenBatch`, parameters [V V]).
      parameters: float32, to start from.
      windows: one optimizer update each. All micro-batches of a job have one shape; windows may differ in length.
      learning_rates: of update 0, 1, ...; there may be more of them than updates.
      clip_norm: largest norm of an update's gradient, or None: no clipping.
      parameter_dtype: in which the trainer should hold its parameters.
      ranks: data-parallel workers that share each micro-batch by rows; B is a multiple of it.
    """

    model: Model
    parameters: np.ndarray
    windows: tuple[tuple[Batch, ...], ...]
    learning_rates: tuple[float, ...]
    clip_norm: float | None = None
    parameter_dtype: Literal["float32", "bfloat16"] = "float32"
    ranks: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Gradients:
    """What a target may return instead of parameters: the gradient that each update applied (before the learning rate).

    Args
      applied: one array per update, shaped like the parameters.
      between: if given, one array per update: what its window's earlier micro-batches already added to the parameters;
        exact zeros where nothing moves before a window is complete.
    """

    applied: Sequence[Any]
    between: Sequence[Any] | None = None


Target = Callable[[Job], "Sequence[Any] | Gradients"]
"""A job -> the parameters after every update, or the gradient that each update applied."""


def accepts(model: Model, *, own_optimizer: bool = False) -> Callable[[Target], Target]:
    """Marks what a target takes. Without it: the linear model, and an optimizer that the job may set.

    Args
      model: "tokens" for a trainer that computes its own loss from logits.
      own_optimizer: the trainer's optimizer cannot be set to SGD: parameter changes are compared between splits of the
        same window, and no micro-batch can be named.
    """

    def mark(target: Target) -> Target:
        target.audit_model = model  # type: ignore[attr-defined]
        target.audit_own_optimizer = own_optimizer  # type: ignore[attr-defined]
        return target

    return mark
