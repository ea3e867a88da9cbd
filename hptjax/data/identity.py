"""Which problem an example is, and the id that keys its randomness: both from what it says, never from its place."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence

from hptjax.records import Example

ID_BITS = 31  # ids are non-negative int32: a sample's noise is folded in as 32 bits


def canonical_text(*texts: str) -> str:
    """The text of a problem without what does not make it another one: Unicode form, case, white space.

    Example
      >>> canonical_text("  What is\\n 2+3? ")
      'what is 2+3?'
    """
    return " ".join(unicodedata.normalize("NFKC", "\n".join(texts)).casefold().split())


def content_digest(example: Example) -> bytes:
    """SHA-256 of all that an example says: turns, tools, demonstration and answer."""
    said = [
        example.prompt,
        [dict(message) for message in example.messages],
        list(example.tools),
        example.demonstration,
        dict(example.answer),
    ]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest()


def content_ids(examples: Sequence[Example]) -> list[int]:
    """The id of each example: the first 31 bits of its content's digest; equal contents have one id.

    Where two contents share the bits (about one chance in three among 40,000), the one with the larger digest takes
    those of the digest of its digest, and so on: the ids do not depend on the order of the examples.
    """
    digests = [content_digest(example) for example in examples]
    taken: dict[int, bytes] = {}
    number_of: dict[bytes, int] = {}
    for digest in sorted(set(digests)):
        bits = digest
        while (number := int.from_bytes(bits[:4], "big") >> (32 - ID_BITS)) in taken:
            bits = hashlib.sha256(bits).digest()
        taken[number] = digest
        number_of[digest] = number
    return [number_of[digest] for digest in digests]
