"""Two real processes train one model: the same run as in one, together through faults, and none waits for ever.

`multihost_pair.py` is what each of the processes does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import hptjax.build.parts as build_parts
import hptjax.build.run as build_run
from hptjax import cli
from hptjax.config import DistributedConfig, MeshConfig
from hptjax.models import decoder, folder_slices
from hptjax.models.folder import load_folder, save_folder
from hptjax.models.folder_slices import folder_shape, load_placed, read_part
from hptjax.models.keys import CheckpointKey
from hptjax.models.shape import DecoderConfig
from hptjax.rundir import check_seen, mark
from hptjax.sharding import distributed
from hptjax.sharding.host import to_host
from hptjax.sharding.mesh import make_mesh
from hptjax.sharding.peers import pack, unpack
from hptjax.sharding.rules import named_shardings
from hptjax.train.accumulate import Status
from tests import child, recorded, tiny
from tests.multihost_pair import INSIDE, STEPS, compiled_once, pair_config, save_inside_a_window, taken_up
from tests.test_bad_input import config_file

REPOSITORY = Path(__file__).resolve().parents[1]
LIMIT_S = 400  # of a pair; so that a hang is a failure and no hang
ACTS = ["whole", "row:bad_row", "worker:worker", "stop:stop", "stop", "late:late"]
CLOCKS = ("time", "perf/", "timing_s/")


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return str(listener.getsockname()[1])


def started(folder: Path, port: str, index: int, acts: list[str]) -> subprocess.Popen:
    with (folder / f"log_{index}").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.multihost_pair", str(folder), port, str(index), *acts],
            cwd=REPOSITORY,
            env=child.with_devices(1),
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def statuses(folder: Path, acts: list[str], *, only: int | None = None) -> list[int | None]:
    """What two processes end with; None of one that is killed here, once the only one that is waited for has ended."""
    pair_config(folder, "tokenizer")  # written before two processes would write it
    port, end = free_port(), time.monotonic() + LIMIT_S
    processes = []
    try:
        processes = [started(folder, port, index, acts) for index in range(2)]
        watched = processes if only is None else [processes[only]]
        while any(process.poll() is None for process in watched) and time.monotonic() < end:
            time.sleep(0.05)
        return [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def log(folder: Path, index: int) -> str:
    return (folder / f"log_{index}").read_text()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(folder, policy, stage) of the same run in one process on one device; and a checkpoint of another in `one`."""
    folder = tmp_path_factory.mktemp("alone")
    config = dataclasses.replace(pair_config(folder, "whole"), mesh=MeshConfig(devices=1))
    with compiled_once():
        tiny.train(config)
        policy = build_parts.build_policy(config)
        stage = build_run.build_stages(config, policy, recorded.questions())[0]
    save_inside_a_window(policy, stage, folder / "one")
    return folder, policy, stage


@pytest.fixture(scope="module")
def pair(alone, tmp_path_factory):
    """(folder, what became of each act in each process): all of them in one pair of processes."""
    folder = tmp_path_factory.mktemp("pair")
    shutil.copytree(alone[0] / "one", folder / "one")
    assert statuses(folder, ACTS) == [0, 0], log(folder, 0)[-1500:] + log(folder, 1)[-1500:]
    return folder, [json.loads((folder / f"outcome_{index}.json").read_text()) for index in range(2)]


def rows(folder: Path, name: str, file: str) -> list[dict]:
    """The rows of a file of a run, without what depends on the clock."""
    entries = [json.loads(line) for line in (folder / "runs" / name / file).read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(CLOCKS)} for row in entries]


def same_numbers(got: list[dict], expected: list[dict]) -> None:
    """Counts, digests and names exactly, floats within contract 3's 1e-4."""
    assert [sorted(row) for row in got] == [sorted(row) for row in expected]
    for row, wanted in zip(got, expected, strict=True):
        for key, value in wanted.items():
            if "checksum" in key or "logp_diff" in key:  # sizes of rounding errors
                continue
            if isinstance(value, float):
                np.testing.assert_allclose(row[key], value, rtol=1e-4, atol=1e-6, err_msg=key)
            elif isinstance(value, int | str) or "digest" in key or key.endswith("by_term"):
                assert row[key] == value, key


