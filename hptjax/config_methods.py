"""The names of the methods, and the constants that single methods are published with."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, get_args

from hptjax.config_text import struct_list

RolloutRow = Literal[
    "reinforce",
    "rloo",
    "reinforce_pp",
    "ppo",
    "grpo",
    "dr_grpo",
    "dapo",
    "cispo",
    "cispo_table",
    "gspo",
    "gmpo",
    "sapo",
]  # rows of losses/table.py for what the policy wrote; each is a method, and may be HPT's row for rollouts

DemonstrationRow = Literal[
    "sft", "dft", "trsft", "chord_phi", "pear_token", "pear_block", "pear_sequence", "implicit_reward"
]  # rows for what somebody else wrote; each is a method that samples nothing

Hybrid = Literal[
    "hpt",
    "hpt_off_band",
    "hpt_soft",
    "random_gate",
    "luffy",
    "srft",
    "chord_mu",
    "relift",
    "kdrl",
    "trapo",
    "uft",
    "prefix_rft",
]  # methods of several parts

MethodName = Literal[RolloutRow, "dpo", DemonstrationRow, Hybrid]
"""The names of hpt/methods.py; `hptjax methods` prints what each of them is."""

FROM_DEMONSTRATIONS = frozenset(get_args(DemonstrationRow))  # nothing is sampled
GATED = frozenset({"hpt", "hpt_off_band", "random_gate"})  # a demonstration or a group per question
BESIDE_A_GROUP = frozenset({"hpt_soft", "srft", "chord_mu"})  # the demonstration joins a whole group
IN_A_GROUP = frozenset({"luffy"})  # the demonstration takes the place of a rollout
CONTINUED = frozenset({"trapo", "uft", "prefix_rft"})  # rollouts that start with a part of the demonstration
BY_RL_ALONE = frozenset({"luffy", "prefix_rft"})  # demonstrations and prefixes learn as rollouts, and not by SFT
APART = frozenset({"relift"})  # demonstrations make updates of their own
PAIRED = frozenset({"dpo"})  # two samples share a row


def learns_from_demonstrations(method: str) -> bool:
    """Whether demonstrations can enter an update of the method."""
    return method in FROM_DEMONSTRATIONS | GATED | BESIDE_A_GROUP | IN_A_GROUP | CONTINUED | APART


def learns_by_sft(method: str) -> bool:
    """Whether the method reads hpt.sft_coefficient."""
    return learns_from_demonstrations(method) and method not in BY_RL_ALONE


def learns_from_rollouts(method: str) -> bool:
    """Whether the method samples."""
    return method not in FROM_DEMONSTRATIONS


def samples_per_question(method: str, group_size: int) -> int:
    """The most samples that a question leaves in an update."""
    if method in FROM_DEMONSTRATIONS:
        return 1
    return group_size + int(method in BESIDE_A_GROUP)


def samples_per_bundle(method: str) -> int:
    """Samples that have to share a row."""
    return 2 if method in PAIRED else 1


@dataclasses.dataclass(frozen=True)
class SoftRow:
    """Coefficients of a question in method hpt_soft."""

    rl: float  # its rollouts
    off: float  # its demonstration as an off-policy rollout
    sft: float  # its demonstration as SFT


@dataclasses.dataclass(frozen=True)
class MicroGroupRow:
    """A micro-group of a question's rollouts in method trapo."""

    count: int  # rollouts
    ratio: float  # share of the demonstration they are given; 1: all of it, and nothing is sampled
    below: float  # ... where the mean reward of all earlier rollouts of the question is below this


@dataclasses.dataclass(frozen=True)
class MethodsConfig:
    """Constants of single methods, as published where there is a published value; the others do not read them."""

    gate_off: int = 1  # hpt_off_band: RL on the demonstration where more than hpt.gate and at most this many solved
    soft_table: Annotated[tuple[SoftRow, ...], struct_list(SoftRow)] = ()  # hpt_soft: for 0..group_size solved
    ppo_gamma: float = 1.0  # ppo: discount of later tokens, (0, 1]
    ppo_lambda: float = 0.95  # ppo: of GAE, [0, 1]
    ppo_value_coefficient: float = 0.1  # ppo: of the critic's loss
    ppo_value_clip: float = 0.2  # ppo: how far a value may move from the one at sampling weights; unverified
    trsft_floor: float = 0.1  # trsft: probability below which the weight falls
    pear_gamma: float = 0.999  # pear_*: unverified
    pear_block_tokens: int = 8  # pear_block: ours
    implicit_beta: float = 0.1  # implicit_reward
    dpo_beta: float = 0.1
    dapo_draws: int = 10  # dapo: batches of questions drawn for a step at the most, the first included; 1: no refill
    dapo_cushion_frac: float = 0.2  # dapo: last part of the length limit, over which the reward falls by 1; 0: off
    luffy_gamma: float = 0.1  # luffy, hpt_off_band, hpt_soft
    srft_sign: Literal["minus", "plus"] = "minus"  # srft: of the entropy in a demonstration's weight; its code: plus?
    chord_peak: float = 0.9  # chord_mu: share of SFT after the rise
    chord_valley: float = 0.05  # chord_mu: ... and after the fall
    chord_rise_steps: int = 0
    chord_fall_steps: int = 200
    kdrl_beta: float = 5e-3  # kdrl: of the KL to the teacher, at the start; unverified
    kdrl_end_beta: float = 1e-3
    kdrl_steps: int = 280
    relift_buffer: int = 128  # relift: failed questions that make an update of their demonstrations
    relift_clip_norm: float | None = 0.7  # relift: of that update's gradient
    kdrl_where: Literal["always", "unsolved", "unsolved_group"] = "always"  # kdrl: which rollouts the teacher corrects
    trapo_constants: Literal["paper", "code"] = "paper"  # trapo: micro-groups, row of the rollouts, whose prefix learns
    trapo_groups: Annotated[tuple[MicroGroupRow, ...], struct_list(MicroGroupRow)] = ()  # trapo: instead of published
    trapo_delimiters: tuple[int, ...] = ()  # trapo: tokens that end a step; a prefix runs on to the next of them
    uft_segments: int = 5  # uft: parts of a demonstration, each of which may be part of the hint
    uft_peak: float = 0.95  # uft: chance of each at the start
    uft_valley: float = 0.05  # uft: ... and at the last step with hints
    uft_steps: int = 300  # uft: steps with hints
    uft_coefficient: float = 0.001  # uft: of the hint's SFT
    prefix_high: float = 0.95  # prefix_rft: largest share of a demonstration that is given; unverified
    prefix_low: float = 0.05  # prefix_rft: where the smallest share ends, which starts at the largest; unverified
    prefix_steps: int = 500  # prefix_rft: steps until then; unverified
    prefix_entropy_share: float = 0.2  # prefix_rft: prefix tokens that learn, those of highest entropy; unverified
    prefix_clip_low: float | None = None  # prefix_rft: as hpt.clip_low, on prefix tokens; None: the same
    prefix_clip_high: float | None = None  # prefix_rft: as hpt.clip_high, on prefix tokens; None: the same
    prefix_clip_bound: float = 3.0  # prefix_rft: cap of the ratio where the advantage is negative
