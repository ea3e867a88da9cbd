"""A conformance kit for gradient accumulation, for a trainer written in anything that Python can call.

A target does the job that it is given with its own accumulation and returns the parameters after every update. The
right one in NumPy, which applies a NaN like most:

  >>> import numpy as np
  >>> from hptjax.audit.job import Unsupported
  >>> from hptjax.audit.kit import audit
  >>> def train(job):
  ...     if job.ranks > 1 or job.parameter_dtype != "float32": raise Unsupported("one fp32 worker")
  ...     theta, after = job.parameters.copy(), []
  ...     for window, rate in zip(job.windows, job.learning_rates):
  ...         tokens = sum(part.mask.sum() for part in window)
  ...         gradient = sum(part.features[part.mask].sum(axis=0) for part in window) / np.float32(tokens)
  ...         norm = np.linalg.norm(gradient)
  ...         if job.clip_norm is not None and norm > job.clip_norm: gradient *= job.clip_norm / norm
  ...         theta = theta - np.float32(rate) * gradient
  ...         after.append(theta)
  ...     return after
  >>> report = audit(train)
  >>> [finding.code for finding in report.findings], report.faults
  (['nan_applied'], ())
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
from typing import Literal

import numpy as np

from hptjax.audit import probes as sgd
from hptjax.audit import split
from hptjax.audit.findings import Finding
from hptjax.audit.job import Model, Target
from hptjax.audit.probe import Audited
from hptjax.audit.problems import COUNTS

Outcome = Literal["pass", "note", "finding", "not run"]
EXAMINES = {f"{kind}, k = {k}" for kind in ("sum", "split") for k in COUNTS if k >= 3}  # probes; one must be judged
LIBRARIES = {
    "numpy": "numpy",
    "jax": "jax",
    "jaxlib": "jaxlib",
    "flax": "flax",
    "optax": "optax",
    "torch": "torch",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "trl": "trl",
    "deepspeed": "deepspeed",
    "tunix": "google-tunix",
    "hptjax": "hptjax",
}


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """One row of the report. `detail` says why a probe did not run, or adds to a pass."""

    probe: str
    asked: str
    outcome: Outcome
    detail: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What an audit found.

    Args
      remarks: what follows from several probes together.
      versions: of the libraries that the target has loaded.
    """

    target: str
    model: Model
    own_optimizer: bool
    injected_drop: bool
    probes: tuple[ProbeResult, ...]
    findings: tuple[Finding, ...]
    remarks: tuple[str, ...]
    versions: dict[str, str]

    @property
    def faults(self) -> tuple[Finding, ...]:
        """The findings that fail the audit."""
        return tuple(finding for finding in self.findings if finding.level == "fault")


def audit(
    target: Target,
    *,
    name: str = "",
    model: Model | None = None,
    own_optimizer: bool | None = None,
    inject_drop: bool = False,
) -> Report:
    """Runs every probe on a target; whatever the target does, a report comes back.

    Args
      name: of the target, for the report. model, own_optimizer: as the target is marked by `accepts` where None.
      inject_drop: blank the middle micro-batch of every window of 3 and more in what the target sees, to show that such
        a fault would be found in it.
    """
    chosen: Model = getattr(target, "audit_model", "linear") if model is None else model
    own = getattr(target, "audit_own_optimizer", False) if own_optimizer is None else own_optimizer
    audited = Audited(target=target, model=chosen, blanked=inject_drop)
    results: list[ProbeResult] = []
    findings: list[Finding] = []
    for probe in split.probes() if own else sgd.probes():
        with np.errstate(all="ignore"):  # of values that the target made up
            seen = probe.ask(audited)
        named = tuple(dataclasses.replace(finding, probe=probe.name) for finding in seen.findings)
        if probe.name == sgd.SUMS_AT_3:
            audited = dataclasses.replace(audited, sums=named)
        findings.extend(named)
        results.append(ProbeResult(probe.name, probe.asked, *_outcome(named, seen.not_run, seen.detail)))
    remarks = () if inject_drop else _remarks(tuple(results), tuple(findings))
    told = [result.detail for result in results if result.probe in EXAMINES and result.outcome == "not run"]
    if told and len(told) == sum(result.probe in EXAMINES for result in results):
        evidence = f"no window of 3 or more micro-batches was judged; the first probe of one says: {told[0]}"
        findings.append(Finding("not_examined", evidence))
    return Report(
        target=name or getattr(target, "__qualname__", repr(target)),
        model=chosen,
        own_optimizer=own,
        injected_drop=inject_drop,
        probes=tuple(results),
        findings=tuple(findings),
        remarks=remarks,
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Versions of the libraries that are loaded now."""
    found = {}
    for module, package in LIBRARIES.items():
        if module in sys.modules:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                found[package] = "not installed as a package"
    return found


def _outcome(findings: tuple[Finding, ...], not_run: str, detail: str) -> tuple[Outcome, str]:
    if not findings:
        return ("not run", not_run) if not_run else ("pass", detail)
    codes = ", ".join(dict.fromkeys(finding.code for finding in findings))
    return ("finding" if any(finding.level == "fault" for finding in findings) else "note"), codes


def _remarks(results: tuple[ProbeResult, ...], findings: tuple[Finding, ...]) -> tuple[str, ...]:
    """A fault that two micro-batches cannot show is worth a sentence: it is how such bugs live for years."""
    outcome = {result.probe: result.outcome for result in results}
    hidden = sorted(
        {finding.code for finding in findings if finding.probe.startswith("sum, k =") and finding.level == "fault"}
    )
    if outcome.get("sum, k = 2") != "pass" or not hidden:
        return ()
    return (f"With 2 micro-batches nothing is wrong ({', '.join(hidden)} only for k >= 3): a test at k = 2 passes.",)
