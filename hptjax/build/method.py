"""From the config's method to what it is made of: terms for the host, token losses for the device, and its needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import jax

from hptjax.build.logical import logical_partition
from hptjax.build.rows import chosen_row
from hptjax.config import Config, HptConfig
from hptjax.config_methods import MethodName
from hptjax.hpt.control import Control, Controls, entropy_control
from hptjax.hpt.method import DEMONSTRATIONS, ROLLOUTS, Method, Part, Share, all_needs
from hptjax.hpt.methods import METHODS, Options
from hptjax.hpt.refine import Refinement, in_turn, mean_one, top_entropy
from hptjax.hpt.terms import Term, completion_span
from hptjax.losses import kl, reducers, table
from hptjax.losses.advantages import ones
from hptjax.losses.entropy import entropy_token_loss
from hptjax.losses.estimator import Estimator, ExtraTerm, Need, Regression
from hptjax.losses.stability import everywhere
from hptjax.losses.view import TokenView, stored
from hptjax.records import Sample, SampleId
from hptjax.train.objective import TokenLoss
from hptjax.types import Array

KL_TOKEN_LOSS = {
    "k1": kl.k1_token_loss,
    "k2": kl.k2_token_loss,
    "k3": kl.k3_token_loss,
    "k3_plus": kl.k3_plus_token_loss,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A method, resolved.

    Args
      method: its row, with the config's penalties and bonuses beside its own parts.
      terms: (steps done in the stage, steered coefficients by part) -> the host side of each plane; token_losses: the
        device side, by the same names.
      scores: whether a score pass gives `rollout_logprobs`. looks: all that it gives, by name; empty: there is none.
      refine, control: what is made of the score pass before anything is trained on.
      needs: what the parts read beside the policy and a reward.
      partition: samples -> logical micro-batch per sample, for the preset that needs one.
    """

    method: Method
    terms: Callable[..., tuple[Term, ...]]
    token_losses: Mapping[str, TokenLoss]
    scores: bool
    looks: frozenset[str]
    refine: Refinement | None
    control: Control | None
    needs: frozenset[Need]
    partition: Callable[[Sequence[Sample]], dict[SampleId, int]] | None

    @property
    def has_critic(self) -> bool:
        """Whether a value head is trained beside the policy."""
        return Need.VALUES in self.needs


def build_recipe(config: Config, name: MethodName, questions_per_step: int) -> Recipe:
    """The recipe of a stage. Raises ValueError where what the method needs is not there, with all that is missing."""
    hpt = config.hpt
    method = chosen_method(config, name)
    parts, penalty = method.parts, _reward_penalty(config, method)
    needs = needs_of(config, method)
    check_needs(config, name, needs)
    rows = [part.row for part in parts if isinstance(part.row, Estimator)]
    scores = config.train.updates_per_rollout_batch > 1 and any(row.reads_rollout_logprobs for row in rows)
    together = ROLLOUTS | DEMONSTRATIONS if hpt.preset == "joint" else None
    shares = {part.name: _reducer(part, config, questions_per_step) for part in parts}

    refinements = _refinements(method, hpt)
    control = None
    if hpt.entropy_target is not None and _has_rl(method):
        control = entropy_control(start=hpt.entropy_coefficient, target=hpt.entropy_target, delta=hpt.entropy_delta)
    looks = {
        "rollout_logprobs": scores or (hpt.correction_normalised and _has_rl(method)),
        "entropy": control is not None or (hpt.top_entropy is not None and _has_rl(method)),
        "rollout_values": Need.VALUES in needs,
    }

    def terms(step: int, controls: Controls = MappingProxyType({})) -> tuple[Term, ...]:
        return tuple(
            Term(
                part.name,
                part.sources,
                part.coefficient
                * (1.0 if part.schedule is None else part.schedule(step))
                * controls.get(part.name, 1.0),
                shares[part.name],
                part.row.advantage if isinstance(part.row, Estimator) else ones,
                token_advantage=part.row.token_advantage if isinstance(part.row, Estimator) else None,
                normalised_over=together or part.normalised_over,
                judged_with=part.judged_with,
                span=part.span,
                counted=completion_span if together else part.counted,
            )
            for part in parts
        )

    return Recipe(
        method=method,
        terms=terms,
        token_losses={part.name: _token_loss(part, scores, penalty if part.name == "rl" else 0.0) for part in parts},
        scores=scores,
        looks=frozenset(name for name, wanted in looks.items() if wanted),
        refine=in_turn(refinements) if refinements else None,
        control=control,
        needs=needs,
        partition=logical_partition(hpt.ranks, hpt.logical_micro_tokens) if hpt.preset == "official" else None,
    )


