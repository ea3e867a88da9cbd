"""The objective of a method: its gate, its clip, its coefficients and its corrections."""

from __future__ import annotations

import dataclasses
from typing import Literal

from hptjax.config_methods import RolloutRow


@dataclasses.dataclass(frozen=True)
class HptConfig:
    """The objective: who decides between SFT and RL, and what one token of each weighs."""

    gate: int = 0  # SFT where at most this many of the group solved; -1: pure RL; group_size: pure SFT
    # the reducers: what one token weighs. "separate": RL, KL, SFT and entropy are each a token mean of their own;
    # "joint": each is divided by the live tokens of rollouts and demonstrations together. Methods other than HPT take
    # the reducers of their own rows under "official_fixed"
    preset: Literal["official_fixed", "official", "paper", "separate", "joint"] = "official_fixed"
    rl_estimator: RolloutRow = (
        "dr_grpo"  # hpt*, random_gate: the row of losses/table.py for rollouts; "ppo" has no critic
    )
    clip_low: float | None = None  # ratio below 1 - clip_low is masked where the advantage is negative; None: the row's
    clip_high: float | None = (
        None  # ratio above 1 + clip_high is masked where the advantage is positive; None: the row's
    )
    clip_kind: Literal["row", "dual", "two_sided"] = "row"  # which clip of losses/stability.py takes these widths
    clip_bound: float = 3.0  # "dual": cap of the ratio where the advantage is negative; "two_sided": its ceiling, 4
    sampler_correction: Literal["none", "token_tis", "sequence_tis", "masked_is"] = (
        "none"  # importance weights from the sampler's log-probs to the trainer's, see losses/weights.py
    )
    correction_cap: float = 2.0  # of "token_tis" and "sequence_tis"; the upper end of "masked_is"
    correction_floor: float = 0.5  # the lower end of "masked_is"
    correction_normalised: bool = False  # "token_tis", "sequence_tis": weights scaled to mean 1 over each update
    sft_coefficient: float = 1.0
    rl_coefficient: float = 1.0
    entropy_coefficient: float = 0.0  # 0.001 in the published recipes
    entropy_on_demonstrations: bool = True  # whether the entropy term covers demonstrations too, as published
    entropy_target: float | None = None  # nats per rollout token that the bonus, then on rollouts alone, steers to
    entropy_delta: float = 0.001  # step of the steered coefficient, which starts at entropy_coefficient; unverified
    top_entropy: float | None = None  # share of rollout tokens, those of highest entropy, that learn by RL; None: all
    kl_coefficient: float | None = None  # to model.reference; None: as published, 0 but for grpo and uft
    kl_estimator: Literal["k1", "k2", "k3", "k3_plus"] = "k3"  # of the loss
    kl_in: Literal["loss", "reward"] = "loss"  # "reward": a rollout token's advantage loses kl_coefficient x k1
    mask_overlong: bool = False  # weight 0 for completions that met their limit
    ranks: int = 8  # preset "official" only: data-parallel ranks of the published script
    logical_micro_tokens: int = 32_768  # preset "official" only: tokens of one of its micro-batches