@pytest.mark.parametrize("file", ["ledger.jsonl", "metrics.jsonl"])
def test_multihost_run_is_the_run_of_one_process(pair, alone, file):
    folder, _ = pair
    expected = rows(alone[0], "whole", file)
    assert len(expected) == {"ledger.jsonl": STEPS, "metrics.jsonl": STEPS + 2}[file]
    same_numbers(rows(folder, "whole", file), expected)


def test_multihost_rollouts_are_those_of_one_process(pair, alone):
    (folder, _), gates = pair, set()
    for path in sorted((alone[0] / "runs/whole/rollouts").iterdir()):
        expected = [json.loads(line) for line in path.read_text().splitlines()]
        got = [json.loads(line) for line in (folder / "runs/whole/rollouts" / path.name).read_text().splitlines()]
        assert got == expected
        gates |= {row["gate"] for row in expected}
    assert gates == {"RL", "SFT"}  # both, or this test proves little


def test_multihost_both_processes_return_the_summary(pair):
    _, outcomes = pair
    first, second = (outcome["whole"]["summary"] for outcome in outcomes)
    assert first == second
    assert (first["steps"], first["witness_ok"]) == (STEPS, True)


@pytest.mark.parametrize(
    ("act", "status", "where", "why"),
    [
        ("row:bad_row", 1, "preparing the questions", "got row 17 without one"),
        ("worker:worker", 2, "preparing the questions", "expected reward.functions to name functions that a worker"),
    ],
)
def test_multihost_error_in_one_process_ends_both_by_name(pair, act, status, where, why):
    there, here = (outcome[act] for outcome in pair[1])
    assert (there["status"], here["status"]) == (status, status)
    assert here["message"].startswith("ValueError: ")
    assert why in here["message"]
    assert there["message"].startswith(f"FailedElsewhere: process 1 failed at '{where}': ValueError: ")
    assert why in there["message"]


def test_multihost_sigterm_in_one_process_stops_both_and_the_run_goes_on(pair):
    """A reward worker that dies in one process costs at most one demonstration, the same in both, and stops nobody."""
    folder, outcomes = pair
    stopped = [outcome["stop:stop"] for outcome in outcomes]
    assert [(end["status"], end["message"]) for end in stopped] == [(0, "stopped")] * 2
    lost = [end["dropped"]["validation"]["demonstration_unverified"] for end in stopped]
    assert lost in ([0, 0], [1, 1])  # the worker may have died before it began the first
    assert [outcome["stop"]["status"] for outcome in outcomes] == [0, 0]
    assert rows(folder, "stop", "ledger.jsonl") == rows(folder, "whole", "ledger.jsonl")


def test_multihost_late_process_is_an_error_with_its_name(pair):
    there, here = (outcome["late:late"] for outcome in pair[1])
    waited = "process 0 waited 2 s at 'judging samples' for process 1 (distributed.timeout_s): process 1 was last at"
    assert there["message"].startswith(f"FailedElsewhere: {waited} 'reward'")
    assert here["message"].startswith(f"FailedElsewhere: process 0 failed at 'judging samples': {waited}")
    assert there["status"] == here["status"] == 1


@pytest.mark.parametrize("way", ["one process to two", "two processes to one"])
def test_t17_multihost_run_moves_between_process_counts(pair, alone, way):
    """Saved inside an open window: its counts bitwise, its losses and the next five within 1e-4 (contract 3)."""
    (folder, _), (saved, policy, stage) = pair, alone
    expected = taken_up(policy, stage, saved / "one")
    assert expected["status"] == Status.UPDATED
    assert expected["micro_batches"] > 2 * INSIDE
    if way == "one process to two":
        found = []
        for index in range(2):
            with np.load(folder / f"moved_{index}.npz") as arrays:
                found.append(dict(arrays))
    else:
        found = [taken_up(policy, stage, folder / "two")]
    for moved in found:
        for name in ("status", "tokens", "micro_batches", "witness"):
            assert np.array_equal(moved[name], expected[name]), name
        np.testing.assert_allclose(moved["losses"], expected["losses"], rtol=1e-4)


