"""From the config's method to what it is made of: terms for the host, token losses for the device, and its needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax

from hptjax.config import Config, HptConfig, Method
from hptjax.hpt.terms import Term
from hptjax.losses import kl, reducers, table
from hptjax.losses.advantages import ones
from hptjax.losses.entropy import entropy_token_loss
from hptjax.losses.stability import everywhere
from hptjax.records import Sample, SampleId, Source
from hptjax.train.objective import TokenLoss

ROLLOUTS = frozenset({Source.ROLLOUT, Source.PREFIX})
DEMONSTRATIONS = frozenset({Source.DEMONSTRATION})
KL_TOKEN_LOSS = {"k1": kl.k1_token_loss, "k2": kl.k2_token_loss, "k3": kl.k3_token_loss}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A method, resolved.

    Args
      threshold: of the gate. rolls_out: whether rollouts decide anything.
      terms, token_losses: the host and the device side of each plane, by the same names.
      estimator: the RL row of the table. scores: whether a score pass gives `rollout_logprobs`.
      reads_reference: whether a frozen reference model is scored. wants_entropy: whether a term needs the entropy.
      partition: samples -> logical micro-batch per sample, for the preset that needs one.
    """

    threshold: int
    rolls_out: bool
    terms: tuple[Term, ...]
    token_losses: Mapping[str, TokenLoss]
    estimator: table.Estimator
    scores: bool
    reads_reference: bool
    wants_entropy: bool
    partition: Callable[[Sequence[Sample]], dict[SampleId, int]] | None


def build_recipe(config: Config, method: Method, questions_per_step: int) -> Recipe:
    """The recipe of a stage. `sft` is HPT with every question gated, `grpo` is HPT with none."""
    hpt, group_size = config.hpt, config.rollout.group_size
    threshold = {"hpt": hpt.gate, "sft": group_size, "grpo": -1}[method]
    estimator = build_estimator(hpt)
    scores = config.train.updates_per_rollout_batch > 1 and estimator.reads_rollout_logprobs
    rl, sft, over_all = _reducers(config, questions_per_step)
    together = ROLLOUTS | DEMONSTRATIONS if hpt.preset == "joint" else None
    terms: list[Term] = []
    losses: dict[str, TokenLoss] = {}
    if threshold < group_size:
        terms.append(Term("rl", ROLLOUTS, hpt.rl_coefficient, rl, estimator.advantage, normalised_over=together))
        losses["rl"] = _policy_loss(estimator, scores)
        if hpt.kl_coefficient > 0:
            terms.append(Term("kl", ROLLOUTS, hpt.kl_coefficient, rl, ones, normalised_over=together))
            token_loss = KL_TOKEN_LOSS[hpt.kl_estimator]
            losses["kl"] = lambda view, advantages: token_loss(view.logprobs, view.reference_logprobs)
    if threshold >= 0:
        terms.append(
            Term("sft", DEMONSTRATIONS, hpt.sft_coefficient, sft, table.SFT.advantage, normalised_over=together)
        )
        losses["sft"] = _policy_loss(table.SFT, scores)
    if hpt.entropy_coefficient > 0:
        sources = ROLLOUTS | DEMONSTRATIONS if hpt.entropy_on_demonstrations else ROLLOUTS
        terms.append(Term("entropy", sources, hpt.entropy_coefficient, over_all, ones, normalised_over=together))
        losses["entropy"] = lambda view, advantages: entropy_token_loss(view.entropy)
    return Recipe(
        threshold=threshold,
        rolls_out=threshold < group_size,
        terms=tuple(terms),
        token_losses=losses,
        estimator=estimator,
        scores=scores,
        reads_reference="kl" in losses,
        wants_entropy="entropy" in losses,
        partition=_partition(hpt) if hpt.preset == "official" else None,
    )


def build_estimator(hpt: HptConfig) -> table.Estimator:
    """The RL row that the config names, with its clip."""
    clip = None if hpt.clip_low is None or hpt.clip_high is None else (hpt.clip_low, hpt.clip_high)
    if hpt.rl_estimator == "dr_grpo":
        return table.DR_GRPO(clip)
    if hpt.rl_estimator == "reinforce":
        return table.REINFORCE
    return (table.GRPO if hpt.rl_estimator == "grpo" else table.PPO)(clip or (0.2, 0.2))


def _policy_loss(estimator: table.Estimator, scored: bool) -> TokenLoss:
    """The row's token loss; without a score pass the rollout policy is the current one, at ratio exactly 1."""

    def token_loss(view, advantages):
        if not scored:
            view = dataclasses.replace(view, rollout_logprobs=jax.lax.stop_gradient(view.logprobs))
        return table.policy_token_loss(estimator, view, advantages)

    return token_loss


def clips(recipe: Recipe) -> bool:
    """Whether tokens of this recipe can be masked by their ratio."""
    return recipe.scores and recipe.estimator.stability_mask is not everywhere


def _reducers(config: Config, questions_per_step: int) -> tuple[reducers.Reducer, reducers.Reducer, reducers.Reducer]:
    """The preset's reducers for RL, for SFT, and for the entropy of all completion tokens (design contract 5).

    "separate" and "joint" take token means of the term's own population or of all populations together, which the
    terms say themselves (`Term.normalised_over`).
    """
    hpt, tokens = config.hpt, config.rollout.max_completion_tokens
    updates = config.train.updates_per_rollout_batch
    if hpt.preset == "official_fixed":
        rows = questions_per_step * config.rollout.group_size // updates
        return reducers.official_fixed_rl(tokens, rows), reducers.official_fixed_sft, reducers.token_mean
    if hpt.preset == "official":
        demonstrations = reducers.official_sft(hpt.ranks)
        return reducers.official_rl(tokens, hpt.ranks), demonstrations, demonstrations
    if hpt.preset in ("separate", "joint"):
        return reducers.token_mean, reducers.token_mean, reducers.token_mean
    questions = questions_per_step // updates
    return reducers.paper_rl(questions), reducers.paper_sft(questions), reducers.token_mean


def _partition(hpt: HptConfig) -> Callable[[Sequence[Sample]], dict[SampleId, int]]:
    """Samples to logical micro-batches: dealt to the ranks by length, then filled up to a token budget.

    The published script balances ranks by the Karmarkar-Karp method; this deal of the sorted samples is simpler and
    gives other, equally arbitrary, neighbours. The formulas take any partition.
    """

    def partition(samples: Sequence[Sample]) -> dict[SampleId, int]:
        def length(sample: Sample) -> int:
            return len(sample.prompt_tokens) + len(sample.completion_tokens)

        ordered = sorted(samples, key=lambda sample: (-length(sample), sample.sample_id))
        places: dict[SampleId, int] = {}
        used = 0
        for rank in range(hpt.ranks):
            room = 0
            for sample in ordered[rank :: hpt.ranks]:
                if length(sample) > room:
                    used, room = used + 1, hpt.logical_micro_tokens
                places[sample.sample_id] = used
                room -= length(sample)
        return places

    return partition
