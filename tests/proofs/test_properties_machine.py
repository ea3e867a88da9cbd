"""P4: hypothesis drives the product's jitted micro_step, and an int64 oracle follows every call (accumulation spec 4).

The model is linear with integer features and weights 0 and 1, so every gradient is an integer and every comparison is
bitwise. All micro-batches have one padded shape: one compilation serves every example.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import shutil
import tempfile
from collections import Counter
from typing import ClassVar

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hptjax.hpt.digest import digest, sample_hashes
from hptjax.records import SampleId
from hptjax.sharding.mesh import make_mesh
from hptjax.sharding.rules import DATA
from hptjax.train.accumulate import Status
from hptjax.train.checkpoint import open_checkpoints
from hptjax.train.state import check_after_resume
from hptjax.train.step import make_micro_step
from tests import toys
from tests.proofs import test_normalisers as normalisers

ROWS, WIDTH, LARGEST_WINDOW = 4, 9, 6
THETA = np.array([1, -2, 3], np.int64)
QUICK = hypothesis.settings(deadline=None, derandomize=True, database=None, print_blob=False)


@functools.cache
def compiled():
    """The donated micro_step, and a fresh state on the host."""
    _, state = toys.sgd_setup(toys.linear_losses, toys.linear_params())
    step = jax.jit(make_micro_step(toys.linear_losses, {"policy": optax.sgd(1.0)}), donate_argnums=0)
    return step, on_host(state)


def on_host(state):
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)


def on_device(state):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.device_put(state, place, may_alias=False)  # a donated buffer must not be NumPy's


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One micro-batch of the machine, as its rows: all of them NumPy, padded to one shape.

    Args
      ids: per row, the number of its sample; -1 where there is none.
    """

    index: int
    tokens: np.ndarray
    mask: np.ndarray
    weights: np.ndarray
    ids: np.ndarray

    def live_rows(self):
        return np.flatnonzero(self.mask.any(1))

    def poisoned(self):
        return bool(np.isnan(self.weights[self.mask]).any())

    def gradient(self):
        """int64, by a loop over tokens."""
        total = np.zeros(toys.FEATURES, np.int64)
        for row, position in zip(*np.nonzero(self.mask), strict=True):
            total += int(self.weights[row, position]) * toys.FEATURE_TABLE[self.tokens[row, position]].astype(np.int64)
        return total

    def hashes(self):
        return sample_hashes([SampleId(int(number), 0, 0) for number in self.ids]).astype(np.uint32)

    def digest(self):
        return digest(self.hashes()[self.live_rows()])

    def micro_batch(self, planned, planned_digest):
        return toys.micro_batch(
            self.tokens,
            self.mask,
            self.weights,
            self.index,
            planned,
            hashes=np.where(self.ids[:, None] >= 0, self.hashes(), np.uint32(0)),
            planned_digest=planned_digest,
        )


def make_part(index, lengths, rng, first_id):
    """A part with rows of these lengths; tokens and 0/1 weights are drawn."""
    mask = np.zeros((ROWS, WIDTH), bool)
    ids = np.full(ROWS, -1)
    for row, length in enumerate(lengths):
        mask[row, :length] = True
        ids[row] = first_id + row
    tokens = rng.integers(0, toys.VOCAB, mask.shape).astype(np.int32)
    return Part(index, tokens, mask, rng.integers(0, 2, mask.shape).astype(np.float32), ids)


@dataclasses.dataclass(frozen=True, eq=False)
class Oracle:
    """What the device must hold; integers only. `window` counts start again at every flush."""

    theta: np.ndarray = dataclasses.field(default_factory=lambda: THETA.copy())
    windows: int = 0
    updates: int = 0
    micro_batches: int = 0
    tokens: int = 0
    gradient: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(toys.FEATURES, np.int64))
    witness: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(toys.MAX_MICRO, np.int64))
    digest: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((toys.MAX_MICRO, 2), np.uint32))
    added: tuple = ()
    nonfinite: int = -1

    def add(self, part):
        bad = part.poisoned()
        witness, found = self.witness.copy(), self.digest.copy()
        witness[part.index] += part.mask.sum()
        found[part.index] += part.digest()
        return dataclasses.replace(
            self,
            gradient=self.gradient if bad else self.gradient + part.gradient(),
            witness=witness,
            digest=found,
            added=(*self.added, part),
            nonfinite=part.index if bad and self.nonfinite < 0 else self.nonfinite,
        )

    def verdict(self, planned, planned_digest):
        """(status, micro-batch to blame): what was lost, repeated or swapped, then what was not finite."""
        for status, wrong in (
            (Status.WITNESS_MISMATCH, self.witness != planned),
            (Status.DIGEST_MISMATCH, (self.digest != planned_digest).any(1)),
        ):
            if wrong.any():
                return status, int(np.flatnonzero(wrong)[0])
        if self.nonfinite >= 0:
            return Status.NONFINITE, self.nonfinite
        return (Status.UPDATED if planned.sum() else Status.EMPTY), -1

    def flush(self, status):
        updated = status == Status.UPDATED
        return Oracle(
            theta=self.theta - self.gradient if updated else self.theta,
            windows=self.windows + 1,
            updates=self.updates + updated,
            micro_batches=self.micro_batches + len(self.added),
            tokens=self.tokens + int(self.witness.sum()),
        )


