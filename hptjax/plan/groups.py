"""Which devices take part in a collective, from the three ways in which a compiled module writes it."""

from __future__ import annotations

import math
import re

import numpy as np

LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
PAIRS = re.compile(r"source_target_pairs=\{\{(\d+),(\d+)\}")
IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")


def first_group(attributes: str) -> tuple[int, ...]:
    """The positions in the mesh of one group of a collective (the others look alike); empty where none is written."""
    listed = LISTED.search(attributes)
    if listed:
        return _numbers(listed[1])
    iota = IOTA.search(attributes)
    if iota:
        shape, source = _numbers(iota[1]), _numbers(iota[2])
        order = np.arange(math.prod(source)).reshape(source)
        order = order.transpose(_numbers(iota[3])) if iota[3] else order
        return tuple(int(place) for place in order.reshape(shape)[0])
    named = NAMED.search(attributes)
    if named:
        axes = re.findall(r"'([^']+)'=(\d+)", named[1])
        joined = set(re.findall(r"'([^']+)'", named[2]))
        order = np.arange(math.prod(int(size) for _, size in axes)).reshape([int(size) for _, size in axes])
        kept = tuple(slice(None) if name in joined else 0 for name, _ in axes)
        return tuple(int(place) for place in np.asarray(order[kept]).reshape(-1))
    pair = PAIRS.search(attributes)
    return (int(pair[1]), int(pair[2])) if pair else ()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)
