"""A whole HPT update and a whole rollout on 8 devices against one (design contract 3), through the product's own build.

The recorded update mixes demonstrations and rollouts of uneven lengths in several micro-batches with empty rows. Every
mesh sees the same NumPy arrays.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from hptjax.build.mesh import build_mesh, check_mesh
from hptjax.build.policy import build_policy
from hptjax.build.stages import build_stages
from hptjax.config import MeshConfig
from hptjax.config_mesh import RuleConfig
from hptjax.config_model import ShapeConfig
from hptjax.models.decoder import param_shapes
from hptjax.models.folder import save_folder
from hptjax.models.shape import DecoderConfig
from hptjax.records import Request, SampleId, Source
from hptjax.sharding.host import to_host
from hptjax.sharding.mesh import REPLICATED_FIELDS, put_micro_batch
from hptjax.train.accumulate import Status
from tests import recorded, tiny

ONE = MeshConfig()
SPREAD = {
    "8x1": MeshConfig(data=8),
    "4x2": MeshConfig(data=4, tensor=2),
    "2x4": MeshConfig(data=2, tensor=4),
    "2x2x2": MeshConfig(data=2, fsdp=2, tensor=2),
    "sequence": MeshConfig(fsdp=2, sequence=2, tensor=2, rollout_rules="decode"),
    "slices": MeshConfig(replica=2, fsdp=4, rollout_rules="decode"),
}
MESHES = {"1x1": ONE, **SPREAD}
SLOW = ("8x1", "4x2", "2x2x2", "slices")


def on(meshes):
    """A case for each mesh."""
    marks = {name: pytest.mark.slow if name in SLOW else () for name in meshes}
    return pytest.mark.parametrize(
        "mesh", [pytest.param(mesh, id=name, marks=marks[name]) for name, mesh in meshes.items()]
    )


on_meshes, on_eight = on(MESHES), on(SPREAD)
SHAPE = ShapeConfig(hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=32)
UNIT_ROUNDOFF = 2.0**-24
LEARNING_RATE = 1e-3
CACHE: dict = {}  # what is compiled and run for a mesh serves all tests of this module
CUT_AXES = {  # array axes of a parameter that are cut over `tensor` and over `fsdp`; the others are whole everywhere
    "embedding": (0, 1),
    "query": (2, 1),
    "key": (2, 1),
    "value": (2, 1),
    "output": (1, 3),
    "gate": (2, 1),
    "up": (2, 1),
    "down": (1, 2),
}
FSDP_ONLY = {"attention_norm": 1, "mlp_norm": 1, "final_norm": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("devices")


def config_of(folder, mesh):
    """The tiny run with 4 query and 2 key heads, on a mesh; compiled sizes are the same for every mesh."""
    config = tiny.tiny_config(folder)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, shape=SHAPE),
        rollout=dataclasses.replace(config.rollout, prefill_rows=8),
        batch=dataclasses.replace(config.batch, rows=8),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=LEARNING_RATE),
        mesh=mesh,
    )


def built(folder, mesh):
    """(policy, stage) of a mesh, made once."""
    if mesh not in CACHE:
        config = config_of(folder, mesh)
        policy = build_policy(config)
        CACHE[mesh] = (policy, build_stages(config, policy, recorded.questions())[-1])
    return CACHE[mesh]


def added(policy, stage, state, micro_batches, *, flush):
    """The state after these micro-batches; `flush` ends the window with the last of them."""
    for index, micro_batch in enumerate(micro_batches):
        last = flush and index == len(micro_batches) - 1
        state = stage.micro_step(
            state, put_micro_batch(policy.mesh, micro_batch, policy.rules), jax.numpy.asarray(last)
        )
    return state


def fresh(policy, stage):
    return stage.start({"policy": policy.params}, None)


def update_of(stage, visit):
    """Sixteen questions: eight gated to their demonstration, eight with four judged rollouts each."""
    return stage.assemble(recorded.mixed(8, 8, visit=visit), frozenset())


def device_shapes(state):
    """Path of every leaf of a state -> (its shape, the shape of the part that one device holds)."""
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.chains))
    return {jax.tree_util.keystr(path): (leaf.shape, leaf.addressable_shards[0].data.shape) for path, leaf in leaves}


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What the tests compare, of one mesh, on the host."""

    sums: list  # gradient leaves before the flush
    witness: np.ndarray
    tokens: int
    open_shapes: dict
    report: object  # of the first update
    start: list
    params: list  # after the first update
    shapes: dict
    losses: np.ndarray  # of the next five updates: [5 2]