class SumsMachine(RuleBasedStateMachine):
    """Windows of random rows, with everything that may happen between two calls of micro_step."""

    seen: ClassVar[Counter] = Counter()  # statuses over all examples: a machine that only ever skips proves nothing

    @initialize()
    def begin(self):
        self.step, fresh = compiled()
        self.state, self.oracle = on_device(fresh), Oracle()
        self.pending, self.next_id, self.folder = [], 0, None
        self.planned = self.planned_digest = None
        self.saved = None

    @precondition(lambda self: not self.pending)
    @rule(
        rows=st.lists(st.lists(st.integers(0, WIDTH), max_size=ROWS), min_size=1, max_size=LARGEST_WINDOW),
        seed=st.integers(0, 2**16),
    )
    def open_window(self, rows, seed):
        """A list of row lengths per micro-batch; a micro-batch may be empty, and so may all of them."""
        rng = np.random.default_rng(seed)
        self.pending = []
        for index, lengths in enumerate(rows):
            self.pending.append(make_part(index, lengths, rng, self.next_id))
            self.next_id += ROWS
        self.planned, self.planned_digest = np.zeros(toys.MAX_MICRO, np.int32), np.zeros((toys.MAX_MICRO, 2), np.uint32)
        for part in self.pending:
            self.planned[part.index], self.planned_digest[part.index] = part.mask.sum(), part.digest()

    def run(self, part, *, is_last):
        self.state = self.step(self.state, part.micro_batch(self.planned, self.planned_digest), jnp.asarray(is_last))
        self.oracle = self.oracle.add(part)

    @precondition(lambda self: len(self.pending) > 1)
    @rule(count=st.integers(1, 3))
    def micro_steps(self, count):
        for _ in range(min(count, len(self.pending) - 1)):
            self.run(self.pending.pop(0), is_last=False)

    @precondition(lambda self: self.pending)
    @rule()
    def flush(self):
        while len(self.pending) > 1:
            self.run(self.pending.pop(0), is_last=False)
        self.run(self.pending.pop(), is_last=True)
        status, blamed = self.oracle.verdict(self.planned, self.planned_digest)
        report = self.state.report
        assert (Status(int(report.status)), int(report.bad_micro_batch)) == (status, blamed)
        assert np.array_equal(np.asarray(report.witness).astype(np.int64), self.oracle.witness)
        assert np.array_equal(report.digest, self.oracle.digest.sum(0, dtype=np.uint32))
        self.oracle = self.oracle.flush(status)
        self.seen[status] += 1

    @precondition(lambda self: len(self.pending) > 1)
    @rule(order=st.permutations(range(LARGEST_WINDOW)))
    def change_order(self, order):
        self.pending = [self.pending[place] for place in order if place < len(self.pending)]

    @precondition(lambda self: any(part.mask.any() for part in self.pending))
    @rule(which=st.integers(0, LARGEST_WINDOW))
    def poison(self, which):
        live = [place for place, part in enumerate(self.pending) if part.mask.any()]
        place = live[which % len(live)]
        part = self.pending[place]
        weights = part.weights.copy()
        weights[part.live_rows()[0], 0] = np.nan
        self.pending[place] = dataclasses.replace(part, weights=weights)

    @precondition(lambda self: self.pending and any(part.mask.any() for part in self.oracle.added))
    @rule(which=st.integers(0, LARGEST_WINDOW))
    def duplicate(self, which):
        live = [part for part in self.oracle.added if part.mask.any()]
        self.run(live[which % len(live)], is_last=False)

    @precondition(lambda self: len(self.pending) > 1 and any(part.mask.any() for part in self.pending))
    @rule(which=st.integers(0, LARGEST_WINDOW))
    def drop(self, which):
        live = [place for place, part in enumerate(self.pending) if part.mask.any()]
        del self.pending[live[which % len(live)]]

    @precondition(lambda self: sum(part.mask.any() for part in self.pending) > 1)
    @rule()
    def swap_two_samples(self):
        """Of two micro-batches that wait, of equal lengths if there are any: only the digest sees those."""
        pairs = [
            (a, b, i, j)
            for a, b in itertools.combinations(range(len(self.pending)), 2)
            for i in self.pending[a].live_rows()
            for j in self.pending[b].live_rows()
        ]
        first, second, i, j = min(pairs, key=self._unequal)
        left, right = self.pending[first], self.pending[second]

        def exchanged(name):
            a, b = getattr(left, name).copy(), getattr(right, name).copy()
            a[i], b[j] = b[j].copy(), a[i].copy()
            return a, b

        fields = {name: exchanged(name) for name in ("tokens", "mask", "weights", "ids")}
        self.pending[first] = dataclasses.replace(left, **{name: pair[0] for name, pair in fields.items()})
        self.pending[second] = dataclasses.replace(right, **{name: pair[1] for name, pair in fields.items()})

    def _unequal(self, pair):
        a, b, i, j = pair
        return abs(int(self.pending[a].mask[i].sum()) - int(self.pending[b].mask[j].sum()))

    @rule()
    def save(self):
        self.saved = (on_host(self.state), self.oracle, list(self.pending), self.planned, self.planned_digest)

    @precondition(lambda self: self.saved is not None)
    @rule()
    def restore(self):
        """Back to the save, possibly windows ago, into fresh buffers."""
        state, self.oracle, pending, self.planned, self.planned_digest = self.saved
        self.pending = list(pending)
        self.state = check_after_resume(on_device(state))

    @precondition(lambda self: self.pending and self.folder is None)
    @rule(chosen=st.integers(0, 7))
    def checkpoint(self, chosen):
        """Through a checkpoint on disk, inside a window; a fraction of the machines, once."""
        if chosen:
            return
        self.folder = tempfile.mkdtemp()
        template = on_host(self.state)
        with open_checkpoints(self.folder, keep_last=1, keep_best=0, fingerprint={}) as checkpoints:
            checkpoints.save(0, self.state, {}, metric=None, wait=True)
            restored = checkpoints.restore_latest(on_device(template))
        self.state = check_after_resume(on_device(restored.state))
        self.seen["checkpoint"] += 1

    @invariant()
    def sums_are_the_oracles_bitwise(self):
        sums, window = self.state.chains["policy"].sums, self.state.window
        got = np.asarray(sums.gradients["theta"])
        if self.oracle.nonfinite >= 0:
            assert not np.isfinite(got).any()
        else:
            assert np.array_equal(got, self.oracle.gradient.astype(np.float32))
        assert np.array_equal(np.asarray(sums.witness).astype(np.int64), self.oracle.witness)
        assert np.array_equal(window.digest, self.oracle.digest)
        assert int(window.first_nonfinite) == self.oracle.nonfinite
        assert int(window.micro_batches) == len(self.oracle.added)
        assert int(window.empty_micro_batches) == sum(not part.mask.any() for part in self.oracle.added)
        assert int(window.tokens) == self.oracle.witness.sum()

    @invariant()
    def parameters_and_totals_are_the_oracles_bitwise(self):
        assert np.array_equal(np.asarray(self.state.params["policy"]["theta"]), self.oracle.theta.astype(np.float32))
        totals = self.state.totals
        assert int(totals.windows) == self.oracle.windows
        assert int(totals.optimizer_steps) == self.oracle.updates
        assert int(totals.skipped_windows) == self.oracle.windows - self.oracle.updates
        assert int(totals.micro_batches) == self.oracle.micro_batches
        assert int(totals.tokens_high) * 2**31 + int(totals.tokens_low) == self.oracle.tokens

    def teardown(self):
        if getattr(self, "folder", None) is not None:
            shutil.rmtree(self.folder)


