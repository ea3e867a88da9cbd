"""Runs of adapters: they alone are trained and kept, rollouts and exports merge them, a run starts from a folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

from hptjax import cli
from hptjax.audit.certificate import certify
from hptjax.build.adapters import as_used, with_frozen
from hptjax.build.export import export_run
from hptjax.build.frozen import add_frozen, make_score
from hptjax.build.policy import build_policy
from hptjax.build.step import build_step
from hptjax.config import StageConfig
from hptjax.config_check import check
from hptjax.config_lora import LoraConfig
from hptjax.explain import explain
from hptjax.inspection import inspect, report_text
from hptjax.losses.estimator import Need
from hptjax.model_shape import adapter_count, asked_adapter
from hptjax.models.folder import load_folder
from hptjax.models.lora import merged
from hptjax.models.lora_config import TARGETS, AdapterShape, read_adapter_shape
from hptjax.models.lora_folder import save_adapter
from hptjax.records import Request, SampleId
from hptjax.sharding.host import to_host
from hptjax.train.checkpoint_read import read_leaves, saved_checkpoints
from hptjax.train.jsonl import read_rows
from tests import tiny
from tests.test_bad_input import config_file, write_model
from tests.test_config import changed
from tests.test_lora import ALL, slow_merged


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of adapters of rank 2 on a model folder."""
    place = tmp_path_factory.mktemp("lora")
    base = tiny.tiny_config(place)
    write_model(place / "model", Path(base.model.tokenizer), 16)
    base = changed(base, model__path=str(place / "model"), model__tokenizer=None, lora__rank=2, lora__alpha=6.0)
    return changed(base, train__steps=2, train__eval_every=1, optimizer__learning_rate=0.02)


@pytest.fixture(scope="module")
def run(config):
    """Its folder, after two steps."""
    return Path(tiny.train(config)["folder"])


def adapters_of(folder):
    saved = saved_checkpoints(folder / "checkpoints")[-1]
    leaves = read_leaves(saved, [name for name in saved.leaves if name.startswith("params.policy.")])
    return traverse_util.unflatten_dict({tuple(name.split(".")[2:]): value for name, value in leaves.items()})


def test_lora_run_trains_adapters_and_keeps_state_for_nothing_else(config, run):
    saved = saved_checkpoints(run / "checkpoints")[-1]
    model = load_folder(config.model.path)[0]
    trained = adapter_count(model, AdapterShape(2, 6.0, ALL))
    inside = {name: text[text.index("[") + 1 : -1].split(",") for name, text in saved.leaves.items()}
    sizes = {name: int(np.prod([int(size) for size in text if size])) for name, text in inside.items()}
    assert sum(size for name, size in sizes.items() if name.startswith("params.policy.")) == trained
    moments = [size for name, size in sizes.items() if ".optimizer." in name and size > 1]
    assert sum(moments) == 2 * trained
    assert not [name for name in saved.leaves if "embedding" in name or "norm" in name.split(".")[-1]]
    found = adapters_of(run)
    assert all(np.abs(factors["b"]).max() > 0 for factors in found["layers"].values())
    ledger = read_rows(run / "ledger.jsonl")
    assert [row["status"] for row in ledger] == ["updated"] * len(ledger)
    data = json.loads((run / "data.json").read_text())
    assert data["parameters"] == trained
    assert data["frozen_parameters"] == sum(leaf.size for leaf in jax.tree.leaves(load_folder(config.model.path)[1]))


@pytest.mark.slow
def test_lora_run_that_was_stopped_ends_with_the_same_bits(config, run, tmp_path):
    first = changed(config, runs_dir=str(tmp_path), train__steps=1)
    tiny.train(first)
    again = Path(tiny.train(changed(first, train__steps=2))["folder"])
    jax.tree.map(np.testing.assert_array_equal, adapters_of(again), adapters_of(run))


def test_lora_export_merges_or_writes_an_adapter_that_a_run_starts_from(config, run, tmp_path, capsys):
    said = export_run(run, tmp_path / "merged", dtype="float32")
    assert said.endswith("adapters merged")
    shape, params = load_folder(config.model.path)
    found = load_folder(tmp_path / "merged")
    assert found[0] == shape
    slow = slow_merged(shape, params, adapters_of(run), 3.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found[1], slow)
    assert np.array_equal(found[1]["embedding"], params["embedding"])
    assert not np.array_equal(found[1]["layers"]["up"], params["layers"]["up"])

    status = cli.run(["export", str(run), str(tmp_path / "adapter"), "--adapter", "--dtype", "float32"])
    assert (status, "adapters of" in capsys.readouterr().out) == (0, True)
    assert "adapters of rank 2, alpha 6, on q_proj" in inspect(run)["notes"][0]
    readable = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_mode
    assert readable == (tmp_path / "merged" / "model.safetensors").stat().st_mode
    assert cli.run(["convert", str(tmp_path / "adapter"), str(tmp_path / "out")]) == cli.BAD_INPUT
    assert "PEFT adapter" in capsys.readouterr().err
    report = inspect(tmp_path / "adapter")
    assert (report["kind"], report["problems"], report["totals"]["tensors"]) == ("PEFT adapter", [], 2 * 2 * 7)
    assert "rank 2, alpha 6, on q_proj" in report_text(report)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        config.model.path
    )
    onward = changed(config, lora__rank=None, lora__alpha=None, lora__adapter=str(tmp_path / "adapter"))
    assert asked_adapter(onward) == AdapterShape(2, 6.0, ALL)
    policy = build_policy(onward)
    jax.tree.map(np.testing.assert_array_equal, to_host(policy.params), adapters_of(run))
    with pytest.raises(ValueError, match=r"expected lora\.rank to be that of the adapter in .* \(2\), got 4"):
        asked_adapter(changed(onward, lora__rank=4))


