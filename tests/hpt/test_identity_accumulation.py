"""Identity 22 of `spec/methods.md` 11: micro-batches through the real optimizer path against one big batch.

The proofs of it are `tests/test_accumulate.py` (integers, bit for bit, every composition) and `tests/proofs/` (every
broken version is caught). Here it stands by name: a tiny decoder, HPT's terms, the compiled step, AdamW.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hptjax.sharding.host import to_host
from hptjax.train.accumulate import Status
from tests import recorded
from tests.test_properties import Made, window

RATE = (("learning_rate", 1e-3), ("clip_norm", None))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with jax.enable_x64(False):
        yield Made(tmp_path_factory.mktemp("identity"))


@pytest.fixture(autouse=True)
def _as_it_runs(_float64):
    """The product runs in float32."""
    with jax.enable_x64(False):
        yield


def moved(made, stage, micro_batches):
    """What the parameters moved by, and the status of the window."""
    before = jax.tree.leaves(to_host(made.policy.params))
    state = window(made, stage, micro_batches, flush=True)
    after = jax.tree.leaves(to_host(state.params["policy"]))
    change = np.concatenate([np.ravel(a) - np.ravel(b) for a, b in zip(after, before, strict=True)])
    return change, Status(int(state.report.status))


def test_identity_22_micro_batches_move_the_parameters_as_one_big_batch_does(made):
    samples = recorded.mixed(3, 4)
    cut = made.stage(optimizer=RATE)
    whole = made.stage(optimizer=RATE, batch=(("rows", 16),))
    parts = cut.assemble(samples, frozenset()).micro_batches
    (one,) = whole.assemble(samples, frozenset()).micro_batches
    assert len(parts) >= 3

    want, status = moved(made, whole, [one])
    assert status == Status.UPDATED
    got, status = moved(made, cut, parts)
    assert status == Status.UPDATED
    # AdamW divides by small moments: every entry within 2 rates, the whole within 1e-3 (design contract 3)
    assert np.abs(got - want).max() <= 2e-3
    assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want)

    # DeepSpeed's bug: only the first, or only the last, reaches the optimizer. The step refuses it ...
    for kept in (parts[:1], parts[-1:]):
        change, status = moved(made, cut, kept)
        assert status == Status.WITNESS_MISMATCH
        assert not change.any()
    # ... and where nobody looks, what it would have moved by is another update
    for kept in (parts[:1], parts[-1:]):
        planned = np.zeros_like(kept[0].planned_tokens)
        planned[0] = kept[0].completion_mask.sum()
        digest = np.zeros_like(kept[0].planned_digest)
        digest[0] = kept[0].planned_digest[int(kept[0].micro_index)]
        alone = [
            jax.tree.map(jnp.asarray, kept[0]).replace(
                planned_tokens=planned, planned_digest=digest, micro_index=np.int32(0)
            )
        ]
        change, status = moved(made, cut, alone)
        assert status == Status.UPDATED
        assert np.linalg.norm(change - want) > 0.1 * np.linalg.norm(want)
