"""The rows on recorded rollouts and a model's own gradients: norm, direction, spread over resampled groups, weights.

Every row is the same surrogate with another coefficient on grad log pi (`rows.coefficients`). So one program gives the
log-probs, one small program per row the coefficients, and one backward program serves all rows. All rows share one
reducer, the token mean of the samples they are for, so that norms compare.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hptjax.build.method import met_needs, options
from hptjax.build.parts import Parts
from hptjax.config_batch import row_room
from hptjax.hpt.assemble import Update, assemble
from hptjax.hpt.terms import Term
from hptjax.losses.estimator import Need
from hptjax.losses.reducers import token_mean
from hptjax.masked import mean, ratio
from hptjax.records import Sample, Source
from hptjax.sharding.host import to_host
from hptjax.sharding.mesh import put_micro_batch
from hptjax.train.objective import term_view, token_view
from hptjax.types import MicroBatch, Params
from hptjax.upge.batch import Draw
from hptjax.upge.rows import MeasuredRow, coefficients, masked, measured_rows

SFT, RL = "sft", "rloo"  # the rows that directions are compared with: plain likelihood, and unbiased on-policy RL
QUANTILES = (0.05, 0.5, 0.95, 1.0)


@dataclasses.dataclass
class _Tally:
    """What one row has shown so far; gradients stay on the devices."""

    total: Any = None
    norms: list[float] = dataclasses.field(default_factory=list)
    weights: list[np.ndarray] = dataclasses.field(default_factory=list)
    masked: float = 0.0
    live: float = 0.0


def measure(parts: Parts, params: Params, sampler: Params, draws: Sequence[Draw]) -> dict[str, dict[str, Any]]:
    """Row -> its figures.

    Args
      params: at which gradients are taken. sampler: the weights that sampled the rollouts; also the reference.
      draws: groups of the same questions, sampled anew for each.
    Returns per row: `grad_norm` of the mean gradient over the draws; `cos_sft`, `cos_rl` of it; `relative_variance`,
      the mean squared distance of a draw's gradient to the mean one, as a share of the mean one's square (0 for
      demonstrations, which do not vary); `masked_frac` of the tokens that have an advantage; `weights`, quantiles of
      the coefficient per unit of advantage, and `effective_frac`, their effective sample size as a share of the tokens.
    """
    met = met_needs(parts.config) - {Need.VALUES, Need.TEACHER_LOGPROBS, Need.PAIRS}
    rows = measured_rows(options(parts.config), met)
    programs = _Programs(parts)
    tallies = {entry.name: _Tally() for entry in rows}
    for draw in draws:
        update = _packed(parts, rows, draw)
        sums: dict[str, Any] = {}
        for host_batch in update.micro_batches:
            batch = programs.scored(params, sampler, put_micro_batch(parts.policy.mesh, host_batch, parts.policy.rules))
            for entry in rows:
                _look(entry, batch, tallies[entry.name], programs)
                part = programs.gradient(params, batch, programs.coefficient(entry)(batch))
                sums[entry.name] = part if entry.name not in sums else programs.add(sums[entry.name], part)
        for name, gradient in sums.items():
            tally = tallies[name]
            tally.norms.append(float(to_host(optax.tree.norm(gradient))))
            tally.total = gradient if tally.total is None else programs.add(tally.total, gradient)
    return {name: _figures(tally, tallies, len(draws)) for name, tally in tallies.items()}


@dataclasses.dataclass(frozen=True)
class _Scored:
    """A micro-batch with the current log-probs and entropies of its tokens."""

    micro_batch: MicroBatch
    stats: Any


class _Programs:
    """The compiled programs of a measurement."""

    def __init__(self, parts: Parts):
        stats = parts.policy.token_stats(True)

        def surrogate(params: Params, micro_batch: MicroBatch, weights: Any) -> Any:
            logprobs = stats(params, micro_batch).logprobs
            return jnp.sum(jnp.where(weights != 0, weights * logprobs, 0), dtype=jnp.float32)

        self._stats = jax.jit(stats)
        self._gradient = jax.jit(jax.grad(surrogate))
        self.add = jax.jit(lambda left, right: jax.tree.map(jnp.add, left, right))
        self.coefficient = functools.cache(self._coefficient)
        self.look = functools.cache(self._look)

    def scored(self, params: Params, sampler: Params, micro_batch: MicroBatch) -> _Scored:
        old = self._stats(sampler, micro_batch).logprobs
        micro_batch = dataclasses.replace(micro_batch, rollout_logprobs=old, reference_logprobs=old)
        return _Scored(micro_batch, self._stats(params, micro_batch))

    def gradient(self, params: Params, batch: _Scored, weights: Any) -> Any:
        return self._gradient(params, batch.micro_batch, weights)

    def _coefficient(self, entry: MeasuredRow) -> Any:
        @jax.jit
        def weighted(micro_batch: MicroBatch, stats: Any) -> Any:
            plane = micro_batch.planes[entry.name]
            view = term_view(token_view(stats, micro_batch), micro_batch, entry.name)
            return jnp.where(plane.weights != 0, plane.weights * coefficients(entry.row, view, plane.advantages), 0)

        return lambda batch: weighted(batch.micro_batch, batch.stats)

    def _look(self, entry: MeasuredRow) -> Any:
        @jax.jit
        def looked(micro_batch: MicroBatch, stats: Any) -> Any:
            plane = micro_batch.planes[entry.name]
            view = term_view(token_view(stats, micro_batch), micro_batch, entry.name)
            return coefficients(entry.row, view, plane.advantages), masked(entry.row, view, plane.advantages)

        return lambda batch: looked(batch.micro_batch, batch.stats)


def _look(entry: MeasuredRow, batch: _Scored, tally: _Tally, programs: _Programs) -> None:
    """Adds the row's weights per unit of advantage, and the tokens that its mask switches off."""
    coefficient, off = (np.asarray(to_host(array), np.float64) for array in programs.look(entry)(batch))
    plane = batch.micro_batch.planes[entry.name]
    weights, advantages = (np.asarray(to_host(array), np.float64) for array in (plane.weights, plane.advantages))
    told = (weights > 0) & (advantages != 0)
    tally.weights.append(coefficient[told] / advantages[told])
    tally.masked += float(off[told].sum())
    tally.live += float(told.sum())


