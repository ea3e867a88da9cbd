"""From the live samples of one update to its packed micro-batches, with every weight and count already decided."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt32

from hptjax.hpt.arrays import micro_batch_arrays
from hptjax.hpt.digest import digest, sample_hashes
from hptjax.hpt.pack import group_rows, pack
from hptjax.hpt.pack_shared import pack_by_prompt, starts_in_rows
from hptjax.hpt.terms import GivenAdvantage, Term, TermValues, live_token_counts, target_length, term_values
from hptjax.masked import ratio
from hptjax.records import Sample, SampleId, Source
from hptjax.types import MicroBatch


@dataclasses.dataclass(frozen=True)
class TermCount:
    """What a term amounts to in one update.

    Args
      tokens, sequences, groups: what the term covers among the packed samples.
      weight_sum: sum of its token weights over the update, coefficient included.
      normaliser: coefficient x tokens / weight_sum, the Z of a term whose tokens all weigh coefficient / Z; 0 if empty.
      token_weight_min, token_weight_max: the weight of one live token; 0 if empty.
    """

    tokens: int
    sequences: int
    groups: int
    weight_sum: float
    normaliser: float
    token_weight_min: float
    token_weight_max: float


@dataclasses.dataclass(frozen=True)
class SourceCount:
    """Live samples of one source in an update, and their live tokens."""

    tokens: int
    sequences: int


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
    """One optimizer update on the host.

    Args
      micro_batches: NumPy, all of one shape; at least one, so that an update without live tokens is flushed and
        counted as empty.
      planned_tokens: live tokens per micro-batch, counted from the samples; [M], zeros past the last micro-batch.
      samples, sample_ids: the packed samples in the order of their ids; `MicroBatch.sample_index` counts in it.
      left_out: samples that were given but have no live token: dead, or in no term's population.
      terms, sources: counts by term name and by source (those that occur).
      digest: `hpt.digest.digest` of `sample_ids`, taken before anything was packed.
      packed_tokens: positions that hold a token, live or context; a prompt that a row's samples share counts once.
      fill: those / positions of all micro-batches.
    """

    micro_batches: tuple[MicroBatch, ...]
    planned_tokens: Int[np.ndarray, " M"]
    samples: tuple[Sample, ...]
    sample_ids: tuple[SampleId, ...]
    left_out: int
    terms: Mapping[str, TermCount]
    sources: Mapping[Source, SourceCount]
    digest: UInt32[np.ndarray, " 2"]
    packed_tokens: int
    fill: float


def assemble(
    samples: Sequence[Sample],
    terms: Sequence[Term],
    *,
    rows: int,
    row_tokens: int,
    max_segments: int,
    max_micro_batches: int,
    lanes: int = 1,
    shared_tokens: int = 0,
    dead: frozenset[SampleId] = frozenset(),
    advantages: Mapping[str, Mapping[SampleId, GivenAdvantage]] | None = None,
    scales: Mapping[str, Mapping[SampleId, float]] | None = None,
    partition: Mapping[SampleId, int] | None = None,
) -> Update:
    """The update that `samples` and `terms` make: weights from the whole update, then packed micro-batches.

    The arrays do not depend on the order of `samples`, and a token's weight does not depend on rows, row_tokens or
    the number of micro-batches.

    Args
      samples: what the gate left, in whole groups; sample ids are unique.
      terms: one plane each; a token is live if a term with coefficient > 0 covers it, whatever its advantage.
      rows, row_tokens, max_segments, max_micro_batches: config `batch.*`: B, T, S and M of `MicroBatch`.
      shared_tokens: P, room for the prompt that all samples of a row share, all of it but its last token; 0: every
        sample brings its own. lanes: equal parts of such a row.
      dead: samples that count in the statistics of their group and nowhere else, e.g. overlong ones.
      advantages: term name -> sample id -> given advantage (or one per token of its run), instead of the term's own.
      scales: term name -> sample id -> factor of its weights, see `term_values`.
      partition: sample id -> logical micro-batch, for reducers that ask for it.
    Raises ValueError, naming the sample or the config field: a repeated sample id or term name, a malformed sample,
      one longer than a row, more micro-batches than `max_micro_batches`, a weight or advantage that is not finite.
    """
    _check_limits(rows, row_tokens, max_segments, max_micro_batches)
    ordered = sorted(samples, key=lambda s: s.sample_id)
    _check_samples(ordered)
    names = [term.name for term in terms]
    if len(set(names)) != len(names):
        raise ValueError(f"expected terms with different names, got {names}")
    given, factors = advantages or {}, scales or {}
    for what, by_term in (("advantages", given), ("scales", factors)):
        unknown = sorted(set(by_term) - set(names))
        if unknown:
            raise ValueError(f"{what} were given for {unknown}, but the terms are {names}")

    alive = np.asarray([s.sample_id not in dead for s in ordered], bool)
    values = [
        term_values(
            t,
            ordered,
            alive,
            advantages=given.get(t.name),
            scales=factors.get(t.name),
            partition=partition,
        )
        for t in terms
    ]
    active = [v for t, v in zip(terms, values, strict=True) if t.coefficient > 0.0]
    live = live_token_counts(active, len(ordered))
    sources = _source_counts(ordered, live)  # before anything is chosen or packed: what must arrive in the gradient

    packed = _packed_samples(ordered, live)
    chosen = [ordered[i] for i in packed]
    values = [_take(v, packed) for v in values]
    live = live[packed]
    pair_ids = np.asarray([s.pair_id for s in chosen], np.int64)
    ids = tuple(s.sample_id for s in chosen)
    room: dict[str, Any] = {"row_tokens": row_tokens, "max_segments": max_segments, "names": ids}
    if shared_tokens:
        _check_prompts(chosen, values, shared_tokens)
        lengths = np.asarray([len(s.completion_tokens) for s in chosen], np.int64)
        row_members, starts = pack_by_prompt([_key(s) for s in chosen], lengths, pair_ids, lanes=lanes, **room)
    else:
        lengths = np.asarray([target_length(s) for s in chosen], np.int64)
        row_members = pack(lengths, pair_ids, **room)
        starts = starts_in_rows(row_members, lengths)
    packed_tokens = int(lengths.sum())
    if shared_tokens:
        packed_tokens += sum(len(chosen[members[0]].prompt_tokens) - 1 for members in row_members)
    row_live = np.asarray([live[members].sum() for members in row_members], np.int64)
    layout = [[row_members[r] for r in group] for group in group_rows(row_live, rows=rows)] or [[]]
    if len(layout) > max_micro_batches:
        raise ValueError(
            f"the update needs {len(layout)} micro-batches of {rows} rows x {row_tokens} tokens, but "
            f"batch.max_micro_batches is {max_micro_batches}: raise it or batch.rows, or take fewer questions"
        )
    planned = np.zeros(max_micro_batches, np.int32)
    planned[: len(layout)] = [sum(int(live[members].sum()) for members in group) for group in layout]
    hashes = sample_hashes(ids)
    planned_digest = np.zeros((max_micro_batches, 2), np.uint32)
    for m, group in enumerate(layout):
        planned_digest[m] = digest(hashes[[i for members in group for i in members]])
    return Update(
        micro_batches=micro_batch_arrays(
            chosen,
            layout,
            dict(zip(names, values, strict=True)),
            active=frozenset(t.name for t in terms if t.coefficient > 0.0),
            sample_hashes=hashes,
            planned_tokens=planned,
            planned_digest=planned_digest,
            starts=starts,
            rows=rows,
            row_tokens=row_tokens,
            max_segments=max_segments,
            shared_tokens=shared_tokens,
        ),
        planned_tokens=planned,
        samples=tuple(chosen),
        sample_ids=ids,
        left_out=len(ordered) - len(chosen),
        terms={t.name: _term_count(t, v, chosen) for t, v in zip(terms, values, strict=True)},
        sources=sources,
        digest=digest(hashes),
        packed_tokens=packed_tokens,
        fill=ratio(float(packed_tokens), float(len(layout) * rows * (shared_tokens + row_tokens))),
    )


def _check_limits(rows: int, row_tokens: int, max_segments: int, max_micro_batches: int) -> None:
    limits = {
        "rows": rows,
        "row_tokens": row_tokens,
        "max_segments": max_segments,
        "max_micro_batches": max_micro_batches,
    }
    for name, value in limits.items():
        if value < 1:
            raise ValueError(f"expected batch.{name} >= 1, got {value}")


def _check_samples(ordered: Sequence[Sample]) -> None:
    """Raises ValueError for a sample that is malformed or whose id is already taken; `ordered` is sorted by id."""
    for before, sample in zip([None, *ordered], ordered, strict=False):
        name, written = sample.sample_id, len(sample.completion_tokens)
        if before is not None and before.sample_id == name:
            raise ValueError(f"sample {name} appears twice in one update: expected unique sample ids")
        if len(sample.prompt_tokens) == 0:
            raise ValueError(f"sample {name} has an empty prompt: nothing would predict its first token")
        if len(sample.sampler_logprobs) != written:
            raise ValueError(
                f"sample {name}: {len(sample.sampler_logprobs)} sampler_logprobs for {written} completion tokens"
            )
        if not 0 <= sample.prefix_len <= written:
            raise ValueError(f"sample {name}: expected prefix_len in 0..{written}, got {sample.prefix_len}")


def _key(sample: Sample) -> bytes:
    return np.asarray(sample.prompt_tokens, np.int32).tobytes()


def _check_prompts(samples: Sequence[Sample], values: Sequence[TermValues], room: int) -> None:
    """Raises ValueError for a prompt that is too long, or one that a term covers: it stands in no sample's row."""
    for place, sample in enumerate(samples):
        covered = any(v.start[place] < min(v.stop[place], len(sample.prompt_tokens) - 1) for v in values)
        if covered:
            raise ValueError(
                f"sample {sample.sample_id}: expected terms over completions where prompts are shared, got one over "
                "its prompt: set batch.share_prompts to false"
            )
        if len(sample.prompt_tokens) > room + 1:
            raise ValueError(
                f"sample {sample.sample_id} has a prompt of {len(sample.prompt_tokens)} tokens, but a row has room for "
                f"{room + 1} that are shared: raise data.max_prompt_tokens"
            )


