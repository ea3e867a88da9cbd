"""One row of evidence per window, tied to counts that the data pipeline made on its own.

The device says what went through the gradient path (witness, tokens, micro-batches); the host says what it planned,
from the samples, in NumPy. The two must agree on every update, or the run stops with the micro-batch named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hptjax.train.accumulate import Status


class AccumulationError(RuntimeError):
    """An update that was not the sum of its micro-batches, or not finite: the run must not go on."""


def ledger_row(
    report: Any,
    *,
    step: int,
    update: int,
    planned_tokens: np.ndarray,
    micro_batches: int,
    term_tokens: Mapping[str, int],
    sequences: int,
    digest: tuple[int, int],
    learning_rate: float,
) -> dict[str, Any]:
    """What is written to `ledger.jsonl` for one window, from a host copy of the device's report.

    Args
      report: a `train.state.Report` of NumPy arrays.
      planned_tokens: [M] live tokens per micro-batch, counted from the samples. term_tokens: the same per term.
      digest: order-independent digest of the update's sample ids.
    """
    return {
        "step": step,
        "update": update,
        "window": int(report.windows),
        "optimizer_step": int(report.optimizer_steps),
        "status": Status(int(report.status)).name.lower(),
        "micro_batches_planned": micro_batches,
        "micro_batches": int(report.micro_batches),
        "tokens_planned": int(planned_tokens.sum()),
        "tokens": int(report.tokens),
        "tokens_by_term": {name: int(count) for name, count in term_tokens.items()},
        "sequences": sequences,
        "digest": [int(part) for part in digest],
        "witness_ok": int(report.status) != Status.WITNESS_MISMATCH,
        "bad_micro_batch": int(report.bad_micro_batch),
        "grad_norm": {name: float(norm) for name, norm in report.grad_norm.items()},
        "learning_rate": learning_rate,
    }


def check(row: Mapping[str, Any], *, nonfinite: str) -> None:
    """Stop the run where the row's evidence fails.

    Args
      nonfinite: "raise" or "skip_window": what a NaN or an infinity in a window's gradient means. Under "skip_window"
        the device has already left parameters and moments as they were.

    Raises AccumulationError naming the micro-batch.
    """
    where = f"step {row['step']}, update {row['update']}"
    if not row["witness_ok"]:
        raise AccumulationError(
            f"{where}: expected every micro-batch once in the gradient sum, but the witness of micro-batch "
            f"{row['bad_micro_batch']} is wrong; parameters were not changed. This is a fault of the program or the "
            "hardware: keep the run folder and report it"
        )
    if (row["micro_batches"], row["tokens"]) != (row["micro_batches_planned"], row["tokens_planned"]):
        raise AccumulationError(
            f"{where}: planned {row['micro_batches_planned']} micro-batches with {row['tokens_planned']} live tokens, "
            f"but {row['micro_batches']} with {row['tokens']} were added"
        )
    if row["status"] == Status.NONFINITE.name.lower() and nonfinite == "raise":
        raise AccumulationError(
            f"{where}: micro-batch {row['bad_micro_batch']} has a gradient that is not finite; parameters were not "
            "changed. Lower optimizer.learning_rate, or set optimizer.nonfinite = 'skip_window' to go on without it"
        )
