"""A run's checkpoint as a model folder, a folder in another dtype, and what `hptjax inspect` says of both."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hptjax import cli
from hptjax.build.export import export_run
from hptjax.build.parts import open_parts
from hptjax.build.policy import build_policy
from hptjax.build.weights import load_weights
from hptjax.config_check import check
from hptjax.config_load import read_file
from hptjax.data.tokenizer import load_tokenizer
from hptjax.inspection import inspect, report_text
from hptjax.models import folder
from hptjax.models.folder_copy import convert_folder
from hptjax.sharding.host import to_host
from hptjax.sharding.words import host_word_sum, word_sum
from hptjax.train.checkpoint_read import read_leaves, saved_checkpoints
from tests import tiny
from tests.test_bad_input import config_file, damage, write_model
from tests.test_config import changed
from tests.test_models import FAMILIES, random_params


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, run folder) of two steps from a model folder that has more than weights in it."""
    place = tmp_path_factory.mktemp("run")
    config = tiny.tiny_config(place)
    model = place / "model"
    write_model(model, Path(config.model.tokenizer), 16)
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(raw | {"eos_token_id": 2, "attention_dropout": 0.0}))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "temperature": 0.6}))
    (model / "chat_template.jinja").write_text("{{ messages }}")
    config = changed(config, train__steps=2, model__path=str(model), model__tokenizer=None)
    config = changed(config, train__eval_every=1, checkpoint__keep_last=2)
    return config, Path(tiny.train(config)["folder"])


def copied(run, tmp_path):
    """The run with a folder of its own, to be damaged."""
    config, _ = run
    shutil.copytree(run[1], tmp_path / "runs" / config.name)
    return changed(config, runs_dir=str(tmp_path / "runs")), tmp_path / "runs" / config.name


def trained(config, checkpoint="last"):
    """The policy's parameters by the road that the commands take, which restores the whole state."""
    with tiny.hashed(), open_parts(config) as parts:
        return jax.tree.map(np.asarray, to_host(load_weights(parts, checkpoint)))


def test_export_writes_the_checkpoints_own_weights_and_all_that_stood_beside_them(run, tmp_path):
    config, path = run
    said = export_run(path, tmp_path / "out", dtype="float32", shard_bytes=3000)
    assert f"step 2 of {path}" in said
    shape, params = folder.load_folder(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, params, trained(config))
    model, out = Path(config.model.path), tmp_path / "out"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    raw = json.loads((out / "config.json").read_text())
    assert (raw["eos_token_id"], raw["attention_dropout"], raw["hidden_size"]) == (2, 0.0, 16)
    assert (out / "model.safetensors.index.json").exists()
    policy = build_policy(changed(config, model__path=str(out)))
    assert (policy.stop_ids, policy.config) == ({2, 5}, shape)
    assert inspect(out)["problems"] == []


def test_export_by_command_from_a_config_and_in_bfloat16(run, tmp_path, capsys):
    config, path = run
    file = config_file(config, tmp_path / "run.toml")
    assert cli.run(["export", file, str(tmp_path / "out")]) == 0
    assert f"{tmp_path / 'out'}: step 2 of {path}" in capsys.readouterr().out
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    rounded = jax.tree.map(lambda v: v.astype(ml_dtypes.bfloat16).astype(np.float32), trained(config))
    jax.tree.map(np.testing.assert_array_equal, folder.load_folder(tmp_path / "out")[1], rounded)


def test_export_takes_the_best_checkpoint_by_its_metric(run, tmp_path):
    config, path = copied(run, tmp_path)
    first, last = saved_checkpoints(path / "checkpoints")[-2:]
    for saved, metric in ((first, 0.9), (last, 0.1)):
        record = saved.path / "record" / "metadata"
        record.write_text(json.dumps(json.loads(record.read_text()) | {"metric": metric}))
    export_run(path, tmp_path / "best", checkpoint="best", dtype="float32")
    export_run(path, tmp_path / "last", checkpoint="last", dtype="float32")
    best, newest = (folder.load_folder(tmp_path / name)[1] for name in ("best", "last"))
    jax.tree.map(np.testing.assert_array_equal, best, trained(config, "best"))
    jax.tree.map(np.testing.assert_array_equal, newest, trained(config, "last"))
    assert not np.array_equal(best["embedding"], newest["embedding"])