def _packed_samples(ordered: Sequence[Sample], live: Int[np.ndarray, " N"]) -> Int[np.ndarray, " L"]:
    """Places of the samples that enter: those with live tokens, and as context whoever shares a bundle with one."""
    needed = {s.pair_id for s, tokens in zip(ordered, live, strict=True) if tokens > 0 and s.pair_id >= 0}
    enters = [
        bool(tokens > 0) or (s.pair_id in needed and target_length(s) > 0)
        for s, tokens in zip(ordered, live, strict=True)
    ]
    return np.flatnonzero(np.asarray(enters, bool))


def _take(values: TermValues, places: Int[np.ndarray, " L"]) -> TermValues:
    return TermValues(
        start=values.start[places],
        stop=values.stop[places],
        token_weights=values.token_weights[places],
        advantages=values.advantages[places],
        token_advantages=values.token_advantages and tuple(values.token_advantages[i] for i in places.tolist()),
    )


def _term_count(term: Term, values: TermValues, samples: Sequence[Sample]) -> TermCount:
    """Counts and weights of a term, from the samples."""
    run = values.stop - values.start
    has = np.flatnonzero(run > 0)
    weight_sum = float((run * values.token_weights).sum())
    tokens = int(run.sum())
    return TermCount(
        tokens=tokens,
        sequences=len(has),
        groups=len({samples[i].group_id for i in has.tolist()}),
        weight_sum=weight_sum,
        normaliser=ratio(term.coefficient * tokens, weight_sum) if weight_sum > 0.0 else 0.0,
        token_weight_min=float(values.token_weights[has].min()) if len(has) else 0.0,
        token_weight_max=float(values.token_weights[has].max()) if len(has) else 0.0,
    )


def _source_counts(samples: Sequence[Sample], live: Int[np.ndarray, " N"]) -> dict[Source, SourceCount]:
    """Live sequences and tokens by source."""
    counts: dict[Source, SourceCount] = {}
    for kind in Source:
        tokens = [int(t) for s, t in zip(samples, live, strict=True) if s.source == kind and t > 0]
        if tokens:
            counts[kind] = SourceCount(tokens=sum(tokens), sequences=len(tokens))
    return counts
