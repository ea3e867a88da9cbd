"""Adapters: what the forward pass adds, and that a PEFT folder goes in and out."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from hptjax.build.adapters import as_used, merge_on_host
from hptjax.inspection import inspect
from hptjax.model_shape import adapter_count
from hptjax.models.decoder import logical_axes
from hptjax.models.folder_config import family
from hptjax.models.lora import adapted, adapter_axes, adapter_shapes, init_adapters, merged
from hptjax.models.lora_config import TARGETS, AdapterShape, read_adapter_shape
from hptjax.models.lora_folder import load_adapter, save_adapter
from hptjax.sharding.mesh import make_mesh
from hptjax.sharding.rules import shard_params
from tests.test_models import FAMILIES, jitted, packed_rows, random_params

ALL = tuple(TARGETS)
SCALE = 1.5


def random_adapters(config, rank=3, targets=ALL, seed=5):
    rng = np.random.default_rng(seed)
    shapes = traverse_util.flatten_dict(adapter_shapes(config, rank, targets))
    return traverse_util.unflatten_dict(
        {path: rng.normal(0, 0.3, shape).astype(np.float32) for path, shape in shapes.items()}
    )


def slow_merged(config, params, adapters, scale):
    """W + scale A B in float64, one layer at a time, in the checkpoint's layout: y = W x, so W' = W + scale B^T A^T."""
    flat = {path: np.asarray(value, np.float64).copy() for path, value in traverse_util.flatten_dict(params).items()}
    for entry in family(config)[1]:
        if entry.path[0] != "layers" or entry.path[1] not in adapters["layers"]:
            continue
        factors = adapters["layers"][entry.path[1]]
        for layer in range(config.num_layers):
            a = factors["a"][layer].astype(np.float64)
            b = factors["b"][layer].astype(np.float64)
            rank = b.shape[0]
            stored = entry.to_stored(flat[entry.path][layer])  # [outputs, inputs]
            lora_a, lora_b = a.reshape(-1, rank).T, b.reshape(rank, -1).T  # [R, inputs], [outputs, R]
            for o in range(stored.shape[0]):
                for i in range(stored.shape[1]):
                    stored[o, i] += scale * sum(lora_b[o, r] * lora_a[r, i] for r in range(rank))
            flat[entry.path][layer] = entry.from_stored(stored, flat[entry.path].shape[1:])
    return traverse_util.unflatten_dict(flat)


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_adapted_forward_equals_the_merged_one(name):
    config = FAMILIES[name]
    params, adapters = random_params(config), random_adapters(config)
    run = jitted(config)[0]
    slow = slow_merged(config, params, adapters, SCALE)
    together = merged(params, adapters, SCALE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), together, slow)
    on_host = merge_on_host(jax.tree.map(np.copy, params), adapters, SCALE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), on_host, slow)
    rows = packed_rows()
    apart = np.asarray(run(adapted(params, adapters, SCALE), *rows))
    np.testing.assert_allclose(apart, run(together, *rows), rtol=0, atol=2e-5)
    assert np.abs(apart - run(params, *rows)).max() > 0.1


def test_lora_fresh_adapters_change_nothing_and_lie_within_their_bound():
    config = dataclasses.replace(FAMILIES["qwen2"], mlp_size=200)
    params = random_params(config)
    fresh = init_adapters(jax.random.key(0), config, 8, ALL)
    run = jitted(config)[0]
    rows = packed_rows()
    assert np.array_equal(run(adapted(params, fresh, SCALE), *rows), run(params, *rows))
    for name, factors in fresh["layers"].items():
        assert not np.any(factors["b"])
        inputs = np.prod(factors["a"].shape[1:-1])
        assert 0.5 < np.abs(factors["a"]).max() * np.sqrt(inputs) <= 1, name
        assert np.std(factors["a"]) == pytest.approx(1 / np.sqrt(3 * inputs), rel=0.2), name
    other = init_adapters(jax.random.key(1), config, 8, ALL)
    assert not np.array_equal(other["layers"]["down"]["a"], fresh["layers"]["down"]["a"])


@pytest.mark.parametrize(
    "name", ["qwen2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "qwen3"))]
)
def test_lora_gradients_are_those_of_the_matrices_through_the_product(name):
    """dA = scale dW B^T and dB = scale A^T dW, where dW is the gradient of the whole matrix at the merged weights."""
    config = FAMILIES[name]
    params, adapters = random_params(config), random_adapters(config)
    rows = packed_rows()
    mixing = np.random.default_rng(9).normal(size=(3, 18, 12)).astype(np.float32)
    run = functools.partial(jitted(config)[0])

    def loss(tree):
        return jnp.sum(run(tree, *rows) * mixing)

    ours = jax.jit(jax.grad(lambda a: loss(adapted(params, a, SCALE))))(adapters)["layers"]
    whole = jax.jit(jax.grad(loss))(merged(params, adapters, SCALE))["layers"]
    for matrix, factors in adapters["layers"].items():
        for layer in range(config.num_layers):
            b = factors["b"][layer].astype(np.float64)
            a = factors["a"][layer].astype(np.float64).reshape(-1, b.shape[0])
            kernel = np.asarray(whole[matrix][layer], np.float64).reshape(a.shape[0], -1)
            for found, wanted in (
                (ours[matrix]["a"][layer], SCALE * kernel @ b.reshape(b.shape[0], -1).T),
                (ours[matrix]["b"][layer], SCALE * a.T @ kernel),
            ):
                error = np.linalg.norm(np.asarray(found).reshape(wanted.shape) - wanted)
                assert error < 1e-4 * np.linalg.norm(wanted), (matrix, layer)


def test_lora_model_held_in_bfloat16_computes_the_same_bits():
    """Every matrix and bias is cast where it is used, and norms are not: all of a model with biases and qk-norm."""
    config = dataclasses.replace(FAMILIES["qwen2"], qk_norm=True)
    params, adapters = random_params(config), random_adapters(config)
    run = jitted(config, jnp.bfloat16)[0]
    rows = packed_rows()
    held = as_used(jax.device_put(params), dtype=jnp.bfloat16)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(held)} == {"bfloat16", "float32"}
    wanted = np.asarray(run(adapted(params, adapters, SCALE), *rows))
    assert np.array_equal(run(adapted(held, adapters, SCALE), *rows), wanted)


def test_lora_shapes_axes_and_counts_are_those_of_the_matrices():
    config = FAMILIES["qwen2"]
    shapes = traverse_util.flatten_dict(adapter_shapes(config, 3, ("o_proj", "k_proj")))
    assert shapes == {
        ("layers", "key", "a"): (2, 12, 3),
        ("layers", "key", "b"): (2, 3, 2, 6),
        ("layers", "output", "a"): (2, 4, 6, 3),
        ("layers", "output", "b"): (2, 3, 12),
    }
    axes = traverse_util.flatten_dict(adapter_axes(config, ("o_proj", "k_proj")))
    assert axes[("layers", "output", "a")] == ("layers", "heads", "head_dim", None)
    assert axes[("layers", "key", "b")] == ("layers", None, "kv_heads", "head_dim")
    for targets in (ALL, ("q_proj", "down_proj")):
        every = traverse_util.flatten_dict(adapter_shapes(config, 3, targets)).values()
        assert adapter_count(config, AdapterShape(3, 6.0, targets)) == sum(int(np.prod(shape)) for shape in every)
    for wrong in ((), ("lm_head",)):
        with pytest.raises(ValueError, match=r"lora\.targets"):
            adapter_shapes(config, 3, wrong)


def test_lora_on_eight_devices_computes_what_one_does(eight_devices):
    config = dataclasses.replace(FAMILIES["qwen2"], hidden_size=16, mlp_size=32, vocab_size=24)
    params, adapters = random_params(config), random_adapters(config, rank=5)
    mesh = make_mesh(fsdp=2, tensor=2, data=2, devices=eight_devices)
    on_mesh = shard_params(mesh, logical_axes(config), params)
    cut = shard_params(mesh, adapter_axes(config, ALL), adapters)
    assert not cut["layers"]["gate"]["b"].sharding.is_fully_replicated
    run = jitted(config)[0]
    rows = packed_rows()
    one = np.asarray(run(adapted(params, adapters, SCALE), *rows))
    np.testing.assert_allclose(run(adapted(on_mesh, cut, SCALE), *rows), one, rtol=0, atol=2e-5)


# ---- PEFT's folder ----


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_folder_round_trip_is_bit_equal_and_stored_as_peft_stores(name, tmp_path):
    config = FAMILIES[name]
    adapters = random_adapters(config)
    shape = AdapterShape(3, 4.5, ALL)
    stabilised = dataclasses.replace(shape, rank_stabilised=True)
    save_adapter(tmp_path, config, adapters, stabilised, dtype="float32", base="some/model")
    assert read_adapter_shape(tmp_path) == stabilised
    save_adapter(tmp_path, config, adapters, shape, dtype="float32", base="some/model")
    assert read_adapter_shape(tmp_path) == shape
    assert shape.scale == SCALE
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path, config), adapters)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    query = "base_model.model.model.layers.1.self_attn.q_proj"
    assert tensors[f"{query}.lora_A.weight"].shape == (3, 12)
    assert tensors[f"{query}.lora_B.weight"].shape == (24, 3)
    x = np.arange(24, dtype=np.float32)
    output = "base_model.model.model.layers.0.self_attn.o_proj"
    expected = np.einsum("he,her,rd->d", x.reshape(4, 6), *(adapters["layers"]["output"][f][0] for f in "ab"))
    found = tensors[f"{output}.lora_B.weight"] @ (tensors[f"{output}.lora_A.weight"] @ x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
    assert len(tensors) == 2 * 2 * 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "need peft_type to be 'LORA', got 'IA3'"),
        ({"task_type": "SEQ_CLS"}, "need task_type to be 'CAUSAL_LM', got 'SEQ_CLS'"),
        ({"use_dora": True}, "need use_dora to be none, got 'True'"),
        ({"use_rslora": "yes"}, "need use_rslora to be False or True, got 'yes'"),
        ({"bias": "all"}, "need bias to be 'none', got 'all'"),
        ({"lora_bias": True}, "need lora_bias"),
        ({"fan_in_fan_out": True}, "need fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "need modules_to_save to be none, got ..'lm_head'"),
        ({"rank_pattern": {"q_proj": 4}}, "need rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "need alpha_pattern"),
        ({"layers_to_transform": [1]}, "need layers_to_transform"),
        ({"layers_to_transform": 0.5}, "need layers_to_transform"),
        ({"exclude_modules": ["k_proj"]}, "need exclude_modules"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "need layer_replication"),
        ({"target_parameters": ["experts.up"]}, "need target_parameters"),
        ({"trainable_token_indices": [3]}, "need trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "need init_lora_weights to be True or False or 'gaussian'"),
        ({"alora_invocation_tokens": [7, 8]}, "need alora_invocation_tokens"),
        ({"use_bdlora": {"nblocks": 2}}, "need use_bdlora"),
        ({"of_next_year": 2}, "need of_next_year to be none, got '2'"),
        ({"target_modules": "all-linear"}, "target_modules must list some of .* got 'all-linear'"),
        ({"target_modules": []}, "target_modules must list some of"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules must list some of .* got .'embed_tokens'"),
        ({"target_modules": [["q_proj"]]}, "target_modules must list some of"),
        ({"lora_alpha": True}, "lora_alpha above 0"),
        ({"lora_alpha": 10**400}, "lora_alpha above 0"),
        ({"r": 0}, "r of at least 1"),
        ({"r": True}, "r of at least 1"),
        ({"lora_alpha": None}, "lora_alpha above 0"),
        ({"lora_alpha": float("inf")}, "lora_alpha above 0"),
        ({"r": 4}, "expected base_model"),
        ({"target_modules": ["q_proj"]}, "unexpected: base_model"),
    ],
)
def test_lora_folder_of_another_kind_is_refused(change, words, tmp_path):
    config = FAMILIES["llama"]
    targets = ("q_proj", "v_proj")
    adapters = random_adapters(config, targets=targets)
    save_adapter(tmp_path, config, adapters, AdapterShape(3, 6.0, targets), dtype="float32", base=None)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        load_adapter(tmp_path, config)


def test_lora_folder_is_no_folder_of_a_model(tmp_path):
    config = FAMILIES["llama"]
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a folder without a model"):
        save_adapter(tmp_path, config, random_adapters(config), AdapterShape(3, 4.5, ALL), dtype="float32", base=None)


def test_lora_config_as_peft_writes_it_is_read(tmp_path):
    """Every field that PEFT 0.21.2 saves for a plain adapter, with its defaults; the scale of both kinds by hand."""
    absent = """alora_invocation_tokens arrow_config auto_mapping corda_config eva_config exclude_modules kasa_config
    layer_replication layers_pattern layers_to_transform lora_ga_config megatron_config modules_to_save
    monteclora_config revision target_parameters trainable_token_indices use_bdlora velora_config"""
    off = "ensure_weight_tying fan_in_fan_out inference_mode lora_bias use_dora use_qalora use_rslora"
    written = dict.fromkeys(absent.split()) | dict.fromkeys(off.split(), False)
    written |= {"alpha_pattern": {}, "rank_pattern": {}, "loftq_config": {}, "bias": "none", "init_lora_weights": True}
    written |= {"base_model_name_or_path": "some/model", "megatron_core": "megatron.core", "qalora_group_size": 16}
    written |= {"peft_type": "LORA", "peft_version": "0.21.2", "task_type": "CAUSAL_LM", "lora_dropout": 0.05}
    written |= {"r": 16, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj"]}
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(written))
    assert read_adapter_shape(tmp_path) == AdapterShape(16, 8.0, ("q_proj", "v_proj"))
    assert read_adapter_shape(tmp_path).scale == 8 / 16
    path.write_text(json.dumps(written | {"use_rslora": True, "init_lora_weights": "gaussian"}))
    assert read_adapter_shape(tmp_path) == AdapterShape(16, 8.0, ("q_proj", "v_proj"), rank_stabilised=True)
    assert read_adapter_shape(tmp_path).scale == 8 / 4
    del written["peft_type"]
    path.write_text(json.dumps(written))
    with pytest.raises(ValueError, match="expected peft_type 'LORA', got none"):
        read_adapter_shape(tmp_path)


def test_lora_folder_that_is_broken_is_refused_by_name(tmp_path):
    config = FAMILIES["llama"]
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        load_adapter(tmp_path, config)
    save_adapter(tmp_path, config, random_adapters(config), AdapterShape(3, 6.0, ALL), dtype="bfloat16", base=None)
    path = tmp_path / "adapter_model.safetensors"
    whole = load_file(path)
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    save_file({name: value for name, value in whole.items() if name != key}, path)
    with pytest.raises(ValueError, match=f"keys missing: {key}"):
        load_adapter(tmp_path, config)
    broken = whole[key].copy()
    broken[0, 0] = np.nan
    save_file({**whole, key: broken}, path)
    with pytest.raises(ValueError, match=f"{key} holds NaN"):
        load_adapter(tmp_path, config)
    assert inspect(tmp_path)["problems"] == [f"{key}: 1 of 60 entries are NaN or infinite"]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_adapter(tmp_path, config)
    assert "not a whole safetensors file" in inspect(tmp_path)["problems"][0]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        load_adapter(tmp_path, config)