@pytest.mark.slow
def test_multihost_killed_process_ends_the_other_and_both_started_again_finish(pair, tmp_path):
    """Through the command line: SIGKILL in the third step, an error in bounded time, then the run of nobody's death."""
    began = time.monotonic()
    killed = statuses(tmp_path, ["cli", "whole:kill"])
    assert killed == [1, -9]
    assert time.monotonic() - began < LIMIT_S
    assert "process 1" in log(tmp_path, 0)
    assert "go on from the last checkpoint" in log(tmp_path, 0)
    assert [row["step"] for row in rows(tmp_path, "whole", "ledger.jsonl")] == [1, 2]
    assert statuses(tmp_path, ["cli", "whole"]) == [0, 0]
    assert rows(tmp_path, "whole", "ledger.jsonl") == rows(pair[0], "whole", "ledger.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["freeze", "freeze_saving"])
def test_multihost_frozen_process_ends_the_other(tmp_path, fault):
    """In words of the meeting that it did not come to, also where the way out of it waits for the frozen one."""
    assert statuses(tmp_path, ["cli", f"whole:{fault}"], only=0) == [1, None]
    assert "process 0 waited 2 s at 'judging samples' for process 1" in log(tmp_path, 0)


@pytest.mark.slow
def test_multihost_frozen_first_process_ends_the_other(tmp_path):
    """It holds the store: every question to it hangs, the watchdog's too."""
    assert statuses(tmp_path, ["cli", "whole:freeze_first"], only=1) == [None, 1]
    assert "no answer from process 0 for 6 s (distributed.timeout_s)" in log(tmp_path, 1)


@pytest.mark.slow
def test_multihost_process_that_never_comes_to_a_program_ends_the_other(tmp_path):
    """The other waits inside a program on the devices: only the watchdog's thread can end it, and then the first."""
    assert statuses(tmp_path, ["cli", "whole:stuck"]) == [1, 1]
    assert "s at 'update' for process 1 (distributed.timeout_s): process 1 was last at 'update'" in log(tmp_path, 0)
    assert "hptjax: process 0 failed at 'update'" in log(tmp_path, 1)


@pytest.mark.slow
def test_multihost_checkpoint_that_one_process_cannot_write_ends_both(tmp_path):
    """The other waits inside orbax for the write that never comes, where orbax itself would wait for 20 minutes."""
    assert statuses(tmp_path, ["cli", "whole:full"]) == [2, 2]
    assert "hptjax: process 1 failed at 'checkpoint': CheckpointFailed: a checkpoint could not be" in log(tmp_path, 0)
    assert "File too large" in log(tmp_path, 0)
    assert [path.name for path in (tmp_path / "runs/whole/checkpoints").glob("[0-9]")] == ["0"]


# Without a second process

TASK = dict.fromkeys(distributed.SLURM_FIELDS, "1") | {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "gpu[01-04,7]"}


@pytest.mark.parametrize(
    ("fields", "environment", "words"),
    [
        (("explicit", None, 2, None), {}, ["distributed.coordinator, distributed.process", "set them"]),
        (("explicit", "host", 2, 0), {}, ["host:port", "got 'host'", "distributed.coordinator"]),
        (("explicit", "host:65536", 2, 0), {}, ["host:port", "got 'host:65536'"]),
        (("explicit", "host:1", 0, 0), {}, ["distributed.processes >= 1, got 0"]),
        (("explicit", "host:1", 2, 2), {}, ["distributed.process in 0..1", "got 2"]),
        (("auto", "host:1", None, None), {}, ["distributed.coordinator only with distributed.mode = 'explicit'"]),
        (("none", None, 2, 0), {}, ["distributed.processes, distributed.process only with", "got 'none'"]),
        (("slurm", None, None, None), {"SLURM_JOB_ID": "1"}, ["SLURM_PROCID", "srun", "distributed.mode"]),
        (("slurm", None, None, None), TASK | {"SLURM_LOCALID": "a"}, ["SLURM_LOCALID", "got 'a'", "srun"]),
        (("slurm", None, None, None), TASK | {"SLURM_GPUS_ON_NODE": ""}, ["SLURM_GPUS_ON_NODE", "got ''"]),
        (("slurm", None, None, None), TASK | {"SLURM_PROCID": "2"}, ["below SLURM_NTASKS (2)", "got 2"]),
    ],
)
def test_multihost_fields_that_do_not_fit_are_refused_by_name(fields, environment, words):
    with pytest.raises(ValueError, match="distributed") as refused:
        distributed.check_fields(*fields, environment)
    assert all(word in str(refused.value) for word in words), refused.value


def test_multihost_fields_that_fit_pass():
    distributed.check_fields("explicit", "[::1]:8476", 4, 3, {})
    distributed.check_fields("none", None, None, None, {})
    distributed.check_fields("slurm", None, None, None, TASK)


def test_multihost_wrong_fields_are_refused_before_anything_is_written(tmp_path):
    config = dataclasses.replace(tiny.tiny_config(tmp_path), distributed=DistributedConfig(mode="explicit"))
    with pytest.raises(ValueError, match=r"expected distributed\.coordinator"):
        tiny.train(config)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["eval", "sample", "compare"])
