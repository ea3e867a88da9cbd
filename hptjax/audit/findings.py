"""What an audit can find."""

from __future__ import annotations

import dataclasses
from typing import Literal

from hptjax.audit.effects import EFFECTS

Level = Literal["fault", "note"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that one probe saw.

    Args
      code: a key of `EFFECTS`.
      evidence: what was seen, in one sentence with numbers.
      micro_batches: the ones to blame, counted from 0 in their window; empty where none can be named.
      window: the update in which it was seen, from 0, or None.
      probe: the probe that saw it.
      level: "note" does not fail the audit.
    """

    code: str
    evidence: str
    micro_batches: tuple[int, ...] = ()
    window: int | None = None
    probe: str = ""
    level: Level = "fault"

    def __post_init__(self) -> None:
        if self.code not in EFFECTS:
            raise ValueError(f"expected one of {sorted(EFFECTS)}, got '{self.code}'")
