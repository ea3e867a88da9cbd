"""Parameters of a run: read back from its checkpoints, and written as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hptjax.build.parts import Parts, fingerprint
from hptjax.build.stages import build_stages
from hptjax.models.folder import save_folder
from hptjax.rundir import run_folder
from hptjax.train.checkpoint import open_checkpoints


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


def export(parts: Parts, params: Any, folder: Path) -> None:
    """Writes the model, given as host arrays, as a Hugging Face folder: config.json, safetensors in bf16, tokenizer."""
    save_folder(folder, parts.policy.config, params, dtype="bfloat16")
    parts.policy.tokenizer.save_pretrained(str(folder))
