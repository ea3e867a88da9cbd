"""The shape of a config's model and of its adapters, found without any weights. No jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from hptjax.config import Config
from hptjax.config_model import ShapeConfig
from hptjax.models.folder_config import read_shape
from hptjax.models.lora_config import TARGETS, AdapterShape, read_adapter_shape
from hptjax.models.presets import PRESETS
from hptjax.models.shape import DecoderConfig


def decoder_shape(config: Config, vocab_size: Callable[[], int]) -> DecoderConfig:
    """The decoder that a run starts from, with the edits of `model.rope_theta` and `model.max_positions`.

    Args
      vocab_size: of the tokenizer; asked only where the model is made from `model.shape`.

    Raises a folder without config.json -> FileNotFoundError; one that this decoder cannot follow -> ValueError.
    """
    model = config.model
    if model.path is not None:
        shape = read_shape(model.path)[0]
    elif model.preset is not None:
        shape = PRESETS[model.preset]
    else:
        shape = from_scratch(model.shape, vocab_size())
    edits: dict[str, Any] = {"rope_theta": model.rope_theta, "max_positions": model.max_positions}
    return dataclasses.replace(shape, **{name: value for name, value in edits.items() if value is not None})


def from_scratch(shape: ShapeConfig, vocab_size: int) -> DecoderConfig:
    """The decoder of `model.shape`, with the tokenizer's vocabulary."""
    return DecoderConfig(vocab_size=vocab_size, **dataclasses.asdict(shape))


def asked_adapter(config: Config) -> AdapterShape | None:
    """Rank, alpha and targets of `config.lora`, or those of the adapter that the run starts from; None where it is off.

    Raises an adapter folder that cannot be used, or fields that contradict it -> FileNotFoundError, ValueError.
    """
    lora = config.lora
    if not lora.on:
        return None
    if lora.adapter is None:
        assert lora.rank is not None
        targets = tuple(name for name in TARGETS if lora.targets is None or name in lora.targets)
        alpha = 2.0 * lora.rank if lora.alpha is None else lora.alpha
        return AdapterShape(lora.rank, alpha, targets, bool(lora.rank_stabilised))
    found = read_adapter_shape(lora.adapter)
    for name, asked, has in (
        ("rank", lora.rank, found.rank),
        ("alpha", lora.alpha, found.alpha),
        ("rank_stabilised", lora.rank_stabilised, found.rank_stabilised),
        ("targets", None if lora.targets is None else sorted(lora.targets), sorted(found.targets)),
    ):
        if asked is not None and asked != has:
            raise ValueError(
                f"expected lora.{name} to be that of the adapter in '{lora.adapter}' ({has}), got {asked}; leave "
                f"lora.{name} out"
            )
    return found


def adapter_count(shape: ShapeConfig | DecoderConfig, adapter: AdapterShape) -> int:
    """Entries of all adapters: L R (inputs + outputs) of each target."""
    heads, kv, hidden = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim, shape.hidden_size
    sides = {"q_proj": hidden + heads, "k_proj": hidden + kv, "v_proj": hidden + kv, "o_proj": heads + hidden}
    return shape.num_layers * adapter.rank * sum(sides.get(name, hidden + shape.mlp_size) for name in adapter.targets)
