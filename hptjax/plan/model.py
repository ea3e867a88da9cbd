"""The shape of a config's model, without its weights and, where it can be, without its tokenizer."""

from __future__ import annotations

import pathlib

from hptjax import model_shape
from hptjax.config import Config
from hptjax.data.tokenizer import load_tokenizer
from hptjax.models.shape import DecoderConfig


def decoder_shape(config: Config) -> DecoderConfig:
    """Of the folder's config.json, of the preset, or of `model.shape` with the tokenizer's vocabulary.

    Raises a folder without config.json -> FileNotFoundError, no shape at all -> ValueError.
    """
    model = config.model
    if model.path is not None and not (pathlib.Path(model.path) / "config.json").is_file():
        raise FileNotFoundError(
            f"expected '{model.path}/config.json', found no such file; change model.path, or leave it out and set "
            "model.preset"
        )
    if model.path is None and model.preset is None and model.tokenizer is None:
        raise ValueError(
            "expected model.preset, or model.path, or model.shape with model.tokenizer (whose vocabulary it has), got "
            "none; change model.preset"
        )
    return model_shape.decoder_shape(config, lambda: len(load_tokenizer(model.tokenizer or "")))
