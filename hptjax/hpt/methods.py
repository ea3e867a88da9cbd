"""The methods by name: every row of the token table with the route and the reducer that make it a way to train.

    she who wants LUFFY writes    method = "luffy"

A method has no loss function of its own: its parts name rows of `losses/table.py`, its route says which samples enter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from hptjax.hpt.method import DEMONSTRATIONS, ROLLOUTS, Method, Part
from hptjax.hpt.methods_critic import ppo
from hptjax.hpt.methods_prefix import prefix_rft, trapo, uft
from hptjax.hpt.options import Options
from hptjax.hpt.route import (
    Route,
    by_band,
    by_chance,
    by_gate,
    by_table,
    corrected_where,
    in_pairs,
    together,
    varied,
    with_buffer,
)
from hptjax.hpt.schedules import linear, rise_and_fall
from hptjax.losses import table
from hptjax.losses.estimator import Estimator, ExtraTerm, Need
from hptjax.losses.kl import k2_token_loss
from hptjax.losses.view import TokenView, stored
from hptjax.losses.words import said
from hptjax.types import Array

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


def rollouts_only(name: str) -> Callable[[Options], Method]:
    """A row of rollouts as a method: everything sampled learns."""

    def method(options: Options) -> Method:
        row = ROLLOUT_ROWS[name](options.clip)
        extra = tuple(
            Part(
                name=term.name,
                row=term,
                sources=ROLLOUTS,
                kind="beside",
                reducer=row.reducer,
                coefficient=term.coefficient,
            )
            for term in row.extra_terms
        )
        return Method(
            name=name,
            parts=(_on_rollouts(row), *extra),
            route=by_gate(-1, options.group_size),
            rollouts=options.group_size,
            most_samples=options.group_size,
        )

    return method


def demonstrations_only(name: str) -> Callable[[Options], Method]:
    """A row of demonstrations as a method: nothing is sampled."""
    return lambda options: Method(
        name=name,
        parts=(_on_demonstrations(DEMONSTRATION_ROWS[name](options)),),
        route=by_gate(options.group_size, options.group_size),
        rollouts=0,
        most_samples=1,
    )


def dapo(options: Options) -> Method:
    """DAPO: its row, on questions where some rollouts are solved and some are not; truncated ones do not learn."""
    method = rollouts_only("dapo")(options)
    return dataclasses.replace(
        method,
        route=varied,
        refills=True,
        mask_overlong=True,
        difference="More questions are drawn until the batch is full, methods.dapo_draws times at most, and never past"
        " the end of a pass over the data, so that no question comes twice in a step.",
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
    off = _off_policy(table.LUFFY_OFF(options.luffy_gamma), judged_with=False)
    return dataclasses.replace(
        method,
        parts=(*method.parts, off),
        rewards_demonstrations=True,
        difference="The published code loses the band's flag when rows are merged, and falls back to SFT.",
    )


def hpt_soft(options: Options) -> Method:
    """HPT with coefficients by the number of solved rollouts instead of a gate."""
    size = options.group_size
    linear_table = tuple((solved / size, 0.0, 1.0 - solved / size) for solved in range(size + 1))
    route = by_table(options.soft_table or linear_table, terms=("rl", "off", "sft"))
    return dataclasses.replace(
        hpt_off_band(options),
        name="hpt_soft",
        route=route,
        most_samples=size + 1,
        difference="The published coefficients are computed and never read; the linear table here is ours.",
    )


def luffy(options: Options) -> Method:
    """LUFFY: one rollout of the group is the demonstration, with a shaped ratio; all are judged by one mean."""
    on = _on_rollouts(table.DR_GRPO(options.clip), reducer="official_fixed_rl", judged_with=DEMONSTRATIONS)
    return Method(
        name="luffy",
        parts=(on, _off_policy(table.LUFFY_OFF(options.luffy_gamma))),
        route=together,
        rollouts=options.group_size - 1,
        most_samples=options.group_size,
        rewards_demonstrations=True,
        source="arXiv 2504.14945",
        difference="Entropy coefficient 0.01 in the paper, 0.001 in the script: hpt.entropy_coefficient.",
    )


def srft(options: Options) -> Method:
    """SRFT: the demonstration as SFT and as a rollout, rollouts pushed up and down; weights by entropy."""
    parts = (
        _on_demonstrations(table.SRFT_SFT(sign=options.srft_sign)),
        _off_policy(table.SRFT_OFF),
        _on_rollouts(table.SRFT_ON(), reducer="official_fixed_rl"),
    )
    return Method(
        name="srft",
        parts=parts,
        route=together,
        rollouts=options.group_size,
        most_samples=options.group_size + 1,
        rewards_demonstrations=True,
        source="arXiv 2506.19767",
        difference="On rollouts log pi and no ratio, as HPT's re-implementation; the placement of 0.5 is second-hand.",
    )


def chord_mu(options: Options) -> Method:
    """CHORD-mu: (1 - mu) GRPO + mu SFT, mu falling over the run."""
    mu = rise_and_fall(options.chord_peak, options.chord_valley, options.chord_rise_steps, options.chord_fall_steps)
    grpo = dataclasses.replace(
        _on_rollouts(ROLLOUT_ROWS["grpo"](options.clip)), schedule=said("1 - mu")(lambda step: 1.0 - mu(step))
    )
    sft = dataclasses.replace(_on_demonstrations(table.SFT), schedule=mu)
    return Method(
        name="chord_mu",
        parts=(grpo, sft),
        route=together,
        rollouts=options.group_size,
        most_samples=options.group_size + 1,
        source="arXiv 2508.11408; constants as in Trinity-RFT",
        difference="Every question brings its demonstration; the code draws a separate expert batch (a fifth of rows).",
    )


def kdrl(options: Options) -> Method:
    """KDRL: GRPO and, on the same rollouts, the reverse KL to a teacher."""
    beta = linear(options.kdrl_beta, options.kdrl_end_beta, options.kdrl_steps)
    row = ROLLOUT_ROWS["grpo"](options.clip)
    teacher = Part(
        name="kd",
        row=ExtraTerm("kd", _k2_to_teacher, 1.0, frozenset({Need.TEACHER_LOGPROBS})),
        sources=ROLLOUTS,
        kind="beside",
        reducer=row.reducer,
        schedule=beta,
    )
    return Method(
        name="kdrl",
        parts=(_on_rollouts(row), teacher),
        route=corrected_where("kd", options.kdrl_where),
        rollouts=options.group_size,
        most_samples=options.group_size,
        source="arXiv 2506.02208",
        difference="Schedule and masks are second-hand: digests give 5e-3 to 1e-3, a re-implementation 0.2 to 0.002.",
    )


def relift(options: Options) -> Method:
    """ReLIFT: RL on everything; demonstrations of failed questions are collected for SFT with its own optimizer."""
    rl = _on_rollouts(table.DR_GRPO(options.clip), reducer="official_fixed_rl")
    return Method(
        name="relift",
        parts=(rl, _on_demonstrations(table.SFT)),
        route=with_buffer(options.relift_buffer),
        rollouts=options.group_size,
        most_samples=options.group_size,
        apart=options.relift_buffer,
        source="arXiv 2506.07527",
        difference="The entropy coefficient of its SFT (0.001) is hpt.entropy_coefficient, for both kinds of update.",
    )


def dpo(options: Options) -> Method:
    """DPO on pairs that the verifier makes of the policy's rollouts."""
    row = table.DPO(options.dpo_beta)
    pairs = dataclasses.replace(_on_rollouts(row), coefficient=2.0)  # a mean over pairs, not over their sequences
    return Method(
        name="dpo",
        parts=(pairs,),
        route=in_pairs("rl"),
        rollouts=options.group_size,
        most_samples=options.group_size,
        difference="Pairs are made online, of solved and unsolved rollouts; the paper's come from a data set.",
    )


