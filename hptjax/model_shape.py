"""The shape of a config's model, found without its weights: of its folder, of a preset, or `model.shape`. No jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from hptjax.config import Config, ShapeConfig
from hptjax.models.folder_config import read_shape
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
