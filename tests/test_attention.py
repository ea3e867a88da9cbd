"""Every form of attention against the plain one, forward and backward, and what each of them holds in memory."""

from __future__ import annotations

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hptjax.build.attention import build_attention, choose_attention
from hptjax.config import MeshConfig
from hptjax.config_batch import SHORT_ROW_TOKENS
from hptjax.models.attention import reference_attention
from hptjax.models.attention_cache import attention_step, attention_step_in_blocks
from hptjax.models.attention_chunked import chunked_attention, chunked_part
from hptjax.models.attention_kernels import splash_kernel, splash_part
from hptjax.models.decoder import decode_step, forward, prefill
from hptjax.plan.chips import parse_topology
from hptjax.plan.environment import expect_no_chips
from hptjax.plan.topology import compile_only_devices
from hptjax.sharding.mesh import make_mesh
from hptjax.sharding.rules import make_constrain, make_rules, partition_spec
from hptjax.train.optimizer import check_host_memory, in_host_memory, make_optimizer, make_schedule
from tests import tiny
from tests.test_models import FAMILIES, packed_rows, random_params

B, T, H, K, E = 2, 50, 6, 3, 8


def rows(shape=(B, T, H, K, E), dtype=np.float32, seed=0):
    """Query, key, value, segment ids with padding inside and at the end, and a cotangent that is 0 on padding."""
    rows, positions, heads, kv_heads, head_dim = shape
    rng = np.random.default_rng(seed)
    query, cotangent = (rng.normal(size=(rows, positions, heads, head_dim)) for _ in range(2))
    key, value = (rng.normal(size=(rows, positions, kv_heads, head_dim)) for _ in range(2))
    segments = np.zeros((rows, positions), np.int32)
    for row in range(rows):
        cuts = np.sort(rng.choice(np.arange(1, positions), 4, replace=False))
        for number, (start, end) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True), start=1):
            segments[row, start:end] = number  # what lies past the last cut is padding
    segments[0, :3] = 0
    cotangent = cotangent * (segments > 0)[:, :, None, None]
    return *(jnp.asarray(x, dtype) for x in (query, key, value)), jnp.asarray(segments), jnp.asarray(cotangent, dtype)


def results(packed, query, key, value, segments, cotangent):
    """The mixture, and the gradients of its product with the cotangent."""

    def loss(query, key, value):
        mixed = packed(segments)(query, key, value)
        return jnp.sum(mixed.astype(jnp.float32) * cotangent.astype(jnp.float32)), mixed

    (_, mixed), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(query, key, value)
    return [np.asarray(x, np.float64) for x in (mixed, *gradients)]


def check_equal(got, want, segments, tolerance):
    live = np.asarray(segments) > 0
    np.testing.assert_allclose(got[0][live], want[0][live], rtol=0, atol=tolerance)
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize("block", [7, 16, 64])
def test_chunked_attention_equals_the_reference_forward_and_backward(block):
    inputs = rows()
    got = results(functools.partial(chunked_attention, block=block), *inputs)
    check_equal(got, results(reference_attention, *inputs), inputs[3], 2e-5)


def test_chunked_attention_in_bf16_is_as_near_to_float32_as_the_reference():
    inputs = rows(dtype=jnp.bfloat16)
    wide = results(reference_attention, *(x.astype(jnp.float32) if x.dtype != jnp.int32 else x for x in inputs))
    check_equal(results(functools.partial(chunked_attention, block=16), *inputs), wide, inputs[3], 0.03)
    check_equal(results(reference_attention, *inputs), wide, inputs[3], 0.03)


def test_chunked_attention_of_part_of_the_queries_is_that_part():
    query, key, value, segments, _ = rows()
    whole = np.asarray(reference_attention(segments)(query, key, value))
    for first in (20, jnp.asarray(20)):
        run = jax.jit(functools.partial(chunked_part, first_query=first, block=8))
        part = run(query[:, 20:33], key, value, segments[:, 20:33], segments)
        live = np.asarray(segments[:, 20:33]) > 0
        np.testing.assert_allclose(np.asarray(part)[live], whole[:, 20:33][live], rtol=0, atol=2e-5)


