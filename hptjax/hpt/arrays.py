"""The arrays of an update's micro-batches: a layout of samples becomes `MicroBatch`es. Nothing is decided here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int, UInt32

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
    rows: int,
    row_tokens: int,
    max_segments: int,
) -> tuple[MicroBatch, ...]:
    """The arrays: every micro-batch is a view into one array per field, filled by flat indices.

    Args
      layout: micro-batch -> row -> places in `samples`; each place once.
      values: term name -> what it says about each sample; becomes one plane.
      active: the terms whose tokens are live.
      sample_hashes: of the samples' ids. planned_tokens, planned_digest: go into every micro-batch as they are.
    Returns padding with token 0, segment 0, weight 0 and mask False.
    """
    count = len(samples)
    prompts = np.asarray([len(s.prompt_tokens) for s in samples], np.int64)
    completions = np.asarray([len(s.completion_tokens) for s in samples], np.int64)
    lengths = prompts + completions - 1
    base, segment = np.zeros(count, np.int64), np.zeros(count, np.int64)  # flat first position; place among segments
    for m, group in enumerate(layout):
        for r, members in enumerate(group):
            offset = (m * rows + r) * row_tokens
            for seat, i in enumerate(members):
                base[i], segment[i] = offset, (m * rows + r) * max_segments + seat
                offset += int(lengths[i])

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
        where, whence = _runs(base, lengths), _runs(first, lengths)
        inputs[where], targets[where] = stream[whence], stream[whence + 1]
        positions[where] = _runs(np.zeros(count, np.int64), lengths)
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


def _author_logprobs(sample: Sample) -> np.ndarray:
    stored = sample.demonstration_logprobs
    return np.zeros(len(sample.completion_tokens), np.float32) if stored is None else stored


def _pairs_by_seat(samples: Sequence[Sample], segment: Int[np.ndarray, " N"], seats: int) -> Int[np.ndarray, " N"]:
    """A pair's number in its row, the seat of its first member counted from 1; 0 for samples in no pair."""
    first: dict[int, int] = {}
    for sample, place in sorted(zip(samples, segment.tolist(), strict=True), key=lambda entry: entry[1]):
        first.setdefault(sample.pair_id, place % seats + 1)
    return np.asarray([first[s.pair_id] if s.pair_id >= 0 else 0 for s in samples], np.int32)
