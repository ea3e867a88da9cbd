"""Who is prefilled with whom, who enters which slot, and the fixed-shape arrays that say so to the device.

The order of admission is a matter of speed only: prefill bucket, noise and compiled path of a sample follow from its
own request (contract 4).

Dims: S slots, R prefill rows, P prompt bucket, F fields of an entry, X copies at most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int32

from hptjax.records import Request, SampleId
from hptjax.rollout.pages import Copy
from hptjax.rollout.requests import DecodeShape, context_of, context_tokens, new_tokens

NO_PAGE = -1  # ends a list of copies

FIELDS = (  # one int32 column each; the stop ids follow
    "enters",
    *("question", "round", "index"),
    *("last_token", "last_position", "prefix_len", "new_tokens"),
    *("temperature", "top_k", "top_p"),
)
"""Columns of an entry table.

enters: 1 where a sample enters the slot, 0 where the slot is left alone. question, round, index: the sample's id.
last_token, last_position: the final token of the context and its place in the cache. prefix_len: completion position of
the first sampled token. new_tokens: how many may be sampled. temperature, top_p: the bits of a float32.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Prefill:
    """One prefill call, and who waits for it.

    Args
      tokens, lengths: R contexts, right-padded.
      entries: (place of the request, row of its context), in order of admission.
    """

    tokens: Int32[np.ndarray, "R P"]
    lengths: Int32[np.ndarray, " R"]
    entries: list[tuple[int, int]]


def plan_prefills(
    requests: Sequence[Request], places: Sequence[int], shape: DecodeShape, pad_id: int
) -> Iterator[Prefill]:
    """The prefill calls for the requests at `places`, in order of admission: each different context once.

    Contexts come by the most tokens that any of their samples may have, then by id, so that what may take longest
    starts first; those of one bucket are prefilled together.
    """
    members: dict[bytes, list[int]] = {}
    contexts: dict[bytes, np.ndarray] = {}
    for place in sorted(places, key=lambda place: _order(requests[place])):
        context = context_of(requests[place])
        members.setdefault(context.tobytes(), []).append(place)
        contexts.setdefault(context.tobytes(), context)
    calls: list[list[bytes]] = []
    filling: dict[int, list[bytes]] = {}
    for name, context in contexts.items():
        bucket = shape.bucket(len(context))
        if len(filling.get(bucket, ())) % shape.prefill_rows == 0:  # none yet, or full
            filling[bucket] = []
            calls.append(filling[bucket])
        filling[bucket].append(name)
    for names in calls:
        yield _prefill([contexts[name] for name in names], [members[name] for name in names], shape, pad_id)


def _order(request: Request) -> tuple[int, SampleId]:
    return -new_tokens(request), request.sample_id


def _prefill(
    contexts: Sequence[np.ndarray], members: Sequence[Sequence[int]], shape: DecodeShape, pad_id: int
) -> Prefill:
    tokens = np.full((shape.prefill_rows, shape.bucket(len(contexts[0]))), pad_id, np.int32)
    lengths = np.ones(shape.prefill_rows, np.int32)  # an unused row is one pad token: its attention is defined
    for row, context in enumerate(contexts):
        tokens[row, : len(context)] = context
        lengths[row] = len(context)
    return Prefill(tokens, lengths, [(place, row) for row, places in enumerate(members) for place in places])


def entry_table(entering: Mapping[int, Request], shape: DecodeShape) -> Int32[np.ndarray, "S F"]:
    """What the slots that are entered need to know, so that no setting is compiled in.

    Args
      entering: slot -> the request that enters.
    Returns [S, fields and stop ids] int32, see FIELDS; one array, because each array sent costs its own transfer.
    """
    table = np.zeros((shape.slots, len(FIELDS) + shape.max_stop_ids), np.int32)
    for slot, request in entering.items():
        prompt, prefix = request.prompt_tokens, request.prefix_tokens
        bits = np.array([request.temperature, request.top_p], np.float32).view(np.int32)
        table[slot] = [
            1,
            *request.sample_id,
            *(prefix[-1] if len(prefix) else prompt[-1], context_tokens(request) - 1, len(prefix)),
            new_tokens(request),
            *(bits[0], request.top_k, bits[1]),
            *sorted(request.stop_ids),
            *[-1] * (shape.max_stop_ids - len(request.stop_ids)),
        ]
    return table


def copy_table(copies: Sequence[Copy], shape: DecodeShape) -> Int32[np.ndarray, "X 3"]:
    """The pages to fill, one after the other, as row, block and page; NO_PAGE after the last."""
    table = np.full((shape.most_copies, 3), NO_PAGE, np.int32)
    table[: len(copies)] = np.array(copies, np.int32).reshape(-1, 3)
    return table
