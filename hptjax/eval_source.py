"""What `hptjax eval` is pointed at: a config, a run folder, or a model folder of Hugging Face; as a config. No jax."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from hptjax.config import Config, DataConfig, EvalConfig, ModelConfig, PromptConfig, RolloutConfig
from hptjax.config_load import read_file
from hptjax.config_text import build

MAX_PROMPT, MAX_COMPLETION = 1024, 8192  # as HPT and LUFFY evaluate (spec/hpt.md 4.1)
ASK_FOR_BOX = "Please reason step by step, and put your final answer within \\boxed{}."
RUN, FOLDER = "run", "folder"


@dataclasses.dataclass(frozen=True)
class Source:
    """Args
    name: of the model, for folders and reports. kind: "run" (weights come from its checkpoints) or "folder".
    """

    config: Config
    name: str
    kind: str


def read_source(path: str | pathlib.Path) -> Source:
    """The config of a TOML file or of a run folder, or one made for a model folder.

    Raises neither of these -> FileNotFoundError or ValueError.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        config = read_file(path)
        return Source(config, config.name, RUN)
    told = _json(path / "config.json")
    if "runs_dir" in told:
        config = build(Config, told, source=str(path / "config.json"))
        where = path.absolute()
        config = dataclasses.replace(config, runs_dir=str(where.parent), name=where.name)
        return Source(config, config.name, RUN)
    return Source(_for_folder(path, told), path.absolute().name, FOLDER)


def fitted(config: Config) -> Config:
    """The config with sizes that follow from its limits: cache, prompt buckets and rows hold the longest sequence."""
    longest = config.data.max_prompt_tokens + config.rollout.max_completion_tokens
    buckets = tuple(size for size in (128, 512) if size < config.data.max_prompt_tokens)
    rollout = dataclasses.replace(
        config.rollout, cache_capacity=longest, prompt_buckets=(*buckets, config.data.max_prompt_tokens)
    )
    batch = dataclasses.replace(config.batch, row_tokens=longest, share_prompts=False, lanes=1)
    return dataclasses.replace(config, rollout=rollout, batch=batch)


def _for_folder(path: pathlib.Path, told: dict[str, Any]) -> Config:
    """How a model folder is evaluated unless options say otherwise: as HPT's models are, within the model's context."""
    from hptjax.models.folder_config import read_shape

    shape, _ = read_shape(path)
    prompt = min(MAX_PROMPT, shape.max_positions // 2)
    dtype = told.get("dtype", told.get("torch_dtype"))
    return Config(
        name="evaluation",
        model=ModelConfig(
            path=str(path),
            compute_dtype="bfloat16" if dtype in ("bfloat16", "float16") else "float32",
        ),
        data=DataConfig(max_prompt_tokens=prompt),
        prompt=PromptConfig(system=ASK_FOR_BOX),
        rollout=RolloutConfig(
            max_completion_tokens=min(MAX_COMPLETION, shape.max_positions - prompt),
            slots=32,
            prefill_rows=8,
            tokens_per_call=32,
        ),
        eval=EvalConfig(temperature=0.6, top_p=0.95),
    )


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = ""
        if (path.parent / "adapter_config.json").is_file():
            hint = ", a PEFT adapter; name the folder of its model, and the adapter with --lora.adapter"
        raise ValueError(
            f"expected a config file, a run folder or a model folder with its config.json, got '{path.parent}'{hint}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in '{path}', got {error}") from None
    if not isinstance(told, dict):
        raise ValueError(f"expected an object in '{path}', got {type(told).__name__}")
    return told