SCRIPTS = {  # what makes each outcome, as rules with their arguments; what hypothesis draws may leave one out
    Status.UPDATED: (),
    Status.EMPTY: (("open_window", [[], [0]], 1),),
    Status.NONFINITE: (("poison", 1),),
    Status.WITNESS_MISMATCH: (("drop", 0),),
    Status.DIGEST_MISMATCH: (("swap_two_samples",),),
    "checkpoint": (("micro_steps", 1), ("checkpoint", 0), ("duplicate", 0)),
}


def run_script(rules):
    """A window of two micro-batches, or the one that the rules open, through the rules to its flush."""
    machine = SumsMachine()
    machine.begin()
    try:
        opens = ("open_window", [[3, 5], [3, 2]], 0)
        for name, *arguments in (*(() if rules and rules[0][0] == "open_window" else (opens,)), *rules, ("flush",)):
            getattr(machine, name)(*arguments)
            machine.sums_are_the_oracles_bitwise()
            machine.parameters_and_totals_are_the_oracles_bitwise()
    finally:
        machine.teardown()


def run_machine(settings):
    SumsMachine.seen.clear()
    step, _ = compiled()
    hypothesis.stateful.run_state_machine_as_test(SumsMachine, settings=settings)
    assert step._cache_size() == 1
    assert SumsMachine.seen[Status.UPDATED]
    assert Status.CHECKSUM_MISMATCH not in SumsMachine.seen


