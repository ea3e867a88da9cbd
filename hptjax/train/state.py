"""Everything a run must not lose, as one pytree: named parameter trees, named chains, counters.

It may be saved between any two calls of `micro_step`: the open window's sums are part of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Bool, Float, Int, UInt32

from hptjax.train.accumulate import Status, Sums, zero_sums
from hptjax.train.checksum import NOT_CHECKED, LeafChecks, zero_checks
from hptjax.types import Array, MicroBatch, Params, Stat

LIMB = 2**31  # lifetime totals are kept as two int32 limbs: total = high * 2^31 + low


@struct.dataclass
class Chain:
    """One named accumulate + optimizer chain, for the parameter tree of the same name."""

    sums: Sums
    optimizer: Any


@struct.dataclass
class Window:
    """The open window: what has been added since the last flush.

    Args
      micro_batches, tokens: counted as they were added. first_nonfinite: index of the first bad micro-batch, or -1.
      empty_micro_batches: those without a live token.
      digest: per micro-batch, the sum of the hashes of the samples that its rows held, each word modulo 2^32.
      checked: whether this window's sums are checked leaf by leaf (`checks`, per chain). check_next: whether the next
        one's are, even if it is not its turn: set after a resume inside a window that is not checked.
      stats: metric sums and peaks over the window so far.
    """

    micro_batches: Int[Array, ""]
    empty_micro_batches: Int[Array, ""]
    tokens: Int[Array, ""]
    digest: UInt32[Array, "M 2"]
    checked: Bool[Array, ""]
    check_next: Bool[Array, ""]
    checks: dict[str, LeafChecks]
    first_nonfinite: Int[Array, ""]
    stats: dict[str, Stat]


@struct.dataclass
class Report:
    """What the last flush did: one ledger row, read by the host after the step.

    Args
      status: a `Status`. bad_micro_batch: the one to blame, or -1.
      grad_norm: per chain, of the summed gradient before clipping.
      optimizer_steps: updates applied so far, this one included; schedules count in it.
      digest: of the samples of all micro-batches. leaf_residual: per chain, a tree of `LeafChecks.residual`; -1 where
        the window was not checked.
    """

    status: Int[Array, ""]
    bad_micro_batch: Int[Array, ""]
    micro_batches: Int[Array, ""]
    empty_micro_batches: Int[Array, ""]
    tokens: Int[Array, ""]
    digest: UInt32[Array, " 2"]
    leaf_residual: dict[str, Params]
    windows: Int[Array, ""]
    optimizer_steps: Int[Array, ""]
    grad_norm: dict[str, Float[Array, ""]]
    witness: Float[Array, " M"]
    stats: dict[str, Stat]


@struct.dataclass
class Totals:
    """Counts over the life of the run; equal to the sums of the ledger's rows."""

    windows: Int[Array, ""]
    optimizer_steps: Int[Array, ""]
    skipped_windows: Int[Array, ""]
    micro_batches: Int[Array, ""]
    tokens_low: Int[Array, ""]
    tokens_high: Int[Array, ""]


@struct.dataclass
class TrainState:
    """Parameters, chains, the open window, lifetime totals and the last report."""

    params: dict[str, Params]
    chains: dict[str, Chain]
    window: Window
    totals: Totals
    report: Report


MicroStep = Callable[[TrainState, MicroBatch, Any], TrainState]
"""State, micro-batch, whether it is the window's last -> state."""


def empty_window(
    params: Mapping[str, Params], stats: Mapping[str, Stat], max_micro_batches: int, *, checked: Any
) -> Window:
    """A window with nothing in it; `stats` gives the names and kinds (their values are ignored)."""
    return Window(
        micro_batches=jnp.zeros((), jnp.int32),
        empty_micro_batches=jnp.zeros((), jnp.int32),
        tokens=jnp.zeros((), jnp.int32),
        digest=jnp.zeros((max_micro_batches, 2), jnp.uint32),
        checked=jnp.asarray(checked),
        check_next=jnp.zeros((), bool),
        checks={name: zero_checks(tree) for name, tree in params.items()},
        first_nonfinite=jnp.full((), -1, jnp.int32),
        stats=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), dict(stats)),
    )


