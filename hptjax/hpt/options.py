"""What a user may choose of the methods, as plain values."""

from __future__ import annotations

import dataclasses
from typing import Literal

from hptjax.losses import table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a user may choose of the methods; the defaults are the published values where there are any.

    Args
      group_size: rollouts per question. seed: of draws that are no sampling (random_gate).
      gate, gate_off: HPT's thresholds. rollout_row: the row of HPT's rollouts. clip: None: as published.
      soft_table: for 0..group_size solved, coefficients (rollouts, off-policy demonstration, SFT); empty: linear.
      the rest: constants of single methods, by name.
    """

    group_size: int
    seed: int = 0
    gate: int = 0
    gate_off: int = 1
    rollout_row: str = "dr_grpo"
    clip: table.Clip | None = None
    soft_table: tuple[tuple[float, float, float], ...] = ()
    ppo_gamma: float = 1.0
    ppo_lambda: float = 0.95
    ppo_value_coefficient: float = 0.1
    ppo_value_clip: float = 0.2
    trsft_floor: float = 0.1
    pear_gamma: float = 0.999
    pear_block_tokens: int = 8
    implicit_beta: float = 0.1
    dpo_beta: float = 0.1
    luffy_gamma: float = 0.1
    srft_sign: Literal[-1, 1] = -1
    chord_peak: float = 0.9
    chord_valley: float = 0.05
    chord_rise_steps: int = 0
    chord_fall_steps: int = 200
    kdrl_beta: float = 5e-3
    kdrl_end_beta: float = 1e-3
    kdrl_steps: int = 280
    kdrl_where: Literal["always", "unsolved", "unsolved_group"] = "always"
    relift_buffer: int = 128
    trapo_constants: Literal["paper", "code"] = "paper"
    trapo_groups: tuple[tuple[int, float, float], ...] = ()
    trapo_delimiters: tuple[int, ...] = ()
    uft_segments: int = 5
    uft_peak: float = 0.95
    uft_valley: float = 0.05
    uft_steps: int = 300
    uft_coefficient: float = 0.001
    prefix_high: float = 0.95
    prefix_low: float = 0.05
    prefix_steps: int = 500
    prefix_entropy_share: float = 0.2
    prefix_clip_low: float | None = None
    prefix_clip_high: float | None = None
    prefix_clip_bound: float = 3.0
