"""The shape of a config's model, without its weights and, where it can be, without its tokenizer."""

from __future__ import annotations

import json
import pathlib

from hptjax.build.policy import from_scratch
from hptjax.config import Config
from hptjax.data.tokenizer import load_tokenizer
from hptjax.models.folder import read_config
from hptjax.models.presets import PRESETS
from hptjax.models.shape import DecoderConfig


def decoder_shape(config: Config) -> DecoderConfig:
    """Of the folder's config.json, of the preset, or of `model.shape` with the tokenizer's vocabulary.

    Raises a folder without config.json -> FileNotFoundError, no shape at all -> ValueError.
    """
    model = config.model
    if model.path is not None:
        path = pathlib.Path(model.path) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"expected '{path}', found no such file; change model.path, or leave it out and set model.preset"
            )
        return read_config(json.loads(path.read_text(encoding="utf-8")))[0]
    if model.preset is not None:
        return PRESETS[model.preset]
    if model.tokenizer is None:
        raise ValueError(
            "expected model.preset, or model.path, or model.shape with model.tokenizer (whose vocabulary it has), got "
            "none; change model.preset"
        )
    return from_scratch(model.shape, len(load_tokenizer(model.tokenizer)))