def run_recorded(folder, mesh):
    key = ("run", mesh)
    if key not in CACHE:
        policy, stage = built(folder, mesh)
        micro_batches = update_of(stage, 0).micro_batches
        start = to_host(jax.tree.leaves(policy.params))
        window = added(policy, stage, fresh(policy, stage), micro_batches, flush=False)
        state = added(policy, stage, fresh(policy, stage), micro_batches, flush=True)
        report, params, shapes = to_host(state.report), to_host(jax.tree.leaves(state.params)), device_shapes(state)
        losses = []
        for visit in range(1, 6):
            state = added(policy, stage, state, update_of(stage, visit).micro_batches, flush=True)
            losses.append([float(to_host(state.report.stats[name].total)) for name in ("loss/sft", "loss/rl")])
        sums = to_host(window.chains["policy"].sums)
        CACHE[key] = Recorded(
            sums=jax.tree.leaves(sums.gradients),
            witness=sums.witness,
            tokens=int(to_host(window.window.tokens)),
            open_shapes=device_shapes(window),
            report=report,
            start=start,
            params=params,
            shapes=shapes,
            losses=np.asarray(losses),
        )
    return CACHE[key]


def difference(left, right):
    return [np.asarray(a, np.float64) - np.asarray(b, np.float64) for a, b in zip(left, right, strict=True)]


def norm(leaves):
    return float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in leaves)))


def tolerances(folder):
    """Accumulation spec 3.6, per leaf: 16 (k + sqrt(T)) u sum of the micro-batches' norms; and the norms, [k leaf]."""
    if "tolerances" not in CACHE:
        policy, stage = built(folder, ONE)
        update = update_of(stage, 0)
        parts = []
        for micro_batch in update.micro_batches:
            state = added(policy, stage, fresh(policy, stage), [micro_batch], flush=False)
            leaves = to_host(jax.tree.leaves(state.chains["policy"].sums.gradients))
            parts.append([np.linalg.norm(np.ravel(leaf)) for leaf in leaves])
        norms = np.asarray(parts, np.float64)
        factor = 16 * (len(parts) + np.sqrt(update.planned_tokens.sum())) * UNIT_ROUNDOFF
        CACHE["tolerances"] = (factor * norms.sum(axis=0), norms)
    return CACHE["tolerances"]


def test_recorded_update_is_mixed_uneven_and_takes_several_micro_batches(folder):
    update = update_of(built(folder, ONE)[1], 0)
    assert update.sources[Source.DEMONSTRATION].sequences == 8
    assert update.sources[Source.ROLLOUT].sequences == 32
    assert len(update.micro_batches) >= 3
    assert len(set(update.planned_tokens[: len(update.micro_batches)].tolist())) > 1
    assert any((micro_batch.segment_ids == 0).all(axis=1).any() for micro_batch in update.micro_batches)


@on_eight
def test_t14_summed_gradient_on_eight_devices_is_within_the_bound(folder, mesh):
    bounds, norms = tolerances(folder)
    assert (norms > 100 * bounds[None, :]).all()  # the gap rule: a lost micro-batch would be seen in every leaf
    gaps = difference(run_recorded(folder, mesh).sums, run_recorded(folder, ONE).sums)
    for gap, bound in zip(gaps, bounds, strict=True):
        assert np.linalg.norm(np.ravel(gap)) <= bound


@on_meshes
def test_t14_witness_and_token_counts_are_bitwise_the_plan_on_every_mesh(folder, mesh):
    run = run_recorded(folder, mesh)
    planned = update_of(built(folder, ONE)[1], 0).planned_tokens
    assert run.witness.dtype == np.float32
    assert np.array_equal(run.witness, planned.astype(np.float32))
    assert run.tokens == int(run.report.tokens) == planned.sum()
    assert int(run.report.status) == Status.UPDATED
    one = run_recorded(folder, ONE).report
    for name in ("sft/loss", "actor/rollout_nll"):  # what the losses count, too
        assert np.array_equal(run.report.stats[name].count, one.stats[name].count)


@on_eight
def test_adamw_update_on_eight_devices_is_the_one_device_update(folder, mesh):
    one, many = run_recorded(folder, ONE), run_recorded(folder, mesh)
    assert max(np.abs(gap).max() for gap in difference(many.params, one.params)) <= 2 * LEARNING_RATE
    moved = norm(difference(one.params, one.start))
    assert moved > 10 * LEARNING_RATE
    np.testing.assert_allclose(norm(difference(many.params, many.start)), moved, rtol=1e-3)
    assert norm(difference(many.params, one.params)) < 0.1 * moved  # not merely as long: the same direction


@on_eight
def test_next_five_losses_on_eight_devices_are_the_one_device_losses(folder, mesh):
    expected = run_recorded(folder, ONE).losses
    assert np.unique(expected, axis=0).shape == (5, 2)
    np.testing.assert_allclose(run_recorded(folder, mesh).losses, expected, rtol=1e-4)


