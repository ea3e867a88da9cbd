"""HPT and its relatives: what a question leaves depends on how many of its rollouts solved it."""

from __future__ import annotations

import dataclasses

from hptjax.hpt.method import Method, Part
from hptjax.hpt.method_parts import ROLLOUT_ROWS, off_policy, on_demonstrations, on_rollouts
from hptjax.hpt.options import Options
from hptjax.hpt.route import Route, by_band, by_chance, by_gate, by_table
from hptjax.losses import table
from hptjax.losses.advantages import raw_reward

_DIFFERENCE = (
    "Paper: std and clip; code and this row: neither. The code's reducer is hpt.preset official, its entropy"
    " coefficient 0.001 (hpt.entropy_coefficient), its SFT coefficient 1, 0.3 for the 1.5B model (hpt.sft_coefficient)."
)


def hpt(options: Options) -> Method:
    """HPT: SFT where at most `gate` of the group solved, RL elsewhere."""
    return _gated("hpt", by_gate(options.gate, options.group_size), options)


def random_gate(options: Options) -> Method:
    """HPT's control: the same number of demonstrations in every step, of questions that are drawn."""
    return _gated("random_gate", by_chance(options.gate, options.group_size, seed=options.seed), options)


def hpt_off_band(options: Options) -> Method:
    """HPT whose middle band learns from the demonstration as LUFFY does."""
    route = by_band(options.gate, options.gate_off, options.group_size, off_term="off", sft_term="sft")
    method = _gated("hpt_off_band", route, options)
    return dataclasses.replace(
        method,
        parts=(*method.parts, _off_alone(options)),
        rewards_demonstrations=True,
        difference="The published code loses the band's flag when rows are merged, and falls back to SFT."
        f" {_DIFFERENCE}",
    )


def hpt_soft(options: Options) -> Method:
    """HPT with coefficients by the number of solved rollouts instead of a gate."""
    size = options.group_size
    linear_table = tuple((solved / size, 0.0, 1.0 - solved / size) for solved in range(size + 1))
    route = by_table(options.soft_table or linear_table, terms=("rl", "off", "sft"))
    method = _gated("hpt_soft", route, options)
    return dataclasses.replace(
        method,
        parts=(*method.parts, _off_alone(options)),
        most_samples=size + 1,
        rewards_demonstrations=True,
        difference="The published coefficients are computed and never read; the linear table here is ours."
        f" {_DIFFERENCE}",
    )


def _off_alone(options: Options) -> Part:
    row = dataclasses.replace(
        table.LUFFY_OFF(options.luffy_gamma),
        advantage=raw_reward,
        formula="g p / (p + g)^2 R grad log pi",
        difference="Alone in its group, as in the published code, so A = R; LUFFY's is R - mean of the union.",
    )
    return off_policy(row, judged_with=frozenset())


def _gated(name: str, route: Route, options: Options) -> Method:
    rl = on_rollouts(ROLLOUT_ROWS[options.rollout_row](options.clip), reducer="official_fixed_rl")
    return Method(
        name=name,
        parts=(rl, on_demonstrations(table.SFT)),
        route=route,
        rollouts=options.group_size,
        most_samples=options.group_size,
        source="arXiv 2509.04419 v2 Eq. 10 to 12, as the published code runs it",
        difference=_DIFFERENCE,
    )