def test_lora_export_of_a_stabilised_run_on_an_edited_model_says_both(config, run, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    record = json.loads((moved / "config.json").read_text())
    record["model"]["rope_theta"] = 40_000.0
    (moved / "config.json").write_text(json.dumps(record))
    path = saved_checkpoints(moved / "checkpoints")[-1].path / "record" / "metadata"
    text = json.loads(path.read_text())
    text["fingerprint"]["lora"]["rank_stabilised"] = True
    path.write_text(json.dumps(text))
    said = export_run(moved, tmp_path / "out", as_adapter=True)
    assert said.endswith("which were trained with rope_theta 40000.0 in its config.json")
    assert read_adapter_shape(tmp_path / "out") == AdapterShape(2, 6.0, ALL, rank_stabilised=True)


@pytest.mark.slow
def test_lora_on_a_mesh_trains_as_on_one_device_and_exports_itself_merged(config, tmp_path, eight_devices):
    """Two SFT steps of rank 3, which no mesh cuts: adapters agree as sums in another order do."""
    adapted_run = changed(
        config, method="sft", lora__rank=3, runs_dir=str(tmp_path / "one"), optimizer__learning_rate=1e-3
    )
    one = adapters_of(Path(tiny.train(adapted_run)["folder"]))
    on_mesh = changed(
        adapted_run,
        runs_dir=str(tmp_path / "two"),
        mesh__fsdp=2,
        mesh__devices=2,
        mesh__rollout_rules="replicated",
        checkpoint__export_folder=str(tmp_path / "out"),
    )
    two = adapters_of(Path(tiny.train(on_mesh)["folder"]))
    for path, value in traverse_util.flatten_dict(one).items():
        other = traverse_util.flatten_dict(two)[path]
        assert np.linalg.norm(other - value) < 1e-3 * np.linalg.norm(value), path
    expected = slow_merged(*load_folder(config.model.path), two, 2.0)
    found = load_folder(tmp_path / "out")[1]
    for path, value in traverse_util.flatten_dict(found).items():
        np.testing.assert_allclose(value, traverse_util.flatten_dict(expected)[path], rtol=2**-8, atol=1e-6)


def test_lora_export_refuses_another_base_and_a_run_without_adapters(config, run, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    other = tmp_path / "model"
    write_model(other, Path(config.model.path), 24)
    record = json.loads((moved / "config.json").read_text())
    record["model"]["path"] = str(other)
    (moved / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"expected the base model of the run .* use --adapter"):
        export_run(moved, tmp_path / "out")
    saved = saved_checkpoints(moved / "checkpoints")[-1]
    path = saved.path / "record" / "metadata"
    text = json.loads(path.read_text())
    del text["fingerprint"]["lora"]
    path.write_text(json.dumps(text))
    with pytest.raises(ValueError, match="leave --adapter out"):
        export_run(moved, tmp_path / "out", as_adapter=True)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_lora_rollouts_use_merged_weights_and_leave_the_model_in_place(config, dtype):
    """Two samplings; then the same from the merged folder's own weights, token for token."""
    policy = build_policy(changed(config, model__compute_dtype=dtype))
    shape = policy.config
    adapters = jax.tree.map(lambda leaf: leaf + 0.2, policy.params)
    requests = [Request(SampleId(n, 0, 0), np.array([1, 5 + n, 9], np.int32), 8, frozenset()) for n in range(3)]
    first, second = (policy.sample(adapters, requests, jax.random.key(3)) for _ in range(2))
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves((policy.frozen.trees, policy.params, adapters)))
    plain = build_policy(changed(config, lora__rank=None, lora__alpha=None, model__compute_dtype=dtype))
    assert policy.frozen.trees["base"]["layers"]["up"].dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves((plain.params, policy.params))} == {np.dtype(np.float32)}
    base = as_used(jax.device_put(load_folder(config.model.path)[1]), dtype=dtype)  # as it is held
    whole = merged(base, to_host(adapters), 3.0)
    third = plain.sample(jax.device_put(whole, plain.shardings), requests, jax.random.key(3))
    for one, two, three in zip(first, second, third, strict=True):
        assert one.completion_tokens.tolist() == two.completion_tokens.tolist() == three.completion_tokens.tolist()
        np.testing.assert_allclose(one.sampler_logprobs, three.sampler_logprobs, rtol=0, atol=1e-5)
    base = plain.sample(plain.params, requests, jax.random.key(3))
    assert any(
        not np.allclose(one.sampler_logprobs, other.sampler_logprobs, atol=1e-3)
        for one, other in zip(first, base, strict=True)
        if len(one.sampler_logprobs) == len(other.sampler_logprobs)
    )
    assert shape == plain.config