def init_state(
    params: Mapping[str, Params],
    optimizers: Mapping[str, optax.GradientTransformation],
    stats: Mapping[str, Stat],
    max_micro_batches: int,
) -> TrainState:
    """A fresh state: the given parameters, empty sums, fresh optimizer states, all counters 0.

    The first window is checked leaf by leaf. Sums and optimizer states are fp32, whatever the dtype of the parameters.
    """
    if set(params) != set(optimizers):
        raise ValueError(f"expected one optimizer chain per parameter tree {sorted(params)}, got {sorted(optimizers)}")

    def zero() -> Array:
        return jnp.zeros((), jnp.int32)  # a buffer each: donated trees must not share one

    window = empty_window(params, stats, max_micro_batches, checked=True)
    return TrainState(
        params=dict(params),
        chains={
            name: Chain(
                sums=zero_sums(params[name], max_micro_batches), optimizer=optimizers[name].init(wide(params[name]))
            )
            for name in params
        },
        window=window,
        totals=Totals(zero(), zero(), zero(), zero(), zero(), zero()),
        report=Report(
            status=jnp.full((), int(Status.EMPTY), jnp.int32),
            bad_micro_batch=jnp.full((), -1, jnp.int32),
            micro_batches=zero(),
            empty_micro_batches=zero(),
            tokens=zero(),
            digest=jnp.zeros(2, jnp.uint32),
            leaf_residual={
                name: jax.tree.map(lambda _: jnp.full((), NOT_CHECKED, jnp.float32), tree)
                for name, tree in params.items()
            },
            windows=zero(),
            optimizer_steps=zero(),
            grad_norm={name: jnp.zeros((), jnp.float32) for name in params},
            witness=jnp.zeros(max_micro_batches, jnp.float32),
            stats=jax.tree.map(jnp.copy, window.stats),
        ),
    )


def wide(params: Params) -> Params:
    """The parameters in fp32: what optimizers see."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


def check_after_resume(state: TrainState) -> TrainState:
    """The state as it goes on after a restore: its leaf sums are checked from here, or from the next window on."""
    window = state.window
    checked = window.checked | (window.micro_batches == 0)
    check_next = window.check_next | ~checked
    places = (window.checked.sharding, window.check_next.sharding)
    checked, check_next = jax.device_put((checked, check_next), places)
    return dataclasses.replace(state, window=dataclasses.replace(window, checked=checked, check_next=check_next))


def state_shardings(
    state: TrainState,
    params: Mapping[str, Any],
    replicated: jax.sharding.Sharding,
    *,
    optimizer_memory: str | None = None,
) -> list[jax.sharding.Sharding]:
    """Where every leaf of a state lives, in the order of `jax.tree.leaves(state)`.

    A leaf whose path ends like a parameter's path, in that parameter's shape, lives beside it: parameters, sums and
    moments of any optimizer. Everything else is replicated.

    Args
      state: a `TrainState` of arrays or shapes. params: per tree, the shardings of its parameters.
      optimizer_memory: kind of memory of the optimizer's arrays, counters excepted; None is the device's own.
    """
    shapes = {_names(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    places = {_names(path): place for path, place in jax.tree_util.tree_leaves_with_path(dict(params))}

    def place_of(path: tuple[str, ...], leaf: Any) -> jax.sharding.Sharding:
        tree = next((name for name in params if name in path), None)
        for start in range(len(path)):
            owner = (tree, *path[start:]) if tree is not None and path[start] != tree else path[start:]
            if owner in places and shapes[owner] == leaf.shape:
                return places[owner]
        return replicated

    def in_memory(path: tuple[str, ...], leaf: Any) -> jax.sharding.Sharding:
        place = place_of(path, leaf)
        if optimizer_memory is None or path[0] != "chains" or path[2] != "optimizer" or not leaf.ndim:
            return place
        return place.with_memory_kind(optimizer_memory)

    return [in_memory(_names(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]


def placed(state: TrainState, places: Sequence[jax.sharding.Sharding]) -> TrainState:
    """The state with every leaf where `places` says."""
    leaves, treedef = jax.tree.flatten(state)
    return jax.tree.unflatten(treedef, jax.device_put(leaves, list(places)))


def jit_step(
    step: Callable[..., TrainState],
    places: Sequence[jax.sharding.Sharding],
    frozen: Mapping[str, Params] | None = None,
) -> MicroStep:
    """The step compiled, its state donated, every leaf that it returns placed as `places` says.

    Args
      frozen: parameter trees that the step reads beside its state and never changes.

    Without the exact places, a state that comes back may differ in the spelling of its shardings from the one that went
    in, and the second call would compile again. `__wrapped__` is the compiled function, on leaves.
    """

    beside = () if frozen is None else (dict(frozen),)  # an argument, or the compiler would copy it into the program

    def leaves_after(state: TrainState, micro_batch: MicroBatch, is_last: Any, *beside: Any) -> list[Any]:
        return jax.tree.leaves(step(state, micro_batch, is_last, *beside))

    compiled = jax.jit(leaves_after, donate_argnums=0, out_shardings=list(places))

    @functools.wraps(compiled)
    def micro_step(state: TrainState, micro_batch: MicroBatch, is_last: Any) -> TrainState:
        treedef = jax.tree.structure(state)
        return jax.tree.unflatten(treedef, compiled(state, micro_batch, is_last, *beside))

    return micro_step


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A key path as plain names."""
    return tuple(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)