def test_chunked_attention_query_that_sees_nothing_is_zero_with_zero_gradient():
    query, key, value, _, cotangent = rows()
    alone, others = jnp.full((B, T), 1, jnp.int32), jnp.full((B, T), 2, jnp.int32)

    def packed(segments):
        return lambda query, key, value: chunked_part(query, key, value, segments, others, 0, block=16)

    for result in results(packed, query, key, value, alone, cotangent):
        assert not result.any()


@pytest.mark.parametrize("perturbed", [1, 2, 3])
def test_chunked_attention_segments_do_not_see_each_other_bitwise(perturbed):
    query, key, value, segments, _ = rows()
    touched = np.asarray(segments) == perturbed
    run = jax.jit(lambda q, k, v: chunked_attention(segments, block=16)(q, k, v))
    before = np.asarray(run(query, key, value))
    after = np.asarray(run(*(jnp.where(touched[:, :, None, None], x + 1, x) for x in (query, key, value))))
    assert np.array_equal(before[~touched], after[~touched])
    assert not np.array_equal(before[touched], after[touched])


def temporary_bytes(packed, positions, kv_heads=2):
    """Scratch memory of one attention's forward and backward pass, as the compiler states it."""
    arguments = rows((1, positions, 4, kv_heads, 16))[:4]

    def loss(query, key, value, segments):
        return jnp.sum(packed(segments)(query, key, value) ** 2)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_chunked_attention_memory_grows_with_the_row_and_not_with_its_square():
    chunked = functools.partial(chunked_attention, block=128)
    short, long = temporary_bytes(chunked, 1024), temporary_bytes(chunked, 2048)
    assert long < 2.2 * short
    assert long < 4 * 2048 * 2048 * 4 / 4  # a quarter of the scores of all heads
    assert temporary_bytes(reference_attention, 2048) > 4 * 2048 * 2048 * 4  # the same reading finds them here


# decoding


def cache_case(seed=0):
    rng = np.random.default_rng(seed)
    layers, capacity = 2, 37
    query = rng.normal(size=(4, 1, H, E)).astype(np.float32)
    key, value = (rng.normal(size=(4, 1, K, E)).astype(np.float32) for _ in range(2))
    keys, values = (rng.normal(size=(layers, 4, capacity, K, E)).astype(np.float32) for _ in range(2))
    return query, key, value, keys, values


@pytest.mark.parametrize("block", [1, 8, 37])
def test_attention_step_in_blocks_equals_the_whole_cache(block):
    query, key, value, keys, values = cache_case()
    lengths = np.array([0, 5, 36, 37], np.int32)
    step = jax.jit(functools.partial(attention_step_in_blocks, block=block))
    for layer in range(2):
        mask = np.arange(37)[None, :] < lengths[:, None]
        whole = attention_step(query, key, value, keys[layer], values[layer], mask)
        got = step(query, key, value, keys, values, jnp.asarray(layer), lengths)
        np.testing.assert_allclose(got, whole, rtol=0, atol=2e-6)


def test_attention_step_in_blocks_rows_do_not_depend_on_others_lengths_bitwise():
    query, key, value, keys, values = cache_case()
    step = jax.jit(functools.partial(attention_step_in_blocks, block=8))
    alone = step(query, key, value, keys, values, jnp.asarray(1), np.array([9, 0, 0, 0], np.int32))
    beside = step(query, key, value, keys, values, jnp.asarray(1), np.array([9, 37, 20, 3], np.int32))
    assert np.array_equal(alone[0], beside[0])
    stale = np.where(np.arange(37)[None, None, :, None, None] < 9, keys, 50.0).astype(np.float32)
    dirty = step(query, key, value, stale, values, jnp.asarray(1), np.array([9, 37, 20, 3], np.int32))
    assert np.array_equal(alone[0], dirty[0])


