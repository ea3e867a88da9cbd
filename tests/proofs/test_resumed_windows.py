"""A window that is open when the run stops: every place in it, another process, another mesh, another split (T17, T18).

The states here go through the product's own checkpoints; what the loop adds to that is in `tests/test_resume.py`.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from hptjax.sharding.host import to_host
from hptjax.sharding.mesh import make_mesh, put_micro_batch
from hptjax.train.accumulate import Status
from hptjax.train.checkpoint import open_checkpoints
from tests import toys
from tests.proofs import two_processes as pair

REPOSITORY = Path(__file__).resolve().parents[2]
# rows of each micro-batch in three windows: the run stops inside the second, whose k is 6
SPLITS = ([1, 9, 4, 10], [2, 7, 0, 1, 8, 6], [5, 0, 1, 12, 6])
STOPPED = 1
ELSEWHERE_AFTER = 4


def toy_windows(splits=SPLITS):
    """A window of 24 rows for each split, each of other rows with another ragged mask."""
    windows = []
    for seed, lengths in enumerate(splits):
        rng = np.random.default_rng(100 + seed)
        tokens, mask = toys.rows_of(rng, pair.ROWS)
        windows.append(toys.window(tokens, mask, rng.integers(0, 4, tokens.shape), pair.cut(lengths), pad_rows=24))
    return windows


@dataclasses.dataclass(frozen=True, eq=False)
class Toy:
    """A toy problem on a mesh: its compiled step and what makes a fresh state."""

    mesh: jax.sharding.Mesh
    step: Callable[..., Any]
    fresh: Callable[[], Any]


def make_toy(data=1, tensor=1, *, linear=False):
    """Integers and SGD where `linear`; else real rounding and AdamW, whose moments must survive as well."""
    mesh = make_mesh(data, tensor, devices=jax.devices()[: data * tensor])
    losses, params = (toys.linear_losses, toys.linear_params) if linear else (toys.tanh_losses, toys.tanh_params)
    return Toy(mesh, *pair.toy_problem(mesh, losses, params(), optax.sgd(1.0) if linear else optax.adamw(1e-2)))


def run(toy, state, windows, *, window=0, first=0, stop=None):
    """The state after the windows from `window` on, whose `first` micro-batches were added before, and a ledger.

    It ends before micro-batch `stop[1]` of window `stop[0]`, or after that window where it has no such micro-batch.
    """
    ledger = []
    for number in range(window, len(windows)):
        count = len(windows[number])
        for index in range(first if number == window else 0, count):
            if stop == (number, index):
                return state, ledger
            batch = put_micro_batch(toy.mesh, windows[number][index])
            state = toy.step(state, batch, jax.numpy.asarray(index == count - 1))
        ledger.append(to_host(state.report))
        if stop == (number, count):
            break
    return state, ledger


def checkpoints(folder):
    return open_checkpoints(folder, keep_last=2, keep_best=0, fingerprint={"toy": 1})


def saved_inside(toy, folder, after):
    """Runs to `after` micro-batches into the window `STOPPED`, and saves; the ledger rows until then."""
    state, ledger = run(toy, toy.fresh(), toy_windows(), stop=(STOPPED, after))
    with checkpoints(folder) as saved:
        saved.save(STOPPED, state, {"window": STOPPED, "next": after}, metric=None, wait=True)
    return ledger


def resumed(toy, folder, windows=None):
    """The end of the run that the folder's checkpoint stands in, and the ledger rows since."""
    with checkpoints(folder) as saved:
        restored = saved.restore_latest(toy.fresh())
    windows = toy_windows() if windows is None else windows
    window, first = restored.host["window"], restored.host["next"]
    if first == len(windows[window]):
        window, first = window + 1, 0
    return run(toy, restored.state, windows, window=window, first=first)


