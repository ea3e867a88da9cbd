"""T29: the certificate of the shipped `micro_step`, what it refuses, and what the compiler makes of the same program.

A broken step is the shipped one, in which the add or a branch of the final `cond` is replaced while it is traced.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import pallas

import hptjax.train.step as shipped
from hptjax.audit import dataflow
from hptjax.audit.certificate import CertificateError, certify
from hptjax.build.policy import build_policy
from hptjax.build.stages import build_stages
from hptjax.config import MeshConfig
from hptjax.config_model import ShapeConfig
from hptjax.sharding.mesh import put_micro_batch
from hptjax.train.accumulate import Sums
from hptjax.train.noise import token_noise_keys
from hptjax.train.state import init_state, jit_step
from tests import recorded, tiny, toys

TOY_READS = ("target_tokens", "planes.toy.weights")
SHAPE = ShapeConfig(hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=32)


def toy_batch():
    return toys.micro_batch(
        np.zeros((1, 5), np.int32), np.ones((1, 5), bool), np.ones((1, 5)), 0, np.zeros(toys.MAX_MICRO, np.int32)
    )


def toy(losses=toys.tanh_losses, params=None, optimizer=None):
    """(step, not jitted; state; micro-batch) of a toy under AdamW with a clip."""
    params = toys.tanh_params() if params is None else params
    chain = optimizer or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    stats = jax.eval_shape(losses, params, toy_batch())[1]
    step = shipped.make_micro_step(losses, dict.fromkeys(params, chain))
    return step, init_state(params, dict.fromkeys(params, chain), stats, toys.MAX_MICRO), toy_batch()


def mutated(step, *, add=None, stay=None, flush=None):
    """The step with its add, or what its final `cond` returns, replaced.

    add: (sums, part, state, micro_batch, is_last) -> sums. stay, flush: (state returned, state given, part) -> state.
    """

    def micro_step(state, micro_batch, is_last):
        cond, right_add, parts = jax.lax.cond, shipped.add, {}

        def new_add(sums, gradients, witness):
            part = parts["policy"] = Sums(gradients, witness)
            if add is None:
                return right_add(sums, gradients, witness)
            return add(sums, part, state, micro_batch, is_last)

        def new_cond(decides, on_true, on_false, *operands):
            if decides is not is_last:
                return cond(decides, on_true, on_false, *operands)
            change = [flush or (lambda after, *_: after), stay or (lambda after, *_: after)]
            branches = [
                lambda *inside, branch=branch, change=change: change(branch(*inside), inside[0], parts["policy"])
                for branch, change in zip((on_true, on_false), change, strict=True)
            ]
            return cond(decides, *branches, *operands)

        with mock.patch.object(shipped, "add", new_add), mock.patch.object(jax.lax, "cond", new_cond):
            return step(state, micro_batch, is_last)

    return micro_step


def each_leaf(rule):
    """An add of all leaves by rule(total, part, state, micro_batch, is_last)."""
    return lambda sums, part, *where: jax.tree.map(lambda a, b: rule(a, b.astype(jnp.float32), *where), sums, part)


def with_sums(state, **changes):
    """The state with parts of its chain's sums replaced."""
    chain = state.chains["policy"]
    return dataclasses.replace(
        state, chains={"policy": dataclasses.replace(chain, sums=dataclasses.replace(chain.sums, **changes))}
    )


@functools.cache
def tanh_toy():
    return toy()


# what is certified


def test_t29_certifies_the_toys():
    step, state, batch = tanh_toy()
    leaves = {leaf.name: leaf.reads for leaf in certify(step, state, batch).leaves}
    assert leaves == {
        "chains.policy.sums.gradients.w1": ("params", "planes.toy.weights", "target_tokens"),
        "chains.policy.sums.gradients.w2": ("params", "planes.toy.weights", "target_tokens"),
        "chains.policy.sums.witness": ("completion_mask", "micro_index"),
    }
    linear = toy(toys.linear_losses, toys.linear_params())
    with pytest.raises(CertificateError, match="depends on params, found that it reads planes"):
        certify(*linear)  # a linear loss has a gradient without parameters, and says so
    assert len(certify(*linear, gradients_read=TOY_READS).leaves) == 2


