"""Parameters of a run: read back from its checkpoints, and written as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hptjax.build.adapters import merge_on_host
from hptjax.build.parts import Parts, fingerprint
from hptjax.build.stages import build_stages
from hptjax.config import ModelConfig
from hptjax.model_shape import asked_adapter
from hptjax.models.folder import load_folder, save_folder
from hptjax.models.folder_config import CONFIG_FILE, GENERATION_FILE, read_json
from hptjax.models.folder_copy import copy_files, copy_tokenizer
from hptjax.models.folder_write import SHARD_BYTES, write_json
from hptjax.models.shape import DecoderConfig
from hptjax.rundir import run_folder
from hptjax.train.checkpoint import open_checkpoints
from hptjax.types import Params


def load_weights(parts: Parts, checkpoint: str) -> Any:
    """The policy's parameters: of the base model, of the last checkpoint, or of the best by the validation metric.

    Raises ValueError where the run folder has no such checkpoint.
    """
    if checkpoint == "base":
        return parts.policy.params
    config = parts.config
    stages = build_stages(config, parts.policy, parts.questions.train)
    folder = run_folder(config) / "checkpoints"
    restored = None
    if folder.is_dir():
        with open_checkpoints(
            folder,
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
            fingerprint=fingerprint(parts),
            read_only=True,
        ) as checkpoints:
            restore = checkpoints.restore_latest if checkpoint == "last" else checkpoints.restore_best
            params = {"policy": parts.policy.params}
            restored = restore(lambda host: stages[min(host["stage"], len(stages) - 1)].start(params, None))
    if restored is None:
        raise ValueError(
            f"expected a {checkpoint} checkpoint in {folder}, found none; train first, or use --checkpoint base"
        )
    return restored.state.params["policy"]


def export(parts: Parts, params: Params, folder: Path, *, dtype: str = "bfloat16") -> None:
    """Writes the model, given as host arrays of what was trained, as a Hugging Face folder; adapters merged."""
    model, lora = parts.config.model, asked_adapter(parts.config)
    if lora is not None and model.path is not None:
        params = merge_on_host(load_folder(model.path)[1], params, lora.scale)
    write_model(folder, parts.policy.config, params, model, parts.policy.tokenizer, dtype=dtype)


def write_model(
    folder: Path,
    shape: DecoderConfig,
    params: Params,
    model: ModelConfig,
    tokenizer: Any,
    *,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """A Hugging Face folder that any tool loads: config, weights, tokenizer, chat template, generation_config.json.

    Args
      params: host arrays. model: the run's. The files of its tokenizer are copied byte for byte; its folder's
        generation_config.json too, and what its config.json says beside the shape.
      tokenizer: of that folder; names the special tokens of a model that was made from scratch.
    """
    beside = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if model.path is not None:
        beside = read_json(Path(model.path) / CONFIG_FILE)
    save_folder(folder, shape, params, dtype=dtype, shard_bytes=shard_bytes, beside=beside)
    copy_tokenizer(Path(model.tokenizer or model.path or ""), folder)
    if model.path is not None:
        copy_files(Path(model.path), folder, (GENERATION_FILE,))
    else:
        write_json(folder / GENERATION_FILE, {name: value for name, value in beside.items() if value is not None})
