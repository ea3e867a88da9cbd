"""One term of the objective on the host: whose tokens, how much, shared among whom, with which advantage.

Everything here is decided on the whole update, before anything is dropped, packed or split. Afterwards nothing
divides, so the gradients of micro-batches simply add.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from hptjax.losses.advantages import AdvantageFn
from hptjax.losses.reducers import Population, Reducer
from hptjax.losses.returns import TokenAdvantageFn
from hptjax.records import Sample, SampleId, Source

# what a caller may give for a sample: one advantage for all its tokens, or one for each token of its run
GivenAdvantage = float | np.ndarray

# sample -> (start, stop): a run of its target positions, 0 <= start <= stop <= len(prompt) + len(completion) - 1
SpanFn = Callable[[Sample], tuple[int, int]]


def written_span(sample: Sample) -> tuple[int, int]:
    """The tokens the sample's author wrote: the completion after the forced prefix; all of a demonstration's."""
    forced = 0 if sample.source == Source.DEMONSTRATION else sample.prefix_len
    return len(sample.prompt_tokens) - 1 + forced, target_length(sample)


def completion_span(sample: Sample) -> tuple[int, int]:
    """The whole completion, forced prefix included."""
    return len(sample.prompt_tokens) - 1, target_length(sample)


def prefix_span(sample: Sample) -> tuple[int, int]:
    """The forced prefix only."""
    start = len(sample.prompt_tokens) - 1
    return start, start + sample.prefix_len


def whole_span(sample: Sample) -> tuple[int, int]:
    """Prompt and completion, but the first prompt token, which nothing predicts."""
    return 0, target_length(sample)


def target_length(sample: Sample) -> int:
    """Target positions of a sample: the tokens of prompt and completion, less the first."""
    return len(sample.prompt_tokens) + len(sample.completion_tokens) - 1


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of the objective, the host side of a `TermPlane`: sum of coefficient x reducer weight x loss.

    Args
      name: the plane's name in the micro-batch.
      sources: samples of these sources are the term's population ...
      coefficient: >= 0; at 0 the plane stays, all zeros, and makes no token live.
      reducer: how the population's tokens share the coefficient, e.g. token mean; counts tokens of the whole update.
      advantage: from rewards and group ids of the whole population; `advantages.ones` for SFT, entropy and KL.
      token_advantage: instead of it, one advantage per token, from rewards, group ids and the lengths of the runs.
      population: ... of which this may keep a part.
      span: which tokens of a sample; by default those its author wrote. Terms may cover the same tokens.
      normalised_over: samples of these sources stand in the reducer's population beside the members and get no weight
        from it: one token mean over demonstrations and rollouts, say, of which the term is a part. None: the members
        alone.
      judged_with: samples of these sources share the groups' statistics beside the members: LUFFY and SRFT judge
        rollouts and demonstration by the mean of both.
      counted: the tokens that the reducer counts, where they are not those of the span: prefix and continuation may be
        two terms that share one token mean. None: the span's.
    """

    name: str
    sources: frozenset[Source]
    coefficient: float
    reducer: Reducer
    advantage: AdvantageFn
    population: Callable[[Sample], bool] | None = None
    span: SpanFn = written_span
    normalised_over: frozenset[Source] | None = None
    token_advantage: TokenAdvantageFn | None = None
    judged_with: frozenset[Source] = frozenset()
    counted: SpanFn | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class TermValues:
    """What a term says about each of the N samples.

    Args
      start, stop: its run of target positions; equal where the sample is no member, or is dead.
      token_weights: coefficient / normaliser for one token of the sample; 0 where the run is empty.
      advantages: 0 where the weight is 0.
      token_advantages: instead of them, for each sample one advantage per token of its run; None: all tokens alike.
    """

    start: Int[np.ndarray, " N"]
    stop: Int[np.ndarray, " N"]
    token_weights: Float[np.ndarray, " N"]
    advantages: Float[np.ndarray, " N"]
    token_advantages: tuple[np.ndarray, ...] | None = None


