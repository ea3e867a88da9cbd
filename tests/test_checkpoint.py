"""Checkpoints: bit for bit, whatever kills the save; other models refused; a full disk survived."""

from __future__ import annotations

import contextlib
import os
import pathlib
import resource
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hptjax.sharding.words import word_sum
from hptjax.train.checkpoint import CheckpointFailed, CheckpointUnreadable, open_checkpoints
from hptjax.train.checkpoint_content import checksums, differences
from hptjax.train.checkpoint_manager import meet
from hptjax.train.state import init_state
from hptjax.types import Peak, SumCount
from tests.child import with_devices

FINGERPRINT = {"model": {"hidden_size": 16, "num_layers": 2}, "method": "hpt"}


def a_state(seed: int, width: int = 16):
    """Parameters, an optimizer state (named tuples, empty states), keys, counters, bool and bfloat16 leaves."""
    weights = jax.random.normal(jax.random.key(seed), (2, width, width))
    params = {"layers": {"wq": weights, "gain": jnp.ones((2, width), jnp.bfloat16)}, "none": None}
    return {
        "params": params,
        "optimizer": optax.adamw(1e-3).init(params["layers"]),
        "keys": jax.random.split(jax.random.key(seed + 1), 3),
        "step": jnp.asarray(seed, jnp.int32),
        "done": jnp.asarray([True, False, True]),
        "empty": jnp.zeros((0, 4), jnp.float32),
    }


def words(tree):
    return [
        np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
        for leaf in jax.tree.leaves(tree)
    ]


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
    for a, b in zip(words(one), words(other), strict=True):
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()


def opened(folder, **changes):
    return open_checkpoints(folder, **{"keep_last": 2, "keep_best": 1, "fingerprint": FINGERPRINT, **changes})


def files_of(folder: pathlib.Path, ordinal: int) -> list[pathlib.Path]:
    return sorted((p for p in (folder / str(ordinal)).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_checkpoint_gives_back_every_bit(tmp_path):
    host = {"position": 7, "nested": {"verdicts": [[1.5, True, "ok"]]}, "tuple": (1, 2), "float": 0.1 + 0.2}
    arrays = {"tokens/0": np.arange(5, dtype=np.int32), "empty": np.zeros((0, 2)), "half": np.ones(3, np.float16)}
    state = a_state(3)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(4, state, host, arrays, metric=None)
    with opened(tmp_path) as checkpoints:
        restored, host_back, arrays_back = checkpoints.restore_latest(a_state(0))
    assert_same(restored, state)
    assert host_back == {**host, "tuple": [1, 2], "step": 4}
    assert arrays_back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert arrays_back[name].dtype == array.dtype
        assert np.array_equal(arrays_back[name], array)


def test_checkpoint_of_a_train_state_between_micro_batches(tmp_path):
    params = {"policy": {"w": jax.random.normal(jax.random.key(0), (4, 3))}}
    stats = {"sft/loss": SumCount(jnp.zeros(()), jnp.zeros(())), "rollout/logp_diff_max": Peak(jnp.zeros(()))}
    fresh = init_state(params, {"policy": optax.adamw(1e-3)}, stats, 4)
    filled = [jnp.full_like(leaf, place) for place, leaf in enumerate(jax.tree.leaves(fresh))]
    half_way = jax.tree.unflatten(jax.tree.structure(fresh), filled)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, half_way, {}, metric=None)
        assert_same(checkpoints.restore_latest(fresh).state, half_way)


def test_checkpoint_of_an_empty_folder_is_none(tmp_path):
    with opened(tmp_path / "absent" / "yet") as checkpoints:
        assert checkpoints.restore_latest(a_state(0)) is None
        assert checkpoints.restore_best(a_state(0)) is None


def test_checkpoint_restores_into_the_templates_shardings(tmp_path, eight_devices):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=eight_devices)

    def placed(spec, array):
        return jax.device_put(array, NamedSharding(mesh, spec))

    weights = np.arange(128.0, dtype=np.float32).reshape(8, 16)
    keys = jax.random.split(jax.random.key(2), 8)
    saved = {
        "w": placed(PartitionSpec("data", "tensor"), weights),
        "keys": placed(PartitionSpec("data"), keys),
        "n": jnp.asarray(3, jnp.int32),
    }
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, saved, {}, metric=None)
        turned = {
            "w": placed(PartitionSpec("tensor"), np.zeros_like(weights)),
            "keys": placed(PartitionSpec(), keys),
            "n": jnp.asarray(0, jnp.int32),
        }
        restored = checkpoints.restore_latest(turned).state
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), saved)
        from_shapes = checkpoints.restore_latest(shapes).state
    for name in saved:
        assert restored[name].sharding.is_equivalent_to(turned[name].sharding, turned[name].ndim), name
        assert from_shapes[name].sharding.is_equivalent_to(saved[name].sharding, saved[name].ndim), name
    assert not restored["n"].committed
    assert_same(jax.device_get({"w": restored["w"]}), {"w": weights})
    assert_same(from_shapes, saved)
    assert words(restored["keys"])[0].tobytes() == words(keys)[0].tobytes()


