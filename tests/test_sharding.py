"""The rules table, placement of batches and parameters, and one model on 1 and on 8 devices."""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from hptjax.config_batch import MESH_AXES
from hptjax.models.cache import Cache, cache_axes
from hptjax.models.decoder import decode_step, forward, logical_axes, param_shapes, prefill
from hptjax.models.shape import DecoderConfig
from hptjax.sharding import agree as agreeing
from hptjax.sharding import reshard as resharding
from hptjax.sharding.agree import agree, anyone
from hptjax.sharding.host import to_host
from hptjax.sharding.mesh import REPLICATED_FIELDS, make_mesh, put_micro_batch, put_rows
from hptjax.sharding.reshard import make_reshard
from hptjax.sharding.rules import (
    AXES,
    PRESETS,
    make_constrain,
    make_rules,
    named_shardings,
    partition_spec,
    replicated,
    shard_params,
    shard_tree,
)
from hptjax.types import MicroBatch, TermPlane

CONFIG = DecoderConfig(
    vocab_size=24,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=32,
    attention_bias=True,
    qk_norm=True,
)


def packed_inputs(rows=8, tokens=12):
    rng = np.random.default_rng(0)
    positions = np.tile(np.concatenate([np.arange(5), np.arange(4), np.arange(3)]), (rows, 1)).astype(np.int32)
    segments = np.tile(np.repeat([1, 2, 0], [5, 4, 3]), (rows, 1)).astype(np.int32)
    return rng.integers(0, CONFIG.vocab_size, (rows, tokens)).astype(np.int32), positions, segments


@functools.cache
def single_device():
    """Host parameters, and the hidden states and the parameters' gradient on one device."""
    rng = np.random.default_rng(1)
    shapes, is_leaf = param_shapes(CONFIG), lambda node: isinstance(node, tuple)
    params = jax.tree.map(lambda shape: rng.normal(0, 0.3, shape).astype(np.float32), shapes, is_leaf=is_leaf)
    gradient, hidden = jax.jit(gradient_and_hidden)(params, *packed_inputs())
    return params, to_host(gradient), to_host(hidden)


def gradient_and_hidden(params, tokens, positions, segments, **keywords):
    def loss(params):
        hidden = forward(params, tokens, positions, segments, config=CONFIG, compute_dtype=jnp.float32, **keywords)
        return jnp.sum(jnp.where((segments > 0)[:, :, None], jnp.sin(hidden), 0.0)), hidden

    return jax.grad(loss, has_aux=True)(params)


@pytest.mark.parametrize(("data", "tensor"), [(2, 4), (4, 2), (8, 1)])
def test_forward_on_eight_devices_equals_one(data, tensor, eight_devices):
    mesh = make_mesh(data, tensor, devices=eight_devices)
    params, _, hidden = single_device()
    run = functools.partial(forward, config=CONFIG, compute_dtype=jnp.float32, constrain=make_constrain(mesh))
    sharded = jax.jit(run)(shard_params(mesh, logical_axes(CONFIG), params), *put_rows(mesh, packed_inputs()))
    assert sharded.sharding.spec[0] == "data"
    np.testing.assert_allclose(to_host(sharded), hidden, rtol=0, atol=1e-5)


def test_gradient_on_eight_devices_equals_one(eight_devices):
    mesh = make_mesh(2, 4, devices=eight_devices)
    params, gradient, _ = single_device()
    run = jax.jit(functools.partial(gradient_and_hidden, constrain=make_constrain(mesh)))
    sharded, _ = run(shard_params(mesh, logical_axes(CONFIG), params), *put_rows(mesh, packed_inputs()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), to_host(sharded), gradient)


def test_prefill_and_decode_on_eight_devices_equal_one(eight_devices):
    params = single_device()[0]
    tokens, _, _ = packed_inputs()
    lengths = np.arange(1, 9, dtype=np.int32)

    def run(params, tokens, lengths, constrain):
        keywords = {"config": CONFIG, "compute_dtype": jnp.float32, "constrain": constrain}
        _, cache = prefill(params, tokens[:, :8], lengths, capacity=12, **keywords)
        cache = jax.tree.map(lambda leaf: constrain(leaf, cache_axes().keys), cache)
        return decode_step(params, cache, tokens[:, 9], lengths, **keywords)

    alone = to_host(jax.jit(functools.partial(run, constrain=make_constrain(make_mesh(1, 1))))(params, tokens, lengths))
    mesh = make_mesh(4, 2, devices=eight_devices)
    placed = shard_params(mesh, logical_axes(CONFIG), params)
    together = jax.jit(functools.partial(run, constrain=make_constrain(mesh)))(
        placed, *put_rows(mesh, (tokens, lengths))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), to_host(together), alone)


