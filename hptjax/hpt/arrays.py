"""The arrays of an update's micro-batches: a layout of samples becomes `MicroBatch`es. Nothing is decided here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int, UInt32

from hptjax.hpt.terms import TermValues, written_span
from hptjax.records import Sample, Source
from hptjax.types import MicroBatch, TermPlane


def micro_batch_arrays(
    samples: Sequence[Sample],
    layout: Sequence[Sequence[Sequence[int]]],
    values: Mapping[str, TermValues],
    *,
    active: frozenset[str],
    sample_hashes: UInt32[np.ndarray, "N 2"],
    planned_tokens: Int[np.ndarray, " M"],
    planned_digest: UInt32[np.ndarray, "M 2"],
    starts: Int[np.ndarray, " N"],
    rows: int,
    row_tokens: int,
    max_segments: int,
    shared_tokens: int = 0,
) -> tuple[MicroBatch, ...]:
    """The arrays: every micro-batch is a view into one array per field, filled by flat indices.

    Args
      layout: micro-batch -> row -> places in `samples`; each place once.
      values: term name -> what it says about each sample; becomes one plane.
      active: the terms whose tokens are live.
      starts: where in its row each sample begins. shared_tokens: room for the prompt that a row's samples share, all of
        it but its last token; 0: every sample brings its own.
      sample_hashes: of the samples' ids. planned_tokens, planned_digest: go into every micro-batch as they are.
    Returns padding with token 0, segment 0, weight 0 and mask False.
    """
    count = len(samples)
    prompts = np.asarray([len(s.prompt_tokens) for s in samples], np.int64)
    completions = np.asarray([len(s.completion_tokens) for s in samples], np.int64)
    elsewhere = prompts - 1 if shared_tokens else np.zeros(count, np.int64)  # what the row's shared prompt holds of it
    lengths = prompts + completions - 1 - elsewhere
    # of a sample's own position 0, also where that stands elsewhere, as flat index; place among segments
    base, segment = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for m, group in enumerate(layout):
        for r, members in enumerate(group):
            base[members] = (m * rows + r) * row_tokens + starts[members] - elsewhere[members]
            segment[members] = (m * rows + r) * max_segments + np.arange(len(members))

    def positions_array(dtype: type) -> np.ndarray:
        return np.zeros(len(layout) * rows * row_tokens, dtype)

    def segments_array(empty: int, dtype: type, entries: np.ndarray) -> np.ndarray:
        array: np.ndarray = np.full((len(layout) * rows * max_segments, *entries.shape[1:]), empty, dtype)
        array[segment] = entries
        return array.reshape(len(layout), rows, max_segments, *entries.shape[1:])

    def cut(array: np.ndarray) -> np.ndarray:
        return array.reshape(len(layout), rows, row_tokens)

    inputs, targets, positions, segment_ids = (positions_array(np.int32) for _ in range(4))
    sampler_logprobs, author_logprobs, mask = (
        *(positions_array(np.float32) for _ in range(2)),
        positions_array(np.bool_),
    )
    if count:
        stream = np.concatenate([part for s in samples for part in (s.prompt_tokens, s.completion_tokens)])
        first = np.cumsum(prompts + completions) - (prompts + completions)
        where, whence = _runs(base + elsewhere, lengths), _runs(first + elsewhere, lengths)
        inputs[where], targets[where] = stream[whence], stream[whence + 1]
        positions[where] = _runs(elsewhere, lengths)
        segment_ids[where] = np.repeat(segment % max_segments + 1, lengths)
        written = _runs(base + prompts - 1, completions)
        sampler_logprobs[written] = np.concatenate([s.sampler_logprobs for s in samples])
        author_logprobs[written] = np.concatenate([_author_logprobs(s) for s in samples])
    planes: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, value in values.items():
        run = value.stop - value.start
        where = _runs(base + value.start, run)
        weights, advantages = positions_array(np.float32), positions_array(np.float32)
        weights[where] = np.repeat(value.token_weights, run)
        if value.token_advantages is None:
            advantages[where] = np.repeat(value.advantages, run)
        elif where.size:
            advantages[where] = np.concatenate(value.token_advantages)
        planes[name] = (cut(weights), cut(advantages))
        if name in active:
            mask[where] = True
    temperature = [1.0 if s.source == Source.DEMONSTRATION else s.temperature for s in samples]
    temperatures = segments_array(1, np.float32, np.asarray(temperature, np.float32))
    sample_index = segments_array(-1, np.int32, np.arange(count))
    hashes = segments_array(0, np.uint32, sample_hashes)
    source = segments_array(-1, np.int32, np.asarray([int(s.source) for s in samples], np.int32))
    pair_ids = segments_array(0, np.int32, _pairs_by_seat(samples, segment, max_segments))
    first_written = segments_array(0, np.int32, np.asarray([written_span(s)[0] for s in samples], np.int32))
    unscored = cut(positions_array(np.float32))
    shared, shared_mask = _shared_prompts(samples, layout, rows, shared_tokens)
    return tuple(
        MicroBatch(
            input_tokens=cut(inputs)[m],
            target_tokens=cut(targets)[m],
            positions=cut(positions)[m],
            segment_ids=cut(segment_ids)[m],
            completion_mask=cut(mask)[m],
            planes={name: TermPlane(weights=w[m], advantages=a[m]) for name, (w, a) in planes.items()},
            sampler_logprobs=cut(sampler_logprobs)[m],
            rollout_logprobs=unscored[m],
            reference_logprobs=unscored[m],
            teacher_logprobs=unscored[m],
            demonstration_logprobs=cut(author_logprobs)[m],
            temperature=temperatures[m],
            sample_index=sample_index[m],
            sample_hash=hashes[m],
            source=source[m],
            pair_ids=pair_ids[m],
            first_written=first_written[m],
            shared_tokens=shared[m] if shared_tokens else None,
            shared_mask=shared_mask[m] if shared_tokens else None,
            micro_index=np.asarray(m, np.int32),
            planned_tokens=planned_tokens,
            planned_digest=planned_digest,
        )
        for m in range(len(layout))
    )


def _runs(starts: Int[np.ndarray, " N"], counts: Int[np.ndarray, " N"]) -> Int[np.ndarray, " X"]:
    """starts[0], starts[0] + 1, ... (counts[0] of them), then starts[1] ...: many ranges in one array."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()))