def test_attention_of_decode_in_blocks_equals_forward():
    config = FAMILIES["qwen3"]
    params = random_params(config)
    tokens, positions, segments = packed_rows(((18,), (18,), (18,)))
    keywords = {"config": config, "compute_dtype": jnp.float32}
    whole = np.asarray(forward(params, tokens, positions, segments, **keywords))
    lengths = np.array([4, 7, 1], np.int32)
    _, cache = prefill(params, tokens[:, :8], lengths, capacity=18, **keywords)
    step = jax.jit(functools.partial(decode_step, cache_block=5, **keywords))
    for _ in range(11):
        hidden, cache = step(params, cache, tokens[np.arange(3), lengths], lengths)
        np.testing.assert_allclose(hidden, whole[np.arange(3), lengths], rtol=0, atol=1e-5)
        lengths = lengths + 1


# splash


def splash_packed(segments, *, heads, block=128):
    kernel = splash_kernel(heads, segments.shape[1], segments.shape[1], block=block, interpret=True)
    return lambda query, key, value: splash_part(kernel, query, key, value, segments, segments)


@pytest.mark.parametrize("head_dim", [pytest.param(64, marks=pytest.mark.slow), 128])
def test_splash_attention_interpreted_equals_the_reference_forward_and_backward(head_dim):
    inputs = rows((1, 256, 4, 2, head_dim))
    got = results(functools.partial(splash_packed, heads=4), *inputs)
    check_equal(got, results(reference_attention, *inputs), inputs[3], 5e-5)


# on meshes


MESHES = {  # mesh sizes, kv heads
    "sequence1": ({"sequence": 1, "data": 2}, 2),
    "sequence2": ({"sequence": 2}, 2),
    "sequence4": ({"sequence": 4, "data": 2}, 2),
    "sequence2_tensor2": ({"sequence": 2, "tensor": 2, "fsdp": 2}, 2),
    "tensor4_copies_kv_heads": ({"sequence": 2, "tensor": 4}, 2),
    "tensor8_copies_one_kv_head": ({"tensor": 8}, 1),
}


def on_mesh(name, mesh, *, head_dim=E, block=8, interpret=False, axes=None):
    return build_attention(
        name,
        mesh=mesh,
        rules=make_rules("fsdp", axes),
        head_dim=head_dim,
        dtype=jnp.float32,
        block=block,
        interpret=interpret,
    )


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        *[(case, "chunked") for case in MESHES],
        *[pytest.param(case, "reference", marks=pytest.mark.slow) for case in MESHES],
    ],
)
def test_attention_on_a_mesh_equals_the_reference_forward_and_backward(case, kind, eight_devices):
    sizes, kv_heads = MESHES[case]
    mesh = make_mesh(**sizes, devices=eight_devices[: int(np.prod(list(sizes.values())))])
    inputs = rows((2, 32, 8, kv_heads, E))
    got = results(on_mesh(kind, mesh), *inputs)
    check_equal(got, results(reference_attention, *inputs), inputs[3], 2e-5)


def test_attention_of_query_heads_cut_across_the_groups_of_copied_kv_heads(eight_devices):
    """6 query heads in groups of 3 on 3 devices: the second has the last of one group and the first of the other."""
    mesh = make_mesh(tensor=3, devices=eight_devices[:3])
    inputs = rows((1, 16, 6, 2, E))
    got = results(on_mesh("chunked", mesh, axes={"kv_heads": ()}), *inputs)
    check_equal(got, results(reference_attention, *inputs), inputs[3], 2e-5)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"heads": ()}, r"kv_heads to be cut .* heads \(\[\]\), got \['tensor'\]"),
        ({"kv_heads": ("data",), "batch": ()}, r"heads \(\['tensor'\]\), got \['data'\]"),
        ({"heads": (), "kv_heads": (), "head_dim": ("tensor",)}, r"head_dim whole .* over \['tensor'\]"),
    ],
)
def test_attention_refuses_tables_that_take_heads_and_kv_heads_apart(axes, words, eight_devices):
    mesh = make_mesh(data=2, tensor=2, devices=eight_devices[:4])
    with pytest.raises(ValueError, match=words):
        results(on_mesh("chunked", mesh, axes=axes), *rows((2, 16, 4, 2, E)))