def term_values(
    term: Term,
    samples: Sequence[Sample],
    alive: Bool[np.ndarray, " N"],
    *,
    advantages: Mapping[SampleId, GivenAdvantage] | None = None,
    scales: Mapping[SampleId, float] | None = None,
    partition: Mapping[SampleId, int] | None = None,
) -> TermValues:
    """Token weights and advantages of a term for every sample of an update.

    Advantages are taken over all members, dead ones too, so a group keeps its baseline. The reducer sees the dead
    with no tokens: they share in no normaliser that counts tokens or sequences with tokens. With `normalised_over` it
    also sees the samples of those sources, by the same span (or `counted`), and the members take their part of its
    weights.

    Args
      alive: False keeps a sample in its group's statistics and out of the gradient.
      advantages: given values instead of `term.advantage`, for estimators that need more than rewards; one per
        sample, or one per token of its run.
      scales: factors >= 0 of the weights, by sample; a sample with 0, or without one, is no member. They come after
        the reducer, like the coefficient. None: every sample has 1.
      partition: sample id -> logical micro-batch, for the reducers that ask for it.
    Raises ValueError for a coefficient, weight or advantage that is negative (not the advantage) or not finite,
      naming term and sample.
    """
    if not (np.isfinite(term.coefficient) and term.coefficient >= 0.0):
        raise ValueError(f"term {term.name!r}: expected a finite coefficient >= 0, got {term.coefficient}")
    count = len(samples)
    start, stop = np.zeros(count, np.int64), np.zeros(count, np.int64)
    weights, values = np.zeros(count, np.float64), np.zeros(count, np.float64)
    keep = term.population
    members = [
        i
        for i, s in enumerate(samples)
        if s.source in term.sources
        and (keep is None or keep(s))
        and (scales is None or scales.get(s.sample_id, 0.0) != 0.0)
    ]
    beside = term.normalised_over or frozenset()
    counted = sorted({*members, *(i for i, s in enumerate(samples) if s.source in beside)})
    for i in counted:
        if alive[i]:
            start[i], stop[i] = term.span(samples[i])
    tokens = stop - start
    counts = tokens
    if term.counted is not None:
        counts = np.zeros(count, np.int64)
        for i in counted:
            first, last = term.counted(samples[i])
            counts[i] = last - first if alive[i] else 0
    for i in np.flatnonzero((start < 0) | (tokens < 0)).tolist():
        raise ValueError(f"term {term.name!r}: sample {samples[i].sample_id} has the span {start[i]}..{stop[i]}")
    groups = np.asarray([s.group_id for s in samples], np.int64)
    chosen, normalising = np.asarray(members, np.int64), np.asarray(counted, np.int64)
    outside = np.setdiff1d(normalising, chosen)
    by_token: list[np.ndarray] | None = None
    if tokens[chosen].any():
        share = term.reducer(_population(samples, normalising, counts, groups, partition))
        weights[normalising] = term.coefficient * np.asarray(share, np.float64)
        if scales is not None:
            weights[chosen] *= [scales[samples[i].sample_id] for i in members]
        mine = [samples[i] for i in members]
        if term.token_advantage is None and not _given_by_token(advantages):
            values[chosen] = _member_advantages(term, samples, members, groups, advantages)
        else:
            by_token = [np.zeros(0, np.float64)] * count
            per_member = _token_advantages(term, mine, groups[chosen], tokens[chosen], advantages)
            for i, each in zip(members, per_member, strict=True):
                by_token[i] = each
    start[outside] = stop[outside] = tokens[outside] = 0
    weights = np.where(tokens > 0, weights, 0.0)
    values = np.where(weights > 0.0, values, 0.0)
    for i in np.flatnonzero(~(np.isfinite(weights) & (weights >= 0.0) & np.isfinite(values))).tolist():
        raise ValueError(
            f"term {term.name!r}: sample {samples[i].sample_id} has token weight {weights[i]} and advantage "
            f"{values[i]}; expected finite values and a weight >= 0 (a sample that needs a reward may have none)"
        )
    if by_token is not None:
        by_token = [
            each if weight > 0.0 else np.zeros(n, np.float64)
            for each, weight, n in zip(by_token, weights.tolist(), tokens.tolist(), strict=True)
        ]
        for sample, each in zip(samples, by_token, strict=True):
            if not np.isfinite(each).all():
                raise ValueError(f"term {term.name!r}: sample {sample.sample_id} has an advantage that is not finite")
    return TermValues(
        start=start,
        stop=stop,
        token_weights=weights,
        advantages=values,
        token_advantages=None if by_token is None else tuple(by_token),
    )