@on_eight
def test_parameters_sums_and_moments_are_cut_by_the_table(folder, mesh):
    """Parameters, sums, and both moments, in an open window and after a flush, lie where the table says."""
    run = run_recorded(folder, mesh)
    seen = dict.fromkeys(CUT_AXES, 0)
    for path, (whole, part) in [*run.shapes.items(), *run.open_shapes.items()]:
        name = path.split("'")[-2] if "'" in path else ""
        expected = list(whole)
        if name in FSDP_ONLY and len(whole) > FSDP_ONLY[name]:
            expected[FSDP_ONLY[name]] //= mesh.fsdp
        if name in CUT_AXES and len(whole) > 1:
            seen[name] += 1
            by_tensor, by_fsdp = CUT_AXES[name]
            copied = whole[by_tensor] < mesh.tensor  # 2 kv heads on 4 devices
            expected[by_tensor] //= 1 if copied else mesh.tensor
            expected[by_fsdp] //= mesh.fsdp
        assert list(part) == expected, path
    assert set(seen.values()) == {8}  # parameters, sums, mu, nu; twice


def asked(questions, index):
    """One completion of each of these questions."""
    return [
        Request(
            sample_id=SampleId(question.question_id, 0, index),
            prompt_tokens=question.prompt_tokens,
            max_completion_tokens=20,
            stop_ids=frozenset({2}),
        )
        for question in recorded.questions()[questions]
    ]


def sampled(folder, mesh):
    """Six groups of four completions, sampled on a mesh."""
    key = ("samples", mesh)
    if key not in CACHE:
        policy, _ = built(folder, mesh)
        requests = [one for index in range(4) for one in asked(slice(6), index)]
        CACHE[key] = policy.sample(policy.params, requests, jax.random.key(0))
    return CACHE[key]


@on_eight  # kv heads cut, copied, and both; weights where they are trained, and moved to where they decode
def test_rollouts_on_eight_devices_are_the_one_device_rollouts(folder, mesh):
    """Tokens may differ at near ties (contract 3); in this recorded case there is none."""
    expected = sampled(folder, ONE)
    assert len({len(sample.completion_tokens) for sample in expected}) > 5
    for sample, one in zip(sampled(folder, mesh), expected, strict=True):
        assert sample.sample_id == one.sample_id
        assert np.array_equal(sample.completion_tokens, one.completion_tokens)
        np.testing.assert_allclose(sample.sampler_logprobs, one.sampler_logprobs, rtol=0, atol=1e-4)


def test_rollouts_in_pages_on_eight_devices_are_the_one_device_rollouts(folder):
    """Sixteen slots in four shares of twelve pages, where four samples may want up to six each."""
    config = config_of(folder, SPREAD["2x2x2"])
    paged = dataclasses.replace(config.rollout, cache_positions=4 * 12 * 8, cache_page=8)
    policy = build_policy(dataclasses.replace(config, rollout=paged))
    requests = [one for index in range(3) for one in asked(slice(16), index)]
    samples = policy.sample(policy.params, requests, jax.random.key(0))
    whole = built(folder, ONE)[0]
    for sample, one in zip(samples, whole.sample(whole.params, requests, jax.random.key(0)), strict=True):
        assert np.array_equal(sample.completion_tokens, one.completion_tokens)
        np.testing.assert_allclose(sample.sampler_logprobs, one.sampler_logprobs, rtol=0, atol=1e-4)


def rescored(folder, mesh):
    """Log-probs of a recorded micro-batch by the score pass of a mesh."""
    key = ("scores", mesh)
    if key not in CACHE:
        policy, stage = built(folder, mesh)
        score = jax.jit(lambda params, micro_batch: policy.token_stats(False)(params, micro_batch).logprobs)
        batch = put_micro_batch(policy.mesh, update_of(stage, 0).micro_batches[0], policy.rules)
        CACHE[key] = to_host(score(policy.params, batch)), to_host(batch.completion_mask)
    return CACHE[key]


