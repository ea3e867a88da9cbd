"""What a probe is: one question to a target, asked by a job, and what was seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from hptjax.audit.findings import Finding
from hptjax.audit.job import Model, Target
from hptjax.audit.judge import judge
from hptjax.audit.problems import COUNTS, Problem, problem, turned
from hptjax.audit.run import Run, carry_out

WRONG_SUMS = "not judged: the sums themselves are wrong"


@dataclasses.dataclass(frozen=True, eq=False)
class Audited:
    """What is under audit.

    Args
      blanked: whether every job is given with its middle micro-batch blanked.
      sums: findings of the plain three-micro-batch probe; probes of other things are not judged on wrong sums.
    """

    target: Target
    model: Model
    blanked: bool = False
    sums: tuple[Finding, ...] = ()


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a probe found; `not_run` says why it could not run, `detail` adds to a pass."""

    findings: tuple[Finding, ...] = ()
    not_run: str = ""
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Probe:
    """A name, what is asked of the target, and the function that asks."""

    name: str
    asked: str
    ask: Callable[[Audited], Seen]


def judged(audited: Audited, asked: Problem) -> Seen:
    """The findings of a plain job."""
    run = carry_out(audited.target, asked.job)
    return Seen(not_run=run.unsupported) if run.unsupported else Seen(tuple(judge(asked, run)))


def plain(
    audited: Audited, k: int, *, windows: int = 2, blanked: bool | None = None, blank: int | None = None
) -> Problem:
    """Windows of k uneven micro-batches; blanked, blank: as in `problem`, blanked as the audit says where None."""
    counts = [turned(COUNTS[k], by) for by in range(windows)]
    return problem(audited.model, counts, blanked=audited.blanked if blanked is None else blanked, blank=blank)


def same_bits(one: Run, other: Run) -> bool:
    """Whether two runs applied exactly the same."""
    if one.applied is None or other.applied is None or len(one.applied) != len(other.applied):
        return False
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one.applied, other.applied, strict=True))