@pytest.mark.parametrize("sequence", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_splash_attention_on_a_mesh_equals_the_reference_forward_and_backward(sequence, eight_devices):
    mesh = make_mesh(sequence=sequence, tensor=2, devices=eight_devices[: 2 * sequence])
    inputs = rows((1, 256, 2, 1, 64))
    got = results(on_mesh("splash", mesh, head_dim=64, block=128, interpret=True), *inputs)
    check_equal(got, results(reference_attention, *inputs), inputs[3], 5e-5)


# which one


CHOICE = {"tokens": 8192, "parts": 1, "head_dim": 128, "dtype": "bfloat16", "platform": "tpu", "block": 512}


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, "splash"),
        ({"tokens": SHORT_ROW_TOKENS}, "reference"),
        ({"parts": 4}, "splash"),
        ({"tokens": 8200}, "chunked"),
        ({"tokens": 8192 + 128}, "splash"),
        ({"tokens": 8192 + 128, "parts": 2}, "chunked"),
        ({"platform": "cpu"}, "chunked"),
        ({"platform": "gpu"}, "cudnn"),
        ({"platform": "gpu", "dtype": "float32"}, "chunked"),
        ({"platform": "gpu", "head_dim": 256}, "chunked"),
    ],
)
def test_attention_is_chosen_by_platform_and_shape(changes, chosen):
    assert choose_attention("auto", **CHOICE | changes) == chosen


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("splash", {"platform": "cpu"}, "runs on TPU only, this is cpu"),
        ("splash", {"tokens": 8200}, "a multiple of 128, got 8200"),
        ("splash", {"head_dim": 96}, "got 96"),
        ("splash", {"block": 64}, "model.attention_block of at least 128, got 64"),
        ("cudnn", {}, "NVIDIA GPUs only, this is tpu"),
        ("cudnn", {"platform": "gpu", "dtype": "float32"}, "model.compute_dtype is float32"),
    ],
)
def test_attention_that_cannot_take_the_rows_is_refused_with_the_reason(name, changes, words):
    with pytest.raises(ValueError, match=words) as error:
        choose_attention(name, **CHOICE | changes)
    assert "model.attention" in str(error.value)


def collectives(text):
    """The collectives of a compiled program by kind, with the shapes of their results."""
    found = re.findall(
        r"= (\S+) (all-gather|reduce-scatter|all-reduce|collective-permute|all-to-all)(?:-start)?\(", text
    )
    return {kind: sorted({shape.split("{")[0] for shape, name in found if name == kind}) for _, kind in found}


def test_attention_over_a_cut_time_axis_gathers_keys_and_values_and_scatters_their_gradients(eight_devices):
    mesh = make_mesh(sequence=4, tensor=2, devices=eight_devices)
    inputs = rows((1, 512, 8, 2, 16))
    packed = on_mesh("chunked", mesh, block=64)

    def loss(query, key, value, segments, cotangent):
        return jnp.sum(packed(segments)(query, key, value) * cotangent)

    specs = [PartitionSpec(None, "sequence", "tensor")] * 3 + [PartitionSpec(None, "sequence")]
    places = [NamedSharding(mesh, spec) for spec in (*specs, specs[0])]
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), in_shardings=places, out_shardings=tuple(places[:3]))
    compiled = step.lower(*inputs).compile()
    found = collectives(compiled.as_text())
    assert found.keys() == {"all-gather", "reduce-scatter"}
    assert found["all-gather"] == ["f32[1,512,1,16]", "s32[1,512]"]  # one kv head per device, never the queries
    assert found["reduce-scatter"] == ["f32[1,128,1,16]"]
    scores = 4 * 128 * 512 * 4  # of this device's queries, if they were held
    assert compiled.memory_analysis().temp_size_in_bytes < scores


@pytest.fixture(scope="module")
def tpu_devices():
    """Compile-only devices of an absent TPU; needs the extra `tpu`, and runs nothing."""
    pytest.importorskip("libtpu")
    expect_no_chips()
    return compile_only_devices(parse_topology("v5e:2x4"))


