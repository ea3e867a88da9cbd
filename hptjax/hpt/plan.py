"""What each rollout of a question starts with: nothing, or a prefix of the demonstration that the policy continues.

    plan          prefix of a question's rollouts                                                        methods
    free_group    none                                                                                   all others
    prefix_rft    the last one floor(l n) tokens, l ~ U(low, high), low falling over the run             prefix_rft
    uft           all of them l of 5 segments, l ~ Binomial(5, p), p falling over the run, then none     uft
    trapo         micro-groups in sequence, longer prefixes the fewer of the earlier rollouts solved     trapo

n counts the demonstration's tokens, stop token included. A plan is asked again with the rewards of what was sampled, so
that rounds may follow each other. Draws are keyed by seed, question and visit, never by position.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from hptjax.hpt.digest import draw
from hptjax.hpt.schedules import Schedule
from hptjax.losses.words import said
from hptjax.masked import ratio
from hptjax.records import Question

Prefix = Int[np.ndarray, " x"]

PrefixPlan = Callable[[Question, int, Mapping[int, float], int], list[Prefix]]
"""A question, its visit, rewards so far by rollout index, steps done in the stage -> the forced prefixes of its first
rollouts, by index: all that are known so far."""

ExtendTo = Callable[[np.ndarray, float], int]
"""A demonstration's tokens and the share of them that a prefix should hold -> how many tokens it holds."""


def free_group(count: int) -> PrefixPlan:
    """`count` rollouts that start from the prompt."""
    return lambda question, visit, rewards, step: [_head(question, 0)] * count


def prefix_rft(count: int, *, low: Schedule, high: float, seed: int) -> PrefixPlan:
    """`count` - 1 free rollouts and one that continues floor(l n) tokens, l ~ U(low at this step, high).

    Source Prefix-RFT: arXiv 2507.01679; the law of l as `spec/methods.md` 4.6 reads it.
    """

    @said(f"{count - 1} from the prompt, one from a prefix of its demonstration")
    def plan(question: Question, visit: int, rewards: Mapping[int, float], step: int) -> list[Prefix]:
        lowest = min(low(step), high)
        share = lowest + (high - lowest) * draw(question.question_id, visit, seed)
        return [*[_head(question, 0)] * (count - 1), _head(question, share_of(question.demonstration_tokens, share))]

    return plan


def uft(count: int, *, segments: int, chance: Schedule, steps: int, seed: int) -> PrefixPlan:
    """`count` rollouts that all continue the same hint: l of `segments` parts of the demonstration, l ~ Binomial.

    One hint per visit, because the published code draws it with the prompt and repeats the prompt: the group then has
    one baseline. The stop token is no part of any segment, so something is left to write.

    Args
      chance: of each segment, by steps done. steps: from this many on there is no hint.
    Source UFT: arXiv 2505.16984, code liumy2010/UFT@ad3c8ec.
    """

    @said(f"all {count} from the same hint, up to {segments} parts of {segments} of its demonstration")
    def plan(question: Question, visit: int, rewards: Mapping[int, float], step: int) -> list[Prefix]:
        content = len(question.demonstration_tokens) - 1
        parts = min(segments, content)
        if step >= steps or parts < 1:
            return [_head(question, 0)] * count
        hinted = binomial_quantile(draw(question.question_id, visit, seed), parts, chance(step))
        return [_head(question, round(ratio(hinted, parts) * content))] * count

    return plan


def binomial_quantile(u: float, trials: int, chance: float) -> int:
    """The smallest l with P(at most l) > u under Binomial(trials, chance): a draw of it, if u is even in [0, 1)."""
    below = 0.0
    for successes in range(trials):
        below += math.comb(trials, successes) * chance**successes * (1.0 - chance) ** (trials - successes)
        if u < below:
            return successes
    return trials


@dataclasses.dataclass(frozen=True)
class MicroGroup:
    """Rollouts of a question that share a prefix: `ratio` of the demonstration, if what came before did badly.

    Args
      below: the prefix is given where the mean reward of all earlier rollouts of the question is below this.
    """

    count: int
    ratio: float
    below: float


PAPER_GROUPS = (MicroGroup(4, 0.0, -1.0), MicroGroup(2, 0.2, 0.5), MicroGroup(1, 0.5, 0.7), MicroGroup(1, 1.0, 0.9))
CODE_GROUPS = (MicroGroup(4, 0.0, -1.0), MicroGroup(2, 0.25, 2 / 4), MicroGroup(1, 0.5, 4 / 6), MicroGroup(1, 1.0, 1.0))


def trapo(groups: Sequence[MicroGroup], extend: ExtendTo | None = None) -> PrefixPlan:
    """Micro-groups in sequence: each waits for the rewards of all before it. A ratio of 1 is the whole demonstration.

    Args
      extend: where a prefix of less than the whole ends; None: after `share_of` the tokens.
    Source TRAPO: arXiv 2512.17636 section 3.1 (`PAPER_GROUPS`, second-hand) and Su-my/TRAPO@982cb8f (`CODE_GROUPS`).
    """
    length = share_of if extend is None else extend

    @said("; ".join(map(group_words, groups)))
    def plan(question: Question, visit: int, rewards: Mapping[int, float], step: int) -> list[Prefix]:
        prefixes: list[Prefix] = []
        for group in groups:
            earlier = range(len(prefixes))
            if any(index not in rewards for index in earlier):
                break
            # as a sum, so that 2 of 4 is not below 2/4 by a rounding
            helped = len(earlier) > 0 and math.fsum(rewards[i] for i in earlier) < group.below * len(earlier)
            tokens = question.demonstration_tokens
            if not helped:
                prefix = _head(question, 0)
            elif group.ratio >= 1.0:
                prefix = np.asarray(tokens, np.int32)
            else:
                prefix = _head(question, length(tokens, group.ratio))
            prefixes += [prefix] * group.count
        return prefixes

    return plan


def group_words(group: MicroGroup) -> str:
    """A micro-group as `hptjax methods` shows it."""
    if group.ratio == 0.0:
        return f"{group.count} from the prompt"
    given = "all" if group.ratio >= 1.0 else f"{group.ratio:g}"
    return f"{group.count} from {given} of its demonstration where less than {group.below:.3g} solved so far"


def share_of(tokens: Int[np.ndarray, " n"], share: float) -> int:
    """floor(share x n)."""
    return int(share * len(tokens))


def to_delimiter(delimiters: frozenset[int], reach: float = 0.3) -> ExtendTo:
    """Makes the rule that a prefix runs on to the end of its step: to the next delimiter, if one is in reach.

    Args
      delimiters: tokens that end a step; the prefix holds the one it reaches. reach: share of the demonstration.
    Source Su-my/TRAPO@982cb8f: the first delimiter after floor(share n), if it lies before (share + 0.3) n.
    """

    def extend(tokens: Int[np.ndarray, " n"], share: float) -> int:
        start = share_of(tokens, share)
        after = (place for place, token in enumerate(tokens.tolist()) if place > start and token in delimiters)
        end = next(after, None)
        return end + 1 if end is not None and end < (share + reach) * len(tokens) else start

    return extend


def _head(question: Question, tokens: int) -> Prefix:
    """The first tokens of the demonstration; at least the last one is left for the policy to write."""
    demonstration = np.asarray(question.demonstration_tokens, np.int32)
    return demonstration[: max(min(tokens, len(demonstration) - 1), 0)]