def test_t29_certifies_whatever_does_not_touch_the_sum():
    """jit, shapes for arrays, remat, a custom gradient, bf16 parameters, and the unbroken mutation itself."""
    step, state, batch = tanh_toy()
    shapes = jax.eval_shape(lambda tree: tree, state)
    expected = certify(step, state, batch)
    assert certify(jax.jit(step, donate_argnums=0), shapes, batch) == expected
    assert certify(mutated(step), state, batch) == expected
    assert certify(*toy(jax.checkpoint(toys.tanh_losses))) == expected
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), toys.tanh_params())

    def in_float32(params, micro_batch):
        return toys.tanh_losses(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), micro_batch)

    assert certify(*toy(in_float32, narrow)) == expected


def test_t29_certifies_noise_that_belongs_to_the_sample_and_refuses_noise_of_the_place():
    def dropped(keys_of):
        def losses(params, micro_batch):
            keys = keys_of(micro_batch)
            kept = jax.vmap(jax.vmap(lambda key: jax.random.bernoulli(key, 0.9)))(keys)
            plane = micro_batch.planes["toy"]
            plane = dataclasses.replace(plane, weights=jnp.where(kept, plane.weights, 0.0))
            return toys.tanh_losses(params, dataclasses.replace(micro_batch, planes={"toy": plane}))

        return losses

    def of_place(micro_batch):
        key = jax.random.fold_in(jax.random.key(0), micro_batch.micro_index)
        return jax.random.split(key, micro_batch.target_tokens.shape)

    certificate = certify(*toy(dropped(lambda batch: token_noise_keys(jax.random.key(0), batch))))
    expected = {"params", "planes.toy.weights", "target_tokens", "sample_hash", "positions", "segment_ids"}
    assert set(certificate.leaves[0].reads) == expected
    with pytest.raises(CertificateError, match="reads micro_index"):
        certify(*toy(dropped(of_place)))


def test_t29_dependence_is_followed_result_by_result():
    """Through branches, and through loops for as many turns as it takes to reach a result."""

    def program(flag, a, b, c, d):
        def turn(carry, x):
            first, second, third = carry
            return (x, first, second), third

        (_, _, late), seen = jax.lax.scan(turn, (a, a, a), jnp.stack([b, b, b, b]))
        looped = jax.lax.while_loop(lambda x: x[1] < c, lambda x: (x[0] * 2.0, x[1] + 1.0), (a, b))
        branched = jax.lax.cond(flag, lambda: (a, c), lambda: (b, c))
        called = jax.jit(lambda x, y: (y * 2.0, x))(c, d)
        drawn = jax.pure_callback(np.sin, jax.ShapeDtypeStruct((), jnp.float32), d)
        return (late, jnp.sum(seen), *looped, *branched, *called, drawn)

    shapes = [jax.ShapeDtypeStruct((), bool), *[jax.ShapeDtypeStruct((), jnp.float32)] * 4]
    names = ["flag", "a", "b", "c", "d"]
    values = dataflow.results(jax.make_jaxpr(program)(*shapes), dataflow.arguments(5))

    def named(reads):
        return {read if isinstance(read, str) else names[read] for read in reads}

    assert [named(value.reads) for value in values] == [
        {"a", "b"},  # three turns later
        {"a", "b"},
        {"a", "b", "c"},  # how often the loop ran
        {"b", "c"},
        {"flag", "a", "b"},
        {"c"},  # jax lifts out what both branches return
        {"d"},
        {"c"},
        {"d", "pure_callback"},
    ]
    assert [named(value.data) for value in values[4:6]] == [{"a", "b"}, {"c"}]


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """(data, tensor) -> its config and policy, made once."""
    folder, made = tmp_path_factory.mktemp("structure"), {}

    def get(data, tensor):
        if (data, tensor) not in made:
            config = tiny.tiny_config(folder)
            config = dataclasses.replace(
                config,
                model=dataclasses.replace(config.model, shape=SHAPE),
                rollout=dataclasses.replace(config.rollout, prefill_rows=8),
                batch=dataclasses.replace(config.batch, rows=8),
                mesh=MeshConfig(data=data, tensor=tensor, devices=data * tensor),
            )
            made[data, tensor] = (config, build_policy(config))
        return made[data, tensor]

    return get


