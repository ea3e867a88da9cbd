"""Floating-point operations of a run by the usual account, 2 N forward and 4 N backward per token, before it starts.

    a rollout of D tokens     sampled 2 N D, trained on 6 N D
    a demonstration           trained on 6 N D

With n parameters in adapters, N of the model stay: trained on (4 N + 6 n) D, because no gradient of the model is made.
N counts all parameters, D prompt and completion. Source: arXiv 2604.23747, appendix B (`spec/accumulation.md` 2.3, a
second-hand reading whose arithmetic was checked): its figures come out of `stage_flops` in the tests.
"""

from __future__ import annotations

import dataclasses
import math

from hptjax.config import Config, StageConfig
from hptjax.config_batch import rollouts_sampled, samples_left, stage_alone, stage_list
from hptjax.masked import inverse_count
from hptjax.model_shape import adapter_count, asked_adapter
from hptjax.models.shape import DecoderConfig

FORWARD, BACKWARD = 2, 4  # operations per parameter and token

Number = float | int
Range = tuple[Number, Number]
"""The least and the most; equal where nothing depends on verdicts."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of a sample, its prompt included; means, or the most there can be."""

    rollout: Number
    demonstration: Number


@dataclasses.dataclass(frozen=True)
class StageFlops:
    """Operations of one step of a stage: to sample, and to train on what is left.

    Args
      scored: of one pass over what is trained on, forward only.
    """

    sampled: Range
    trained: Range
    scored: Range

    @property
    def total(self) -> Range:
        """Sampling and training, as the source counts."""
        return self.sampled[0] + self.trained[0], self.sampled[1] + self.trained[1]


def longest(config: Config) -> Lengths:
    """The most tokens that a sample may have."""
    tokens = float(config.data.max_prompt_tokens + config.rollout.max_completion_tokens)
    return Lengths(tokens, tokens)


def lengths_asked(config: Config, rollout: float | None, demonstration: float | None) -> Lengths | None:
    """The lengths that a user names; None where neither is. A demonstration has those of a rollout, if only they are.

    Raises a length that is not above 0 -> ValueError.
    """
    for name, value in (("rollout_tokens", rollout), ("demonstration_tokens", demonstration)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"expected a number of tokens above 0, got {value}; change --{name}.")
    if rollout is None and demonstration is None:
        return None
    first = longest(config).rollout if rollout is None else rollout
    return Lengths(first, first if demonstration is None else demonstration)


def stage_flops(
    config: Config, stage: StageConfig, parameters: Number, lengths: Lengths, adapters: Number | None = None
) -> StageFlops:
    """Of one step of a stage: `questions x (2 N D per rollout + 6 N D per sample that is left)`.

    Args
      parameters: N. lengths: D. adapters: n, where they are trained and the model is not.
    """
    alone = stage_alone(config, stage)
    questions = alone.data.questions_per_step
    few, many = rollouts_sampled(alone, stage.method)
    left = [
        questions * (rollouts * lengths.rollout + demonstrations * lengths.demonstration)
        for rollouts, demonstrations in samples_left(alone, stage.method)
    ]
    sampled = FORWARD * parameters * questions * lengths.rollout
    forward, per_token = FORWARD * parameters, (FORWARD + BACKWARD) * parameters
    if adapters is not None:
        forward += FORWARD * adapters
        per_token = (FORWARD + BACKWARD // 2) * parameters + (FORWARD + BACKWARD) * adapters
    return StageFlops(
        sampled=(sampled * few, sampled * many),
        trained=(per_token * min(left), per_token * max(left)),
        scored=(forward * min(left), forward * max(left)),
    )


def flop_lines(config: Config, shape: DecoderConfig, parameters: int, lengths: Lengths | None) -> list[str]:
    """The operations of each stage, per step and in all, and what is not among them.

    Args
      lengths: None: the most that a sample may have.
    """
    known = longest(config) if lengths is None else lengths
    said = "as said"
    if lengths is None:
        said = "the most there can be; --rollout_tokens and --demonstration_tokens say the means"
    lora = asked_adapter(config)
    adapters = None if lora is None else adapter_count(shape, lora)
    counted, trained = f"N = {parameters:,} parameters", "6 N"
    if adapters is not None:
        counted, trained = f"{counted}, n = {adapters:,} in adapters", "4 N + 6 n"
    lines = [
        f"{counted}; 2 N for a token that is sampled, {trained} for one that is trained on (arXiv 2604.23747, App. B)",
        f"a rollout has {known.rollout:,.0f} tokens, a demonstration {known.demonstration:,.0f}, prompt included: "
        + said,
    ]
    whole: Range = (0.0, 0.0)
    stages = stage_list(config)
    for number, stage in enumerate(stages, start=1):
        one = stage_flops(config, stage, parameters, known, adapters)
        total = (one.total[0] * stage.steps, one.total[1] * stage.steps)
        whole = (whole[0] + total[0], whole[1] + total[1])
        lines.append(
            f"{number}. {stage.method}: sampling {words(one.sampled)} + training {words(one.trained)} = "
            f"{words(one.total)} per step, {words(total)} in all {stage.steps:,} steps"
        )
        passes = score_passes(stage_alone(config, stage))
        if passes:
            scored = (passes * one.scored[0], passes * one.scored[1])
            lines.append(f"   beside that {passes} score pass(es) over what is trained on, {words(scored)} per step")
    lines += [f"in all {words(whole)}"] * (len(stages) > 1)
    return [*lines, _left_out(config, shape, parameters, known)]


def score_passes(config: Config) -> int:
    """Forward passes over what the last stage trains on before it does: of the policy itself, of frozen models."""
    from hptjax.build.method import build_recipe
    from hptjax.losses.estimator import Need

    recipe = build_recipe(config, config.method, config.data.questions_per_step)
    return bool(recipe.looks) + len({Need.REFERENCE_LOGPROBS, Need.TEACHER_LOGPROBS} & recipe.needs)


def attention_share(shape: DecoderConfig, parameters: int, tokens: Number) -> float:
    """Operations of attention between tokens over those of the weights, in a sequence of so many tokens.

    4 L H E (D + 1) / 2  over  2 N: scores and mixing, causal
    """
    pairs = 2.0 * shape.num_layers * shape.num_heads * shape.head_dim * (tokens + 1)
    return pairs * inverse_count(FORWARD * parameters)


def _left_out(config: Config, shape: DecoderConfig, parameters: int, lengths: Lengths) -> str:
    """What the account leaves out, with its size where arithmetic knows it."""
    share = attention_share(shape, parameters, max(lengths.rollout, lengths.demonstration))
    again = {
        "none": "",
        "full": ", the forward pass done again (model.remat full: up to 2 N per token that is trained on)",
        "offload": ", the forward pass done again (model.remat offload: up to 2 N per token that is trained on)",
    }.get(config.model.remat, f", what model.remat {config.model.remat} does again")
    return f"not in these: attention between tokens (about {100 * share:.0f} % more at this length){again}, evaluations"


def words(value: Range) -> str:
    """One number, or two with `to`."""
    low, high = f"{value[0]:.3g}", f"{value[1]:.3g}"
    return low if low == high else f"{low} to {high}"