def chosen_method(config: Config, name: MethodName) -> Method:
    """A method's row, with the config's penalties and bonuses beside its own parts."""
    method = METHODS[name](options(config))
    own = [_with_choices(part, config) for part in method.parts if part.name != "kl"]
    return dataclasses.replace(method, parts=(*own, *_beside(config, method)))


def needs_of(config: Config, method: Method) -> frozenset[Need]:
    """What the parts of a chosen method, and a KL in the reward, read beside the policy and a reward."""
    penalised = _reward_penalty(config, method) != 0.0
    return all_needs(method) | (frozenset({Need.REFERENCE_LOGPROBS}) if penalised else frozenset())


def options(config: Config) -> Options:
    """The options of the methods, as the config sets them."""
    hpt, constants = config.hpt, dataclasses.asdict(config.methods)
    for name in ("relift_clip_norm", "dapo_draws", "dapo_cushion_frac"):  # of the optimizer and of sampling
        del constants[name]
    constants["srft_sign"] = -1 if config.methods.srft_sign == "minus" else 1
    constants["trapo_groups"] = tuple((row.count, row.ratio, row.below) for row in config.methods.trapo_groups)
    constants["soft_table"] = tuple((row.rl, row.off, row.sft) for row in config.methods.soft_table)
    return Options(
        group_size=config.rollout.group_size,
        seed=config.seed,
        gate=hpt.gate,
        rollout_row=hpt.rl_estimator,
        clip=None if hpt.clip_low is None or hpt.clip_high is None else (hpt.clip_low, hpt.clip_high),
        **constants,
    )


def met_needs(config: Config) -> frozenset[Need]:
    """What the config provides. Log-probs of trainer and sampler, entropy and pairs of rollouts are always there."""
    provided = {
        Need.DEMONSTRATIONS: config.data.demonstrations,
        Need.GROUPS: config.rollout.group_size > 1,
        Need.PAIRS: config.rollout.group_size > 1,
        Need.REFERENCE_LOGPROBS: config.model.reference is not None,
        Need.TEACHER_LOGPROBS: config.model.teacher is not None,
        Need.DEMONSTRATION_LOGPROBS: config.model.demonstration_author is not None,
    }
    return frozenset(need for need in Need if provided.get(need, True))


REMEDY = {
    Need.DEMONSTRATIONS: "data.demonstrations",
    Need.GROUPS: "rollout.group_size (2 or more)",
    Need.PAIRS: "rollout.group_size (2 or more)",
    Need.REFERENCE_LOGPROBS: "model.reference",
    Need.TEACHER_LOGPROBS: "model.teacher",
    Need.DEMONSTRATION_LOGPROBS: "model.demonstration_author",
}
"""The config field that provides a need."""


def check_needs(config: Config, name: str, needs: frozenset[Need]) -> None:
    """Nothing, where everything that a method reads is there. Raises ValueError with the list of what is missing."""
    met = met_needs(config)
    missing = [need for need in Need if need in needs - met]
    if missing:
        wanted = "; ".join(f"{need.value} (set {REMEDY[need]})" for need in missing)
        raise ValueError(f"method {name!r} needs what this config does not provide: {wanted}")


def _with_choices(part: Part, config: Config) -> Part:
    """The part with the config's coefficient, clip and sampler correction."""
    hpt = config.hpt
    factor = {"rl": hpt.rl_coefficient, "sft": hpt.sft_coefficient, "beside": 1.0}[part.kind]
    row = part.row
    if isinstance(row, Estimator) and part.sources == ROLLOUTS:
        row = chosen_row(row, hpt)
    return dataclasses.replace(part, row=row, coefficient=factor * part.coefficient)


def _refinements(method: Method, hpt: HptConfig) -> list[Refinement]:
    """The method's own, then what the config asks for, on the rollouts' part."""
    chosen = [] if method.refine is None else [method.refine]
    if _has_rl(method):
        if hpt.top_entropy is not None:
            chosen.append(top_entropy(hpt.top_entropy))
        if hpt.correction_normalised:
            whole = hpt.sampler_correction == "sequence_tis"
            chosen.append(mean_one(cap=hpt.correction_cap, whole_sequence=whole))
    return chosen


def _reward_penalty(config: Config, method: Method) -> float:
    return config.hpt.kl_coefficient or 0.0 if config.hpt.kl_in == "reward" and _has_rl(method) else 0.0


def _has_rl(method: Method) -> bool:
    return any(part.name == "rl" for part in method.parts)