def made_stage(configs, mesh, *, method="hpt", **sections):
    """(stage, policy) of the product; nothing is compiled."""
    config, policy = configs(*mesh)
    config = dataclasses.replace(config, method=method)
    for name, fields in sections.items():
        config = dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **fields)})
    return build_stages(config, policy, recorded.questions())[-1], policy


MODEL = {"params", "input_tokens", "target_tokens", "positions", "segment_ids", "completion_mask", "temperature"}
SFT, RL = ({f"planes.{name}.weights", f"planes.{name}.advantages"} for name in ("sft", "rl"))
REGULARISED = {"entropy_coefficient": 0.001, "kl_coefficient": 0.1}
CLIPPED = {"hpt": {"clip_low": 0.2, "clip_high": 0.2}, "train": {"updates_per_rollout_batch": 2}}
PRODUCT = {
    "sft": ({"method": "sft"}, SFT),
    "dr_grpo": ({"method": "dr_grpo"}, RL),
    "hpt": ({}, SFT | RL),
    "entropy_and_kl": (
        {"hpt": REGULARISED},
        SFT | RL | {"planes.entropy.weights", "planes.kl.weights", "reference_logprobs"},
    ),
    "two_updates_with_clip": (CLIPPED, SFT | RL | {"rollout_logprobs"}),
}
ONE_DEVICE, MESH = (1, 1), (4, 2)  # data x tensor


@pytest.mark.parametrize("mesh", [ONE_DEVICE, MESH], ids=["one_device", "data4_tensor2"])
@pytest.mark.parametrize("case", PRODUCT)
def test_t29_certifies_the_product_steps(configs, case, mesh):
    check_certified(configs, mesh, *PRODUCT[case])


@pytest.mark.parametrize("mesh", [ONE_DEVICE, MESH], ids=["one_device", "data4_tensor2"])
def test_t29_certifies_ppo_and_that_policy_and_critic_read_planes_of_their_own(configs, mesh):
    """Two chains in one backward: no leaf of the policy can see the critic's loss, nor the critic the policy's."""
    stage, policy = made_stage(configs, mesh, method="ppo", train={"updates_per_rollout_batch": 2})
    state = jax.eval_shape(lambda params: stage.start({"policy": params}, None), policy.params)
    micro_batch = stage.assemble([], frozenset()).micro_batches[0]
    rl = MODEL | RL | {"rollout_logprobs"}
    value = {"planes.value.weights", "planes.value.advantages", "rollout_values"}
    value |= MODEL - {"target_tokens", "temperature"}
    certificate = certify(
        stage.micro_step, state, micro_batch, gradients_read={"policy": sorted(rl), "critic": sorted(value)}
    )
    leaves = {leaf.name: set(leaf.reads) for leaf in certificate.leaves}
    for chain, reads in (("policy", rl), ("critic", value)):
        mine = {name: of for name, of in leaves.items() if name.startswith(f"chains.{chain}.")}
        assert mine.pop(f"chains.{chain}.sums.witness") == {"completion_mask", "micro_index"}
        assert len(mine) == len(jax.tree.leaves(state.params[chain])) >= 2
        assert all(of == reads for of in mine.values())
    with pytest.raises(CertificateError, match=r"critic.*depends on .*planes\.rl\.weights"):
        certify(stage.micro_step, state, micro_batch, gradients_read={"policy": sorted(rl), "critic": sorted(rl)})


def test_t29_certifies_recomputation_chunks_and_skip_norm(configs):
    changed = {
        "model": {"remat": "full", "logprob_chunk_tokens": 64},
        "optimizer": {"skip_norm": 9.0, "clip_norm": None},
    }
    check_certified(configs, ONE_DEVICE, changed, SFT | RL)


