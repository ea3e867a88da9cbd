"""The optimizer chain and its schedule: clip the summed gradient, then AdamW; time is counted in optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import optax

from hptjax.types import Params

HOST_MEMORY = "pinned_host"  # the kind of memory of the host that devices read and write by themselves


def make_schedule(
    kind: str, learning_rate: float, *, warmup_steps: int, decay_steps: int, end_fraction: float = 0.0
) -> optax.Schedule:
    """Learning rate at optimizer step s: linear warm-up over `warmup_steps`, then constant, linear or cosine.

    Args
      kind: "constant", "linear" or "cosine"; the last two reach `end_fraction * learning_rate` at `decay_steps`.
      warmup_steps, decay_steps: in optimizer steps; skipped windows do not count. With a warm-up, step 0 takes
        learning_rate / warmup_steps, so that the first update is not thrown away.

    Raises ValueError for an unknown kind, or a decay that ends inside the warm-up.
    """
    if kind not in ("constant", "linear", "cosine"):
        raise ValueError(
            f"expected optimizer.schedule 'constant', 'linear' or 'cosine', got {kind!r}; change optimizer.schedule"
        )
    if kind != "constant" and decay_steps <= warmup_steps:
        raise ValueError(
            f"expected optimizer.decay_steps > optimizer.warmup_steps = {warmup_steps}, got {decay_steps}; "
            "change either field"
        )
    after = {
        "constant": optax.constant_schedule(learning_rate),
        "linear": optax.linear_schedule(
            learning_rate, learning_rate * end_fraction, max(decay_steps - warmup_steps, 1)
        ),
        "cosine": optax.cosine_decay_schedule(learning_rate, max(decay_steps - warmup_steps, 1), alpha=end_fraction),
    }[kind]
    if not warmup_steps:
        return after
    warmup = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, warmup_steps - 1 or 1)
    return optax.join_schedules([warmup, after], [warmup_steps])


def decay_mask(params: Params) -> Params:
    """True where weight decay applies: matrices, not norm scales or biases (their names end in `norm` or `bias`)."""

    def decays(path: tuple, _: object) -> bool:
        names = [str(getattr(entry, "key", entry)) for entry in path]
        return not any("norm" in name or name.endswith("bias") for name in names)

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(
    schedule: optax.Schedule, *, b1: float, b2: float, eps: float, weight_decay: float, clip_norm: float | None
) -> optax.GradientTransformation:
    """Clip by the global norm of the summed gradient, then AdamW with decoupled decay (Loshchilov 2019, 1711.05101)."""
    adamw = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask)
    return adamw if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), adamw)


def alternating(*optimizers: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Several optimizers for the same parameters, each with moments and a schedule of its own; one takes each update.

    `update` takes a keyword more, `optimizer`: the place of the one that is meant, an int32 scalar that may be traced.
    The states of the others do not change. ReLIFT trains on rollouts with the first and on demonstrations with the
    second.
    """

    def init(params: Any) -> tuple[Any, ...]:
        return tuple(each.init(params) for each in optimizers)

    def update(updates: Any, state: tuple[Any, ...], params: Any = None, *, optimizer: Any) -> tuple[Any, Any]:
        def taken_by(place: int) -> Any:
            def take() -> tuple[Any, tuple[Any, ...]]:
                changed, own = optimizers[place].update(updates, state[place], params)
                return changed, (*state[:place], own, *state[place + 1 :])

            return take

        return jax.lax.switch(optimizer, [taken_by(place) for place in range(len(optimizers))])

    return optax.GradientTransformationExtraArgs(init, update)


def in_host_memory(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer with its moments in the host's memory: during an update they are on the device.

    A fresh state is where `init` makes it; place it by shardings of memory kind `pinned_host`. Counters stay on the
    device. The values are those of the optimizer, bit for bit.
    """

    def moved(state: Any, space: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.device_put(leaf, space) if leaf.ndim else leaf, state)

    inner = optax.with_extra_args_support(optimizer)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, state = inner.update(updates, moved(state, jax.memory.Space.Device), params, **extra)
        return updates, moved(state, jax.memory.Space.Host)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def check_host_memory(platform: str, kinds: Sequence[str]) -> None:
    """Raises ValueError where a device, which has these kinds of memory, cannot read and write the host's by itself."""
    if HOST_MEMORY not in kinds:
        raise ValueError(
            f"optimizer.host_memory = true needs a platform with {HOST_MEMORY} memory, {platform} has "
            f"{', '.join(kinds)}; set optimizer.host_memory to false"
        )
