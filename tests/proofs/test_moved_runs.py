"""Real runs stopped inside a window: taken up on other devices, refused under another split (T17, T18)."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import hptjax.build.run as build_run
import hptjax.train.loop as loop
from hptjax.config import MeshConfig, changed_fields, resolved
from hptjax.rundir import read_json
from hptjax.sharding.host import to_host
from hptjax.train.accumulate import Status
from tests import recorded, tiny
from tests.proofs import two_processes as pair
from tests.proofs.test_resumed_windows import bits, checkpoints

UNIT_ROUNDOFF = 2.0**-24
STOPPED_STEP = 2  # counted from 1; the run has three


def config_of(folder):
    """Three on-policy steps of the tiny run, evaluated at its ends only."""
    config = tiny.tiny_config(folder)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3, eval_every=0))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """(config, micro-batches added) of a run that was stopped inside the open window of its second step."""
    config = config_of(tmp_path_factory.mktemp("stopped"))
    added = []

    def stopping_run(stages, state, progress, world, cadence):
        def should_stop():
            step = progress.open_step
            inside = progress.step == STOPPED_STEP - 1 and step is not None and step.micro_index >= 2
            added.extend([step.micro_index] if inside else [])
            return inside

        return loop.run(stages, state, progress, dataclasses.replace(world, should_stop=should_stop), cadence)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_run, "run", stopping_run)
        with pytest.raises(SystemExit):
            tiny.train(config)
    assert added == [2]
    return config


def taken_over(stopped, folder, **changes):
    """The stopped run's config with changes, its run folder copied to a new place."""
    shutil.copytree(Path(stopped.runs_dir), folder / "runs")
    return dataclasses.replace(stopped, runs_dir=str(folder / "runs"), **changes)


def rows(config, name):
    path = Path(config.runs_dir) / config.name / name
    return [json.loads(line) for line in path.read_text().splitlines()]


def saved_files(config):
    """Every file of the run's checkpoints and logs, by name; the lock and versions do not count."""
    folder = Path(config.runs_dir) / config.name
    names = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("lock", "versions.json")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("batch", "rows", 4),
        ("batch", "row_tokens", 64),
        ("batch", "max_segments", 3),
        ("batch", "max_micro_batches", 24),
        ("data", "questions_per_step", 4),
        ("train", "updates_per_rollout_batch", 2),
    ],
)
def test_t18_resume_with_another_split_is_refused_by_field(stopped, tmp_path, section, field, value):
    old = getattr(getattr(stopped, section), field)
    changed = taken_over(
        stopped, tmp_path, **{section: dataclasses.replace(getattr(stopped, section), **{field: value})}
    )
    before = saved_files(changed)
    with pytest.raises(ValueError, match=rf"{section}\.{field}: {old} -> {value}") as refused:
        tiny.train(changed)
    assert "change these back" in str(refused.value)
    assert saved_files(changed) == before


@pytest.fixture(scope="module")
def unmoved(stopped, tmp_path_factory):
    """The run taken up as it was, on one device, to its end."""
    config = taken_over(stopped, tmp_path_factory.mktemp("unmoved"))
    tiny.train(config)
    return config


def test_t17_resume_on_another_mesh_goes_on_inside_the_window(stopped, unmoved, tmp_path, eight_devices):
    """From one device to two: nothing missing or twice, and the open window's update is the one-device update."""
    config = taken_over(stopped, tmp_path, mesh=MeshConfig(data=2, devices=2))
    assert [row["step"] for row in rows(config, "ledger.jsonl")] == [1]
    tiny.train(config)
    assert [row["step"] for row in rows(config, "metrics.jsonl") if "witness/ok" in row] == [1, 2, 3]
    assert [row["step"] for row in rows(config, "metrics.jsonl") if "validation/pass@1" in row] == [0, 3]
    ledger, expected = rows(config, "ledger.jsonl"), rows(unmoved, "ledger.jsonl")
    assert [(row["step"], row["optimizer_step"], row["status"]) for row in ledger] == [
        (step, step, "updated") for step in (1, 2, 3)
    ]
    assert ledger[0] == expected[0]
    exact = ("window", "micro_batches_planned", "micro_batches", "tokens_planned", "tokens", "digest", "witness_ok")
    assert {name: ledger[1][name] for name in exact} == {name: expected[1][name] for name in exact}
    assert ledger[1]["micro_batches"] > 2  # some were added after the move
    np.testing.assert_allclose(ledger[1]["grad_norm"]["policy"], expected[1]["grad_norm"]["policy"], rtol=1e-5)
    losses, wanted = (rows(run, "metrics.jsonl")[2] for run in (config, unmoved))
    for name in ("sft/loss", "actor/rollout_nll"):
        np.testing.assert_allclose(losses[name], wanted[name], rtol=1e-4)
    assert read_json(Path(config.runs_dir) / config.name / "config.json")["mesh"]["data"] == 2


def test_t17_only_the_mesh_is_forgiven_beside_what_reaches_no_number(stopped):
    moved = dataclasses.replace(stopped, mesh=MeshConfig(data=2, tensor=2))
    assert changed_fields(resolved(stopped), resolved(moved)) == []
    both = dataclasses.replace(moved, batch=dataclasses.replace(moved.batch, rows=4))
    assert changed_fields(resolved(stopped), resolved(both)) == ["batch.rows: 2 -> 4"]