METHODS: Mapping[str, Callable[[Options], Method]] = {
    **{name: rollouts_only(name) for name in ROLLOUT_ROWS},
    "ppo": ppo,  # in the place of its row
    "dapo": dapo,
    "dpo": dpo,
    **{name: demonstrations_only(name) for name in DEMONSTRATION_ROWS},
    "hpt": hpt,
    "hpt_off_band": hpt_off_band,
    "hpt_soft": hpt_soft,
    "random_gate": random_gate,
    "luffy": luffy,
    "srft": srft,
    "chord_mu": chord_mu,
    "relift": relift,
    "kdrl": kdrl,
    "trapo": trapo,
    "uft": uft,
    "prefix_rft": prefix_rft,
}
"""Every method that can be trained, in the order of `hptjax methods`."""


def _gated(name: str, route: Route, options: Options) -> Method:
    rl = _on_rollouts(ROLLOUT_ROWS[options.rollout_row](options.clip), reducer="official_fixed_rl")
    return Method(
        name=name,
        parts=(rl, _on_demonstrations(table.SFT)),
        route=route,
        rollouts=options.group_size,
        most_samples=options.group_size,
        source="arXiv 2509.04419 v2 Eq. 10 to 12, as the published code runs it",
        difference="Paper: std and clip; code and this row: neither. The code's reducer is hpt.preset official.",
    )


def _on_rollouts(row: Estimator, **changes: object) -> Part:
    part = Part(name="rl", row=row, sources=ROLLOUTS, kind="rl", reducer=row.reducer)
    return dataclasses.replace(part, **changes)  # type: ignore[arg-type]


def _on_demonstrations(row: Estimator) -> Part:
    return Part(name="sft", row=row, sources=DEMONSTRATIONS, kind="sft", reducer=row.reducer)


def _off_policy(row: Estimator, *, judged_with: bool = True) -> Part:
    return Part(
        name="off",
        row=row,
        sources=DEMONSTRATIONS,
        kind="rl",
        reducer="official_fixed_rl",
        judged_with=ROLLOUTS if judged_with else frozenset(),
    )


@said("k2 to the teacher")
def _k2_to_teacher(view: TokenView) -> Array:
    return k2_token_loss(view.logprobs, stored(view.teacher_logprobs, "teacher_logprobs"))
