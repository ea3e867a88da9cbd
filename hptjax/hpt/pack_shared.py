"""Samples into rows of one prompt each, cut into lanes that no sample crosses; see `models/attention_shared.py`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Int

from hptjax.hpt.pack import pack


def pack_by_prompt(
    prompts: Sequence[Hashable],
    lengths: Int[np.ndarray, " N"],
    bundle_ids: Int[np.ndarray, " N"],
    *,
    row_tokens: int,
    lanes: int,
    max_segments: int,
    names: Sequence[object] | None = None,
) -> tuple[list[list[int]], Int[np.ndarray, " N"]]:
    """Rows of sample indices, one prompt to a row, and where in its row each sample begins.

    The samples of a prompt are packed into lanes by `pack`, and its lanes fill rows in that order. Prompts come in the
    order of their first samples.

    Args
      prompts: equal for samples that may share a row. lengths: target positions of each sample behind the prompt; >= 1.
      bundle_ids: samples with the same id >= 0 share a lane; -1: alone.
      row_tokens, max_segments: of a row; every lane has an equal part of both.
    Raises ValueError naming the sample (or bundle) that no lane can hold or whose bundle has different prompts, or a
      number that `lanes` does not divide.
    Example
      >>> room = {"row_tokens": 8, "lanes": 2, "max_segments": 4}
      >>> rows, starts = pack_by_prompt("abaa", np.array([3, 2, 2, 4]), np.full(4, -1), **room)
      >>> rows, starts.tolist()
      ([[3, 0], [2], [1]], [4, 0, 0, 0])
    """
    if row_tokens % lanes or max_segments % lanes:
        raise ValueError(
            "expected batch.row_tokens and batch.max_segments to be multiples of batch.lanes, got "
            f"{row_tokens}, {max_segments} and {lanes}"
        )
    _check(prompts, lengths, bundle_ids, row_tokens // lanes, names)
    members: dict[Hashable, list[int]] = {}
    for index, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(index)
    rows: list[list[int]] = []
    starts = np.zeros(len(prompts), np.int64)
    for places in members.values():
        filled = pack(
            lengths[places],
            bundle_ids[places],
            row_tokens=row_tokens // lanes,
            max_segments=max_segments // lanes,
            names=[names[i] if names is not None else i for i in places],
        )
        for first in range(0, len(filled), lanes):
            rows.append([])
            for lane, seats in enumerate(filled[first : first + lanes]):
                offset = lane * (row_tokens // lanes)
                for i in (places[seat] for seat in seats):
                    starts[i] = offset
                    offset += int(lengths[i])
                    rows[-1].append(i)
    return rows, starts


def _check(
    prompts: Sequence[Hashable],
    lengths: Int[np.ndarray, " N"],
    bundle_ids: Int[np.ndarray, " N"],
    lane_tokens: int,
    names: Sequence[object] | None,
) -> None:
    """Raises ValueError for a sample that no lane holds, or a bundle of different prompts."""
    prompt_of: dict[int, Hashable] = {}
    for index, (prompt, length, bundle) in enumerate(zip(prompts, lengths.tolist(), bundle_ids.tolist(), strict=True)):
        name = index if names is None else names[index]
        if length > lane_tokens:
            raise ValueError(
                f"sample {name} has a completion of {length} tokens, but a lane holds {lane_tokens} "
                "(batch.row_tokens / batch.lanes): raise batch.row_tokens, or lower batch.lanes or "
                "rollout.max_completion_tokens"
            )
        if bundle >= 0 and prompt_of.setdefault(bundle, prompt) != prompt:
            raise ValueError(
                f"sample {name} and another of its pair have different prompts, but a row holds one: set "
                "batch.share_prompts to false"
            )


def starts_in_rows(rows: Sequence[Sequence[int]], lengths: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """Where each sample begins in a row whose samples follow each other."""
    starts = np.zeros(len(lengths), np.int64)
    for members in rows:
        starts[list(members)] = np.cumsum(lengths[list(members)]) - lengths[list(members)]
    return starts
