"""What stands in a model folder beside config and weights; and a folder written anew, in another dtype or shards."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from typing import Any

import numpy as np

from hptjax.models.folder import expected_shapes, open_model
from hptjax.models.folder_config import CONFIG_FILE, GENERATION_FILE, read_json, write_config
from hptjax.models.folder_write import SHARD_BYTES, as_saved, make_folder, saved_dtype, write_weights

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES = "additional_chat_templates"  # folder of the chat templates that have a name, as transformers writes them
STORED_NAMES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def copy_files(source: pathlib.Path, target: pathlib.Path, names: tuple[str, ...]) -> None:
    """The files of these names, byte for byte, where the folders are two.

    Those that are not there are not in the target afterwards either: a template of another model would be read there.
    """
    make_folder(target)
    if target.samefile(source):
        return
    for name in names:
        if not (source / name).is_file():
            (target / name).unlink(missing_ok=True)
        elif not ((target / name).exists() and (source / name).samefile(target / name)):
            shutil.copyfile(source / name, target / name)


def copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> None:
    """The files of a tokenizer, its chat templates of other names among them; as `copy_files`."""
    templates = {path.name for folder in (source, target) for path in (folder / TEMPLATES).glob("*.jinja")}
    if templates:
        make_folder(target / TEMPLATES)
    copy_files(source, target, (*TOKENIZER_FILES, *(f"{TEMPLATES}/{name}" for name in sorted(templates))))


def convert_folder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """A model folder written anew: another dtype, other shards, config.json in the form that all versions read.

    Args
      dtype: as `save_folder`; None keeps the embedding's. shard_bytes: largest file of weights.

    Tensor by tensor: one shard is in memory at a time. Buffers that can be derived, and a tied model's second copy of
    its embedding, are left out; tokenizer, chat template and generation_config.json are copied.
    Raises what `load_folder` refuses, a target that is the source, a weight that the dtype cannot hold -> ValueError.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    if target.exists() and target.samefile(source):
        raise ValueError(f"expected another folder to write to, got {target}, which is read; change the second folder")
    with contextlib.ExitStack() as files:
        config, keys, tensors = open_model(source, files)
        shapes = expected_shapes(keys, config)
        stored = saved_dtype(STORED_NAMES[tensors[next(iter(shapes))].dtype] if dtype is None else dtype)

        def tensor(name: str) -> np.ndarray:
            return as_saved(name, tensors[name][:], stored)

        sizes = {name: int(np.prod(shape)) * stored.itemsize for name, shape in shapes.items()}
        documents = {CONFIG_FILE: write_config(config, stored.name, read_json(source / CONFIG_FILE))}
        write_weights(target, sizes, tensor, documents, shard_bytes=shard_bytes)
    copy_tokenizer(source, target)
    copy_files(source, target, (GENERATION_FILE,))