@pytest.mark.parametrize("mesh", [ONE_DEVICE, MESH], ids=["one_device", "data4_tensor2"])
def test_t29_certifies_chunked_attention(configs, mesh):
    check_certified(configs, mesh, {"model": {"attention": "chunked", "attention_block": 16}}, SFT | RL)


def test_t29_certifies_a_kernel_that_reads_its_operands_and_refuses_one_that_reads_more():
    def with_kernel(body):
        def losses(params, micro_batch):
            plane = micro_batch.planes["toy"]
            shape = jax.ShapeDtypeStruct(plane.weights.shape, jnp.float32)
            doubled = pallas.pallas_call(body, out_shape=shape, interpret=True)(plane.weights)
            plane = dataclasses.replace(plane, weights=doubled)
            return toys.tanh_losses(params, dataclasses.replace(micro_batch, planes={"toy": plane}))

        return losses

    def doubles(read, write):
        write[...] = 2.0 * read[...]

    def asks(read, write):
        jax.debug.print("{x}", x=read[0, 0])
        write[...] = 2.0 * read[...]

    assert certify(*toy(with_kernel(doubles))) == certify(*tanh_toy())
    with pytest.raises(CertificateError, match="operations that can be followed, found `debug_"):
        certify(*toy(with_kernel(asks)))


def check_certified(configs, mesh, options, planes):
    """Every leaf of the policy is certified, and reads the model's fields and those of the method's planes."""
    stage, policy = made_stage(configs, mesh, **options)
    state = jax.eval_shape(lambda params: stage.start({"policy": params}, None), policy.params)
    micro_batch = stage.assemble([], frozenset()).micro_batches[0]
    leaves = {leaf.name: set(leaf.reads) for leaf in certify(stage.micro_step, state, micro_batch).leaves}
    assert leaves.pop("chains.policy.sums.witness") == {"completion_mask", "micro_index"}
    assert len(leaves) == len(jax.tree.leaves(policy.params)) > 5
    for name, reads in leaves.items():
        assert reads == MODEL | planes, name


# what is refused


def first_or_last(micro_batch, is_last):
    return (micro_batch.micro_index == 0) | is_last


def on_leaf(name, rule):
    """An add that breaks one leaf of the gradients."""

    def add(sums, part, state, micro_batch, is_last):
        added = jax.tree.map(jnp.add, sums, part)
        broken = rule(sums.gradients[name], part.gradients[name], state, micro_batch, is_last)
        return dataclasses.replace(added, gradients={**added.gradients, name: broken})

    return add


def running_mean(total, part, state, *_):
    return total + (part - total) / (state.window.micro_batches + 1).astype(jnp.float32)


def on_host(total, part, *_):
    return jax.pure_callback(np.add, jax.ShapeDtypeStruct(total.shape, jnp.float32), total, part)


def stale_host_gradient(total, part, *_):
    return total + jax.pure_callback(np.copy, jax.ShapeDtypeStruct(total.shape, jnp.float32), part)


def in_a_loop(total, part, *_):
    return jax.lax.scan(lambda carry, _: (carry + part, None), total, None, length=1)[0]


def on_each_device(total, part, *_):
    everywhere = jax.sharding.PartitionSpec()
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    return jax.shard_map(jnp.add, mesh=mesh, in_specs=everywhere, out_specs=everywhere)(total, part)


def planned_witness(sums, part, state, micro_batch, is_last):
    planned = micro_batch.planned_tokens.astype(jnp.float32)
    own = jnp.where(jnp.arange(toys.MAX_MICRO) == micro_batch.micro_index, planned, 0.0)
    return Sums(jax.tree.map(jnp.add, sums.gradients, part.gradients), sums.witness + own)


