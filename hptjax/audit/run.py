"""What a target did with a job: arrays that the kit can trust, or a finding. No exception gets past here."""

from __future__ import annotations

import dataclasses
import traceback
from typing import Any

import numpy as np

from hptjax.audit.findings import Finding
from hptjax.audit.job import Batch, Gradients, Job, LinearBatch, Target, Unsupported

FLOATS = ("float32", "float64")
LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What came back.

    Args
      applied: gradient that each update applied, float64, from the parameters before and after where the target returns
        parameters. None: nothing could be read; `finding` or `unsupported` says why.
      parameters: after every update, or None where the target returns gradients.
      between: as in `Gradients`.
      exception: what the target raised, in one line.
    """

    applied: tuple[np.ndarray, ...] | None = None
    parameters: tuple[np.ndarray, ...] | None = None
    between: tuple[np.ndarray, ...] = ()
    finding: Finding | None = None
    unsupported: str | None = None
    exception: str | None = None


def arrays_of(job: Job) -> list[np.ndarray]:
    """Every array that the target is given."""
    arrays = [job.parameters]
    for window in job.windows:
        for batch in window:
            if isinstance(batch, LinearBatch):
                arrays += [batch.features, batch.mask]
            else:
                arrays += [batch.input_ids, batch.labels, batch.attention_mask]
    return arrays


def carry_out(target: Target, job: Job, *, may_share: bool = False) -> Run:
    """The target's answer to the job, checked. The target gets a copy of the job.

    Args
      may_share: updates that changed nothing may be one and the same array.
    """
    given = _copy(job)
    try:
        with np.errstate():  # NumPy's own defaults, whatever the kit has set, and what a target sets stays in it
            np.seterr(all="warn", under="ignore")
            answer = target(given)
    except KeyboardInterrupt:
        raise
    except Unsupported as error:
        return Run(unsupported=_first_line(error) or "the target does not support it")
    except BaseException as error:
        told = raised(error)
        return Run(finding=Finding("target_raised", told), exception=told)
    if not _same_job(job, given):
        return Run(finding=Finding("changed_its_input", "the job's arrays are not what they were before the call"))
    try:
        return _read(job, answer, may_share)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an array-like that raises when it is read
        return Run(finding=Finding("wrong_type", f"reading what the target returned: {raised(error)}"))


def raised(error: BaseException) -> str:
    """An exception in one line: its type, first line and place."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {_first_line(error)}{place}"


def _first_line(error: BaseException) -> str:
    try:
        return next(iter(str(error).strip().splitlines()), "")
    except Exception:
        return "(no text)"


def _copy(job: Job) -> Job:
    """The same job in arrays of its own, which cannot be written to by accident."""
    given = dataclasses.replace(
        job,
        parameters=job.parameters.copy(),
        windows=tuple(tuple(_copied(batch) for batch in window) for window in job.windows),
    )
    for array in arrays_of(given):
        array.setflags(write=False)
    return given


def _copied(batch: Batch) -> Batch:
    if isinstance(batch, LinearBatch):
        return dataclasses.replace(batch, features=batch.features.copy(), mask=batch.mask.copy())
    return dataclasses.replace(
        batch,
        input_ids=batch.input_ids.copy(),
        labels=batch.labels.copy(),
        attention_mask=batch.attention_mask.copy(),
    )


def _same_job(job: Job, given: Job) -> bool:
    """Whether nothing of the job was replaced or written over; a frozen dataclass can be forced."""
    try:
        one, other = _plain(job), _plain(given)
        arrays = zip(arrays_of(job), arrays_of(given), strict=True)
        return one == other and all(a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in arrays)
    except Exception:
        return False


def _plain(job: Job) -> tuple[Any, ...]:
    """Everything in a job that is no array."""
    batches = [[(type(batch), batch.index, batch.is_last) for batch in window] for window in job.windows]
    return job.model, job.learning_rates, job.clip_norm, job.parameter_dtype, job.ranks, batches


def _read(job: Job, answer: Any, may_share: bool) -> Run:
    gradients = isinstance(answer, Gradients)
    what = "gradients" if gradients else "parameters"
    values = answer.applied if gradients else answer
    read = _arrays(job, values, what, may_share=may_share)
    if isinstance(read, Finding):
        return Run(finding=read)
    if gradients:
        between = [] if answer.between is None else _arrays(job, answer.between, "gradients", may_share=True)
        if isinstance(between, Finding):
            return Run(finding=between)
        if answer.between is not None and len(between) != len(read):
            evidence = f"expected one array of between per update, got {len(between)} for {len(read)}"
            return Run(finding=Finding("wrong_type", evidence))
        return Run(applied=tuple(read), between=tuple(between))
    applied = []
    before = job.parameters.astype(np.float64)
    # more updates than rates: the count is a finding of its own, and the last rate stands in
    rates = [*job.learning_rates, *[job.learning_rates[-1]] * len(read)]
    with np.errstate(invalid="ignore"):
        for after, rate in zip(read, rates, strict=False):
            applied.append((before - after) / rate)
            before = after
    return Run(applied=tuple(applied), parameters=tuple(read))


def _arrays(job: Job, values: Any, what: str, *, may_share: bool) -> list[np.ndarray] | Finding:
    """The values as float64 arrays in the shape of the parameters; what float32 cannot hold is infinite."""
    wanted = f"expected a list of one array of {what} per update, shape {job.parameters.shape}"
    if isinstance(values, dict | str | bytes) or not hasattr(values, "__len__") or not hasattr(values, "__getitem__"):
        return Finding("wrong_type", f"{wanted}, got {_kind(values)}")
    if hasattr(values, "dtype") and getattr(values, "shape", None) == job.parameters.shape:
        return Finding("wrong_type", f"{wanted}, got a single {_kind(values)}")
    raw, read = [], []
    for index in range(len(values)):
        value = values[index]
        if not hasattr(value, "__array__") and not _is_number_list(value):
            return Finding("wrong_type", f"{wanted}, got {_kind(value)} at place {index}")
        array = np.asarray(value)
        if array.shape != job.parameters.shape:
            return Finding("wrong_shape", f"{wanted}, got shape {array.shape} at place {index}", window=index)
        allowed = (*FLOATS, "bfloat16") if job.parameter_dtype == "bfloat16" else FLOATS
        if array.dtype.name not in allowed:
            return Finding(
                "wrong_dtype", f"expected {' or '.join(allowed)}, got {array.dtype.name} at place {index}", window=index
            )
        raw.append(array)
        wide = array.astype(np.float64)
        read.append(np.where(np.abs(wide) > LARGEST, np.copysign(np.inf, wide), wide))
    aliased = all(array.flags.writeable and np.shares_memory(array, raw[0]) for array in raw)
    if len(raw) > 1 and aliased and not may_share and not np.array_equal(read[0], job.parameters):
        return Finding("same_array", f"{wanted}, got the same memory for several updates; return copies")
    return read


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ + (f" of shape {tuple(shape)}" if isinstance(shape, tuple) else "")


def _is_number_list(value: Any) -> bool:
    """A plain list of numbers, as some loops keep their parameters."""
    return isinstance(value, list | tuple) and all(
        isinstance(item, float | int | complex) or _is_number_list(item) for item in value
    )