def _beside(config: Config, method: Method) -> tuple[Part, ...]:
    """The KL penalty and the entropy bonus: the config's, or the penalty that the method is published with."""
    hpt = config.hpt
    published = [part for part in method.parts if part.name == "kl"]
    rl = next((part for part in method.parts if part.name == "rl"), None)
    steered = hpt.entropy_target is not None and rl is not None
    parts: list[Part] = []
    if hpt.kl_coefficient is None:
        parts += published
    elif hpt.kl_coefficient > 0 and hpt.kl_in == "loss" and rl is not None:
        row = ExtraTerm("kl", _to_reference(hpt), 1.0, frozenset({Need.REFERENCE_LOGPROBS}))
        parts.append(
            Part(
                name="kl",
                row=row,
                sources=ROLLOUTS,
                kind="beside",
                reducer=rl.reducer,
                coefficient=hpt.kl_coefficient,
            )
        )
    if hpt.entropy_coefficient > 0 or steered:
        row = ExtraTerm("entropy", lambda view: entropy_token_loss(view.entropy), 1.0, frozenset({Need.ENTROPY}))
        parts.append(
            Part(
                name="entropy",
                row=row,
                sources=ROLLOUTS | DEMONSTRATIONS if hpt.entropy_on_demonstrations and not steered else ROLLOUTS,
                kind="beside",
                reducer="token_mean",
                coefficient=1.0 if steered else hpt.entropy_coefficient,
            )
        )
    return tuple(parts)


def _to_reference(hpt: HptConfig) -> Callable[[TokenView], Array]:
    token_loss = KL_TOKEN_LOSS[hpt.kl_estimator]
    return lambda view: token_loss(view.logprobs, stored(view.reference_logprobs, "reference_logprobs"))


def _token_loss(part: Part, scored: bool, reward_penalty: float) -> TokenLoss:
    """The part's token loss; without a score pass the rollout policy is the current one, at ratio exactly 1.

    Args
      reward_penalty: beta of a KL in the reward: the advantage of a token loses beta x (logp - reference_logprobs).
        Of the part `rl` alone, as where the KL is a loss: nothing else was sampled from the policy.
    """
    row = part.row
    if isinstance(row, Regression):
        return row.token_loss
    if isinstance(row, ExtraTerm):
        term = row.token_loss
        return lambda view, advantages: term(view)

    def token_loss(view: TokenView, advantages: Array) -> Array:
        if not scored:
            view = dataclasses.replace(view, rollout_logprobs=jax.lax.stop_gradient(view.logprobs))
        if reward_penalty:
            reference = stored(view.reference_logprobs, "reference_logprobs")
            advantages = advantages - reward_penalty * jax.lax.stop_gradient(kl.k1(view.logprobs, reference))
        return table.policy_token_loss(row, view, advantages)

    return token_loss


def stability_mask(recipe: Recipe) -> Callable[[TokenView, Array], Array] | None:
    """The mask of the rollouts' part, where tokens can be masked by their ratio; its share is reported."""
    row = next((part.row for part in recipe.method.parts if part.name == "rl"), None)
    if not recipe.scores or not isinstance(row, Estimator) or row.stability_mask is everywhere:
        return None
    return row.stability_mask


def _reducer(part: Part, config: Config, questions_per_step: int) -> reducers.Reducer:
    """How a part's tokens share its coefficient: the preset's way (design contract 5), or the row's own.

    "separate" and "joint" take token means of the term's own population or of all populations together, which the
    terms say themselves (`Term.normalised_over`).
    """
    hpt, tokens = config.hpt, config.rollout.max_completion_tokens
    updates = config.train.updates_per_rollout_batch
    questions = questions_per_step // updates
    like_sft = part.kind == "sft" or part.name == "entropy"
    if hpt.preset == "official_fixed":
        return _published(part.reducer, tokens, questions_per_step * config.rollout.group_size // updates)
    if hpt.preset == "official":
        return reducers.official_sft(hpt.ranks) if like_sft else reducers.official_rl(tokens, hpt.ranks)
    if hpt.preset in ("separate", "joint") or part.name == "entropy":
        return reducers.token_mean
    return reducers.paper_sft(questions) if like_sft else reducers.paper_rl(questions)


def _published(name: Share, max_tokens: int, rollout_rows: int) -> reducers.Reducer:
    return {
        "token_mean": reducers.token_mean,
        "seq_mean_token_mean": reducers.seq_mean_token_mean,
        "seq_mean_token_sum": reducers.seq_mean_token_sum,
        "dr_grpo": reducers.dr_grpo(max_tokens),
        "official_fixed_rl": reducers.official_fixed_rl(max_tokens, rollout_rows),
    }[name]