@pytest.mark.parametrize(
    ("sizes", "tokens", "heads", "kv_heads"),
    [({}, 8192, 28, 4), ({"tensor": 8}, 2048, 16, 2), ({"sequence": 4, "tensor": 2}, 32768, 28, 4)],
    ids=["one_chip_8k", "kv_heads_copied", "sequence4_32k"],
)
def test_splash_attention_compiles_for_an_absent_tpu(sizes, tokens, heads, kv_heads, tpu_devices):
    count = int(np.prod(list(sizes.values())))
    mesh, rules = make_mesh(**sizes, devices=tpu_devices[:count]), make_rules("fsdp")
    packed = build_attention("auto", mesh=mesh, rules=rules, head_dim=128, dtype="bfloat16", block=512)

    def shaped(dtype, shape, *axes):
        place = NamedSharding(mesh, partition_spec(mesh, axes, shape, rules))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    query = shaped(jnp.bfloat16, (1, tokens, heads, 128), "batch", "time", "heads", "head_dim")
    key = shaped(jnp.bfloat16, (1, tokens, kv_heads, 128), "batch", "time", "kv_heads", "head_dim")
    segments = shaped(jnp.int32, (1, tokens), "batch", "time")

    def loss(query, key, value, segments):
        return jnp.sum(packed(segments)(query, key, value).astype(jnp.float32))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, key, key, segments).compile()
    assert (
        compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    )  # forward, and one per side of backward
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * tokens * 4
    if "sequence" in sizes:
        assert "all-gather" in collectives(compiled.as_text())


# what is kept, and where


@functools.cache
def remat_program(remat, attention=reference_attention):
    """The gradient of a small decoder under a remat policy, compiled; (params, tokens, positions, segments)."""

    def loss(params, *inputs):
        hidden = forward(
            params, *inputs, config=FAMILIES["qwen2"], compute_dtype=jnp.float32, remat=remat, attention=attention
        )
        live = (inputs[2] > 0)[:, :, None]
        return jnp.sum(jnp.where(live, hidden, 0) ** 2)

    return jax.jit(jax.grad(loss)).lower(random_params(FAMILIES["qwen2"]), *packed_rows()).compile()


IN_TILES = functools.partial(chunked_attention, block=8)