def test_lora_reference_is_the_start_or_the_model_without_adapters(config, tmp_path):
    """Fresh adapters change nothing, so both are the plain model's log-probs; of adapters that were read, one is."""
    fresh, plain = build_policy(config), build_policy(changed(config, lora__rank=None, lora__alpha=None))
    far = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.2), to_host(fresh.params))
    save_adapter(tmp_path, fresh.config, far, AdapterShape(2, 6.0, ALL), dtype="float32", base=None)
    started = build_policy(changed(config, lora=LoraConfig(adapter=str(tmp_path))))
    stage = StageConfig(method="hpt", steps=1)
    empty = build_step(config, stage, plain.token_stats, plain.params, plain.shardings, plain.mesh).empty
    tokens, live = np.arange(96, dtype=np.int32).reshape(2, 48) % 30, np.ones((2, 48), bool)
    batch = dataclasses.replace(
        empty,
        input_tokens=tokens,
        target_tokens=np.roll(tokens, -1, 1),
        segment_ids=live.astype(np.int32),
        positions=np.tile(np.arange(48, dtype=np.int32), (2, 1)),
        completion_mask=live,
    )

    def reference(policy, word):
        score = make_score(policy.token_stats)
        own = with_frozen(policy.frozen, lambda trees, batch: score(policy.frozen.policy_of(trees), batch))
        asked = changed(config, model__reference=word)
        fill = add_frozen(
            asked, policy, lambda params, batch: own({"policy": params}, batch), frozenset({Need.REFERENCE_LOGPROBS})
        )
        return np.asarray(fill(batch).reference_logprobs)

    wanted = reference(plain, "start")
    assert np.std(wanted) > 0
    assert np.array_equal(reference(fresh, "base"), wanted)
    np.testing.assert_allclose(reference(fresh, "start"), wanted, rtol=0, atol=2e-6)  # another program
    assert np.array_equal(reference(started, "base"), wanted)
    assert np.abs(reference(started, "start") - wanted).max() > 1e-3
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(started.frozen.trees)) == sum(
        leaf.nbytes for leaf in jax.tree.leaves(plain.params)
    )


@pytest.mark.parametrize("method", ["hpt", "ppo"])
def test_lora_step_has_its_certificate(config, method):
    """The traced step adds every adapter's gradient once; the model's weights have no sums and no outputs."""
    policy = build_policy(config)
    step = build_step(
        changed(config, method=method),
        StageConfig(method=method, steps=1),
        policy.token_stats,
        policy.params,
        policy.shardings,
        policy.mesh,
        frozen=policy.frozen,
    )
    planes = [f"planes.{name}.weights" for name in step.empty.planes if name != "value"]
    reads = {"policy": ["params", "target_tokens", *planes]} | ({"critic": ["params"]} if method == "ppo" else {})
    leaves = certify(step.micro_step, step.state, step.empty, gradients_read=reads).leaves
    names = {leaf.name for leaf in leaves if "gradients" in leaf.name and ".critic." not in leaf.name}
    assert names == {f"chains.policy.sums.gradients.layers.{TARGETS[t][0]}.{f}" for t in ALL for f in "ab"}


def test_lora_fields_are_checked_and_explained(config, tmp_path, capsys):
    check(config)
    for change, words in (
        ({"lora__rank": 0}, "lora.rank of at least 1"),
        ({"lora__alpha": 0.0}, "lora.alpha above 0"),
        ({"lora__targets": ("q_proj", "q_proj")}, "distinct names in lora.targets"),
        ({"lora__targets": ()}, "distinct names in lora.targets"),
        ({"lora__rank": None}, "lora.rank beside lora.alpha"),
        ({"lora__rank": None, "lora__alpha": None, "lora__targets": ("q_proj",)}, "lora.rank beside lora.targets"),
        ({"model__path": None, "model__tokenizer": config.model.path}, "a model folder that the adapters belong to"),
    ):
        with pytest.raises(ValueError, match=words):
            check(changed(config, **change))
    text = explain(changed(config, lora__targets=("q_proj", "up_proj"), model__reference="base"))
    assert f"{2 * 2 * (16 + 16 + 16 + 32):,} in adapters of rank 2 on q_proj, up_proj" in text
    assert "Not known here" not in text
    file = config_file(config, tmp_path / "run.toml")
    assert cli.run(["upge", file]) == cli.BAD_INPUT
    assert "knows no adapters" in capsys.readouterr().err
