"""Bytes of what a run holds, whole and per device, from shapes and the sharding tables alone.

Arrays are cut by the tables that the run itself uses (`sharding/rules.py`, on a mesh of sizes without devices); the
activations are an estimate, the rest is exact.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from hptjax.build.frozen import reads_start
from hptjax.build.mesh import check_mesh, rollout_rules, training_rules
from hptjax.build.sampler import decode_shape
from hptjax.config import Config
from hptjax.config_batch import SHORT_ROW_TOKENS, mesh_devices, mesh_sizes, mesh_words, row_positions, shared_tokens
from hptjax.config_model import ShapeConfig
from hptjax.explain import human_bytes
from hptjax.model_shape import adapter_count, asked_adapter
from hptjax.models import decoder
from hptjax.models.cache import cache_axes, cache_shapes
from hptjax.models.lora import adapter_axes, adapter_shapes
from hptjax.models.quantise import MATRICES, SCALE, with_scales
from hptjax.models.shape import DecoderConfig
from hptjax.sharding.rules import AXES, Rules, named_shardings, parts

FP32_BYTES, BF16_BYTES = 4, 2


@dataclasses.dataclass(frozen=True)
class Held:
    """One line of the table.

    Args
      whole: bytes of one copy. device: bytes on each device. when: "always", or only while "training" or "sampling".
    """

    name: str
    whole: float | int
    device: float | int
    when: str = "always"


def memory_lines(config: Config, shape: DecoderConfig) -> list[str]:
    """The table, with what a device holds at the most while it trains and while it samples."""
    rows = held(config, shape)
    lines = [f"{row.name:<38}{human_bytes(row.whole):>12}{human_bytes(row.device):>14}" for row in rows]
    phases = [("training",), ("sampling",), *([("training", "sampling")] if config.train.rollouts_ahead else [])]
    for phase in phases:
        of_phase = [row for row in rows if row.when in ("always", *phase)]
        whole, device = (sum(getattr(row, column) for row in of_phase) for column in ("whole", "device"))
        title = f"together while {' and '.join(phase)}"
        lines.append(f"{title:<38}{human_bytes(whole):>12}{human_bytes(device):>14}")
    what, lora = f"{parameter_count(shape, shape.vocab_size):,} parameters", asked_adapter(config)
    if lora is not None:
        what += (
            f" that stay, {adapter_count(shape, lora):,} in adapters of rank {lora.rank} on {', '.join(lora.targets)}"
        )
    return [
        f"{what}, {mesh_devices(config)} device(s) ({mesh_words(config)})",
        f"{'':<38}{'whole':>12}{'per device':>14}",
        *lines,
    ]


def held(config: Config, shape: DecoderConfig) -> list[Held]:
    """What a run holds. Raises what does not divide over the mesh -> ValueError that names the sizes that clash."""
    check_mesh(config, shape)
    sizes = mesh_sizes(config)
    mesh = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    training, sampling = training_rules(config), rollout_rules(config)
    compute_bytes = FP32_BYTES if config.model.compute_dtype == "float32" else BF16_BYTES
    axes, shapes = decoder.logical_axes(shape), decoder.param_shapes(shape)
    places = [named_shardings(mesh, axes, shapes, rules) for rules in (training, sampling)]
    size = {True: FP32_BYTES, False: compute_bytes}  # the scales of norms stay as they are
    int8 = config.rollout.weights_dtype == "int8"
    as_used = [_entries(shapes, place, lambda name: size[name.endswith("norm")]) for place in places]
    if int8:
        kept = with_scales(shapes)
        as_used[1] = _entries(
            kept,
            named_shardings(mesh, with_scales(axes), kept, sampling),
            lambda name: 1 if name in MATRICES else size[name.endswith(("norm", SCALE))],
        )
    lora, rows = asked_adapter(config), []
    if lora is None:
        whole, device = _entries(shapes, places[0])
    else:
        adapters = adapter_shapes(shape, lora.rank, lora.targets)
        whole, device = _entries(adapters, named_shardings(mesh, adapter_axes(shape, lora.targets), adapters, training))
        rows.append(Held(f"the model, {config.model.compute_dtype}", *as_used[0]))
    of = "parameters" if lora is None else "adapters"
    sizes_of_cache = decode_shape(config, shape.vocab_size, parts(sizes, "batch", sampling)).cache_sizes
    int8_cache = config.rollout.cache_dtype == "int8"
    cache = cache_shapes(shape, *sizes_of_cache, int8=int8_cache)
    cached = _entries(
        cache,
        named_shardings(mesh, cache_axes(int8=int8_cache), cache, sampling),
        lambda name: FP32_BYTES if name.endswith("scales") else 1 if int8_cache else compute_bytes,
    )
    positions = config.batch.rows * row_positions(config)
    logits = (
        min(config.model.logprob_chunk_tokens, config.batch.rows * config.batch.row_tokens)
        * shape.vocab_size
        * FP32_BYTES
    )
    over = math.prod(parts(sizes, name, training) for name in ("batch", "time", "vocab"))
    away = config.optimizer.host_memory
    fp32, fp32_device = whole * FP32_BYTES, device * FP32_BYTES
    kept_entries, kept_on_device = layer_entries(config, shape, sizes, training)
    bytes_per_entry = positions * compute_bytes
    rows += [
        Held(f"{of}, fp32", fp32, fp32_device),
        *([Held(f"{of} at the start (KL reference)", fp32, fp32_device)] if reads_start(config) else []),
        Held(
            "optimizer (two moments), fp32" + (", on the host" if away else ""),
            2 * fp32,
            0.0 if away else 2 * fp32_device,
        ),
        Held("accumulator, fp32", fp32, fp32_device),
        Held("gradient of a micro-batch, fp32", fp32, fp32_device, "training"),
        Held("logits of a chunk, fp32", logits, logits / over, "training"),
        Held(
            "activations of a micro-batch (about)",
            kept_entries * bytes_per_entry,
            kept_on_device * bytes_per_entry,
            "training",
        ),
    ]
    if places[0] != places[1] or lora is not None or int8:
        rows.append(Held("weights of rollouts", *as_used[1], "sampling"))
    if config.train.rollouts_ahead:  # a copy that outlives the updates
        copy = as_used[0] if lora is None and not int8 else (fp32, fp32_device)
        rows.append(Held(f"{of} that sample ahead", *copy, "sampling"))
    return [*rows, Held("KV cache", *cached, "sampling")]


def layer_entries(config: Config, shape: DecoderConfig, sizes: dict[str, int], rules: Rules) -> tuple[float, float]:
    """What all layers keep for the backward pass, per position of a micro-batch: entries whole, and on each device.

    About, by `model.remat`: the layer's input; the results of the weights' products; the rest of the layer too, and the
    scores of plain attention. What has the model's width is on every device of `tensor`, heads and mlp are cut.
    """
    remat, width, mlp = config.model.remat, shape.hidden_size, shape.mlp_size
    heads, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    seen = shared_tokens(config) + config.batch.row_tokens // config.batch.lanes
    plain = config.batch.share_prompts or config.model.attention == "reference" or seen <= SHORT_ROW_TOKENS
    scores = shape.num_heads * seen if plain else 0
    products = {"embed": 3 * width, "heads": heads, "kv_heads": 2 * kv, "mlp": 2 * mlp}
    kept: dict[str, int] = {
        "none": {"embed": 4 * width, "heads": 2 * heads + scores, "kv_heads": 2 * kv, "mlp": 3 * mlp},
        "full": {"embed": width},
        "offload": {},
        "attention": {"embed": width, "heads": 0 if plain else heads},
        "dots": products | {"heads": heads + scores},
        "dots_no_batch": products,
    }[remat]
    rows = parts(sizes, "batch", rules) * parts(sizes, "time", rules)
    cut = {name: 1 if name == "embed" else parts(sizes, name, rules) for name in kept}
    cut["kv_heads"] = min(shape.num_kv_heads, parts(sizes, "kv_heads", rules))  # fewer than devices are copied
    device = sum(entries / (rows * cut[name]) for name, entries in kept.items())
    return float(shape.num_layers * sum(kept.values())), float(shape.num_layers * device)


def parameter_count(shape: ShapeConfig | DecoderConfig, vocab_size: int) -> int:
    """Entries of all parameter arrays of a decoder.

    L (2 D H E + 2 D K E + 3 D F + 2 D [+ 2 E] [+ (H + 2 K) E]) + D + V D [+ V D]

    In brackets: qk-norm, attention bias, untied embeddings.
    """
    heads, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layer = 2 * shape.hidden_size * (heads + kv) + 3 * shape.hidden_size * shape.mlp_size + 2 * shape.hidden_size
    layer += 2 * shape.head_dim if shape.qk_norm else 0
    layer += heads + 2 * kv if shape.attention_bias else 0
    embeddings = (1 if shape.tie_embeddings else 2) * vocab_size * shape.hidden_size
    return shape.num_layers * layer + shape.hidden_size + embeddings


def _entries(shapes: Any, places: Any, size: Any = None) -> tuple[float, float]:
    """Entries of a tree of shape tuples, whole and on each device; times `size(name)` of the leaf, if it is given."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=lambda node: type(node) is tuple)
    whole = device = 0.0
    for (path, sizes), place in zip(leaves, jax.tree.leaves(places), strict=True):
        factor = 1 if size is None else size(str(getattr(path[-1], "key", getattr(path[-1], "name", ""))))
        whole += factor * math.prod(sizes)
        device += factor * math.prod(place.shard_shape(sizes))
    return whole, device