def test_multihost_other_commands_are_for_one_process(tmp_path, capsys, command):
    config = dataclasses.replace(tiny.tiny_config(tmp_path), distributed=DistributedConfig(mode="auto"))
    assert cli.run([command, config_file(config, tmp_path / "run.toml")]) == cli.BAD_INPUT
    assert f"one process for `hptjax {command}`, got distributed.mode = 'auto'" in capsys.readouterr().err


def test_multihost_no_cluster_is_an_error_that_says_what_to_set():
    """In a process of its own: this one has used its devices already."""
    script = "from hptjax.sharding.distributed import initialize; initialize('auto', connect_s=5)"
    ended = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert "ValueError: expected to join the other processes by distributed.mode = 'auto'" in ended.stderr
    assert "distributed.coordinator" in ended.stderr


def test_multihost_processes_that_do_not_come_are_an_error_that_says_what_to_check():
    """In a process of its own: jax itself would abort it."""
    call = f"initialize('explicit', coordinator='localhost:{free_port()}', processes=2, process=1, connect_s=1)"
    script = f"from hptjax.sharding.distributed import initialize; {call}"
    ended = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == cli.BAD_INPUT
    assert "within 1 s, got no answer from all of them; check that distributed.coordinator is host:port" in ended.stderr


def test_multihost_port_that_is_taken_is_refused():
    with socket.create_server(("", 0), family=socket.AF_INET) as taken:
        coordinator = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=r"expected a free port.*change distributed\.coordinator"):
            distributed.initialize("explicit", coordinator=coordinator, processes=2, process=0)


def test_multihost_nothing_touches_a_device_before_the_processes_have_joined():
    script = (
        "import hptjax.build, hptjax.cli; from jax._src import xla_bridge; "
        "assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({}, None),  # a CPU node
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_LOCALID": "0"}, list(range(8))),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_LOCALID": "3"}, [6, 7]),
        (
            {
                "SLURM_GPUS_ON_NODE": "8",
                "CUDA_VISIBLE_DEVICES": "4,5",
                "SLURM_STEP_TASKS_PER_NODE": "4",
                "SLURM_LOCALID": "2",
            },
            [0, 1],  # bound by Slurm: all that it sees
        ),
    ],
)
def test_multihost_slurm_task_takes_its_gpus(environment, devices):
    assert distributed.slurm_local_devices(environment) == devices


def test_multihost_slurm_gpus_that_do_not_divide_are_refused():
    environment = {"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_LOCALID": "0"}
    with pytest.raises(ValueError, match=r"8 GPUs of a node to divide over its 3 tasks.*--ntasks-per-node"):
        distributed.slurm_local_devices(environment)


def test_multihost_run_folder_that_another_process_does_not_see_is_refused(tmp_path):
    sign = mark(tmp_path)
    check_seen(tmp_path, sign)
    (tmp_path / "elsewhere").mkdir()
    for folder, told in ((tmp_path / "elsewhere", sign), (tmp_path, "of an earlier start"), (tmp_path / "none", sign)):
        with pytest.raises(ValueError, match=r"every process to see the run folder.*set runs_dir"):
            check_seen(folder, told)


def test_multihost_packed_bytes_come_back():
    parts = [b"", b"abc", bytes(range(256)) * 3]
    assert unpack(pack(parts)) == parts
    assert unpack(pack([])) == []


# What a process reads of a model folder


class Stored:
    """A stored tensor that counts the numbers that were read of it."""

    def __init__(self, array: np.ndarray):
        self.array, self.read = array, 0

    def __getitem__(self, index):
        part = self.array[index]
        self.read += part.size
        return part


