"""The rows that are measured, and the coefficient that each of them puts on grad log pi."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from hptjax.hpt.method_parts import DEMONSTRATION_ROWS, ROLLOUT_ROWS
from hptjax.hpt.options import Options
from hptjax.losses import table
from hptjax.losses.estimator import Estimator, Need
from hptjax.losses.view import TokenView
from hptjax.types import Array


@dataclasses.dataclass(frozen=True)
class MeasuredRow:
    """A row of the table, and whose tokens it is for: "rollouts", "demonstrations" or "both" (judged together)."""

    name: str
    row: Estimator
    on: str


def measured_rows(options: Options, met: frozenset[Need]) -> list[MeasuredRow]:
    """The rows whose needs are met; the others need a frozen model, a critic or pairs that the data does not have."""
    rollouts = [MeasuredRow(name, make(options.clip), "rollouts") for name, make in ROLLOUT_ROWS.items()]
    demonstrations = [MeasuredRow(name, make(options), "demonstrations") for name, make in DEMONSTRATION_ROWS.items()]
    beside = [
        MeasuredRow("luffy_off", table.LUFFY_OFF(options.luffy_gamma), "both"),
        MeasuredRow("srft_off", table.SRFT_OFF, "both"),
        MeasuredRow("srft_sft", table.SRFT_SFT(sign=options.srft_sign), "demonstrations"),
        MeasuredRow("srft_on", table.SRFT_ON(), "rollouts"),
    ]
    return [entry for entry in (*rollouts, *demonstrations, *beside) if entry.row.needs <= met]


def coefficients(row: Estimator, view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """What the row puts on grad log pi of each token: minus the derivative of its token loss by its own log-prob.

    Everything but the log-prob of the token itself is a constant of the loss, so the sum's gradient is elementwise.
    """

    def total(logprobs: Any) -> Any:
        return jnp.sum(table.policy_token_loss(row, dataclasses.replace(view, logprobs=logprobs), advantages))

    return -jax.grad(total)(view.logprobs)


def masked(row: Estimator, view: TokenView, advantages: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """1 where the row's stability mask switches a token off that has an advantage, else 0."""
    return jnp.where((row.stability_mask(view, advantages) == 0) & (advantages != 0), 1.0, 0.0)