ADDS = {  # name: (add, what the message says)
    "first_and_last_by_select": (
        each_leaf(lambda total, part, s, b, last: jnp.where(first_or_last(b, last), total + part, total)),
        "one unconditional add .* found `select_n`",
    ),
    "first_only": (
        each_leaf(lambda total, part, s, b, last: jnp.where(b.micro_index == 0, total + part, total)),
        "one unconditional add .* found `select_n`",
    ),
    "flag_multiply": (
        each_leaf(lambda total, part, s, b, last: total + first_or_last(b, last).astype(jnp.float32) * part),
        "reads is_last, micro_index",
    ),
    "last_only": (lambda sums, part, *_: part, "one unconditional add .* found `(transpose|dot_general)`"),
    "last_only_after_another_add": (
        each_leaf(lambda total, part, *_: part + 0.0),
        "as they came in and one addend, found the add of `transpose` and a constant",
    ),
    "last_only_on_one_leaf": (
        on_leaf("w2", lambda total, part, *_: part),
        r"gradients\.w2: expected one unconditional add .* found `dot_general`",
    ),
    "lost_witness": (
        lambda sums, part, *_: Sums(jax.tree.map(jnp.add, sums.gradients, part.gradients), sums.witness),
        r"sums\.witness: expected one unconditional add .* found one of the program's arguments",
    ),
    "duplicate_add": (each_leaf(lambda total, part, *_: total + part + part), "found the add of `add` and `transpose`"),
    "adds_itself": (each_leaf(lambda total, part, *_: total + total), "one addend, found the add of one of"),
    "add_inside_cond": (
        each_leaf(
            lambda total, part, s, b, last: jax.lax.cond(
                jnp.any(b.completion_mask), jnp.add, lambda a, _: a, total, part
            )
        ),
        "one unconditional add .* found `cond`",
    ),
    "add_inside_scan": (each_leaf(in_a_loop), "one unconditional add .* found `scan`"),
    "add_inside_shard_map": (each_leaf(on_each_device), "one unconditional add .* found `shard_map`"),
    "write_in_place": (
        each_leaf(lambda total, part, *_: jax.lax.dynamic_update_slice(total, total + part, (0,) * total.ndim)),
        "one unconditional add .* found `dynamic_update_slice`",
    ),
    "running_mean": (each_leaf(running_mean), r"reads chains\.policy\.sums.*window\.micro_batches"),
    "half_precision_add": (
        each_leaf(lambda total, part, *_: (total.astype(jnp.bfloat16) + part.astype(jnp.bfloat16)).astype(jnp.float32)),
        "one unconditional add .* found `convert_element_type`",
    ),
    "scaled_sums": (each_leaf(lambda total, part, *_: total * 0.5 + part), "found the add of `mul` and `transpose`"),
    "scaled_after_the_add": (each_leaf(lambda total, part, *_: (total + part) / 3.0), "found `div`"),
    "scaled_by_is_last": (
        each_leaf(lambda total, part, s, b, last: total + part * (1.0 + last.astype(jnp.float32))),
        "reads is_last",
    ),
    "scaled_by_micro_index": (
        each_leaf(lambda total, part, s, b, last: total + part * b.micro_index.astype(jnp.float32)),
        "reads micro_index",
    ),
    "scaled_by_the_window_count": (
        each_leaf(lambda total, part, s, b, last: total + part / (s.window.micro_batches + 1).astype(jnp.float32)),
        r"reads .*window\.micro_batches",
    ),
    "scaled_by_the_plan": (
        each_leaf(lambda total, part, s, b, last: total + part / jnp.sum(b.planned_tokens).astype(jnp.float32)),
        "reads .*planned_tokens",
    ),
    "scaled_by_how_often_a_loop_runs": (
        each_leaf(
            lambda total, part, s, b, last: total + jax.lax.fori_loop(0, b.micro_index, lambda _, x: 2 * x, part)
        ),
        "reads micro_index",
    ),
    "chosen_by_a_branch": (
        each_leaf(lambda total, part, s, b, last: total + jax.lax.cond(last, lambda x: x, lambda x: 2 * x, part)),
        "reads is_last",
    ),
    "stale_term": (
        each_leaf(lambda total, part, s, *_: total + (part + s.report.grad_norm["policy"])),
        r"reads .*report\.grad_norm\.policy",
    ),
    "stale_moments": (
        on_leaf("w1", lambda total, part, s, *_: total + (part + s.chains["policy"].optimizer[1][0].mu["w1"])),
        r"gradients\.w1: .* reads chains\.policy\.optimizer",
    ),
    "constant_gradient": (each_leaf(lambda total, part, *_: total + jnp.ones_like(part)), "reads nothing"),
    "weights_ignored": (
        on_leaf("w2", lambda total, part, s, b, last: total + s.params["policy"]["w2"] * b.target_tokens[0, 0]),
        r"depends on planes\.toy\.weights, found that it reads params, target_tokens",
    ),
    "witness_of_the_plan": (planned_witness, r"sums\.witness: .* reads micro_index, planned_tokens"),
    "sums_by_callback": (each_leaf(on_host), "one unconditional add .* found `pure_callback`"),
    "addend_by_callback": (each_leaf(stale_host_gradient), "operations that can be followed, found `pure_callback`"),
    "addend_by_custom_solve": (
        each_leaf(lambda total, part, *_: total + jax.lax.custom_linear_solve(jnp.negative, part, lambda _, b: -b)),
        "operations that can be followed, found `custom_linear_solve`",
    ),
}