# The real decoder


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """data, tensor -> (policy, stage), made once."""
    folder, made = tmp_path_factory.mktemp("decoders"), {}

    def get(data, tensor):
        if (data, tensor) not in made:
            made[data, tensor] = pair.decoder_parts(folder, data, tensor)
        return made[data, tensor]

    return get


def update_of(stage, visit):
    """Twelve demonstrations and twenty groups: seven micro-batches or so."""
    return stage.assemble(recorded.mixed(12, 20, visit=visit), frozenset())


def save_decoder(policy, stage, folder, after):
    """A checkpoint after so many micro-batches of the first update; with all of them the update is made."""
    batches = update_of(stage, 0).micro_batches
    state = pair.added(policy, stage, batches[:after], flush=after == len(batches))
    with checkpoints(folder) as saved:
        saved.save(0, state, {"next": after}, metric=None, wait=True)


def restore_decoder(policy, stage, folder):
    with checkpoints(folder) as saved:
        return saved.restore_latest(stage.start({"policy": policy.params}, None)).state


def finished(policy, stage, state, after):
    """The state at the end of the first update and of one more, and what the two reported."""
    batches = update_of(stage, 0).micro_batches
    state = pair.added(policy, stage, batches[after:], flush=True, state=state)
    first = to_host(state.report)
    state = pair.added(policy, stage, update_of(stage, 1).micro_batches, flush=True, state=state)
    return to_host((state, first))


def test_t17_decoder_resumes_bitwise_after_every_micro_batch(decoders, tmp_path):
    policy, stage = decoders(1, 1)
    count = len(update_of(stage, 0).micro_batches)
    assert count >= 5
    expected = bits(finished(policy, stage, stage.start({"policy": policy.params}, None), 0))
    for after in range(1, count + 1):
        save_decoder(policy, stage, tmp_path / str(after), after)
        assert bits(finished(policy, stage, restore_decoder(policy, stage, tmp_path / str(after)), after)) == expected


def bound(policy, stage, update):
    """Accumulation spec 3.6, per leaf: 16 (k + sqrt(T)) u sum of the micro-batches' norms; and the norms [k leaf]."""
    parts = []
    for batch in update.micro_batches:
        sums = to_host(pair.added(policy, stage, [batch], flush=False).chains["policy"].sums.gradients)
        parts.append([np.linalg.norm(np.ravel(leaf)) for leaf in jax.tree.leaves(sums)])
    norms = np.asarray(parts, np.float64)
    return 16 * (len(parts) + np.sqrt(update.planned_tokens.sum())) * UNIT_ROUNDOFF * norms.sum(axis=0), norms


def next_losses(policy, stage, state):
    """Losses of the next five recorded updates, [5 2]."""
    losses = []
    for visit in range(1, 6):
        state = pair.added(policy, stage, update_of(stage, visit).micro_batches, flush=True, state=state)
        losses.append([float(to_host(state.report.stats[name].total)) for name in ("loss/sft", "loss/rl")])
    return np.asarray(losses)


@pytest.fixture(scope="module")
def on_one_device(decoders):
    """(bounds, norms, sums, losses) of the run that was never moved, on one device."""
    policy, stage = decoders(1, 1)
    update = update_of(stage, 0)
    sums = to_host(pair.added(policy, stage, update.micro_batches, flush=False).chains["policy"].sums)
    state = pair.added(policy, stage, update.micro_batches, flush=True)
    return *bound(policy, stage, update), sums, next_losses(policy, stage, state)


@pytest.mark.parametrize(
    ("saved_on", "resumed_on"),
    [
        pytest.param((4, 2), (1, 1), marks=pytest.mark.slow),
        pytest.param((8, 1), (1, 1), marks=pytest.mark.slow),
        pytest.param((8, 1), (2, 2), marks=pytest.mark.slow),
    ],
)
def test_t17_decoder_resumes_on_fewer_devices_within_the_bound(decoders, on_one_device, tmp_path, saved_on, resumed_on):
    """Saved inside the open window and at its end; counts bitwise, sums in the bound, the next five losses in 1e-4."""
    bounds, norms, expected, losses = on_one_device
    assert (norms > 100 * bounds[None, :]).all()  # the gap rule
    policy, stage = decoders(*resumed_on)
    update = update_of(stage, 0)
    batches, count = update.micro_batches, len(update.micro_batches)
    for after in (2, count):
        save_decoder(*decoders(*saved_on), tmp_path / str(after), after)
    inside = restore_decoder(policy, stage, tmp_path / "2")
    sums = to_host(pair.added(policy, stage, batches[2:], flush=False, state=inside).chains["policy"].sums)
    assert sums.witness.tobytes() == update.planned_tokens.astype(np.float32).tobytes()
    pairs = zip(jax.tree.leaves(sums.gradients), jax.tree.leaves(expected.gradients), bounds, strict=True)
    for got, want, limit in pairs:
        assert np.linalg.norm(np.ravel(got.astype(np.float64) - want.astype(np.float64))) <= limit
    inside = restore_decoder(policy, stage, tmp_path / "2")
    ends = [
        pair.added(policy, stage, batches[2:], flush=True, state=inside),
        restore_decoder(policy, stage, tmp_path / str(count)),
    ]
    for state in ends:
        assert int(to_host(state.report.status)) == Status.UPDATED
        np.testing.assert_allclose(next_losses(policy, stage, state), losses, rtol=1e-4)