@pytest.mark.parametrize(
    ("remat", "attention"),
    [
        ("offload", reference_attention),
        ("attention", IN_TILES),
        *[
            pytest.param(remat, attention, marks=pytest.mark.slow)
            for remat in ("full", "dots", "dots_no_batch")
            for attention in (reference_attention, IN_TILES)
        ],
    ],
)
def test_attention_and_the_rest_have_the_same_gradient_under_every_remat_policy(remat, attention):
    inputs = (random_params(FAMILIES["qwen2"]), *packed_rows())
    for ours, theirs in zip(
        jax.tree.leaves(remat_program(remat, attention)(*inputs)),
        jax.tree.leaves(remat_program("none", attention)(*inputs)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.slow
def test_attention_and_the_rest_are_kept_as_the_remat_policy_says():
    layers = 8
    config = dataclasses.replace(
        FAMILIES["qwen2"], num_layers=layers, hidden_size=64, mlp_size=256, num_heads=4, head_dim=16
    )
    tokens, positions, segments = packed_rows(((200, 56), (256,)), row_tokens=256)
    packed = functools.partial(chunked_attention, block=64)

    def kept(remat):
        def loss(params):
            keywords = {"config": config, "compute_dtype": jnp.float32, "remat": remat, "attention": packed}
            return jnp.sum(forward(params, tokens, positions, segments, **keywords) ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(random_params(config)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    sizes = {remat: kept(remat) for remat in ("none", "dots", "dots_no_batch", "attention", "full")}
    assert list(sizes) == sorted(sizes, key=sizes.__getitem__, reverse=True), sizes
    mixtures = layers * 2 * 256 * 64 * 4  # what `attention` keeps beside the layers' inputs
    assert 0.5 * mixtures < sizes["attention"] - sizes["full"] < 2 * mixtures


def toy_optimizer(host):
    chain = make_optimizer(
        make_schedule("constant", 0.1, warmup_steps=0, decay_steps=1),
        b1=0.9,
        b2=0.99,
        eps=1e-8,
        weight_decay=0.1,
        clip_norm=1.0,
    )
    return in_host_memory(chain) if host else chain


@pytest.mark.parametrize("devices", [1, 4])
def test_plan_of_moments_in_host_memory_gives_the_same_updates_bitwise(devices, eight_devices):
    mesh = make_mesh(fsdp=devices, devices=eight_devices[:devices])
    place = NamedSharding(mesh, PartitionSpec("fsdp"))
    params = {"kernel": jax.device_put(np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4), place)}

    def trained(host):
        optimizer = toy_optimizer(host)
        state = optimizer.init(params)
        memory = "pinned_host" if host else "device"
        places = jax.tree.map(
            lambda leaf: place.with_memory_kind(memory) if leaf.ndim else NamedSharding(mesh, PartitionSpec()), state
        )
        state, now = jax.device_put(state, places), params

        @functools.partial(jax.jit, out_shardings=({"kernel": place}, places))
        def step(params, state):
            def advance(params, state):
                updates, state = optimizer.update(jax.tree.map(jnp.sin, params), state, params)
                return jax.tree.map(jnp.add, params, updates), state

            return jax.lax.cond(jnp.sum(params["kernel"]) < 1e9, advance, lambda *same: same, params, state)

        with jax.numpy_dtype_promotion("standard"):  # optax mixes them
            for _ in range(3):
                now, state = step(now, state)
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state) if leaf.ndim}
        assert kinds == {memory}
        return [np.asarray(now["kernel"]), *map(np.asarray, jax.tree.leaves(state))]

    for ours, theirs in zip(trained(True), trained(False), strict=True):
        assert np.array_equal(ours, theirs)


def test_plan_of_moments_in_host_memory_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match=r"optimizer.host_memory = true needs .* toy has device; set"):
        check_host_memory("toy", ["device"])


@pytest.mark.slow
def test_plan_of_a_run_with_moments_in_host_memory_resumes_and_ends_with_the_same_rows(tmp_path):
    """The product's own loop: two steps, a resume, a third; against the same run with moments on the device."""
    ledgers = []
    for host in (False, True):
        config = tiny.tiny_config(tmp_path / str(host), mesh=MeshConfig(fsdp=2, devices=2))
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, host_memory=host))
        for steps in (2, 3):
            tiny.train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps)))
        lines = next((tmp_path / str(host)).glob("runs/*/ledger.jsonl")).read_text().splitlines()
        ledgers.append([(row["grad_norm"], row["digest"]) for row in map(json.loads, lines)])
    assert len(ledgers[0]) == 3
    assert ledgers[0] == ledgers[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chunked", "reference"])
def test_attention_of_long_rows_in_a_whole_step_on_a_mesh_equals_one_device(kind, eight_devices):
    """The decoder's forward and gradient with the time axis over 1, 2 and 4 devices."""
    config = dataclasses.replace(FAMILIES["qwen3"], num_heads=4, num_kv_heads=2, hidden_size=16, mlp_size=32)
    tokens, positions, segments = packed_rows(((100, 60, 90), (256,)), row_tokens=256)
    params, gradients = random_params(config), []
    for sequence in (1, 2, 4):
        mesh = make_mesh(sequence=sequence, fsdp=2, devices=eight_devices[: 2 * sequence])
        constrain = make_constrain(mesh, make_rules("fsdp"))

        def loss(params, constrain=constrain, mesh=mesh):
            hidden = forward(
                params,
                tokens,
                positions,
                segments,
                config=config,
                compute_dtype=jnp.float32,
                constrain=constrain,
                attention=on_mesh(kind, mesh, head_dim=6, block=32),
                remat="attention",
            )
            return jnp.sum(jnp.where((segments > 0)[:, :, None], hidden, 0) ** 2)

        gradients.append(jax.jit(jax.grad(loss))(params))
    for other in gradients[1:]:
        for ours, theirs in zip(jax.tree.leaves(other), jax.tree.leaves(gradients[0]), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