def test_parameters_lie_where_the_table_says(eight_devices):
    mesh = make_mesh(2, 4, devices=eight_devices)
    placed = shard_params(mesh, logical_axes(CONFIG), single_device()[0])
    parts = {name: leaf.addressable_shards[0].data.shape for name, leaf in placed["layers"].items()}
    assert parts["query"] == (2, 16, 1, 8)  # 4 heads over 4
    assert parts["key"] == (2, 16, 2, 8)  # 2 kv heads, copied
    assert parts["output"] == (2, 1, 8, 16)
    assert parts["gate"] == (2, 16, 8)
    assert parts["down"] == (2, 8, 16)
    assert placed["embedding"].addressable_shards[0].data.shape == (6, 16)
    assert placed["final_norm"].sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, to_host(placed), single_device()[0])


def test_rules_of_one_array(eight_devices):
    mesh = make_mesh(2, 4, devices=eight_devices)
    assert partition_spec(mesh, ("batch", "time", "features")) == PartitionSpec("data", None, None)
    assert partition_spec(mesh, ("embed", "mlp"), (3, 8)) == PartitionSpec(None, "tensor")
    assert partition_spec(mesh, (None, "kv_heads"), (3, 8)) == PartitionSpec(None, "tensor")
    assert partition_spec(mesh, (None, "kv_heads"), (3, 1)) == PartitionSpec(None, None)
    assert partition_spec(mesh, (None, "kv_heads"), (3, 2)) == PartitionSpec(None, None)  # 2 on 4: copied


def test_mesh_rules_over_several_axes(eight_devices):
    mesh = make_mesh(2, 2, fsdp=2, devices=eight_devices)
    assert partition_spec(mesh, ("batch", "time", "features"), (8, 3, 5)) == PartitionSpec(("data", "fsdp"), None, None)
    assert partition_spec(mesh, ("vocab", "embed"), (6, 4)) == PartitionSpec("tensor", "fsdp")
    assert partition_spec(mesh, ("vocab", "embed"), (6, 4), make_rules("replicated")) == PartitionSpec("tensor", None)
    decode = make_rules("decode")
    assert partition_spec(mesh, ("embed", "mlp"), (3, 8), decode) == PartitionSpec(None, ("fsdp", "tensor"))
    # 2 kv heads on fsdp 2 x tensor 2: cut over fsdp, copied over tensor; as the query heads' first cut
    assert partition_spec(mesh, ("kv_heads",), (2,), decode) == PartitionSpec("fsdp")
    six = make_mesh(fsdp=3, tensor=2, devices=eight_devices[:6])
    assert partition_spec(six, ("kv_heads",), (2,), decode) == PartitionSpec(None)  # not over fsdp 3, so over neither
    sequences = make_mesh(sequence=8, devices=eight_devices)
    assert partition_spec(sequences, ("batch", "time"), (1, 16)) == PartitionSpec(None, "sequence")
    assert set(PRESETS) == {"fsdp", "replicated", "decode"}
    assert MESH_AXES == AXES


def test_mesh_axes_of_the_config_replace_lines_of_a_table(eight_devices):
    rules = make_rules("fsdp", {"embed": ("fsdp", "data"), "mlp": ()})
    mesh = make_mesh(2, 2, fsdp=2, devices=eight_devices)
    assert partition_spec(mesh, ("embed", "mlp"), (8, 3), rules) == PartitionSpec(("fsdp", "data"), None)
    assert rules["heads"] == ("tensor",)
    for preset, axes, message in (
        ("fspd", {}, "fsdp, replicated, decode, got 'fspd'"),
        ("fsdp", {"embd": ("fsdp",)}, "unknown logical axis 'embd'"),
        ("fsdp", {"embed": ("fspd",)}, r"mesh.axes, 'embed': .*got \['fspd'\]"),
        ("fsdp", {"embed": ("fsdp", "fsdp")}, "distinct mesh axes"),
    ):
        with pytest.raises(ValueError, match=message):
            make_rules(preset, axes)
    with pytest.raises(ValueError, match="'embed' and 'mlp' of one array both lie on mesh axis 'tensor'"):
        partition_spec(mesh, ("embed", "mlp"), (8, 8), make_rules("fsdp", {"embed": ("tensor",)}))


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (("batch", "time"), (3, 4), "'batch' of size 3 does not divide over the 2 devices of mesh.data"),
        (("embed", "mlp"), (4, 6), "'mlp' of size 6 .* devices of mesh.tensor .4."),
        (("kv_heads",), (3,), "'kv_heads' of size 3 .*multiple of 4 or a divisor"),
        (("kv_heads",), (6,), "'kv_heads' of size 6"),
        (("heads", "mlp"), None, "'heads' and 'mlp' of one array both lie on mesh axis 'tensor'"),
        (("embd",), None, "unknown logical axis 'embd'"),
        (("embed",), (4, 6), "one logical axis name per array axis"),
    ],
)
def test_uneven_splits_collisions_and_unknown_names_are_errors(axes, shape, message, eight_devices):
    with pytest.raises(ValueError, match=message):
        partition_spec(make_mesh(2, 4, devices=eight_devices), axes, shape)