def test_checkpoint_survives_the_donation_of_what_it_saves(tmp_path):
    spoil = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    state = {name: jnp.full((256, 256), place, jnp.float32) for place, name in enumerate("abcdefgh")}
    expected = jax.tree.map(np.array, state)
    template = jax.tree.map(jnp.copy, state)
    with opened(tmp_path) as checkpoints:
        for step in range(4):
            checkpoints.save(step, state, {}, metric=None)
            spoiled = spoil(state)
            assert all(leaf.is_deleted() for leaf in state.values())
            jax.block_until_ready(spoiled)
            assert_same(jax.tree.map(np.array, checkpoints.restore_latest(template).state), expected)
            state = jax.tree.map(jnp.asarray, expected)


def test_checkpoint_of_a_step_saved_before_is_the_next_ordinal(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(5, a_state(1), {"micro": 0}, metric=None)
        checkpoints.save(5, a_state(2), {"micro": 3}, metric=None, wait=True)
        assert [(entry.ordinal, entry.step) for entry in checkpoints.entries()] == [(0, 5), (1, 5)]
        restored = checkpoints.restore_latest(a_state(0))
    assert_same(restored.state, a_state(2))
    assert restored.host == {"step": 5, "micro": 3}


def test_checkpoint_template_may_depend_on_where_the_run_stood(tmp_path):
    stages = [{"a": jnp.zeros(2)}, {"a": jnp.zeros(2), "b": jnp.zeros(3)}]
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.ones(2), "b": jnp.ones(3)}, {"stage": 1}, metric=0.5)
        for restore in (checkpoints.restore_latest, checkpoints.restore_best):
            assert_same(restore(lambda host: stages[host["stage"]]).state, {"a": jnp.ones(2), "b": jnp.ones(3)})
        with pytest.raises(ValueError, match="b: checkpoint has float32"):
            checkpoints.restore_latest(lambda host: stages[0])


def test_checkpoint_keeps_the_last_and_the_best(tmp_path):
    metrics = [0.1, 0.9, None, 0.9, 0.3, float("nan"), 0.2]
    with opened(tmp_path, keep_last=2, keep_best=1) as checkpoints:
        for step, metric in enumerate(metrics[:5]):
            checkpoints.save(step, {"x": jnp.asarray(step)}, {}, metric=metric)
    with opened(tmp_path, keep_last=2, keep_best=1) as checkpoints:  # metrics are found again in a new process
        for step, metric in enumerate(metrics[5:], start=5):
            checkpoints.save(step, {"x": jnp.asarray(step)}, {}, metric=metric)
        checkpoints.wait()
        assert [(entry.step, entry.metric) for entry in checkpoints.entries()] == [(3, 0.9), (5, None), (6, 0.2)]
        assert int(checkpoints.restore_best({"x": jnp.asarray(0)}).state["x"]) == 3
        assert int(checkpoints.restore_latest({"x": jnp.asarray(0)}).state["x"]) == 6
    with opened(tmp_path, keep_last=1, keep_best=0) as checkpoints:
        checkpoints.save(7, {"x": jnp.asarray(7)}, {}, metric=0.95, wait=True)
        assert [entry.step for entry in checkpoints.entries()] == [7]


