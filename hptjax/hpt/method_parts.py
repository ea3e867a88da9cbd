"""The rows of the token table by name, and the three kinds of parts that methods make of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from hptjax.hpt.method import DEMONSTRATIONS, ROLLOUTS, Part
from hptjax.hpt.options import Options
from hptjax.losses import table
from hptjax.losses.estimator import Estimator
from hptjax.records import Source

ROLLOUT_ROWS: Mapping[str, Callable[[table.Clip | None], Estimator]] = {
    "reinforce": lambda clip: table.REINFORCE,
    "rloo": lambda clip: table.RLOO,
    "reinforce_pp": lambda clip: table.REINFORCE_PP(clip or (0.2, 0.2)),
    "ppo": lambda clip: table.PPO(clip or (0.2, 0.2)),
    "grpo": lambda clip: table.GRPO(clip or (0.2, 0.2)),
    "dr_grpo": table.DR_GRPO,
    "dapo": lambda clip: table.DAPO(clip or (0.2, 0.28)),
    "cispo": lambda clip: table.CISPO(*(clip or (1.0, 0.2))),
    "cispo_table": lambda clip: table.CISPO_TABLE(clip or (0.2, 0.2)),
    "gspo": lambda clip: table.GSPO(clip or (3e-4, 4e-4)),
    "gmpo": lambda clip: table.GMPO(clip or (0.4, 0.4)),
    "sapo": lambda clip: table.SAPO(),
}
"""Rows for the policy's own rollouts, by name; the clip of None is the published one."""

WITHOUT_CLIP = frozenset({"reinforce", "rloo", "sapo"})

DEMONSTRATION_ROWS: Mapping[str, Callable[[Options], Estimator]] = {
    "sft": lambda options: table.SFT,
    "dft": lambda options: table.DFT,
    "trsft": lambda options: table.TRSFT(options.trsft_floor),
    "chord_phi": lambda options: table.CHORD_PHI,
    "pear_token": lambda options: table.PEAR_TOKEN(options.pear_gamma),
    "pear_block": lambda options: table.PEAR_BLOCK(options.pear_block_tokens, options.pear_gamma),
    "pear_sequence": lambda options: table.PEAR_SEQUENCE(),
    "implicit_reward": lambda options: table.IMPLICIT_REWARD(options.implicit_beta),
}
"""Rows for demonstrations alone, by name."""


def on_rollouts(row: Estimator, **changes: object) -> Part:
    """The part of what the policy wrote."""
    part = Part(name="rl", row=row, sources=ROLLOUTS, kind="rl", reducer=row.reducer)
    return dataclasses.replace(part, **changes)  # type: ignore[arg-type]


def on_demonstrations(row: Estimator) -> Part:
    """The part of demonstrations by SFT."""
    return Part(name="sft", row=row, sources=DEMONSTRATIONS, kind="sft", reducer=row.reducer)


def off_policy(row: Estimator, *, judged_with: frozenset[Source] = ROLLOUTS) -> Part:
    """The part of demonstrations as rollouts that somebody else made, judged beside the policy's own or alone."""
    return Part(
        name="off",
        row=row,
        sources=DEMONSTRATIONS,
        kind="rl",
        reducer="official_fixed_rl",
        judged_with=judged_with,
    )
