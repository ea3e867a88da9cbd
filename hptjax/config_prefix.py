"""What the methods that continue a demonstration's prefix ask of a config: their constants, and room for the prefix."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hptjax.config import Config
from hptjax.config_batch import steps_of
from hptjax.config_methods import CONTINUED
from hptjax.config_problem import Problem

PUBLISHED_GROUP = 8  # TRAPO's micro-groups of 4, 2, 1 and 1
STEP_REACH = 0.3  # share of a demonstration within which a prefix runs on to the end of a step


def prefix_problems(config: Config) -> Iterator[Problem]:
    """What is wrong with the constants of these methods, whether they are used or not, and with the config for them."""
    yield from _constants(config)
    for place, method, _ in steps_of(config):
        if method in CONTINUED:
            yield from _room(config, place, method)
        if method == "trapo":
            yield from _micro_groups(config, place)


def longest_prefix(config: Config, method: str) -> int:
    """The most tokens of a demonstration that a rollout of the method continues.

    The policy writes one token at least, and a demonstration fits in rollout.max_completion_tokens.
    """
    constants, tokens = config.methods, config.rollout.max_completion_tokens
    if method == "trapo":
        shares = [group.ratio for group in constants.trapo_groups if group.ratio < 1] or [0.5]
        reach = math.ceil(STEP_REACH * tokens) + 1 if constants.trapo_delimiters else 0
        longest = int(max(shares) * tokens) + reach
    else:
        longest = int(constants.prefix_high * tokens) if method == "prefix_rft" else tokens
    return min(longest, tokens - 1)


def _room(config: Config, place: str, method: str) -> Iterator[Problem]:
    prefix, prompt = longest_prefix(config, method), config.data.max_prompt_tokens
    last = config.rollout.prompt_buckets[-1]
    if last < prompt + prefix:
        yield (
            f"a last prompt bucket of at least {prompt + prefix} for {place} ({method}): data.max_prompt_tokens "
            f"{prompt} + up to {prefix} tokens of the demonstration, which are prefilled with the prompt",
            f"{last}",
            f"rollout.prompt_buckets, for example to {[*config.rollout.prompt_buckets, prompt + prefix]}",
        )


def _constants(config: Config) -> Iterator[Problem]:
    constants = config.methods
    for name, low, other, high in (
        ("methods.uft_valley", constants.uft_valley, "methods.uft_peak", constants.uft_peak),
        ("methods.prefix_low", constants.prefix_low, "methods.prefix_high", constants.prefix_high),
    ):
        if not 0 <= low <= high <= 1:
            yield f"0 <= {name} <= {other} <= 1", f"{low} and {high}", f"{name} or {other}"
    if not 0 < constants.prefix_entropy_share <= 1:
        yield (
            "methods.prefix_entropy_share in (0, 1]",
            f"{constants.prefix_entropy_share}",
            "methods.prefix_entropy_share",
        )
    if not constants.prefix_clip_bound > 1:
        yield "methods.prefix_clip_bound above 1", f"{constants.prefix_clip_bound}", "methods.prefix_clip_bound"
    for group in constants.trapo_groups:
        if group.count < 1 or not 0 <= group.ratio <= 1 or not math.isfinite(group.below):
            yield (
                "micro-groups of methods.trapo_groups with a count of at least 1, a ratio in 0..1 and a finite below",
                f"count {group.count}, ratio {group.ratio}, below {group.below}",
                "methods.trapo_groups",
            )
    if constants.trapo_groups and constants.trapo_groups[0].ratio != 0:
        yield (
            "a first micro-group that starts from the prompt (ratio 0): nothing was judged before it",
            f"{constants.trapo_groups[0].ratio}",
            "methods.trapo_groups",
        )


def _micro_groups(config: Config, place: str) -> Iterator[Problem]:
    groups, size = config.methods.trapo_groups, config.rollout.group_size
    wanted = sum(group.count for group in groups) if groups else PUBLISHED_GROUP
    if size != wanted:
        whose = "methods.trapo_groups" if groups else "4, 2, 1 and 1, as published"
        yield (
            f"rollout.group_size {wanted} for {place} (trapo): the rollouts of its micro-groups ({whose})",
            f"{size}",
            "rollout.group_size or methods.trapo_groups",
        )