def test_constrain_checks_and_places(eight_devices):
    constrain = make_constrain(make_mesh(4, 2, devices=eight_devices))
    placed = jax.jit(lambda x: constrain(x, ("batch", "mlp")))(np.ones((4, 6), np.float32))
    assert placed.addressable_shards[0].data.shape == (1, 3)
    with pytest.raises(ValueError, match="'batch' of size 6"):
        jax.jit(lambda x: constrain(x, ("batch", "mlp")))(np.ones((6, 6), np.float32))
    x = jnp.ones((3, 5))
    assert make_constrain(make_mesh(1, 1))(x, ("batch", "mlp")) is x


def test_named_shardings_keep_the_tree(eight_devices):
    mesh = make_mesh(2, 4, devices=eight_devices)
    shape = jax.ShapeDtypeStruct((2, 8, 12, 2, 8), jnp.float32)
    found = named_shardings(mesh, cache_axes(), Cache(shape, shape))
    assert found.keys.spec == PartitionSpec(None, "data", None, None, None)  # 2 kv heads over 4 devices: copied
    assert named_shardings(mesh, cache_axes()).values.spec == PartitionSpec(None, "data", None, "tensor", None)
    assert shard_tree({"a": np.ones(3)}, replicated(mesh))["a"].sharding.is_fully_replicated