def _population(
    samples: Sequence[Sample],
    places: Int[np.ndarray, " n"],
    tokens: Int[np.ndarray, " N"],
    groups: Int[np.ndarray, " N"],
    partition: Mapping[SampleId, int] | None,
) -> Population:
    micro_batches = None if partition is None else [partition[samples[i].sample_id] for i in places.tolist()]
    return Population(
        token_counts=tokens[places],
        group_ids=groups[places],
        partition=None if micro_batches is None else np.asarray(micro_batches, np.int64),
    )


def _given_by_token(given: Mapping[SampleId, GivenAdvantage] | None) -> bool:
    return given is not None and any(isinstance(value, np.ndarray) for value in given.values())


def _member_advantages(
    term: Term,
    samples: Sequence[Sample],
    members: Sequence[int],
    groups: Int[np.ndarray, " N"],
    given: Mapping[SampleId, GivenAdvantage] | None,
) -> Float[np.ndarray, " n"]:
    """The members' advantages: the given ones, or the term's own from the rewards of whole groups."""
    if given is not None:
        mine = [samples[i] for i in members]
        return np.asarray([given[s.sample_id] for s in _all_given(term, mine, given)], np.float64)
    judged = sorted({*members, *(i for i, s in enumerate(samples) if s.source in term.judged_with)})
    values = _from_rewards(term, [samples[i] for i in judged], lambda r: term.advantage(r, groups[judged]))
    return values[np.searchsorted(judged, members)]


def _token_advantages(
    term: Term,
    members: Sequence[Sample],
    groups: Int[np.ndarray, " N"],
    tokens: Int[np.ndarray, " N"],
    given: Mapping[SampleId, GivenAdvantage] | None,
) -> list[np.ndarray]:
    """For each member one advantage per token of its run; one given for the whole sample goes to all of them."""
    if given is not None:
        values = [np.asarray(given[s.sample_id], np.float64) for s in _all_given(term, members, given)]
        for sample, value, n in zip(members, values, tokens.tolist(), strict=True):
            if n and value.ndim and value.shape != (n,):
                raise ValueError(
                    f"term {term.name!r}: sample {sample.sample_id} got {value.shape[0]} advantages for {n} tokens"
                )
        # a dead sample has no tokens, whatever was given for it
        return [np.broadcast_to(v, n) if n else np.zeros(0) for v, n in zip(values, tokens.tolist(), strict=True)]
    assert term.token_advantage is not None
    per_token = term.token_advantage
    flat = _from_rewards(term, members, lambda rewards: per_token(rewards, groups, tokens))
    return np.split(flat, np.cumsum(tokens)[:-1])


def _all_given(term: Term, members: Sequence[Sample], given: Mapping[SampleId, GivenAdvantage]) -> Sequence[Sample]:
    missing = [str(s.sample_id) for s in members if s.sample_id not in given]
    if missing:
        raise ValueError(f"term {term.name!r}: advantages were given, but none for the samples {missing[:5]}")
    return members


def _from_rewards(term: Term, members: Sequence[Sample], advantages: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    rewards = np.asarray([np.nan if s.reward is None else s.reward for s in members], np.float64)
    try:
        return np.asarray(advantages(rewards), np.float64)
    except ValueError as error:
        unjudged = [str(s.sample_id) for s in members if s.reward is None or not np.isfinite(s.reward)]
        if not unjudged:
            raise
        raise ValueError(f"term {term.name!r}: no finite reward for the samples {unjudged[:5]}; {error}") from error


def live_token_counts(values: Sequence[TermValues], count: int) -> Int[np.ndarray, " N"]:
    """Live tokens per sample: the length of the union of the terms' runs, by interval arithmetic on the samples.

    A second route to what the packed `completion_mask` shows; the witness is compared with sums of these.
    """
    if not values:
        return np.zeros(count, np.int64)
    starts = np.stack([v.start for v in values])  # [K N]
    stops = np.stack([v.stop for v in values])  # [K N]
    order = np.argsort(starts, axis=0, kind="stable")
    live, reach = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for start, stop in zip(np.take_along_axis(starts, order, 0), np.take_along_axis(stops, order, 0), strict=True):
        live += np.maximum(stop - np.maximum(start, reach), 0)
        reach = np.maximum(reach, stop)
    return live
