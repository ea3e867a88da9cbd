"""The methods by name: every row of the token table with the route and the reducer that make it a way to train.

    she who wants LUFFY writes    method = "luffy"

A method has no loss function of its own: its parts name rows of `losses/table.py`, its route says which samples enter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from hptjax.hpt.method import DEMONSTRATIONS, ROLLOUTS, Method, Part
from hptjax.hpt.method_parts import (
    DEMONSTRATION_ROWS,
    ROLLOUT_ROWS,
    WITHOUT_CLIP,
    off_policy,
    on_demonstrations,
    on_rollouts,
)
from hptjax.hpt.methods_critic import ppo
from hptjax.hpt.methods_gated import hpt, hpt_off_band, hpt_soft, random_gate
from hptjax.hpt.methods_prefix import grpo_without_kl, prefix_rft, trapo, uft
from hptjax.hpt.options import Options
from hptjax.hpt.route import by_gate, corrected_where, in_pairs, together, varied, with_buffer
from hptjax.hpt.schedules import linear, rise_and_fall
from hptjax.losses import table
from hptjax.losses.estimator import ExtraTerm, Need
from hptjax.losses.kl import k2_token_loss
from hptjax.losses.view import TokenView, stored
from hptjax.losses.words import said
from hptjax.types import Array


def rollouts_only(name: str) -> Callable[[Options], Method]:
    """A row of rollouts as a method: everything sampled learns."""

    def method(options: Options) -> Method:
        row = ROLLOUT_ROWS[name](None if name in WITHOUT_CLIP else options.clip)
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
            parts=(on_rollouts(row), *extra),
            route=by_gate(-1, options.group_size),
            rollouts=options.group_size,
            most_samples=options.group_size,
        )

    return method


def demonstrations_only(name: str) -> Callable[[Options], Method]:
    """A row of demonstrations as a method: nothing is sampled."""
    return lambda options: Method(
        name=name,
        parts=(on_demonstrations(DEMONSTRATION_ROWS[name](options)),),
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


def luffy(options: Options) -> Method:
    """LUFFY: one rollout of the group is the demonstration, with a shaped ratio; all are judged by one mean."""
    on = on_rollouts(table.DR_GRPO(options.clip), reducer="official_fixed_rl", judged_with=DEMONSTRATIONS)
    return Method(
        name="luffy",
        parts=(on, off_policy(table.LUFFY_OFF(options.luffy_gamma))),
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
        on_demonstrations(table.SRFT_SFT(sign=options.srft_sign)),
        off_policy(table.SRFT_OFF),
        on_rollouts(table.SRFT_ON(), reducer="official_fixed_rl"),
    )
    return Method(
        name="srft",
        parts=parts,
        route=together,
        rollouts=options.group_size,
        most_samples=options.group_size + 1,
        rewards_demonstrations=True,
        source="arXiv 2506.19767",
        difference="On rollouts log pi and no ratio, as HPT's re-implementation; the placement of 0.5 is second-hand."
        " Entropy coefficient 0.001: hpt.entropy_coefficient.",
    )


def chord_mu(options: Options) -> Method:
    """CHORD-mu: (1 - mu) GRPO + mu SFT, mu falling over the run."""
    mu = rise_and_fall(options.chord_peak, options.chord_valley, options.chord_rise_steps, options.chord_fall_steps)
    grpo = dataclasses.replace(
        on_rollouts(grpo_without_kl(options)), schedule=said("1 - mu")(lambda step: 1.0 - mu(step))
    )
    sft = dataclasses.replace(on_demonstrations(table.SFT), schedule=mu)
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
    row = grpo_without_kl(options)
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
        parts=(on_rollouts(row), teacher),
        route=corrected_where("kd", options.kdrl_where),
        rollouts=options.group_size,
        most_samples=options.group_size,
        source="arXiv 2506.02208",
        difference="Schedule and masks are second-hand: digests give 5e-3 to 1e-3, a re-implementation 0.2 to 0.002."
        " With a mask the teacher's term is a mean over the rollouts that it covers; it has no ratio and no clip.",
    )


def relift(options: Options) -> Method:
    """ReLIFT: RL on everything; demonstrations of failed questions are collected for SFT with its own optimizer."""
    rl = on_rollouts(table.DR_GRPO(options.clip), reducer="official_fixed_rl")
    return Method(
        name="relift",
        parts=(rl, on_demonstrations(table.SFT)),
        route=with_buffer(options.relift_buffer),
        rollouts=options.group_size,
        most_samples=options.group_size,
        apart=options.relift_buffer,
        source="arXiv 2506.07527",
        difference="The entropy coefficient of its SFT (0.001) is hpt.entropy_coefficient, for both kinds of update. A"
        " question waits once, by its latest visit.",
    )


def dpo(options: Options) -> Method:
    """DPO on pairs that the verifier makes of the policy's rollouts."""
    row = table.DPO(options.dpo_beta)
    pairs = dataclasses.replace(on_rollouts(row), coefficient=2.0)  # a mean over pairs, not over their sequences
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


@said("k2 to the teacher")
def _k2_to_teacher(view: TokenView) -> Array:
    return k2_token_loss(view.logprobs, stored(view.teacher_logprobs, "teacher_logprobs"))