@on_eight
def test_recorded_tokens_are_rescored_alike_on_every_mesh(folder, mesh):
    (one, live), (many, _) = rescored(folder, ONE), rescored(folder, mesh)
    assert live.sum() > 100
    assert np.ptp(one[live]) > 0.1
    np.testing.assert_allclose(many[live], one[live], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("section", "fields", "names"),
    [
        ("batch", {"rows": 6}, ["batch.rows", "mesh.data (4)", "got 6"]),
        ("rollout", {"slots": 18}, ["rollout.slots", "mesh.data (4)", "got 18"]),
        ("rollout", {"prefill_rows": 3}, ["rollout.prefill_rows", "mesh.data (4)", "got 3", "(to 4)"]),
    ],
)
def test_mesh_check_names_rows_that_do_not_divide(folder, section, fields, names):
    config = config_of(folder, SPREAD["4x2"])
    check_mesh(config)
    with pytest.raises(ValueError) as caught:
        check_mesh(dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)}))
    assert all(name in str(caught.value) for name in names), str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"axes": [("embed", ()), ("embed", ("fsdp",))]}, "one line per logical axis in mesh.axes, got 2 for 'embed'"),
        ({"axes": [("embd", ())]}, "unknown logical axis 'embd' in mesh.axes"),
        ({"rollout_axes": [("embd", ())]}, "unknown logical axis 'embd' in mesh.rollout_axes"),
        ({"rollout_axes": [("mlp", ("tensr",))]}, r"mesh.rollout_axes, 'mlp': .*got \['tensr'\]"),
        ({"rollout_axes": [("time", ("data",))]}, "mesh.rollout_axes cannot cut 'time'"),
    ],
)
def test_mesh_tables_that_cannot_be_meant_are_refused(folder, fields, words):
    lines = {name: tuple(RuleConfig(*line) for line in table) for name, table in fields.items()}
    with pytest.raises(ValueError, match=words):
        check_mesh(config_of(folder, MeshConfig(data=4, tensor=2, **lines)))


def with_heads(config, heads, kv_heads):
    shape = dataclasses.replace(SHAPE, num_heads=heads, num_kv_heads=kv_heads)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, shape=shape))


def test_kv_heads_are_cut_or_copied_and_anything_else_names_the_field(folder):
    check_mesh(config_of(folder, SPREAD["2x4"]))  # 2 kv heads on 4 devices: copied
    check_mesh(config_of(folder, SPREAD["4x2"]))  # cut
    with pytest.raises(ValueError, match=r"model\.shape\.num_kv_heads: .*size 3 .* mesh\.tensor \(2\)"):
        check_mesh(with_heads(config_of(folder, SPREAD["4x2"]), 6, 3))


def test_build_names_what_a_mesh_cannot_hold(folder, eight_devices):
    """What the config alone does not say (a model folder's own sizes, the vocabulary) is refused when it is built."""
    shape = DecoderConfig(
        vocab_size=20, hidden_size=16, num_layers=1, num_heads=6, num_kv_heads=3, head_dim=8, mlp_size=32
    )
    params = jax.tree.map(
        lambda size: np.zeros(size, np.float32), param_shapes(shape), is_leaf=lambda x: type(x) is tuple
    )
    save_folder(folder / "model", shape, params, dtype="float32")
    config = config_of(folder, SPREAD["4x2"])
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(folder / "model")))
    check_mesh(config)
    with pytest.raises(ValueError, match=r"'kv_heads' of size 3 .* change mesh\.tensor"):
        build_policy(config)
    with pytest.raises(ValueError, match=r"of size (20|4) .* change mesh\.tensor"):
        build_policy(config_of(folder, MeshConfig(tensor=8)))
    policy, stage = built(folder, SPREAD["4x2"])
    whole = update_of(stage, 0).micro_batches[0]
    names = [field.name for field in dataclasses.fields(whole) if field.name not in REPLICATED_FIELDS]
    rows = {name: jax.tree.map(lambda leaf: leaf[:6], getattr(whole, name)) for name in names}
    rows = dataclasses.replace(whole, **rows)
    with pytest.raises(ValueError, match=r"'batch' of size 6 .* change mesh\.data"):
        put_micro_batch(policy.mesh, rows)


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (MeshConfig(data=4), ["mesh of 8 devices", "mesh.data 4, which is 4", "mesh.data 8", "mesh.devices 4"]),
        (MeshConfig(data=3, tensor=2), ["mesh.data 3 x mesh.tensor 2, which is 6", "mesh.devices 6"]),
        (MeshConfig(data=4, tensor=4), ["which is 16", "mesh.data 2", "mesh.tensor 2", "16 devices"]),
        (MeshConfig(data=2, devices=4), ["mesh of 4 devices", "which is 2", "mesh.data 4"]),
        (MeshConfig(devices=9), ["mesh.devices in 1..8", "got 9"]),
    ],
)
def test_mesh_that_is_not_the_devices_says_what_would_work(folder, mesh, words, eight_devices):
    with pytest.raises(ValueError) as caught:
        build_mesh(config_of(folder, mesh), eight_devices)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert build_mesh(config_of(folder, ONE), eight_devices).size == 1
    assert build_mesh(config_of(folder, MeshConfig(data=2, devices=2)), eight_devices).size == 2