def bits(tree):
    """Every leaf's dtype, shape and bytes."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(to_host(tree))]
    return [(leaf.dtype.str, leaf.shape, leaf.tobytes()) for leaf in leaves]


@pytest.fixture(scope="module")
def toy():
    return make_toy()


@pytest.fixture(scope="module")
def linear():
    return make_toy(linear=True)


@pytest.fixture(scope="module")
def whole(toy):
    """(final state, ledger) of the run that nobody stopped."""
    state, ledger = run(toy, toy.fresh(), toy_windows())
    assert [int(row.status) for row in ledger] == [Status.UPDATED] * 3
    return to_host(state), ledger


@pytest.mark.parametrize("after", range(len(SPLITS[STOPPED]) + 1))
def test_t17_resume_after_every_micro_batch_is_bitwise(toy, whole, tmp_path, after):
    """Parameters, moments, sums, totals, every report: saved after so many micro-batches of six, and finished."""
    before = saved_inside(toy, tmp_path, after)
    state, since = resumed(toy, tmp_path)
    assert bits(state) == bits(whole[0])
    assert bits([*before, *since]) == bits(whole[1])


def finish_here(folder: str) -> None:
    """Finishes the saved run in this process and leaves its leaves beside the checkpoint."""
    state, since = resumed(make_toy(), folder)
    np.savez(Path(folder) / "end.npz", *jax.tree.leaves((to_host(state), since)))


def test_t17_resume_in_a_new_process_is_bitwise(toy, whole, tmp_path):
    before = saved_inside(toy, tmp_path, ELSEWHERE_AFTER)
    code = f"from tests.proofs.test_resumed_windows import finish_here; finish_here({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(tmp_path / "end.npz") as found:
        leaves = [found[f"arr_{place}"] for place in range(len(found.files))]
    assert bits(leaves) == bits((whole[0], whole[1][len(before) :]))


def test_t17_a_resume_that_loses_the_sums_or_the_count_is_seen(toy, tmp_path):
    """What the tests above would see: without the open sums the witness refuses the window and names where."""
    state, _ = run(toy, toy.fresh(), toy_windows(), stop=(STOPPED, 3))
    empty = dataclasses.replace(state, chains=toy.fresh().chains)
    _, ledger = run(toy, empty, toy_windows()[: STOPPED + 1], window=STOPPED, first=3)
    assert int(ledger[0].status) == Status.WITNESS_MISMATCH
    assert int(ledger[0].bad_micro_batch) == 0


@pytest.mark.parametrize(("saved_on", "resumed_on"), [((8, 1), (4, 1)), ((8, 1), (1, 1)), ((4, 2), (2, 2))])
@pytest.mark.parametrize("after", [3, len(SPLITS[STOPPED])])
def test_t17_integers_resume_bitwise_on_another_mesh(linear, tmp_path, saved_on, resumed_on, after):
    """Inside the open window, and at its end: the same integers on fewer devices, and the int64 answer."""
    before = saved_inside(make_toy(*saved_on, linear=True), tmp_path, after)
    state, since = resumed(make_toy(*resumed_on, linear=True), tmp_path)
    expected, ledger = run(linear, linear.fresh(), toy_windows())
    assert bits(state) == bits(expected)
    assert bits([*before, *since]) == bits(ledger)
    answer = sum(
        np.einsum("bt,btf->f", batch.planes["toy"].weights, toys.FEATURE_TABLE[batch.target_tokens]).astype(np.int64)
        for window in toy_windows()
        for batch in window
    )
    moved = np.asarray(toys.linear_params()["policy"]["theta"]) - to_host(state.params["policy"]["theta"])
    assert np.array_equal(moved.astype(np.int64), answer)


# The same window cut otherwise


def split_otherwise(cuts):
    """The windows up to the stopped one, with the rows of that one cut in another way."""
    rng = np.random.default_rng(100 + STOPPED)
    tokens, mask = toys.rows_of(rng, pair.ROWS)
    other = toys.window(tokens, mask, rng.integers(0, 4, tokens.shape), cuts, pad_rows=pair.ROWS)
    return [*toy_windows()[:STOPPED], other]


def swapped_rows():
    """The split of the stopped window with two rows of equally many live tokens, one added and one not, exchanged."""
    mask = toys.rows_of(np.random.default_rng(100 + STOPPED), pair.ROWS)[1]
    cuts = pair.cut(SPLITS[STOPPED])
    live = mask.sum(axis=1)
    early, late = next((a, b) for a in cuts[1] for b in cuts[5] if live[a] == live[b] > 0)
    return [[{early: late, late: early}.get(row, row) for row in rows] for rows in cuts]


@pytest.mark.parametrize("lengths", [[2, 7, 0, 15], [2, 7, 0, 14, 1], [2, 7, 0, 1, 2, 3, 0, 4, 5]])
def test_t18_another_split_of_what_is_still_to_come_is_the_same_sum(linear, tmp_path, lengths):
    saved_inside(linear, tmp_path, 3)
    expected, _ = resumed(linear, tmp_path, toy_windows()[: STOPPED + 1])
    state, ledger = resumed(linear, tmp_path, split_otherwise(pair.cut(lengths)))
    assert int(ledger[0].status) == Status.UPDATED
    assert int(ledger[0].micro_batches) == len(lengths)
    assert bits(state.params) == bits(expected.params)


@pytest.mark.parametrize(
    ("cuts", "status", "named"),
    [
        (pair.cut([9, 0, 1, 8, 6]), Status.WITNESS_MISMATCH, 0),
        (pair.cut([2, 8, 0, 8, 6]), Status.WITNESS_MISMATCH, 1),
        (pair.cut([2, 3, 4, 1, 8, 6]), Status.WITNESS_MISMATCH, 1),
        (pair.cut([2, 7, 1, 8, 6]), Status.WITNESS_MISMATCH, 2),
        (swapped_rows(), Status.DIGEST_MISMATCH, 1),  # the counts are right, the samples are not
    ],
)
def test_t18_another_split_of_what_was_added_changes_nothing(toy, tmp_path, cuts, status, named):
    """Never silent: the window ends with the micro-batch named, and the checkpoint goes on under the right plan."""
    saved_inside(toy, tmp_path, 3)
    kept = restored(toy, tmp_path)
    untouched = bits((kept.params, kept.chains["policy"].optimizer))
    state, ledger = resumed(toy, tmp_path, split_otherwise(cuts))
    assert (int(ledger[0].status), int(ledger[0].bad_micro_batch)) == (status, named)
    assert bits((state.params, state.chains["policy"].optimizer)) == untouched
    assert bits(restored(toy, tmp_path)) == bits(kept)
    _, again = resumed(toy, tmp_path)
    assert [int(report.status) for report in again] == [Status.UPDATED] * 2


def restored(toy, folder):
    with checkpoints(folder) as saved:
        return to_host(saved.restore_latest(toy.fresh()).state)
