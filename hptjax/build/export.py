"""`export`: a run's checkpoint as a Hugging Face folder. Neither data nor devices are needed for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from flax import traverse_util

from hptjax.build.parts import files_digest
from hptjax.build.weights import write_model
from hptjax.config import Config
from hptjax.config_load import read_file
from hptjax.config_text import build
from hptjax.data.tokenizer import load_tokenizer
from hptjax.models.folder_write import SHARD_BYTES
from hptjax.models.shape import DecoderConfig, Llama3RopeScaling
from hptjax.rundir import read_json, run_folder
from hptjax.train.checkpoint_read import chosen_leaves

POLICY = "params.policy."  # how the names of the policy's parameters begin in a checkpoint


def export_run(
    source: Path,
    out: Path,
    *,
    checkpoint: str = "last",
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    tokenizer: str | None = None,
) -> str:
    """Writes the policy of a run's checkpoint into `out`; what was written, in words.

    Args
      source: a run folder, or the config of a run. checkpoint: "last" or "best". dtype: of the stored weights.
      tokenizer: folder of the run's tokenizer, where it has moved since.

    Raises no such run, no checkpoint that can be read, another tokenizer than the run's -> ValueError.
    """
    folder, config = _run_of(source)
    model = config.model if tokenizer is None else dataclasses.replace(config.model, tokenizer=tokenizer)
    saved, leaves = chosen_leaves(folder / "checkpoints", checkpoint, lambda name: name.startswith(POLICY))
    words = load_tokenizer(model.tokenizer or model.path or "")
    if files_digest(Path(model.tokenizer or model.path or ""), "tokenizer.json") != saved.fingerprint["tokenizer"]:
        raise ValueError(
            f"expected the tokenizer that {folder} was trained with, got another one in "
            f"'{model.tokenizer or model.path}'; name its folder with --tokenizer"
        )
    params = traverse_util.unflatten_dict(
        {tuple(name.removeprefix(POLICY).split(".")): value for name, value in leaves.items()}
    )
    shape = _shape(saved.fingerprint["model"])
    write_model(out, shape, params, model, words, dtype=dtype, shard_bytes=shard_bytes)
    metric = "" if saved.metric is None else f", {config.checkpoint.metric} {saved.metric:.4g}"
    return f"{out}: step {saved.step} of {folder} (checkpoint {saved.ordinal}{metric}), {dtype}"


def _run_of(source: Path) -> tuple[Path, Config]:
    """A run's folder and config, from either of them."""
    if source.is_dir():
        path = source / "config.json"
        if not path.is_file():
            raise ValueError(f"expected a run folder with its config.json, or a config file, got '{source}'")
        return source, build(Config, read_json(path), source=str(path))
    config = read_file(source)
    return run_folder(config), config


def _shape(recorded: dict[str, object]) -> DecoderConfig:
    """The decoder's shape, as a checkpoint's fingerprint records it."""
    scaling = recorded["rope_scaling"]
    stretch = Llama3RopeScaling(**scaling) if isinstance(scaling, dict) else None
    return DecoderConfig(**{**recorded, "rope_scaling": stretch})  # type: ignore[arg-type]
