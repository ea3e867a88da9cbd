"""One row of evidence per window, tied to counts that the data pipeline made on its own.

The device says what went through the gradient path (witness, tokens, micro-batches); the host says what it planned,
from the samples, in NumPy. The two must agree on every update, or the run stops with the micro-batch named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from hptjax.hpt.assemble import Update
from hptjax.train.accumulate import Status
from hptjax.train.state import LIMB


class AccumulationError(RuntimeError):
    """An update that was not the sum of its micro-batches, or not finite: the run must not go on."""


def ledger_row(
    report: Any,
    update: Update,
    *,
    step: int,
    place: int,
    window: int,
    learning_rate: float,
    schedule_step: int,
    clip_norm: float | None,
) -> dict[str, Any]:
    """What is written to `ledger.jsonl` for one window: the device's report beside the host's plan.

    Args
      report: a `train.state.Report` of NumPy arrays.
      update: the plan; its counts were taken from the samples, before anything was packed.
      step, place: which update of which step. window: which flush of the run this must be, from 1.
      schedule_step: the optimizer step that the learning rate is of.
    """
    norms = {name: float(norm) for name, norm in report.grad_norm.items()}
    largest = max(norms.values())
    residuals = _residuals(report)
    return {
        "step": step,
        "update": place,
        "window_planned": window,
        "window": int(report.windows),
        "optimizer_step": int(report.optimizer_steps),
        "status": Status(int(report.status)).name.lower(),
        "micro_batches_planned": len(update.micro_batches),
        "micro_batches": int(report.micro_batches),
        "empty_micro_batches": int(report.empty_micro_batches),
        "tokens_planned": sum(count.tokens for count in update.sources.values()),
        "tokens": int(report.tokens),
        "tokens_by_term": {name: count.tokens for name, count in update.terms.items()},
        "normaliser_by_term": {name: count.normaliser for name, count in update.terms.items()},
        "sequences": len(update.samples),
        "digest_planned": [int(word) for word in update.digest],
        "digest": [int(word) for word in report.digest],
        "witness_ok": int(report.status) != Status.WITNESS_MISMATCH,
        "checksum": max(residuals.values()) if max(residuals.values()) >= 0.0 else None,
        "bad_leaves": sorted(name for name, residual in residuals.items() if not residual <= 1.0),
        "bad_micro_batch": int(report.bad_micro_batch),
        "grad_norm": norms,
        "clip_factor": min(1.0, clip_norm / largest) if clip_norm is not None and largest > 0.0 else 1.0,
        "learning_rate": learning_rate,
        "schedule_step": schedule_step,
    }


def _residuals(report: Any) -> dict[str, float]:
    """Leaf by dotted name -> its checksum's residual as a share of what rounding may cause; -1: not checked."""
    return {
        ".".join(str(getattr(entry, "key", entry)) for entry in path): float(residual)
        for path, residual in jax.tree_util.tree_leaves_with_path(report.leaf_residual)
    }


def check(row: Mapping[str, Any], *, nonfinite: str) -> None:
    """Stop the run where the row's evidence fails.

    Args
      nonfinite: "raise" or "skip_window": what a NaN or an infinity in a window's gradient means. Under "skip_window"
        the device has already left parameters and moments as they were.

    Raises AccumulationError naming the micro-batch.
    """
    where = f"step {row['step']}, update {row['update']}"
    named = "" if row["bad_micro_batch"] < 0 else f" of micro-batch {row['bad_micro_batch']}"
    fault = (
        "the window was not applied. This is a fault of the program or the hardware: keep the run folder and report it"
    )
    if row["window"] != row["window_planned"]:
        raise AccumulationError(
            f"{where}: expected the device to have closed window {row['window_planned']}, got {row['window']}: one was "
            "not closed, or twice, or the state is not the one that the run had; keep the run folder and report it"
        )
    if row["status"] == Status.WITNESS_MISMATCH.name.lower():
        raise AccumulationError(
            f"{where}: expected every micro-batch once in the gradient sum, but the witness{named} is wrong; {fault}"
        )
    if row["status"] == Status.DIGEST_MISMATCH.name.lower():
        raise AccumulationError(
            f"{where}: expected every planned sample once, but the digest{named} is not that of its samples; {fault}"
        )
    if row["status"] == Status.CHECKSUM_MISMATCH.name.lower():
        raise AccumulationError(
            f"{where}: the gradient sum of {', '.join(row['bad_leaves'])} is not the sum of its micro-batches' "
            f"gradients (checksum {row['checksum']:.3g} times what rounding may cause), first seen after the add"
            f"{named}; {fault}"
        )
    for what, name in (("micro-batches", "micro_batches"), ("live tokens", "tokens"), ("the sample digest", "digest")):
        if row[name] != row[f"{name}_planned"]:
            raise AccumulationError(
                f"{where}: expected {what} {row[f'{name}_planned']} as planned from the samples, got {row[name]} in "
                "what was added: the packing lost or repeated something; keep the run folder and report it"
            )
    if row["status"] == Status.NONFINITE.name.lower() and nonfinite == "raise":
        raise AccumulationError(
            f"{where}: the gradient{named} is not finite; parameters were not changed. Lower optimizer.learning_rate, "
            "or set optimizer.nonfinite = 'skip_window' to go on without this update"
        )


def check_totals(rows: Iterable[Mapping[str, Any]], totals: Any) -> None:
    """Raises AccumulationError where the ledger's rows do not add up to the lifetime totals of the device.

    Args
      rows: of the whole run. totals: a `train.state.Totals` of NumPy arrays.
    """
    listed = list(rows)
    from_rows = {
        "windows": len(listed),
        "optimizer_steps": sum(row["status"] == Status.UPDATED.name.lower() for row in listed),
        "micro_batches": sum(row["micro_batches"] for row in listed),
        "tokens": sum(row["tokens"] for row in listed),
    }
    from_device = {
        "windows": int(totals.windows),
        "optimizer_steps": int(totals.optimizer_steps),
        "micro_batches": int(totals.micro_batches),
        "tokens": int(totals.tokens_high) * LIMB + int(totals.tokens_low),
    }
    if from_rows != from_device:
        raise AccumulationError(
            f"expected ledger.jsonl to add up to the run's totals {from_device}, got {from_rows}: rows are missing, "
            "repeated or of another run"
        )