@pytest.mark.parametrize("name", ADDS)
def test_t29_refuses_another_add(name):
    add, reason = ADDS[name]
    step, state, batch = tanh_toy()
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        pytest.raises(CertificateError, match=reason),
    ):
        certify(mutated(step, add=add), state, batch)


def test_t29_refuses_a_half_precision_accumulator():
    step, state, batch = tanh_toy()
    half = with_sums(state, gradients=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params["policy"]))
    add = each_leaf(lambda total, part, *_: total + part.astype(total.dtype))

    def reset(after, given, part):  # the norm in the report would be of half precision, too
        zeros = jax.tree.map(jnp.zeros_like, given.chains["policy"].sums.gradients)
        return with_sums(dataclasses.replace(after, report=given.report), gradients=zeros)

    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(CertificateError, match=r"w1: expected float32 sums, found bfloat16 in, bfloat16 out"),
    ):
        certify(mutated(step, add=add, flush=reset), half, batch)


def scaled(tree, factor):
    return jax.tree.map(lambda leaf: leaf * factor, tree)


def with_optimizer(state, optimizer):
    chain = state.chains["policy"]
    return dataclasses.replace(state, chains={"policy": dataclasses.replace(chain, optimizer=optimizer)})


def of_last_gradient(after, given, part):
    """The sums, the witness and the norms are right, but what is applied is the last micro-batch's gradient."""
    return dataclasses.replace(after, params=jax.tree.map(jnp.subtract, given.params, {"policy": part.gradients}))


def unconditional(after, given, part):
    """The update is that of the sums, but neither the witness nor the norm has a say."""
    gradients = given.chains["policy"].sums.gradients
    return dataclasses.replace(after, params=jax.tree.map(jnp.subtract, given.params, {"policy": gradients}))


def one_leaf_stays(after, given, part):
    kept = {"w1": given.params["policy"]["w1"], "w2": after.params["policy"]["w2"]}
    return dataclasses.replace(after, params={"policy": kept})


def one_leaf_from_another(after, given, part):
    w1 = jax.lax.cond(
        jnp.sum(after.params["policy"]["w1"]) > 0, jnp.negative, jnp.positive, given.params["policy"]["w1"]
    )
    return dataclasses.replace(after, params={"policy": {"w1": w1, "w2": after.params["policy"]["w2"]}})