def _packed(parts: Parts, rows: Sequence[MeasuredRow], draw: Draw) -> Update:
    """The draw as one update in which every row is a plane."""
    rollouts, demonstrations = frozenset({Source.ROLLOUT}), frozenset({Source.DEMONSTRATION})
    terms = [
        Term(
            entry.name,
            rollouts if entry.on == "rollouts" else demonstrations,
            1.0,
            token_mean,
            entry.row.advantage,
            token_advantage=entry.row.token_advantage,
            judged_with=rollouts if entry.on == "both" else frozenset(),
        )
        for entry in rows
    ]
    samples: list[Sample] = [*draw.rollouts, *draw.demonstrations]
    return assemble(
        samples,
        terms,
        **row_room(parts.config),
        max_micro_batches=len(samples),
    )


def _figures(tally: _Tally, tallies: dict[str, _Tally], draws: int) -> dict[str, Any]:
    norm = float(to_host(optax.tree.norm(tally.total))) / draws

    def cosine(name: str) -> float | None:
        other = tallies.get(name)
        if other is None:
            return None
        product = float(to_host(optax.tree.vdot(tally.total, other.total)))
        scale = norm * draws * float(to_host(optax.tree.norm(other.total)))
        return ratio(product, scale) if scale > 0 else None

    squares = mean(np.square(np.asarray(tally.norms)))
    spread = max(squares - norm**2, 0.0) * ratio(draws, draws - 1) if draws > 1 else math.nan
    weights = np.concatenate(tally.weights) if tally.weights else np.zeros(0)
    return {
        "grad_norm": norm,
        "cos_sft": cosine(SFT),
        "cos_rl": cosine(RL),
        "relative_variance": ratio(spread, norm**2) if norm > 0 else math.nan,
        "masked_frac": ratio(tally.masked, tally.live) if tally.live else 0.0,
        "weights": {f"{q:g}": float(np.quantile(weights, q)) for q in QUANTILES} if weights.size else {},
        "effective_frac": _effective(weights),
    }


def _effective(weights: np.ndarray) -> float:
    squares = float(np.square(weights).sum())
    return ratio(float(weights.sum()) ** 2, squares * weights.size) if squares > 0 else math.nan
