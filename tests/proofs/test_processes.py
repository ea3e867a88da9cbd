"""One mesh over two real processes: the same integers bit for bit, the same decoder within the bound (spec T14, T32).

Both processes are started once per mesh, on one port of this machine; `two_processes.py` says what each computes.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from hptjax.sharding.host import to_host
from hptjax.train.accumulate import Status
from tests import recorded
from tests.child import with_devices
from tests.proofs import two_processes as pair

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT_S = 300  # of the pair; a process that waits for a dead one would wait for ever
UNIT_ROUNDOFF = 2.0**-24


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def started(folder: Path, mesh: str, port: int, index: int) -> subprocess.Popen:
    environment = with_devices(pair.DEVICES_EACH) | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    with (folder / f"log_{index}").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.proofs.two_processes", mesh, str(port), str(index), str(folder)],
            cwd=REPOSITORY,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def finish(processes: list[subprocess.Popen], folder: Path) -> None:
    """Waits for both; when one fails, or both take too long, the test fails with the end of their logs."""
    deadline = time.monotonic() + LIMIT_S
    while any(process.poll() is None for process in processes):
        failed = any(process.poll() not in (None, 0) for process in processes)
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    logs = "\n".join((folder / f"log_{index}").read_text()[-1500:] for index in range(2))
    assert [process.poll() for process in processes] == [0, 0], logs


@pytest.fixture(scope="module", params=[pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("8x1", "4x2")])
def both(request, tmp_path_factory):
    """What each of the two processes found on a mesh, by name."""
    folder = tmp_path_factory.mktemp("pair")
    pair.decoder_config(folder, 1, 1)  # writes the tokenizer, before two processes would
    port = free_port()
    processes = []
    try:
        processes = [started(folder, request.param, port, index) for index in range(2)]
        finish(processes, folder)
    finally:
        for process in processes:
            process.kill()  # SIGTERM only asks jax's processes to stop
            process.wait()
    found = []
    for index in range(2):
        with np.load(folder / f"process_{index}.npz") as arrays:
            found.append(dict(arrays))
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(what one process with one device finds, per update the bound of each leaf and the norms, [k leaf])."""
    policy, stage = pair.decoder_parts(tmp_path_factory.mktemp("alone"), 1, 1)
    bounds = {}
    for name, (gated, rolled) in pair.UPDATES.items():
        update = stage.assemble(recorded.mixed(gated, rolled), frozenset())
        parts = []
        for batch in update.micro_batches:
            leaves = to_host(pair.added(policy, stage, [batch], flush=False).chains["policy"].sums.gradients)
            parts.append([np.linalg.norm(np.ravel(leaf)) for leaf in jax.tree.leaves(leaves)])
        norms = np.asarray(parts, np.float64)
        factor = 16 * (len(parts) + np.sqrt(update.planned_tokens.sum())) * UNIT_ROUNDOFF
        bounds[name] = (factor * norms.sum(axis=0), norms, update.planned_tokens)
    return pair.decoder_results(policy, stage, pair.UPDATES), bounds


def leaves(found, name):
    return [found[key] for key in sorted(found) if key.startswith(f"{name}/")]


def test_t14_two_processes_hold_the_same_bits(both):
    assert set(both[0]) == set(both[1])
    assert [name for name in both[0] if both[0][name].tobytes() != both[1][name].tobytes()] == []


@pytest.mark.parametrize("window", pair.WINDOWS)
def test_t14_two_processes_sum_integers_bitwise(both, window):
    """Uneven windows, an empty micro-batch, all tokens on the first or on the last device: the int64 answer."""
    batches = pair.toy_window(window)
    planned = batches[0].planned_tokens
    answer = pair.integer_answer()
    assert np.abs(answer).max() > 0
    for found in both:
        got = {name: found[f"{window}/{name}"] for name in ("gradient", "witness", "tokens", "status")}
        assert got["status"] == Status.UPDATED
        assert np.array_equal(got["gradient"].astype(np.int64), answer)
        assert np.array_equal(got["gradient"], answer.astype(np.float32))
        assert got["witness"].dtype == np.float32
        assert got["witness"].tobytes() == planned.astype(np.float32).tobytes()
        assert got["tokens"] == planned.sum()


@pytest.mark.parametrize(("window", "shards"), [("first", {0}), ("last", {7}), ("one", set(range(8)))])
def test_t14_two_processes_windows_lie_where_their_names_say(window, shards):
    name = next(name for name in pair.WINDOWS if name.endswith(window) or f"the {window} device" in name)
    live = [batch.completion_mask.any(axis=1) for batch in pair.toy_window(name)]
    assert {int(row) * 8 // pair.ROWS for rows in live for row in np.flatnonzero(rows)} == shards


@pytest.mark.parametrize("update", pair.UPDATES)
def test_t14_two_processes_sum_decoder_gradients_within_the_bound(both, alone, update):
    expected, bounds = alone
    bound, norms, _ = bounds[update]
    assert len(norms) >= 2
    assert (norms > 100 * bound[None, :]).all()  # the gap rule: a lost micro-batch would be seen in every leaf
    for found in both:
        sums = leaves(found, f"{update}/sums")
        for got, want, limit in zip(sums, leaves(expected, f"{update}/sums"), bound, strict=True):
            assert np.linalg.norm(np.ravel(got.astype(np.float64) - want.astype(np.float64))) <= limit


@pytest.mark.parametrize("update", pair.UPDATES)
def test_t14_two_processes_count_tokens_of_the_decoder_bitwise(both, alone, update):
    planned = alone[1][update][2]
    for found in both:
        assert found[f"{update}/status"] == Status.UPDATED
        assert found[f"{update}/witness"].tobytes() == planned.astype(np.float32).tobytes()
        assert found[f"{update}/tokens"] == planned.sum()


@pytest.mark.parametrize("update", pair.UPDATES)
def test_t14_two_processes_apply_the_same_adamw_update(both, alone, update):
    """Contract 3: every entry within 2 lr of the one-device parameters."""
    rate = 1e-3
    for found in both:
        pairs = zip(leaves(found, f"{update}/params"), leaves(alone[0], f"{update}/params"), strict=True)
        assert max(np.abs(got - want).max() for got, want in pairs) <= 2 * rate


def test_t32_two_processes_log_sums_and_counts_of_all_rows(both, alone):
    """A logged loss is one sum over one count, whatever rows each process holds; so is the held-out loss."""
    expected = alone[0]
    names = [name for name in expected if "/stats/" in name]
    assert any(name.endswith("sft/loss") for name in names)
    for found in both:
        for name in names:
            assert found[name][1] == expected[name][1]
            np.testing.assert_allclose(found[name][0], expected[name][0], rtol=1e-5, atol=1e-5)
        assert found["held out"][1] == expected["held out"][1]
        np.testing.assert_allclose(found["held out"][0], expected["held out"][0], rtol=1e-6)