BRANCHES = {  # name: (replaced branches, what the message says)
    "reset_by_multiply": (
        {"flush": lambda after, given, _: with_sums(after, gradients=scaled(given.chains["policy"].sums.gradients, 0))},
        "a literal zero .* found `mul`",
    ),
    "no_reset": (
        {"flush": lambda after, given, part: with_sums(after, gradients=given.chains["policy"].sums.gradients)},
        r"gradients\.w1: expected the result of the final cond on is_last, found `add`",  # jax lifts it out of the cond
    ),
    "reset_to_one": (
        {"flush": lambda after, given, part: with_sums(after, witness=jnp.ones(toys.MAX_MICRO))},
        r"sums\.witness: expected a literal zero",
    ),
    "sums_changed_when_staying": (
        {"stay": lambda after, given, part: with_sums(after, witness=after.chains["policy"].sums.witness * 2)},
        r"sums\.witness: expected the other branch to return the sums as they came, found `mul`",
    ),
    "decay_per_micro_batch": (
        {"stay": lambda after, given, part: dataclasses.replace(after, params=scaled(after.params, 0.999))},
        r"params\.policy\.w1: expected the other branch to return it as it came, found `mul`",
    ),
    "moments_per_micro_batch": (
        {"stay": lambda after, *_: with_optimizer(after, scaled(after.chains["policy"].optimizer, 2))},
        r"chains\.policy\.optimizer.*: expected the other branch to return it as it came, found `mul`",
    ),
    "update_of_the_last_gradient": (
        {"flush": of_last_gradient},
        r"params\.policy\.w1: expected a new value computed from parameters, sums .* found `(transpose|dot_general)`",
    ),
    "one_leaf_never_updated": (
        {"flush": one_leaf_stays},
        r"params\.policy\.w1: expected the result of the final cond on is_last, found one of the program's arguments",
    ),
    "update_without_the_evidence": (
        {"flush": unconditional},
        r"params\.policy\.w1: expected a new value that depends on chains\.policy\.sums\.",
    ),
    "one_leaf_not_from_its_sums": (
        {"flush": one_leaf_from_another},
        r"params\.policy\.w1: expected a new value computed from chains\.policy\.sums\.gradients\.w1",
    ),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_t29_refuses_another_branch(name):
    branches, reason = BRANCHES[name]
    step, state, batch = tanh_toy()
    with jax.numpy_dtype_promotion("standard"), pytest.raises(CertificateError, match=reason):
        certify(mutated(step, **branches), state, batch)


def test_t29_refuses_a_step_that_ends_elsewhere():
    """A boundary that is not is_last, a step without a final cond, parameters changed outside it, another tree."""
    step, state, batch = tanh_toy()

    def own_boundary(state, micro_batch, is_last):
        return step(state, micro_batch, micro_batch.micro_index == 2)

    def inverted(state, micro_batch, is_last):
        return step(state, micro_batch, ~is_last)

    def after_the_cond(state, micro_batch, is_last):
        after = step(state, micro_batch, is_last)
        return dataclasses.replace(after, params=scaled(after.params, 0.5))

    def before_the_cond(state, micro_batch, is_last):
        return step(dataclasses.replace(state, params=scaled(state.params, 0.5)), micro_batch, is_last)

    def by_select(state, micro_batch, is_last):
        ends, goes_on = (step(state, micro_batch, jnp.asarray(flag)) for flag in (True, False))
        return jax.tree.map(lambda a, b: jnp.where(is_last, a, b), ends, goes_on)

    def without_chains(state, micro_batch, is_last):
        return step(state, micro_batch, is_last).params

    for broken, reason in (
        (own_boundary, "decided by is_last itself, found `eq`"),
        (inverted, "decided by is_last itself, found `not`"),
        (after_the_cond, "params.policy.w1: expected the result of the final cond on is_last, found `mul`"),
        (before_the_cond, "params.policy.w1: expected the other branch to return it as it came, found `mul`"),
        (by_select, "expected the result of the final cond on is_last, found `select_n`"),
        (without_chains, "expected the tree that went in"),
    ):
        with pytest.raises(CertificateError, match=reason):
            certify(broken, state, batch)


def test_t29_refuses_sums_without_a_leaf_or_a_witness():
    """A parameter that has no sum cannot have been updated from one; a chain without a witness has no evidence."""
    step, state, batch = tanh_toy()
    whole = state.chains["policy"].sums

    def without_w1(state, micro_batch, is_last):
        kept = {"w1": whole.gradients["w1"], "w2": state.chains["policy"].sums.gradients["w2"]}
        after = step(with_sums(state, gradients=kept), micro_batch, is_last)
        return with_sums(after, gradients={"w2": after.chains["policy"].sums.gradients["w2"]})

    def cut(state):  # as plain dictionaries: the product's own types know no chain without a witness
        chain = state.chains["policy"]
        parts = {"sums": {"gradients": chain.sums.gradients}, "optimizer": chain.optimizer}
        return {"params": state.params, "chains": {"policy": parts}, "rest": (state.window, state.totals, state.report)}

    def without_witness(given, micro_batch, is_last):
        sums, optimizer = given["chains"]["policy"]["sums"], given["chains"]["policy"]["optimizer"]
        full = with_optimizer(with_sums(state, gradients=sums["gradients"]), optimizer)
        window, totals, report = given["rest"]
        full = dataclasses.replace(full, params=given["params"], window=window, totals=totals, report=report)
        return cut(step(full, micro_batch, is_last))

    with pytest.raises(CertificateError, match=r"policy\.w1: expected a new value computed from parameters, sums and"):
        certify(without_w1, with_sums(state, gradients={"w2": whole.gradients["w2"]}), batch)
    with pytest.raises(CertificateError, match=r"policy\.w1: expected a sum of its gradients and a witness, found"):
        certify(without_witness, cut(state), batch)


# what the compiler makes of it


def entry(text):
    """(dtype of every output, output -> the argument that it is written over) of a compiled program."""
    header = text[: text.index("\n")]
    outputs = header[header.index("->") :]
    aliased = re.findall(r"\{(\d+)\}: \((\d+), \{\}, (?:may|must)-alias\)", header)
    return re.findall(r"([a-z]+\d*)\[[\d,]*\]", outputs), {int(out): int(argument) for out, argument in aliased}


def check_sums_in_place(text, state):
    dtypes, aliased = entry(text)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    assert len(dtypes) == len(leaves)
    for place, (path, _) in enumerate(leaves):
        if ".sums" in jax.tree_util.keystr(path):
            assert dtypes[place] == "f32"
            assert aliased[place] == place


def test_t29_compiled_sums_are_float32_and_written_over_their_inputs():
    step, state, batch = tanh_toy()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    compiled = jit_step(step, [here] * len(jax.tree.leaves(state))).__wrapped__
    check_sums_in_place(compiled.lower(state, batch, jnp.asarray(False)).compile().as_text(), state)


def test_t29_compiled_product_reduces_every_gradient_once_per_micro_batch(configs):
    """On a data mesh each leaf is summed over the devices once in every call of `micro_step`, k times in a window.

    One reduction per window would need sums that differ between devices and are saved so; the step trades it for a
    state that is whole after every call. A tied embedding is two gradients (lookup and logits), reduced one by one.
    """
    stage, policy = made_stage(configs, (8, 1))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(policy.params))
    state = stage.start({"policy": policy.params}, None)
    micro_batch = put_micro_batch(policy.mesh, stage.assemble([], frozenset()).micro_batches[0])
    text = stage.micro_step.__wrapped__.lower(state, micro_batch, jnp.asarray(False)).compile().as_text()
    check_sums_in_place(text, state)
    reduced = collections.Counter()
    for result in re.findall(r"= (.*?) all-reduce(?:-start)?\(", text):
        for dims in re.findall(r"f32\[([\d,]+)\]", result):
            reduced[int(np.prod([int(size) for size in dims.split(",")]))] += 1
    whole = dict(policy.params)
    layers = [leaf.size // SHAPE.num_layers for leaf in jax.tree.leaves(whole.pop("layers"))]
    layers *= SHAPE.num_layers  # few layers are written out on the CPU
    others = [leaf.size for leaf in jax.tree.leaves(whole)]
    assert policy.config.tie_embeddings
    assert reduced == collections.Counter([*layers, *others, whole["embedding"].size])
