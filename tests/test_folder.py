"""A model folder written and read back, in both forms of its config, sharded or not; and every way it can be wrong."""

from __future__ import annotations

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hptjax.models import folder, folder_slices
from hptjax.models.decoder import param_shapes
from hptjax.models.folder_config import read_config, read_eos_ids, read_shape
from hptjax.models.folder_slices import load_placed
from hptjax.models.folder_write import split
from tests.test_models import FAMILIES, random_params

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_round_trip_is_bit_equal(family, tmp_path):
    config = FAMILIES[family]
    params = random_params(config)
    folder.save_folder(tmp_path, config, params, dtype=np.float32)
    read, back = folder.load_folder(tmp_path)
    assert read == config
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not config.tie_embeddings)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family


def test_folder_in_bfloat16_rounds_once(tmp_path):
    config = FAMILIES["qwen3"]
    params = random_params(config)
    folder.save_folder(tmp_path, config, params, dtype=jnp.bfloat16)
    _, once = folder.load_folder(tmp_path)
    expected = jax.tree.map(lambda v: v.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, once, expected)
    folder.save_folder(tmp_path / "again", config, once, dtype="bfloat16")
    first, second = ((tmp_path / part / "model.safetensors").read_bytes() for part in ("", "again"))
    assert first == second


def test_folder_stores_matrices_as_outputs_by_inputs(tmp_path):
    """The checkpoint's y = W x, against our einsums, for a query, an output and an unembedding matrix."""
    config = FAMILIES["qwen3"]
    params = random_params(config)
    folder.save_folder(tmp_path, config, params, dtype=np.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    x, mixed = np.arange(12, dtype=np.float32), np.arange(24, dtype=np.float32)
    layers = params["layers"]
    query = np.einsum("d,dhe->he", x, layers["query"][1])
    np.testing.assert_allclose(tensors["model.layers.1.self_attn.q_proj.weight"] @ x, query.reshape(24), rtol=1e-4)
    output = np.einsum("he,hed->d", mixed.reshape(4, 6), layers["output"][0])
    np.testing.assert_allclose(tensors["model.layers.0.self_attn.o_proj.weight"] @ mixed, output, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(tensors["lm_head.weight"] @ x, x @ params["unembedding"], rtol=1e-4, atol=1e-4)


def test_folder_reads_shards(tmp_path):
    config = FAMILIES["qwen2"]
    params = random_params(config)
    folder.save_folder(tmp_path, config, params, dtype=np.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    halves = [dict(list(tensors.items())[part::2]) for part in (0, 1)]
    for number, half in enumerate(halves):
        save_file(half, tmp_path / f"part-{number}.safetensors")
    index = {key: f"part-{number}.safetensors" for number, half in enumerate(halves) for key in half}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "model.safetensors").unlink()
    jax.tree.map(np.testing.assert_array_equal, folder.load_folder(tmp_path)[1], params)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"part-1\.safetensors"):
        folder.load_folder(tmp_path)


def test_both_forms_of_the_config_file_read_the_same(tmp_path):
    config = FAMILIES["llama"]
    folder.save_folder(tmp_path, config, random_params(config), dtype=np.float32)
    older = json.loads((tmp_path / "config.json").read_text())
    newer = {key: value for key, value in older.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    newer |= {"dtype": "float32", "rope_parameters": {"rope_theta": older["rope_theta"], **older["rope_scaling"]}}
    newer |= {"layer_types": ["full_attention"] * 2, "sliding_window": None, "head_dim": None, "hidden_size": 24}
    assert read_config(older)[0] == config
    assert read_config(newer)[0] == dataclasses.replace(config, hidden_size=24)  # head_dim: 24 / 4
    assert read_config(older | {"rope_parameters": newer["rope_parameters"]})[0] == config  # both, and they agree
    with_type = {**older, "rope_scaling": {"type": "llama3", **older["rope_scaling"]}}
    assert read_config(with_type)[0] == config
    bare = {key: value for key, value in older.items() if key not in ("rope_theta", "rope_scaling")}
    assert (read_config(bare)[0].rope_theta, read_config(bare)[0].rope_scaling) == (10_000.0, None)
    published = {"sliding_window": 131_072, "use_sliding_window": False, "max_window_layers": 28, "use_mrope": False}
    assert read_config(older | published)[0] == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type must be one of"),
        ({"attention_bias": True}, "needs attention_bias=False"),
        ({"mlp_bias": True}, "needs mlp_bias=False"),
        ({"use_sliding_window": True}, "needs use_sliding_window=False"),
        ({"hidden_act": "gelu"}, "needs hidden_act='silu'"),
        ({"model_type": None}, "model_type must be one of llama, qwen2, qwen3; got None"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "architectures must name Qwen3ForCausalLM"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type must be 'default' or 'llama3', got 'yarn'"),
        ({"rope_scaling": {"factor": 8, "low_freq_factor": 1}}, "rope_type beside factor, low_freq_factor, got none"),
        ({"rope_scaling": {**LLAMA3, "factor": float("nan")}}, "factor must be a number above 0, got nan"),
        ({"model_type": ["qwen3"]}, "model_type must be one of"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type must be 'default' or 'llama3', got 'linear'"),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "dynamic"}}, "got 'dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one object for all layers"),
        ({"rope_parameters": {"rope_theta": 7.0}}, "rope_theta stands there twice, as 7.0 and as 1000000.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1.0"),
        ({"partial_rotary_factor": 0.5}, "needs partial_rotary_factor=1.0"),
        ({"rope_theta": "many"}, "rope_theta must be a number above 0, got 'many'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "throughout, got sliding_attention"),
        ({"layer_types": ["full_attention"]}, "layer_types must list 2 .num_hidden_layers. names"),
        ({"quantization_config": {"quant_method": "gptq"}}, "needs quantization_config=None"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers must be a whole number of at least 1, got 2.5"),
        ({"num_key_value_heads": 3}, "num_heads must be a multiple of num_kv_heads"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number above 0"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "needs low_freq_factor"),
        ({"hidden_size": None}, "missing hidden_size"),
    ],
)
def test_folder_refuses_a_config_it_cannot_follow(change, message, tmp_path):
    config = FAMILIES["qwen3"]
    folder.save_folder(tmp_path, config, random_params(config), dtype=np.float32)
    raw = json.loads((tmp_path / "config.json").read_text()) | change
    with pytest.raises(ValueError, match=message):
        read_config(raw)


def test_folder_refuses_missing_unexpected_and_misshaped_keys_by_name(tmp_path):
    config = FAMILIES["qwen2"]
    folder.save_folder(tmp_path, config, random_params(config), dtype=np.float32)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)

    def broken(remove=(), add=None):
        save_file({key: value for key, value in whole.items() if key not in remove} | (add or {}), path)
        with pytest.raises(ValueError) as caught:
            folder.load_folder(tmp_path)
        return str(caught.value)

    assert "missing: model.layers.1.self_attn.k_proj.bias" in broken(remove=["model.layers.1.self_attn.k_proj.bias"])
    assert "unexpected: model.layers.0.extra" in broken(add={"model.layers.0.extra": np.zeros((23, 12), np.float32)})
    message = broken(add={"model.layers.0.mlp.up_proj.weight": np.zeros((12, 20), np.float32)})
    assert "model.layers.0.mlp.up_proj.weight (expected [20, 12], found [12, 20])" in message
    assert "missing: model.norm.weight" in broken(remove=["model.norm.weight"])


def test_folder_refuses_absent_and_truncated_files(tmp_path):
    config = FAMILIES["qwen2"]
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        folder.load_folder(tmp_path)
    folder.save_folder(tmp_path, config, random_params(config), dtype=np.float32)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        folder.load_folder(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        folder.load_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        folder.load_folder(tmp_path)


def test_save_refuses_what_it_cannot_write(tmp_path):
    config = FAMILIES["qwen2"]
    params = random_params(config)
    with pytest.raises(ValueError, match="got dtype float64"):
        folder.save_folder(tmp_path, config, params, dtype=np.float64)
    with pytest.raises(ValueError, match="call to_host first"):
        folder.save_folder(tmp_path, config, jax.tree.map(jnp.asarray, params), dtype=np.float32)
    plain = dataclasses.replace(config, attention_bias=False)
    trimmed = {**params, "layers": {k: v for k, v in params["layers"].items() if k in ("query", "query_bias")}}
    with pytest.raises(ValueError, match="unexpected layers/query_bias"):
        folder.save_folder(tmp_path, plain, trimmed, dtype=np.float32)
    with pytest.raises(ValueError, match="embedding has shape"):
        folder.save_folder(tmp_path, config, {**params, "embedding": params["embedding"][1:]}, dtype=np.float32)
    with pytest.raises(ValueError, match="no supported family has both"):
        folder.save_folder(tmp_path, dataclasses.replace(config, qk_norm=True), params, dtype=np.float32)


# ---- folders that transformers may load without a word ----


def load_on_a_device(path):
    """`load_placed` on one device, as host arrays."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = param_shapes(read_shape(path)[0])
    places = jax.tree.map(lambda _: place, shapes, is_leaf=lambda node: isinstance(node, tuple))
    return jax.tree.map(np.asarray, load_placed(path, places))


LOADERS = {
    "load_folder": lambda path: folder.load_folder(path)[1],
    "load_placed": load_on_a_device,
    "load_placed, layer by layer": load_on_a_device,
}


@pytest.fixture(params=LOADERS)
def load(request, monkeypatch):
    if "layer" in request.param:
        monkeypatch.setattr(folder_slices, "AT_ONCE_BYTES", 0)
    return LOADERS[request.param]


def in_shards(path, config, params, **options):
    """The folder in shards of at most 2,000 bytes; its index."""
    folder.save_folder(path, config, params, dtype=np.float32, shard_bytes=2000, **options)
    return json.loads((path / "model.safetensors.index.json").read_text())


def test_tied_folder_may_store_its_unembedding_where_it_is_the_embedding(tmp_path, load):
    config = FAMILIES["qwen2"]
    params = random_params(config)
    folder.save_folder(tmp_path, config, params, dtype=np.float32)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    save_file(whole | {"lm_head.weight": whole["model.embed_tokens.weight"]}, path)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path), params)
    other = whole["model.embed_tokens.weight"].copy()
    other[22, 11] += 1e-6
    save_file(whole | {"lm_head.weight": other}, path)
    with pytest.raises(
        ValueError, match=r"tie_word_embeddings, but lm_head\.weight is not model\.embed_tokens\.weight"
    ):
        load(tmp_path)
    save_file(whole | {"lm_head.weight": other[1:]}, path)
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \[22, 12\]"):
        load(tmp_path)


def test_rotary_buffers_of_old_checkpoints_are_left_alone_and_nothing_else_is(tmp_path, load):
    config = FAMILIES["llama"]
    params = random_params(config)
    folder.save_folder(tmp_path, config, params, dtype=np.float32)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    buffers = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in (0, 1)]
    save_file(whole | {name: np.ones(3, np.float32) for name in [*buffers, "model.rotary_emb.inv_freq"]}, path)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path), params)
    save_file(whole | {"model.layers.0.self_attn.rotary_emb.scale": np.ones(3, np.float32)}, path)
    with pytest.raises(ValueError, match=r"unexpected: model\.layers\.0\.self_attn\.rotary_emb\.scale"):
        load(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"]
)
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, load, name, value):
    config = FAMILIES["qwen3"]
    folder.save_folder(tmp_path, config, random_params(config), dtype="bfloat16")
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    whole[name].reshape(-1)[-1] = value
    save_file(whole, path)
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinite weights"):
        load(tmp_path)


def test_weights_too_large_for_float32_and_weights_that_are_no_floats_are_refused(tmp_path, load):
    config = FAMILIES["qwen3"]
    folder.save_folder(tmp_path, config, random_params(config), dtype=np.float32)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    save_file(whole | {"model.norm.weight": np.full(12, 1e39)}, path)
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds NaN or infinite weights \(as float32\)"):
        load(tmp_path)
    save_file(whole | {"model.norm.weight": np.ones(12, np.int8)}, path)
    with pytest.raises(ValueError, match=r"expected model\.norm\.weight as one of F64, F32, F16, BF16, got I8"):
        load(tmp_path)


def test_shards_and_index_that_do_not_fit_each_other_are_refused(tmp_path, load):
    config = FAMILIES["qwen2"]
    params = random_params(config)
    index = in_shards(tmp_path, config, params)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path), params)
    file, names = tmp_path / "model.safetensors.index.json", dict(index["weight_map"])
    shards = sorted(set(names.values()))
    assert len(shards) > 2
    first = [key for key in names if names[key] == shards[0]]

    def refused(weight_map, words, error=ValueError):
        file.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(error, match=words):
            load(tmp_path)

    refused({key: name for key, name in names.items() if key != first[0]}, f"it also holds {first[0]}")
    refused(names | {first[0]: shards[1]}, f"it also holds {first[0]}")
    refused(names | {"model.layers.7.extra": shards[0]}, r"it lacks model\.layers\.7\.extra")
    refused(names | {first[0]: "other.safetensors"}, r"missing other\.safetensors", FileNotFoundError)
    refused(names | {first[0]: "../other.safetensors"}, "expected weight_map")
    refused(names | {first[0]: "other.bin"}, "expected weight_map")
    refused(names | {first[0]: 3}, "expected weight_map")
    refused({}, "expected weight_map")
    file.write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        load(tmp_path)
    file.write_text(json.dumps(index))
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="two models"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / shards[1]).write_bytes((tmp_path / shards[1]).read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{shards[1]} is not a whole safetensors file"):
        load(tmp_path)


def test_folder_of_pickles_or_of_no_text_is_refused(tmp_path, load):
    config = FAMILIES["qwen2"]
    folder.save_folder(tmp_path, config, random_params(config), dtype=np.float32)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin is there, but a pickle can run code"):
        load(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load(tmp_path)


def test_stop_tokens_of_a_folder(tmp_path):
    def write(name, value):
        (tmp_path / name).write_text(json.dumps({"eos_token_id": value}))

    write("config.json", 7)
    assert read_eos_ids(tmp_path) == (7,)
    write("generation_config.json", [5, 3, 5])
    assert read_eos_ids(tmp_path) == (5, 3)
    write("generation_config.json", None)
    assert read_eos_ids(tmp_path) == ()
    for wrong in ("5", [5, "3"], [-1], [True], {"a": 1}):
        write("generation_config.json", wrong)
        with pytest.raises(ValueError, match="eos_token_id must be a token or a list of tokens"):
            read_eos_ids(tmp_path)


# ---- shards ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shards_hold_the_bits_of_the_whole_file(tmp_path, family, dtype):
    config = FAMILIES[family]
    params = random_params(config)
    folder.save_folder(tmp_path / "whole", config, params, dtype=dtype)
    (tmp_path / "parts").mkdir()
    folder.save_folder(tmp_path / "parts", config, params, dtype=dtype, shard_bytes=1500)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert names == [f"model-{n:05d}-of-{len(names):05d}.safetensors" for n in range(1, len(names) + 1)]
    joined = {}
    for name in names:
        part = load_file(tmp_path / "parts" / name)
        assert len(part) == 1 or sum(value.nbytes for value in part.values()) <= 1500
        assert {key for key, file in index["weight_map"].items() if file == name} == set(part)
        joined |= part
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    assert joined.keys() == whole.keys()
    for key, value in whole.items():
        assert value.dtype == joined[key].dtype
        assert value.tobytes() == joined[key].tobytes()


def test_shards_begin_above_the_limit_and_not_at_it(tmp_path):
    assert split({"a": 3, "b": 2, "c": 5, "d": 6, "e": 1}, 5) == [["a", "b"], ["c"], ["d"], ["e"]]
    config = FAMILIES["llama"]
    params = random_params(config)
    whole = sum(leaf.size for leaf in jax.tree.leaves(params)) * 2
    for limit, sharded in ((whole, False), (whole - 1, True), (whole, False)):
        folder.save_folder(tmp_path, config, params, dtype="bfloat16", shard_bytes=limit)
        assert (tmp_path / "model.safetensors.index.json").exists() == sharded


def test_saving_beside_an_adapter_or_where_nobody_may_write_is_refused(tmp_path, monkeypatch):
    """Other tools would put the adapter on top of the model that has it merged."""
    config = FAMILIES["llama"]
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="on top of the model; name another folder"):
        folder.save_folder(tmp_path, config, random_params(config), dtype="bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match="expected a folder that can be written to"):
        folder.save_folder(tmp_path, config, random_params(config), dtype="bfloat16")


def test_saving_over_a_folder_leaves_nothing_of_the_old_weights(tmp_path):
    config, other = FAMILIES["qwen2"], FAMILIES["llama"]
    in_shards(tmp_path, config, random_params(config))
    for options in ({}, {"shard_bytes": 2000}, {"shard_bytes": 5000}, {}):
        folder.save_folder(tmp_path, other, random_params(other), dtype=np.float32, **options)
        jax.tree.map(np.testing.assert_array_equal, folder.load_folder(tmp_path)[1], random_params(other))
        assert not list(tmp_path.glob("*.partial"))
        assert (tmp_path / "model.safetensors").exists() == (not options)


def test_a_save_that_is_interrupted_leaves_the_old_folder_or_one_that_is_refused(tmp_path, monkeypatch):
    config = FAMILIES["qwen2"]
    old, new = random_params(config), random_params(config, seed=1)
    replace, outcomes = os.replace, []
    for fails_at in range(20):
        in_shards(tmp_path, config, old)
        moves = iter(range(100))

        def replace_or_die(source, target, *, moves=moves, fails_at=fails_at):
            if next(moves) == fails_at:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patched:
            patched.setattr("os.replace", replace_or_die)
            try:
                in_shards(tmp_path, config, new)
            except KeyboardInterrupt:
                with pytest.raises(FileNotFoundError):
                    folder.load_folder(tmp_path)
            else:
                jax.tree.map(np.testing.assert_array_equal, folder.load_folder(tmp_path)[1], new)
                outcomes.append(fails_at)
    assert 0 < len(outcomes) < 15


def test_a_save_that_fails_before_it_moves_anything_leaves_the_old_folder(tmp_path, monkeypatch):
    config = FAMILIES["qwen2"]
    old = random_params(config)
    in_shards(tmp_path, config, old)
    monkeypatch.setattr("hptjax.models.folder_write.save_file", lambda *_, **__: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        folder.save_folder(tmp_path, config, random_params(config, seed=1), dtype=np.float32)
    jax.tree.map(np.testing.assert_array_equal, folder.load_folder(tmp_path)[1], old)


def test_saving_keeps_what_another_config_says_beside_the_shape(tmp_path):
    config = dataclasses.replace(FAMILIES["llama"], rope_theta=40_000.0, max_positions=16_384)
    beside = {
        "eos_token_id": [1, 2],
        "rope_parameters": {"rope_type": "default"},
        "dtype": "float64",
        "max_position_embeddings": 9,
    }
    folder.save_folder(tmp_path, config, random_params(config), dtype="bfloat16", beside=beside)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert (raw["eos_token_id"], raw["torch_dtype"], raw["max_position_embeddings"]) == ([1, 2], "bfloat16", 16_384)
    assert read_shape(tmp_path)[0] == config