def test_checkpoint_reader_leaves_the_folder_of_a_run_under_way_alone(tmp_path):
    """Neither the save that is being written nor a damaged checkpoint is the reader's to remove or to rename."""
    with opened(tmp_path, keep_last=3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, a_state(step), {}, metric=None)
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir()  # what a save looks like before its rename
    for path in files_of(tmp_path, 1):
        path.write_bytes(b"")
    before = sorted(path.name for path in tmp_path.iterdir())
    with opened(tmp_path, read_only=True, report=lambda text: None) as checkpoints:
        assert checkpoints.restore_latest(a_state(0)).host["step"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    with opened(tmp_path, report=lambda text: None) as checkpoints:
        checkpoints.restore_latest(a_state(0))
    assert sorted(path.name for path in tmp_path.iterdir()) != before


def test_checkpoint_of_another_run_is_refused_by_field(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, a_state(1), {}, metric=0.5)
    other = {"model": {"hidden_size": 32, "num_layers": 2}, "method": "hpt", "new": 1}
    hidden = r"model\.hidden_size: checkpoint has 16, this run has 32; new: check"
    with opened(tmp_path, fingerprint=other) as checkpoints, pytest.raises(ValueError, match=hidden):
        checkpoints.restore_latest(a_state(0))
    with opened(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=r"params\.layers\.wq: checkpoint has float32\[2,16,16\], this run has fl"):
            checkpoints.restore_latest(a_state(0, width=8))
        with pytest.raises(ValueError, match=r"extra: checkpoint has nothing, this run has float32\[2\]"):
            checkpoints.restore_best({**a_state(0), "extra": jnp.zeros(2)})
        assert int(checkpoints.restore_latest(a_state(0)).state["step"]) == 1  # nothing was set aside by a refusal


@pytest.mark.parametrize("which", ["data", "record", "metadata", "one_bit"])
def test_checkpoint_damaged_falls_back_and_says_so(tmp_path, which):
    lines: list[str] = []
    rng = np.random.default_rng(0)
    noise = {"w": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32)}  # does not compress
    with opened(tmp_path) as checkpoints:
        for step in range(2):
            checkpoints.save(step, {**noise, "s": jnp.asarray(step)}, {"pad": "x" * 50}, {"a": np.ones(9)}, metric=0.5)
    candidates = files_of(tmp_path, 1)
    if which in ("data", "one_bit"):
        victim = candidates[-1]
    elif which == "record":
        victim = next(p for p in candidates if p.parent.name == "record" and p.name == "metadata")
    else:
        victim = next(p for p in candidates if p.parent.name == "state" and p.name == "_METADATA")
    content = victim.read_bytes()
    if which == "one_bit":
        place = len(content) - 3000  # inside the weights
        victim.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
    else:
        victim.write_bytes(content[: len(content) // 2])
    template = {"w": jnp.zeros((64, 64)), "s": jnp.asarray(0)}
    with opened(tmp_path, report=lines.append) as checkpoints:
        restored = checkpoints.restore_latest(template)
        assert (restored.host["step"], int(restored.state["s"])) == (0, 0)
        assert [line.partition(" in ")[0] for line in lines] == ["checkpoint 1"]
        assert "going on from checkpoint 0, step 0" in lines[0]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "unreadable-1"]
        assert checkpoints.restore_best(template).host["step"] == 0
        checkpoints.save(2, {**noise, "s": jnp.asarray(2)}, {}, metric=None, wait=True)
        assert [(entry.ordinal, entry.step) for entry in checkpoints.entries()] == [(0, 0), (2, 2)]


def test_checkpoint_with_none_readable_raises(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(0, a_state(0), {}, metric=None)
    for path in files_of(tmp_path, 0):
        path.write_bytes(path.read_bytes()[:10])
    damaged = pytest.raises(CheckpointUnreadable, match="expected a readable checkpoint")
    with opened(tmp_path) as checkpoints, damaged:
        checkpoints.restore_latest(a_state(0))
    assert (tmp_path / "0").is_dir()  # nothing is moved where nothing can take its place


@contextlib.contextmanager
def full_disk(limit: int):
    """No file may grow past `limit` bytes: writes fail with EFBIG, as they do with ENOSPC on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Where a write fails, orbax may leave other writes to finish in an event loop that it has closed; Python says so.
orbax_leftovers = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@orbax_leftovers
@pytest.mark.parametrize("limit", [0, 20_000])
def test_checkpoint_full_disk_keeps_the_last_good_one(tmp_path, limit):
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(128, 128)), jnp.float32)
    with opened(tmp_path, keep_last=1, keep_best=0) as checkpoints:
        checkpoints.save(0, {"w": noise}, {}, metric=None, wait=True)
        with full_disk(limit), pytest.raises(CheckpointFailed, match="the last good one is 0"):
            checkpoints.save(1, {"w": noise + 1}, {}, metric=0.9, wait=True)
        assert [path.name for path in tmp_path.iterdir() if path.name != "0"] == []  # the space is given back
        assert_same(checkpoints.restore_latest({"w": noise * 0}).state, {"w": noise})
        assert checkpoints.restore_best({"w": noise * 0}) is None
        checkpoints.save(2, {"w": noise + 2}, {}, metric=None, wait=True)  # training went on; there is space again
        assert_same(checkpoints.restore_latest({"w": noise * 0}).state, {"w": noise + 2})


def test_checkpoint_write_that_failed_waits_for_no_other_process(monkeypatch):
    """Orbax comes to its meetings in a `finally` too, which the others never come to."""
    waited = []
    monkeypatch.setattr(ocp.multihost, "get_barrier_sync_fn", lambda: lambda **meeting: waited.append(meeting))
    meet(key="written", timeout_ms=5)
    assert waited == [{"key": "written", "timeout_ms": 5}]

    def finish() -> None:
        try:
            raise OSError("disk full")
        finally:
            meet(key="done", timeout_ms=5)
            waited.append("came here")

    with pytest.raises(OSError, match="disk full"):
        finish()
    assert len(waited) == 1


@orbax_leftovers
def test_checkpoint_failure_in_the_background_surfaces_once_at_the_next_save(tmp_path):
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(128, 128)), jnp.float32)
    with opened(tmp_path) as checkpoints:
        with full_disk(20_000):
            try:
                checkpoints.save(0, {"w": noise}, {}, metric=None)
                while checkpoints.manager.is_saving_in_progress():
                    time.sleep(0.01)
                with pytest.raises(CheckpointFailed, match="there is no earlier one"):
                    checkpoints.save(1, {"w": noise}, {}, metric=None)
            except CheckpointFailed:  # the file was already too large before the background began
                pytest.fail("expected the first save to fail in the background")
        checkpoints.save(2, {"w": noise}, {}, metric=None)
    with opened(tmp_path) as checkpoints:
        assert [entry.step for entry in checkpoints.entries()] == [2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host": {"rows": [{"a": np.float32(1)}]}}, r"host\.rows\[0\]\.a: expected a JSON value, got float32"),
        ({"host": {"by_id": {3: 1}}}, r"host\.by_id: expected string keys, got 3"),
        ({"host": {"step": 4}}, "host\\['step'\\] is 4, but the checkpoint is of step 1"),
        ({"arrays": {"a": np.array([None])}}, r"arrays\['a'\]: expected a NumPy array"),
        ({"state": {"lr": 0.1}}, "state leaf 'lr': expected a jax array"),
    ],
)
def test_checkpoint_refuses_what_it_cannot_give_back(tmp_path, changes, message):
    with opened(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=message):
            checkpoints.save(
                1, changes.get("state", {"x": jnp.ones(2)}), changes.get("host", {}), changes.get("arrays"), metric=None
            )
        assert checkpoints.entries() == []


def test_checkpoint_refuses_counts_out_of_range(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint\.keep_last >= 1"):
        opened(tmp_path, keep_last=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_checksum_is_the_weighted_sum_of_words(dtype):
    array = jnp.asarray(np.random.default_rng(1).integers(0, 2, (3, 4, 5)), dtype)
    raw = np.asarray(array)
    flat = raw.reshape(-1).view(f"uint{8 * raw.dtype.itemsize}").tolist()
    expected = sum(word * (2 * place + 1) for place, word in enumerate(flat)) % 2**32
    assert int(jax.jit(word_sum)(array)) == expected


def test_checksum_does_not_depend_on_the_sharding(eight_devices):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=eight_devices)
    array = jax.random.normal(jax.random.key(0), (16, 8))
    split = jax.device_put(array, NamedSharding(mesh, PartitionSpec("data")))
    assert int(checksums({"a": split})[0]) == int(checksums({"a": array})[0])


def test_differences_names_nested_fields():
    assert differences({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 1, "c": 3}, "d": [1], "e": None}) == [
        "a.c: checkpoint has 2, this run has 3",
        "e: checkpoint has nothing, this run has None",
    ]


def test_checkpoint_save_returns_before_it_is_written(tmp_path, monkeypatch):
    """The thread that writes is held until the save has returned."""
    returned, held = threading.Event(), []
    rename = os.rename

    def rename_later(*names, **places):
        held.append(returned.wait(10))
        rename(*names, **places)

    monkeypatch.setattr(os, "rename", rename_later)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(3, {"w": jnp.ones((4, 8))}, {}, metric=None)
        assert not (tmp_path / "0").exists()
        returned.set()
        checkpoints.wait()
        assert (tmp_path / "0").is_dir()
    assert held
    assert all(held)  # a save that waited for its own thread would have waited in vain


@pytest.mark.timed
def test_checkpoint_blocks_a_small_model_for_less_than_50_ms(tmp_path):
    leaves = {
        name: jnp.ones((4, 128, 420), jnp.float32) for name in ("params", "mu", "nu", "sums")
    }  # 0.22 M each, 0.86 MB
    blocked = []
    with opened(tmp_path) as checkpoints:
        for step in range(6):
            start = time.perf_counter()
            checkpoints.save(step, leaves, {"rows": [[0.5] * 20] * 50}, metric=None)
            blocked.append(time.perf_counter() - start)
            checkpoints.wait()
    assert min(blocked[1:]) < 0.05, blocked  # the best of five: the machine may be busy


SAVE_UNTIL_KILLED = """
import sys
import jax, jax.numpy as jnp
from hptjax.train.checkpoint import open_checkpoints
checkpoints = open_checkpoints(sys.argv[1], keep_last=2, keep_best=1, fingerprint={})
restored = checkpoints.restore_latest({"w": jnp.zeros((200, 500)), "step": jnp.asarray(0)})
step = 0 if restored is None else restored.host["step"]
while True:
    step += 1
    state = {"w": jnp.full((200, 500), float(step)), "step": jnp.asarray(step)}
    checkpoints.save(step, state, {}, metric=float(step % 7))
    print(step, flush=True)
"""


def kill_while_saving(folder: pathlib.Path, rng: np.random.Generator) -> int:
    """Starts (or resumes) a process that saves without end, kills it at a random moment, returns its last step."""
    with subprocess.Popen(
        [sys.executable, "-c", SAVE_UNTIL_KILLED, str(folder)], stdout=subprocess.PIPE, text=True, env=with_devices(1)
    ) as process:
        assert process.stdout is not None
        first = int(process.stdout.readline())
        time.sleep(float(rng.uniform(0.02, 0.4)))
        process.send_signal(signal.SIGKILL)
        steps = [int(line) for line in process.stdout.read().split("\n")[:-1] if line]
    return max([first, *steps])


def check_after_kill(folder: pathlib.Path, last: int) -> None:
    template = {"w": jnp.zeros((200, 500)), "step": jnp.asarray(0)}
    with open_checkpoints(folder, keep_last=2, keep_best=1, fingerprint={}, report=pytest.fail) as checkpoints:
        restored = checkpoints.restore_latest(template)
    # a save begins only when the one before has ended: at most the last two can be missing
    step = 0 if restored is None else restored.host["step"]
    assert last - 2 <= step <= last + 1, (step, last)
    if restored is not None:
        assert int(restored.state["step"]) == step
        assert np.array_equal(restored.state["w"], np.full((200, 500), step, np.float32))
    assert not list(folder.glob("unreadable-*"))


def test_checkpoint_killed_during_a_save_leaves_a_good_one(tmp_path):
    check_after_kill(tmp_path, kill_while_saving(tmp_path, np.random.default_rng(0)))


@pytest.mark.slow
def test_checkpoint_killed_many_times_always_resumes(tmp_path):
    rng = np.random.default_rng(1)
    for _ in range(20):
        check_after_kill(tmp_path, kill_while_saving(tmp_path, rng))
