"""K objectives cost one forward and one backward pass: the matrix products of a micro-step, counted in its jaxpr."""

from __future__ import annotations

import collections
import dataclasses

import jax
import jax.numpy as jnp
import pytest

from hptjax.build.policy import build_policy
from hptjax.build.step import build_step
from hptjax.config import StageConfig
from hptjax.train.step import make_named_gradients
from tests import tiny

WITHOUT_ENTROPY = {"dr_grpo": 1, "hpt": 2, "uft": 3}
WITH_ENTROPY = {"sft": 2, "srft": 4}  # the bonus is a plane, and srft reads the entropy in two more
ROWS, TOKENS = 2, 48  # of the tiny run's micro-batch; no other size is 48 or 96


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny.tiny_config(tmp_path_factory.mktemp("backward"))


@pytest.fixture(scope="module")
def policy(config):
    return build_policy(config)


def products(jaxpr):
    """How often each shape of a matrix product stands in a jaxpr and all that it calls; a loop's body counts once.

    Of the model's path only: one side goes over tokens. The checksum's products go over parameters.
    """
    found = collections.Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            shapes = tuple(variable.aval.shape for variable in (*equation.invars, *equation.outvars))
            found[shapes] += any(size in (TOKENS, ROWS * TOKENS) for shape in shapes for size in shape)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += products(inner)
    return found


def counted(config, policy, name, *, entropy):
    """(planes, products of the micro-step, products of one backward pass per plane)."""
    config = dataclasses.replace(
        config,
        method=name,
        model=dataclasses.replace(config.model, teacher="teacher"),
        hpt=dataclasses.replace(config.hpt, entropy_coefficient=0.01 if entropy else 0.0),
    )
    step = build_step(
        config, StageConfig(method=name, steps=1), policy.token_stats, policy.params, policy.shardings, policy.mesh
    )
    flag = jax.ShapeDtypeStruct((), jnp.bool_)
    one = products(jax.make_jaxpr(step.micro_step)(step.state, step.empty, flag).jaxpr)
    apart = make_named_gradients(step.losses)
    many = products(jax.make_jaxpr(apart)({"policy": policy.params}, step.empty).jaxpr)
    return len(step.recipe.token_losses), one, many


@pytest.mark.parametrize("entropy", [False, True], ids=["", "with entropy"])
def test_any_number_of_planes_costs_one_backward_pass(config, policy, entropy):
    expected = WITH_ENTROPY if entropy else WITHOUT_ENTROPY
    found = {name: counted(config, policy, name, entropy=entropy) for name in expected}
    assert {name: planes for name, (planes, _, _) in found.items()} == expected
    (first, *others) = [one for _, one, _ in found.values()]
    assert first.total() > 20  # forward and backward of the decoder are in there
    assert all(one == first for one in others)
    for planes, one, many in found.values():  # and this is what a pass per plane would be
        assert many.total() == planes * one.total()
