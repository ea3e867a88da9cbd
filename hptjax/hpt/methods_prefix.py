"""The methods whose rollouts continue a prefix of the demonstration: TRAPO, UFT, Prefix-RFT.

Each has a plan (`plan.py`), the plane `rl` of the tokens that the policy wrote, and the plane `prefix` of those it was
given. The verifier sees prefix and continuation as one completion, and `rollout.max_completion_tokens` counts both.
"""

from __future__ import annotations

import dataclasses

from hptjax.hpt.method import CONTINUED, ROLLOUTS, Method, Part
from hptjax.hpt.options import Options
from hptjax.hpt.plan import CODE_GROUPS, PAPER_GROUPS, MicroGroup, to_delimiter
from hptjax.hpt.plan import prefix_rft as prefix_rft_plan
from hptjax.hpt.plan import trapo as trapo_plan
from hptjax.hpt.plan import uft as uft_plan
from hptjax.hpt.route import by_gate
from hptjax.hpt.route_prefix import judging_prefixes, weighing_prefixes
from hptjax.hpt.schedules import rise_and_fall
from hptjax.hpt.terms import completion_span, prefix_span
from hptjax.losses import table
from hptjax.losses.estimator import Need

SCORED_AT = "Prefix tokens are scored at the sampling temperature, like the rest of the sample."


def trapo_groups(options: Options) -> tuple[MicroGroup, ...]:
    """The micro-groups that the options choose: their own, or those of the paper or of the code."""
    if options.trapo_groups:
        return tuple(MicroGroup(*group) for group in options.trapo_groups)
    return PAPER_GROUPS if options.trapo_constants == "paper" else CODE_GROUPS


def trapo(options: Options) -> Method:
    """TRAPO: micro-groups in sequence that are given more of the demonstration the worse the earlier ones did.

    What the policy writes is judged by the mean of all; what it is given is learnt by TrSFT, a whole demonstration too.
    """
    by_paper = options.trapo_constants == "paper"
    extend = to_delimiter(frozenset(options.trapo_delimiters)) if options.trapo_delimiters else None
    return Method(
        name="trapo",
        parts=(
            Part(
                name="rl",
                row=grpo_without_kl(options) if by_paper else table.DR_GRPO(options.clip),
                sources=ROLLOUTS,
                kind="rl",
                reducer="official_fixed_rl",
            ),
            Part(
                name="prefix",
                row=table.TRSFT(options.trsft_floor),
                sources=CONTINUED,
                kind="sft",
                reducer="official_fixed_rl",
                span=prefix_span,
            ),
        ),
        route=weighing_prefixes("prefix", options.group_size, first_only=not by_paper),
        rollouts=options.group_size,
        most_samples=options.group_size,
        plan=trapo_plan(trapo_groups(options), extend),
        needs=frozenset({Need.DEMONSTRATIONS}),  # for prefixes, whether they learn or not
        source="arXiv 2512.17636; code Su-my/TRAPO",
        difference="Paper (second-hand): ratios 0.2, 0.5, 1 below means 0.5, 0.7, 0.9, std and clip. Code: 0.25, 0.5, 1"
        " below sums 2 of 4, 4 of 6, 7 of 7, up to the end of a step, no std, no clip, and one of two samples with the"
        " same prefix learns it. methods.trapo_constants chooses. Both share the code's constant normaliser; the"
        f" paper's is not known. The script's entropy coefficient is 0.001: hpt.entropy_coefficient. {SCORED_AT}",
    )


def uft(options: Options) -> Method:
    """UFT: GRPO on what continues a hint, and a little SFT on the hint; the hints end during the run."""
    grpo = grpo_without_kl(options)
    return Method(
        name="uft",
        parts=(
            Part(name="rl", row=grpo, sources=ROLLOUTS, kind="rl", reducer="token_mean"),
            Part(
                name="kl",
                row=next(term for term in table.GRPO().extra_terms if term.name == "kl"),
                sources=ROLLOUTS,
                kind="beside",
                reducer="token_mean",
                coefficient=0.001,
            ),
            Part(
                name="prefix",
                row=table.SFT,
                sources=CONTINUED,
                kind="sft",
                reducer="token_mean",
                coefficient=options.uft_coefficient,
                span=prefix_span,
            ),
        ),
        route=by_gate(-1, options.group_size),
        rollouts=options.group_size,
        most_samples=options.group_size,
        plan=uft_plan(
            options.group_size,
            segments=options.uft_segments,
            chance=rise_and_fall(options.uft_peak, options.uft_valley, 0, options.uft_steps),
            steps=options.uft_steps,
            seed=options.seed,
        ),
        needs=frozenset({Need.DEMONSTRATIONS}),
        source="arXiv 2505.16984; code liumy2010/UFT",
        difference="Segments are equal runs of tokens; the code's are runs of the data's own steps. Its hint is part of"
        " the prompt, with a budget of its own. Its means are of micro-batches, here of the update."
        f" {SCORED_AT}",
    )


def prefix_rft(options: Options) -> Method:
    """Prefix-RFT: one rollout of the group continues a prefix, which learns by how much it helped."""
    clip = options.clip or (0.2, 0.2)
    low = clip[0] if options.prefix_clip_low is None else options.prefix_clip_low
    high = clip[1] if options.prefix_clip_high is None else options.prefix_clip_high
    written = Part(
        name="rl",
        row=table.PREFIX_RFT(clip, options.prefix_clip_bound),
        sources=ROLLOUTS,
        kind="rl",
        reducer="token_mean",
        counted=completion_span,
        normalised_over=ROLLOUTS,
    )
    prefix = dataclasses.replace(
        written,
        name="prefix",
        row=table.PREFIX_RFT_OFF(options.prefix_entropy_share, (low, high), options.prefix_clip_bound),
        sources=CONTINUED,
        span=prefix_span,
    )
    return Method(
        name="prefix_rft",
        parts=(written, prefix),
        route=judging_prefixes("rl", "prefix", options.group_size),
        rollouts=options.group_size,
        most_samples=options.group_size,
        plan=prefix_rft_plan(
            options.group_size,
            low=rise_and_fall(options.prefix_high, options.prefix_low, 0, options.prefix_steps),
            high=options.prefix_high,
            seed=options.seed,
        ),
        needs=frozenset({Need.DEMONSTRATIONS}),
        source="arXiv 2507.01679; code ZeroYuHuang/prefix_rft",
        difference="One token mean over prefixes and continuations, as the code's default. Unverified: the range of l,"
        " its schedule, and the share of prefix tokens. Entropy coefficient 0.001: hpt.entropy_coefficient."
        f" {SCORED_AT}",
    )


def grpo_without_kl(options: Options) -> table.Estimator:
    """GRPO's row for the methods that leave its penalty out, or have their own."""
    return dataclasses.replace(table.GRPO(options.clip or (0.2, 0.2)), extra_terms=(), difference="")