@pytest.mark.parametrize(
    ("path", "input_axes", "shape", "ranges"),
    [
        (("layers", "query"), 1, (3, 8, 4, 6), ((0, 3), (4, 8), (2, 4), (0, 6))),  # [L D H E], D and H cut
        (("layers", "output"), 2, (3, 4, 6, 8), ((1, 3), (2, 4), (0, 6), (0, 4))),  # [L H E D]
        (("layers", "query_bias"), None, (3, 4, 6), ((0, 3), (1, 3), (0, 6))),  # stored [H E] as one axis
        (("embedding",), None, (10, 8), ((5, 10), (4, 8))),
        (("unembedding",), 1, (8, 10), ((0, 8), (5, 10))),
    ],
)
def test_multihost_part_of_a_parameter_reads_no_more_than_itself(path, input_axes, shape, ranges):
    name = ".".join(path) + (".{layer}" if path[0] == "layers" else "") + (".bias" if path[-1] == "query_bias" else "")
    entry = CheckpointKey(path, name, input_axes)
    whole = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    layers = whole if path[0] == "layers" else [whole]
    stored = {name.format(layer=number): Stored(entry.to_stored(layer)) for number, layer in enumerate(layers)}
    part = read_part(entry, shape, ranges, stored.__getitem__)
    np.testing.assert_array_equal(part, whole[tuple(slice(*each) for each in ranges)])
    assert sum(tensor.read for tensor in stored.values()) == part.size


def test_multihost_part_along_an_inner_axis_is_cut_after_reading():
    entry = CheckpointKey(("layers", "query"), "q.{layer}", 1)
    whole = np.arange(2 * 8 * 4 * 6, dtype=np.float32).reshape(2, 8, 4, 6)
    stored = {f"q.{number}": Stored(entry.to_stored(layer)) for number, layer in enumerate(whole)}
    part = read_part(entry, whole.shape, ((0, 2), (0, 8), (0, 4), (3, 6)), stored.__getitem__)
    np.testing.assert_array_equal(part, whole[..., 3:6])


@pytest.mark.parametrize("at_once_bytes", [0, 4 * 2 * 8 * 8, 1 << 20], ids=["layers", "some", "whole"])
@pytest.mark.parametrize("stored_dtype", ["float32", "bfloat16"])
def test_multihost_folder_is_placed_on_a_mesh_as_it_is_read_whole(
    tmp_path, eight_devices, stored_dtype, at_once_bytes, monkeypatch
):
    """Stacked parameters layer by layer, or whole, or those that are small whole and the rest layer by layer."""
    monkeypatch.setattr(folder_slices, "AT_ONCE_BYTES", at_once_bytes)
    config = DecoderConfig(
        vocab_size=16, hidden_size=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_size=16,
        attention_bias=True, qk_norm=False, tie_embeddings=False,
    )  # fmt: skip
    params = to_host(decoder.init_params(jax.random.key(0), config))
    save_folder(tmp_path, config, params, dtype=stored_dtype)
    mesh = make_mesh(fsdp=2, tensor=4, devices=eight_devices)
    shardings = named_shardings(mesh, decoder.logical_axes(config), shapes=decoder.param_shapes(config))
    assert folder_shape(tmp_path) == config
    placed, expected = load_placed(tmp_path, shardings), load_folder(tmp_path)[1]
    assert jax.tree.structure(placed) == jax.tree.structure(expected)
    for leaf, whole, sharding in zip(*map(jax.tree.leaves, (placed, expected, shardings)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        np.testing.assert_array_equal(to_host(leaf), whole)
    assert not placed["layers"]["query"].sharding.is_fully_replicated
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_placed(tmp_path, shardings)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["slurm", "auto"])
def test_multihost_slurm_tasks_find_each_other(mode):
    """Two tasks of a step on this machine, by the variables that srun sets; asking twice does nothing."""
    job = os.getpid()  # jax takes the port from it
    script = (
        "import sys, jax; from hptjax.sharding.distributed import initialize; from hptjax.sharding.peers import gather;"
        f"initialize({mode!r}, connect_s=60); initialize({mode!r});"
        "print(jax.process_count(), jax.device_count(), gather(sys.argv[1].encode(), 'a test'))"
    )
    step = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1"}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", script, f"task {index}"],
            cwd=REPOSITORY,
            env=child.with_devices(1) | step | {"SLURM_NTASKS": "2", "SLURM_PROCID": str(index), "SLURM_LOCALID": "0"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        printed = [task.communicate(timeout=LIMIT_S)[0] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert all("2 2 [b'task 0', b'task 1']" in text for text in printed), printed