def test_export_passes_over_a_damaged_checkpoint_and_says_so(run, tmp_path, capsys):
    _, path = copied(run, tmp_path)
    *_, before, newest = saved_checkpoints(path / "checkpoints")
    damage(newest.path / "state")
    assert f"step {before.step} of" in export_run(path, tmp_path / "out")
    assert f"checkpoint {newest.ordinal} in {path / 'checkpoints'} cannot be read" in capsys.readouterr().out
    for saved in saved_checkpoints(path / "checkpoints"):
        damage(saved.path / "state")
    with pytest.raises(ValueError, match=r"expected a last checkpoint that can be read in .*, found none"):
        export_run(path, tmp_path / "out")


def test_export_refuses_another_tokenizer_and_a_folder_that_is_no_run(run, tmp_path):
    _, path = run
    from hptjax.data.tokenizer import make_character_tokenizer

    make_character_tokenizer("0123", tmp_path / "other")
    with pytest.raises(ValueError, match=r"expected the tokenizer that .* was trained with"):
        export_run(path, tmp_path / "out", tokenizer=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="expected a run folder with its config"):
        export_run(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_refuses_to_write_over_what_it_reads(run, repository, capsys):
    config, path = run
    before = (path / "config.json").read_bytes()
    for out, what in ((path, "the run itself"), (config.model.path, "its model")):
        with pytest.raises(ValueError, match=f"expected another folder to write to, got .*, which is {what}"):
            export_run(path, Path(out))
        with pytest.raises(
            ValueError, match=r"another folder for the exported model.* change checkpoint\.export_folder"
        ):
            check(changed(config, checkpoint__export_folder=f"{out}/"))
    assert (path / "config.json").read_bytes() == before
    check(read_file(repository / "configs" / "base_model.toml"))  # beside its tokenizer a model from scratch may go
    assert cli.run(["convert", str(path), str(path / "out")]) == cli.BAD_INPUT
    assert "got the run folder" in capsys.readouterr().err


def test_export_leaves_no_template_of_another_model_and_takes_those_with_names_along(run, tmp_path):
    config, path = run
    model = tmp_path / "model"
    shutil.copytree(config.model.path, model)
    for name in (
        "additional_chat_templates/tool_use.jinja",
        "additional_chat_templates/rag.jinja",
        "added_tokens.json",
    ):
        stale = tmp_path / "out" / name
        stale.parent.mkdir(parents=True, exist_ok=True)
        stale.write_text("of another model")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    export_run(path, tmp_path / "out", tokenizer=str(model))
    assert sorted(file.name for file in (tmp_path / "out").rglob("*.jinja")) == [
        "chat_template.jinja",
        "tool_use.jinja",
    ]
    assert not (tmp_path / "out" / "added_tokens.json").exists()
    assert load_tokenizer(tmp_path / "out").chat_template == {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    convert_folder(tmp_path / "out", tmp_path / "converted")
    assert load_tokenizer(tmp_path / "converted").chat_template == load_tokenizer(model).chat_template


@pytest.mark.slow
def test_export_of_a_model_from_scratch_says_what_ends_a_completion(tmp_path):
    config = tiny.tiny_config(tmp_path)
    config = changed(config, train__steps=1, train__eval_every=0, checkpoint__export_folder=str(tmp_path / "own"))
    path = Path(tiny.train(config)["folder"])
    export_run(path, tmp_path / "out")
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    tokenizer = load_tokenizer(tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == tokenizer.eos_token_id


@pytest.mark.parametrize("dtype", ["float32", "int32", "uint16", "bool", "bfloat16", "float64"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5, 7)])
def test_checksum_of_a_host_array_is_that_of_the_device(dtype, shape, monkeypatch):
    monkeypatch.setattr("hptjax.sharding.words.HOST_WORDS", 16)  # several parts
    value = (np.random.default_rng(0).normal(0, 100, shape)).astype(
        ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    )
    if dtype == "float64":
        words = value.reshape(-1).view(np.uint32).astype(np.uint64)
        expected = int(np.sum(words * (2 * np.arange(words.size, dtype=np.uint64) + 1)) % 2**32)
    else:
        expected = int(word_sum(jax.numpy.asarray(value)))
    assert host_word_sum(value) == expected


def test_leaves_of_a_checkpoint_whose_bits_have_changed_are_refused(run, tmp_path, monkeypatch):
    saved = saved_checkpoints(run[1] / "checkpoints")[-1]
    names = [name for name in saved.leaves if name.startswith("params.")]
    assert set(read_leaves(saved, names)) == set(names)
    whole = read_leaves(saved, list(saved.leaves))
    assert whole.keys() == saved.leaves.keys()
    monkeypatch.setattr("hptjax.train.checkpoint_read.host_word_sum", lambda value: host_word_sum(value) + 1)
    with pytest.raises(ValueError, match=r"is damaged: the checksum of params\.policy"):
        read_leaves(saved, names)


# ---- convert ----


@pytest.mark.parametrize("family", FAMILIES)
def test_convert_rounds_once_and_drops_what_can_be_derived(family, tmp_path):
    config = FAMILIES[family]
    params = random_params(config)
    source, wanted = tmp_path / "source", tmp_path / "wanted"
    folder.save_folder(source, config, params, dtype="float32")
    path = source / "model.safetensors"
    extra = {"model.rotary_emb.inv_freq": np.ones(3, np.float32)}
    whole = load_file(path)
    if config.tie_embeddings:
        extra["lm_head.weight"] = whole["model.embed_tokens.weight"]
    save_file(whole | extra, path)
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        (source / name).write_text(name)
    (source / "training_args.bin").write_bytes(b"a pickle")
    folder.save_folder(wanted, config, params, dtype="bfloat16")
    convert_folder(source, tmp_path / "out", dtype="bfloat16")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (wanted / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (wanted / "config.json").read_text()
    )
    copied_files = {path.name for path in (tmp_path / "out").iterdir()} - {"config.json", "model.safetensors"}
    assert copied_files == {"tokenizer.json", "generation_config.json", "chat_template.jinja"}
    convert_folder(tmp_path / "out", tmp_path / "again", shard_bytes=1000)  # as stored, in shards
    convert_folder(tmp_path / "again", tmp_path / "back", shard_bytes=10**9)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (wanted / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors.index.json").exists()


def test_convert_refuses_itself_and_what_a_dtype_cannot_hold(tmp_path):
    config = FAMILIES["qwen3"]
    params = random_params(config)
    params["final_norm"][3] = 7e4  # float16 ends at 65,504
    folder.save_folder(tmp_path / "a", config, params, dtype="float32")
    with pytest.raises(ValueError, match="expected another folder to write to"):
        convert_folder(tmp_path / "a", tmp_path / "a", dtype="bfloat16")
    with pytest.raises(ValueError, match=r"model\.norm\.weight: expected finite weights as float16, .* cannot hold it"):
        convert_folder(tmp_path / "a", tmp_path / "b", dtype="float16")
    params["final_norm"][3] = np.nan
    with pytest.raises(ValueError, match="the weight itself is not finite"):
        folder.save_folder(tmp_path / "c", config, params, dtype="float32")
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(ValueError, match="expected to make the folder"):
            convert_folder(tmp_path / "a", place, dtype=None)
    assert cli.run(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--shard-gb", "0"]) == cli.BAD_INPUT


# ---- inspect ----


def test_inspect_says_of_every_tensor_what_numpy_says(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hptjax.models.tensor_stats.READ_AT_ONCE", 30)  # several parts
    config = dataclasses.replace(FAMILIES["qwen2"], num_layers=11)
    params = random_params(config)
    params["layers"]["key_bias"][10] = 0.0
    params["layers"]["mlp_norm"][2] = 1.0
    folder.save_folder(tmp_path, config, params, dtype="float32", shard_bytes=4000)
    assert cli.run(["inspect", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    tensors = {}
    for path in tmp_path.glob("*.safetensors"):
        tensors |= load_file(path)
    assert {row["name"] for row in report["tensors"]} == set(tensors)
    for row in report["tensors"]:
        wide = tensors[row["name"]].astype(np.float64)
        assert (row["shape"], row["entries"], row["dtype"]) == (list(wide.shape), wide.size, "F32")
        found = [row[name] for name in ("min", "max", "mean", "norm")]
        np.testing.assert_allclose(
            found, [wide.min(), wide.max(), wide.mean(), np.sqrt((wide**2).sum())], rtol=1e-12, atol=1e-15
        )
    totals = report["totals"]
    assert totals["entries"] * 4 == totals["bytes"] == sum(value.nbytes for value in tensors.values())
    assert totals["tensors_by_dtype"] == {"F32": len(tensors)}
    assert report["about"]["num_layers"] == 11
    assert report["notes"] == [
        "model.layers.2.post_attention_layernorm.weight: every entry is 1, as in a fresh norm",
        "model.layers.10.self_attn.k_proj.bias: all zeros, as a fresh bias is",
        "no tokenizer in this folder",
    ]
    order = [row["name"] for row in report["tensors"] if row["name"].endswith("k_proj.bias")]
    assert [name.split(".")[2] for name in order] == [str(number) for number in range(11)]


def test_inspect_lists_every_problem_and_not_the_first(tmp_path, capsys):
    config = dataclasses.replace(FAMILIES["qwen2"], num_layers=3)
    folder.save_folder(tmp_path, config, random_params(config), dtype="float32", shard_bytes=3000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    first = load_file(shards[0])
    first["model.embed_tokens.weight"][2, 3] = np.nan
    save_file(first | {"lm_head.weight": np.zeros((23, 12), np.float32), "odd": np.ones(2, np.int8)}, shards[0])
    last = load_file(shards[-1])
    (name,) = [name for name in last if name.endswith("2.self_attn.q_proj.bias")]
    save_file({**last, name: np.ones(5, np.float32)}, shards[-1])
    shards[1].write_bytes(shards[1].read_bytes()[:-3])
    shards[2].unlink()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 23]}')
    (tmp_path / "run").mkdir()
    for file in Path(tiny.tiny_config(tmp_path / "run").model.tokenizer).iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    assert cli.run(["inspect", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    for words in (
        f"{shards[1]} is not a whole safetensors file",
        f"missing {shards[2].name}",
        f"{shards[0]} does not hold what model.safetensors.index.json says: it also holds lm_head.weight, odd",
        "model.embed_tokens.weight: 1 of 276 entries are NaN or infinite",
        "lm_head.weight: differs from the embedding, although the config ties them",
        "odd: stored as I8, expected floats",
        f"{name}: of shape [5], expected [24]",
        "eos_token_id 23 is outside the vocabulary of 23 tokens",
    ):
        assert f"{words}" in text, words
    assert text.count(": missing\n") > 3
    assert text.rstrip().endswith(f"{text.count('problem: ')} problems")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "model_type must be one of"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "got 'yarn'"),
        ({"vocab_size": 7}, "the tokenizer has 20 tokens, the model 7"),
    ],
)
def test_inspect_of_a_folder_whose_config_is_wrong_still_shows_its_tensors(tmp_path, change, words):
    config = FAMILIES["qwen3"]
    folder.save_folder(tmp_path, config, random_params(config), dtype="float32")
    tokenizer = Path(tiny.tiny_config(tmp_path).model.tokenizer)
    for file in tokenizer.iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    report = inspect(tmp_path)
    assert any(words in problem for problem in report["problems"])
    assert report["totals"]["tensors"] == 25
    assert words in report_text(report)


def test_inspect_of_a_run_shows_its_last_checkpoint(run, tmp_path, capsys):
    config, path = copied(run, tmp_path)
    report = inspect(path)
    assert report["path"].endswith(str(saved_checkpoints(path / "checkpoints")[-1].ordinal))
    assert report == inspect(path / "checkpoints") == inspect(Path(report["path"]))
    params = trained(config)
    norms = {row["name"]: row["norm"] for row in report["tensors"]}
    assert norms["params.policy.layers.up"] == pytest.approx(np.linalg.norm(params["layers"]["up"].astype(np.float64)))
    assert report["totals"]["entries"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    whole = inspect(path, everything=True)
    assert len(whole["tensors"]) > 5 * len(report["tensors"])
    assert not whole["notes"]
    damage(Path(report["path"]) / "state")
    assert cli.run(["inspect", str(path)]) == 1
    assert "it is damaged" in capsys.readouterr().out
    assert cli.run(["inspect", str(tmp_path / "nowhere")]) == cli.BAD_INPUT