def _shared_prompts(
    samples: Sequence[Sample], layout: Sequence[Sequence[Sequence[int]]], rows: int, room: int
) -> tuple[Int[np.ndarray, "M B P"], Bool[np.ndarray, "M B P"]]:
    """Of each row that holds samples, their prompt without its last token."""
    tokens, mask = np.zeros((len(layout), rows, room), np.int32), np.zeros((len(layout), rows, room), np.bool_)
    if room:
        for m, group in enumerate(layout):
            for r, members in enumerate(group):
                prompt = samples[members[0]].prompt_tokens[:-1]
                tokens[m, r, : len(prompt)], mask[m, r, : len(prompt)] = prompt, True
    return tokens, mask


def _author_logprobs(sample: Sample) -> np.ndarray:
    stored = sample.demonstration_logprobs
    return np.zeros(len(sample.completion_tokens), np.float32) if stored is None else stored


def _pairs_by_seat(samples: Sequence[Sample], segment: Int[np.ndarray, " N"], seats: int) -> Int[np.ndarray, " N"]:
    """A pair's number in its row, the seat of its first member counted from 1; 0 for samples in no pair."""
    first: dict[int, int] = {}
    for sample, place in sorted(zip(samples, segment.tolist(), strict=True), key=lambda entry: entry[1]):
        first.setdefault(sample.pair_id, place % seats + 1)
    return np.asarray([first[s.pair_id] if s.pair_id >= 0 else 0 for s in samples], np.int32)