@pytest.mark.parametrize("kind", SCRIPTS, ids=str)
def test_p4_sums_follow_the_integer_oracle_to_every_outcome(kind):
    """Each outcome once for certain: a machine that only ever skips proves nothing."""
    SumsMachine.seen.clear()
    run_script(SCRIPTS[kind])
    assert SumsMachine.seen[kind] == 1


def test_p4_sums_follow_the_integer_oracle_under_every_rule():
    run_machine(hypothesis.settings(QUICK, max_examples=35, stateful_step_count=30))


@pytest.mark.slow
def test_p4_sums_follow_the_integer_oracle_under_every_rule_at_length():
    run_machine(hypothesis.settings(deadline=None, max_examples=300, stateful_step_count=60))


# Splits, orders, masks, devices and modes, drawn together


@functools.cache
def on_devices(count):
    """All modes' step and a state that lives on this many devices."""
    mesh = make_mesh(count, 1, devices=jax.devices()[:count])
    step, state = normalisers.mode_setup("linear", 12, WIDTH)
    return mesh, step, jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


@st.composite
def windows(draw):
    """(tokens, mask, groups, partition, cuts): rows of ragged lengths, cut anywhere, in any order of rows."""
    lengths = draw(st.lists(st.integers(0, WIDTH), min_size=1, max_size=12))
    count = len(lengths)
    order = draw(st.permutations(range(count)))
    inner = draw(st.lists(st.integers(0, count), max_size=6))  # equal cuts: empty micro-batches
    cuts = [order[a:b] for a, b in zip([0, *sorted(inner)], [*sorted(inner), count], strict=True)]
    groups = np.asarray(draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)))
    partition = np.asarray(draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)))
    tokens = np.random.default_rng(draw(st.integers(0, 2**16))).integers(0, toys.VOCAB, (count, WIDTH))
    mask = np.arange(WIDTH)[None, :] < np.asarray(lengths)[:, None]
    return tokens.astype(np.int32), mask, groups, partition, cuts


def spread(mesh, batch):
    """The micro-batch with its rows over the mesh, in one transfer; as it is on one device."""
    if mesh.size == 1:
        return batch
    whole, rows = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in ((), (DATA,)))
    leaves, treedef = jax.tree.flatten(batch)
    places = [rows if leaf.shape[:1] == (12,) else whole for leaf in leaves]
    return jax.tree.unflatten(treedef, jax.device_put(leaves, places))


def check_window(window, devices):
    tokens, mask, groups, partition, cuts = window
    row_weights, expected = normalisers.scaled_integers(tokens, mask, groups, partition)
    hypothesis.assume(all(largest < 2**24 for _, largest in expected.values()))
    mesh, step, state = on_devices(devices)
    batches = normalisers.mode_window(tokens, mask, row_weights, cuts, pad_rows=12)
    got = normalisers.sums_of(step, state, [spread(mesh, batch) for batch in batches])
    for mode, (total, _) in expected.items():
        assert np.array_equal(got[mode]["theta"], total.astype(np.float32)), mode


@hypothesis.settings(QUICK, max_examples=40)
@hypothesis.given(window=windows(), devices=st.sampled_from([1, 2, 4]))
def test_p4_any_split_order_and_device_count_is_bitwise_for_every_mode(window, devices):
    check_window(window, devices)


@pytest.mark.slow
@hypothesis.settings(deadline=None, max_examples=500)
@hypothesis.given(window=windows(), devices=st.sampled_from([1, 2, 4]))
def test_p4_any_split_order_and_device_count_is_bitwise_for_every_mode_at_length(window, devices):
    check_window(window, devices)
