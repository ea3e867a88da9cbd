"""PPO's two chains on eight devices against one, and a checkpoint of an open window that moves between them."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from hptjax.build.policy import build_policy
from hptjax.build.stages import build_stages
from hptjax.config import MeshConfig
from hptjax.config_model import ShapeConfig
from hptjax.hpt.route import Routed
from hptjax.sharding.host import to_host
from hptjax.sharding.mesh import put_micro_batch
from hptjax.train.accumulate import Status
from hptjax.train.checkpoint import open_checkpoints
from hptjax.train.phases import Gated, assemble_updates
from hptjax.train.second_look import look_again
from tests import recorded, tiny

SHAPE = ShapeConfig(hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=32)
MESHES = {"one": MeshConfig(), "eight": MeshConfig(data=2, fsdp=2, tensor=2)}


def built(folder, mesh):
    config = tiny.as_off_policy(tiny.tiny_config(folder, method="ppo"))
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, shape=SHAPE),
        rollout=dataclasses.replace(config.rollout, prefill_rows=8),
        batch=dataclasses.replace(config.batch, rows=8),
        mesh=mesh,
    )
    policy = build_policy(config)
    return policy, build_stages(config, policy, recorded.questions())[-1]


def fresh(policy, stage):
    """A state whose critic already says something."""
    rng = np.random.default_rng(3)
    critic = {"weight": rng.normal(size=16).astype(np.float32), "bias": np.asarray(0.2, np.float32)}
    return stage.start({"policy": policy.params, "critic": critic}, None)


def micro_batches(policy, stage, state):
    """Twelve groups, scored, refined and on the mesh."""
    gated = Gated(np.zeros(12), Routed(objectives=[], live=recorded.mixed(0, 12)))
    assembled = partial(assemble_updates, gated, updates=1, stage_step=0, mask_overlong=False, assemble=stage.assemble)
    updates = assembled()
    put = partial(put_micro_batch, policy.mesh, rules=policy.rules)
    scores = [to_host(stage.score(state.params, put(batch))) for batch in updates[0].micro_batches]
    looked = look_again(updates, scores, stage.second_look, {}, reassemble=assembled)
    return [put(batch) for batch in looked.micro_batches[0]]


def added(stage, state, batches, *, flush):
    for index, batch in enumerate(batches):
        state = stage.micro_step(state, batch, jax.numpy.asarray(flush and index == len(batches) - 1))
    return state


def close(got, want):
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-5 * max(np.abs(right).max(), 1e-3))


@pytest.mark.slow
def test_policy_and_critic_on_eight_devices_and_after_a_move(eight_devices, tmp_path):
    made = {name: built(tmp_path, mesh) for name, mesh in MESHES.items()}
    starts = {name: fresh(*parts) for name, parts in made.items()}
    batches = {name: micro_batches(*made[name], starts[name]) for name in made}
    assert len(batches["one"]) == len(batches["eight"]) >= 2
    weight = starts["eight"].params["critic"]["weight"]
    assert weight.addressable_shards[0].data.shape == (8,)  # cut by fsdp, as the scale beside which it lives
    for field in ("rollout_values", "rollout_logprobs"):
        for one, eight in zip(batches["one"], batches["eight"], strict=True):
            close(to_host(getattr(eight, field)), to_host(getattr(one, field)))
    windows = {name: added(made[name][1], starts[name], batches[name][:1], flush=False) for name in made}
    sums = {name: to_host({n: c.sums for n, c in window.chains.items()}) for name, window in windows.items()}
    close(sums["eight"], sums["one"])
    assert np.abs(sums["one"]["critic"].gradients["weight"]).max() > 1e-3

    opened = partial(open_checkpoints, tmp_path / "saved", keep_last=1, keep_best=0, fingerprint={})
    with opened() as saved:
        saved.save(0, windows["eight"], {}, metric=None, wait=True)
    with opened() as saved:
        moved = saved.restore_latest(fresh(*made["one"])).state
    same = map(np.array_equal, jax.tree.leaves(to_host(moved)), jax.tree.leaves(to_host(windows["eight"])))
    assert all(same)
    ends = [added(made["one"][1], state, batches["one"][1:], flush=True) for state in (moved, windows["one"])]
    assert all(int(end.report.status) == Status.UPDATED for end in ends)
    close(*(to_host(end.chains["critic"].optimizer) for end in ends))
    close(*(to_host(end.params["critic"]) for end in ends))
