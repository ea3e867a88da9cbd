"""What a person or a machine can get wrong, met by a whole run: a clear message, or the run goes on and says so."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import hptjax.build.parts as build_parts
from hptjax import cli
from hptjax.build.parts import open_parts
from hptjax.build.run import train
from hptjax.config import Config, flatten, resolved
from hptjax.config_rollout import RewardFunction
from hptjax.config_text import inline_table
from hptjax.models import decoder
from hptjax.models.folder import save_folder
from hptjax.models.shape import DecoderConfig
from hptjax.rundir import held, run_folder
from hptjax.sharding.host import to_host
from hptjax.train.jsonl import read_rows
from tests import bad_verifiers, tiny
from tests.test_config import changed


def config_file(config: Config, path: Path) -> str:
    """The config as a TOML file of dotted keys."""
    lines = []
    for name, value in flatten(resolved(config)).items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(f"{name} = [{', '.join(inline_table(entry) for entry in value)}]")
        elif value is not None:
            lines.append(f"{name} = {json.dumps(value)}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def short(folder: Path, **changes) -> Config:
    """Two steps; dotted fields may be changed as `train__steps=3`."""
    fields = {"train__steps": 2, "train__eval_every": 0, "eval__train_questions": 0, **changes}
    return changed(tiny.tiny_config(folder), **fields)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__tokenizer": "nowhere"}, ["expected a tokenizer", "nowhere", "model."]),
        ({"model__path": "nowhere"}, ["expected config.json in nowhere", "model.path"]),
        ({"model__path": "x" * 5000}, ["expected config.json in xxx", "model.path"]),
        ({"model__tokenizer": "x" * 5000}, ["expected a tokenizer", "in xxx", "model."]),
        ({"data__max_prompt_tokens": 4}, ["prompt_too_long': 40", "change data.max_prompt_tokens (4)"]),
        ({"rollout__max_completion_tokens": 3}, ["demonstration_too_long': 40", "rollout.max_completion_tokens (3)"]),
        ({"task__instances": 2}, ["at least one question in the", "got none out of 2", "task.instances"]),
        (
            {"data__train_questions": 6, "data__max_prompt_tokens": 10, "task__high": 12, "eval__train_questions": 0},
            ["data.questions_per_step", "6"],
        ),
        ({"reward__functions": (RewardFunction("verfy"),)}, ["got ['verfy']", "change reward.functions"]),
        ({"rollout__stop_ids": (1, 999)}, ["rollout.stop_ids below the vocabulary of", "got [999]"]),
        ({"rollout__stop_ids": (-1,)}, ["rollout.stop_ids of at least 0, got [-1]"]),
        ({"mesh__data": 16, "batch__rows": 16, "rollout__prefill_rows": 16}, ["16", "mesh.data"]),
    ],
)
def test_bad_input_of_a_run_is_one_message_that_names_the_field(tmp_path, monkeypatch, capsys, changes, words):
    monkeypatch.chdir(tmp_path)
    status = cli.run(["train", config_file(short(tmp_path, **changes), tmp_path / "run.toml")])
    text = capsys.readouterr().err
    assert status == cli.BAD_INPUT
    assert text.startswith("hptjax train: ")
    assert text.count("\n") == 1
    for word in words:
        assert word in text
    assert not (tmp_path / "runs" / "tiny" / "metrics.jsonl").exists()


def test_bad_input_runs_dir_that_cannot_be_made_names_the_field(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    config = short(tmp_path, runs_dir=str(tmp_path / "file" / "runs"))
    assert cli.run(["train", config_file(config, tmp_path / "run.toml")]) == cli.BAD_INPUT
    assert "change runs_dir" in capsys.readouterr().err


def spoil(task, count):
    """The task with the first `count` demonstrations of a split wrong."""

    def write(instances, seed):
        examples = task.write(instances, seed)
        wrong = [dataclasses.replace(example, demonstration="1+1=2") for example in examples[:count]]
        return wrong + examples[count:]

    return dataclasses.replace(task, write=write)


def test_bad_demonstrations_are_dropped_counted_and_told(tmp_path, monkeypatch, capsys):
    make = build_parts.build_task
    monkeypatch.setattr(build_parts, "build_task", lambda task: spoil(make(task), 3))
    monkeypatch.setattr("hptjax.build.data.build_task", lambda task, corrupt: spoil(make(task, corrupt=corrupt), 3))
    config = short(tmp_path, train__steps=1, data__max_prompt_tokens=10, task__high=12)
    with open_parts(config) as parts:
        dropped = parts.questions.dropped["train"]
        too_long = dropped["prompt_too_long"]
        assert 0 < dropped["demonstration_unverified"] <= 3  # one that is too long is counted as that
        assert 0 < too_long < 30
        assert len(parts.questions.train) == 40 - too_long - dropped["demonstration_unverified"]
        assert all(question.example.demonstration != "1+1=2" for question in parts.questions.train)
    train(config)
    record = json.loads((tmp_path / "runs" / "tiny" / "data.json").read_text())
    assert record["dropped"]["train"] == dict(dropped)
    assert f"{dropped['demonstration_unverified']} train (demonstration unverified)" in capsys.readouterr().err


def test_bad_demonstrations_throughout_are_an_error(tmp_path, monkeypatch, capsys):
    make = build_parts.build_task
    monkeypatch.setattr("hptjax.build.data.build_task", lambda task, corrupt: spoil(make(task, corrupt=corrupt), 40))
    assert cli.run(["train", config_file(short(tmp_path), tmp_path / "run.toml")]) == cli.BAD_INPUT
    assert "'demonstration_unverified': 40" in capsys.readouterr().err


def test_bad_verifier_costs_the_reward_and_is_counted_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    """It raises, hangs or dies on some completions; the same run warns of truncated sampling and of unread choices."""
    make = build_parts.build_task

    def build_task(task):
        return dataclasses.replace(make(task), verify=bad_verifiers.solve_or_misbehave)

    monkeypatch.setattr(build_parts, "build_task", build_task)
    config = short(
        tmp_path,
        train__steps=1,
        reward__deadline_s=0.3,
        rollout__top_k=12,
        data__questions_per_step=12,
        hpt__kl_estimator="k1",
    )
    summary = train(config, quiet=True)
    folder = Path(summary["folder"])
    (row,) = [row for row in read_rows(folder / "metrics.jsonl") if "witness/ok" in row]
    judged = read_rows(folder / "rollouts" / "000001.jsonl")
    reasons = [entry["reason"] for entry in judged]
    assert row["verifier/timeouts"] == reasons.count("timeout") > 0
    failures = reasons.count("crashed") + reasons.count("raised: ValueError")
    assert row["verifier/failures"] == failures > reasons.count("crashed") > 0
    assert all(entry["reward"] == 0.0 for entry in judged if entry["reason"] in ("timeout", "crashed"))
    assert row["witness/ok"] == 1
    assert summary["steps"] == 1
    said = capsys.readouterr().err
    assert said.count("warning: training on truncated sampling (rollout.top_k 12") == 1
    assert said.count("note: without effect with method 'hpt': hpt.kl_estimator\n") == 1


def test_bad_second_process_in_a_run_folder_is_refused_before_it_writes(tmp_path):
    config = short(tmp_path)
    folder = run_folder(config)
    with held(folder), pytest.raises(ValueError, match="another process is training"):
        train(config, quiet=True)
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_bad_run_folder_that_lost_files_is_refused_and_nothing_of_it_changes(tmp_path):
    """Its record of the config, or rows of its metrics or ledger: going on would mix two runs, or sum up half a one."""
    config = short(tmp_path)
    folder = Path(tiny.train(config)["folder"])
    (folder / "summary.json").unlink()
    kept = {name: (folder / name).read_bytes() for name in ("config.json", "metrics.jsonl", "ledger.jsonl")}
    (folder / "config.json").unlink()
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"got no config\.json"):
        tiny.train(changed(config, optimizer__learning_rate=5.0))
    (folder / "config.json").write_bytes(kept["config.json"])
    with pytest.raises(ValueError, match=r"metrics\.jsonl to hold every step up to 2, .* got no step 0"):
        tiny.train(config)
    (folder / "metrics.jsonl").write_bytes(kept["metrics.jsonl"])
    (folder / "ledger.jsonl").write_bytes(kept["ledger.jsonl"].splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match=r"ledger\.jsonl to hold every step up to 2, .* got no step 2"):
        tiny.train(config)
    assert (folder / "metrics.jsonl").read_bytes() == kept["metrics.jsonl"]
    (folder / "ledger.jsonl").write_bytes(kept["ledger.jsonl"])
    assert tiny.train(config)["steps"] == 2


def write_model(
    folder: Path, tokenizer: Path, hidden_size: int, *, vocab_size: int = 32, max_positions: int = 256
) -> None:
    """A model folder of a random decoder with a tokenizer."""
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    sizes = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "mlp_size": 32, "qk_norm": True}
    sizes |= {"vocab_size": vocab_size, "hidden_size": hidden_size, "max_positions": max_positions}
    shape = DecoderConfig(tie_embeddings=True, **sizes)
    save_folder(folder, shape, to_host(decoder.init_params(jax.random.key(0), shape)), dtype="float32")


def damage(checkpoint: Path) -> None:
    """Cuts every file of a checkpoint in half."""
    for path in checkpoint.rglob("*"):
        if path.is_file() and path.stat().st_size > 1:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def last_parameters(config: Config) -> list[np.ndarray]:
    from hptjax.build.weights import load_weights

    with open_parts(config) as parts:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(to_host(load_weights(parts, "last")))]


def test_bad_checkpoint_truncated_of_another_model_or_all_unreadable(tmp_path, capsys):
    """The same run folder meets a newest checkpoint cut in half, then another model, then nothing readable."""
    config = short(tmp_path, train__steps=3, checkpoint__keep_best=0)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(tmp_path / "model")))
    write_model(tmp_path / "model", tmp_path / "tokenizer", 16)
    file = config_file(config, tmp_path / "run.toml")
    assert cli.run(["train", file]) == 0
    folder = tmp_path / "runs" / "tiny"
    expected = last_parameters(config)
    rows = [row["step"] for row in read_rows(folder / "metrics.jsonl")]

    (folder / "summary.json").unlink()
    newest = max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    damage(folder / "checkpoints" / str(newest))
    capsys.readouterr()
    assert cli.run(["train", file]) == 0
    assert f"checkpoint {newest}" in (text := capsys.readouterr().out)
    assert "cannot be read" in text
    for got, wanted in zip(last_parameters(config), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == rows

    (folder / "summary.json").unlink()
    write_model(tmp_path / "model", tmp_path / "tokenizer", 24)
    capsys.readouterr()
    assert cli.run(["train", file]) == cli.BAD_INPUT
    text = capsys.readouterr().err
    assert "model.hidden_size: checkpoint has 16, this run has 24" in text

    for checkpoint in (folder / "checkpoints").iterdir():
        damage(checkpoint)
    assert cli.run(["train", file]) == cli.BAD_INPUT
    assert "expected a readable checkpoint in" in capsys.readouterr().err


def test_bad_disk_full_at_a_checkpoint_keeps_the_last_good_one_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    """What a disk that is really full leaves behind is a test of the checkpoints; this is what the run makes of it."""
    save = ocp.CheckpointManager.save
    full = iter([False, True, True, False, True, True])  # each save is tried twice
    kept: list[list[int]] = []

    def save_on_a_full_disk(self, ordinal, **options):
        if not next(full):
            return save(self, ordinal, **options)
        kept.append(sorted(self.all_steps()))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", save_on_a_full_disk)
    config = short(tmp_path, train__steps=4, checkpoint__keep_best=0)
    summary = train(config, quiet=True)
    assert (summary["steps"], summary["witness_ok"]) == (4, True)
    assert kept == [[0], [0], [0, 1], [0, 1]]
    text = capsys.readouterr().err
    assert text.count("No space left on device; the run goes on") == 4
    assert len(last_parameters(config)) > 0  # of step 3