def test_a_micro_batch_has_its_rows_over_data(eight_devices):
    mesh = make_mesh(4, 2, devices=eight_devices)
    rows, tokens, segments = 8, 6, 3
    rng = np.random.default_rng(0)

    def integers(*shape):
        return rng.integers(0, 5, shape).astype(np.int32)

    def floats(*shape):
        return rng.normal(size=shape).astype(np.float32)

    batch = MicroBatch(
        input_tokens=integers(rows, tokens),
        target_tokens=integers(rows, tokens),
        positions=integers(rows, tokens),
        segment_ids=integers(rows, tokens),
        completion_mask=integers(rows, tokens) > 2,
        planes={name: TermPlane(floats(rows, tokens), floats(rows, tokens)) for name in ("policy", "sft")},
        sampler_logprobs=floats(rows, tokens),
        rollout_logprobs=floats(rows, tokens),
        reference_logprobs=floats(rows, tokens),
        temperature=floats(rows, segments),
        sample_index=integers(rows, segments),
        sample_hash=integers(rows, segments, 2).astype(np.uint32),
        source=integers(rows, segments),
        micro_index=np.asarray(1, np.int32),
        planned_tokens=integers(8),  # as many as there are rows, and still replicated
        planned_digest=integers(8, 2).astype(np.uint32),
    )
    placed = put_micro_batch(mesh, batch)
    for put, whole in zip(jax.tree.leaves(placed), jax.tree.leaves(batch), strict=True):
        assert put.dtype == whole.dtype
        np.testing.assert_array_equal(to_host(put), whole)
    for name in MicroBatch.__dataclass_fields__:
        for leaf in jax.tree.leaves(getattr(placed, name)):
            whole = name in REPLICATED_FIELDS
            assert leaf.addressable_shards[0].data.shape[:1] == ((leaf.shape[:1]) if whole else (2,)), name
    by_time = put_micro_batch(make_mesh(2, 1, sequence=2, fsdp=2, devices=eight_devices), batch)
    assert by_time.planes["sft"].weights.addressable_shards[0].data.shape == (2, tokens // 2)
    assert by_time.sample_hash.addressable_shards[0].data.shape == (2, segments, 2)
    assert placed.planned_tokens.sharding.is_fully_replicated
    assert placed.planes["sft"].weights.addressable_shards[0].data.shape == (2, tokens)
    with pytest.raises(ValueError, match=r"'batch' of size 8 .* devices of mesh.data .3."):
        put_micro_batch(make_mesh(3, 1, devices=eight_devices), batch)


def test_mesh_refuses_what_the_machine_lacks(eight_devices):
    assert dict(make_mesh(2, 1).shape) == {"replica": 1, "data": 2, "fsdp": 1, "sequence": 1, "tensor": 1}
    with pytest.raises(ValueError, match="needs 16 devices, this machine shows 8"):
        make_mesh(4, 4, devices=eight_devices)
    with pytest.raises(ValueError, match="at least 1"):
        make_mesh(0, 1)
    there = [types.SimpleNamespace(process_index=index // 4) for index in range(8)]
    with pytest.raises(ValueError, match="must use them all"):
        make_mesh(2, 2, devices=there)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What jax asks of a TPU's chip to lay a mesh on its torus."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"


@pytest.mark.parametrize("slices", [1, 2])
def test_mesh_axes_may_share_an_axis_of_the_torus(slices):
    """8 x 2 on a 4 x 4 torus: neither size is a product of whole sides."""
    chips = [Chip(16 * s + 4 * y + x, (x, y, 0), s) for s in range(slices) for y in range(4) for x in range(4)]
    mesh = make_mesh(fsdp=2, tensor=8, replica=slices, devices=chips)
    assert mesh.devices.shape == (slices, 1, 2, 1, 8)
    for s in range(slices):
        assert {chip.slice_index for chip in mesh.devices[s].flat} == {s}


def test_agree_is_the_identity_on_one_process():
    value = {"stop": True, "count": 2**40, "gate": np.array([0, 1])}
    assert agree(value) is value


def test_agree_carries_bytes_exactly_between_processes(monkeypatch):
    """Two processes faked: the other one's bytes are given; 64-bit values survive."""
    other = {"stop": True, "count": 2**40 + 1, "rate": 1 / 3, "gate": np.array([4, 5], np.int64)}
    own = {"stop": False, "count": 7, "rate": 0.5, "gate": np.array([6, 7], np.int64)}
    theirs = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(other))
    monkeypatch.setattr(agreeing, "several", lambda: True)
    monkeypatch.setattr(agreeing, "gather", lambda sent, what: [theirs, sent])  # the other one is process 0
    agreed = agree(own)
    assert agreed["stop"] is True
    assert (agreed["count"], agreed["rate"], agreed["gate"].tolist()) == (2**40 + 1, 1 / 3, [4, 5])
    monkeypatch.setattr(agreeing, "gather", lambda sent, what: [b"\x01", sent])
    assert agree({"stop": False}, anyone)["stop"] is True


def test_to_host_reads_a_sharded_tree(eight_devices):
    mesh = make_mesh(8, 1, devices=eight_devices)
    tree = {"rows": np.arange(16).reshape(8, 2)}
    read = to_host(put_rows(mesh, tree))
    assert type(read["rows"]) is np.ndarray
    assert np.array_equal(read["rows"], tree["rows"])


def test_mesh_reshard_moves_every_word_and_refuses_a_changed_one(eight_devices, monkeypatch):
    mesh = make_mesh(2, 2, fsdp=2, devices=eight_devices)
    axes, shapes = logical_axes(CONFIG), param_shapes(CONFIG)
    source, target = (named_shardings(mesh, axes, shapes, make_rules(name)) for name in ("fsdp", "decode"))
    params = shard_tree(single_device()[0], source)

    def narrow(tree):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)

    copy = make_reshard(target, narrow)(params)
    assert jax.tree.map(lambda leaf: leaf.sharding, copy) == target
    jax.tree.map(np.testing.assert_array_equal, to_host(copy), to_host(narrow(params)))
    assert not params["embedding"].is_deleted()  # training goes on from them

    real, seen = resharding.to_host, []

    def one_word_lost(tree):
        seen.append(None)
        return jax.tree.map(lambda leaf: leaf + np.uint32(len(seen) == 2), real(tree))

    monkeypatch.setattr(resharding, "to_host", one_word_lost)
    with pytest.raises(RuntimeError, match=r"other sums in .*layers/query.*mesh\.rollout_rules"):
        make_reshard(target, narrow)(params)
