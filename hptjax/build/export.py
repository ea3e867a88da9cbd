"""`export`: a run's checkpoint as a Hugging Face folder. Neither data nor devices are needed for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import traverse_util

from hptjax.build.adapters import merge_on_host
from hptjax.build.parts import files_digest
from hptjax.build.weights import write_model
from hptjax.config import Config, ModelConfig
from hptjax.config_load import read_file
from hptjax.config_text import build
from hptjax.data.tokenizer import load_tokenizer
from hptjax.models.folder import load_folder
from hptjax.models.folder_write import SHARD_BYTES
from hptjax.models.lora_config import AdapterShape
from hptjax.models.lora_folder import save_adapter
from hptjax.models.shape import DecoderConfig, Llama3RopeScaling
from hptjax.rundir import read_json, run_folder
from hptjax.train.checkpoint_read import chosen_leaves
from hptjax.types import Params

POLICY = "params.policy."  # how the names of the policy's parameters begin in a checkpoint


def export_run(
    source: Path,
    out: Path,
    *,
    checkpoint: str = "last",
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    tokenizer: str | None = None,
    as_adapter: bool = False,
) -> str:
    """Writes the policy of a run's checkpoint into `out`; what was written, in words.

    Args
      source: a run folder, or the config of a run. checkpoint: "last" or "best". dtype: of the stored weights.
      tokenizer: folder of the run's tokenizer, where it has moved since.
      as_adapter: of a run that trained adapters, a PEFT folder instead of the model with them merged.

    Raises no such run, no checkpoint that can be read, another tokenizer or base model than the run's -> ValueError.
    """
    folder, config = _run_of(source)
    model = config.model if tokenizer is None else dataclasses.replace(config.model, tokenizer=tokenizer)
    read = {
        "the run itself": str(folder),
        "its model": model.path,
        "the adapter that it began with": config.lora.adapter,
    }
    _refuse_read(out, read)
    saved, leaves = chosen_leaves(folder / "checkpoints", checkpoint, lambda name: name.startswith(POLICY))
    params = traverse_util.unflatten_dict(
        {tuple(name.removeprefix(POLICY).split(".")): value for name, value in leaves.items()}
    )
    shape, lora = _shape(saved.fingerprint["model"]), saved.fingerprint.get("lora")
    metric = "" if saved.metric is None else f", {config.checkpoint.metric} {saved.metric:.4g}"
    what = f"{out}: step {saved.step} of {folder} (checkpoint {saved.ordinal}{metric}), {dtype}"
    if as_adapter and lora is None:
        raise ValueError(
            f"expected a run that trained adapters, got {folder}, which trained the model; leave --adapter out"
        )
    adapter = None if lora is None else _adapter(lora)
    if adapter is not None and as_adapter:
        save_adapter(out, shape, params, adapter, dtype=dtype, base=model.path)
        return f"{what}, adapters of {model.path}{_edits(model)}"
    if adapter is not None:
        params = merge_on_host(_base_of(model.path, saved.fingerprint["base_weights"]), params, adapter.scale)
    words = load_tokenizer(model.tokenizer or model.path or "")
    if files_digest(Path(model.tokenizer or model.path or ""), "tokenizer.json") != saved.fingerprint["tokenizer"]:
        raise ValueError(
            f"expected the tokenizer that {folder} was trained with, got another one in "
            f"'{model.tokenizer or model.path}'; name its folder with --tokenizer"
        )
    write_model(out, shape, params, model, words, dtype=dtype, shard_bytes=shard_bytes)
    return what + ("" if adapter is None else ", adapters merged")


def _refuse_read(out: Path, read: Mapping[str, str | None]) -> None:
    """Raises ValueError where the folder to write is one of those that are read; what is in them -> folder."""
    for what, path in read.items():
        if path is not None and out.exists() and Path(path).exists() and out.samefile(path):
            raise ValueError(f"expected another folder to write to, got {out}, which is {what}; change OUT")


def _edits(model: ModelConfig) -> str:
    """What must be changed in the config.json of the model that adapters are put beside, in words."""
    asked = {"rope_theta": model.rope_theta, "max_position_embeddings": model.max_positions}
    changes = [f"{name} {value}" for name, value in asked.items() if value is not None]
    return f", which were trained with {' and '.join(changes)} in its config.json" if changes else ""


def _base_of(path: str | None, digest: str) -> Params:
    """The weights that a run's adapters belong to."""
    if path is None or files_digest(Path(path), "*.safetensors") != digest:
        raise ValueError(
            f"expected the base model of the run in '{path}', got other weights; put them back, or use --adapter"
        )
    return load_folder(path)[1]


def _run_of(source: Path) -> tuple[Path, Config]:
    """A run's folder and config, from either of them."""
    if source.is_dir():
        path = source / "config.json"
        if not path.is_file():
            raise ValueError(f"expected a run folder with its config.json, or a config file, got '{source}'")
        return source, build(Config, read_json(path), source=str(path))
    config = read_file(source)
    return run_folder(config), config


def _adapter(recorded: Mapping[str, Any]) -> AdapterShape:
    """Rank, alpha and targets, as a checkpoint's fingerprint records them."""
    return AdapterShape(recorded["rank"], recorded["alpha"], tuple(recorded["targets"]), recorded["rank_stabilised"])


def _shape(recorded: dict[str, object]) -> DecoderConfig:
    """The decoder's shape, as a checkpoint's fingerprint records it."""
    scaling = recorded["rope_scaling"]
    stretch = Llama3RopeScaling(**scaling) if isinstance(scaling, dict) else None
    return DecoderConfig(**{**recorded, "rope_scaling": stretch})  # type: ignore[arg-type]
