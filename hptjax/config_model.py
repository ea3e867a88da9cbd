"""The model that a run starts from: a folder, a published shape, or sizes of its own."""

from __future__ import annotations

import dataclasses
from typing import Literal

Preset = Literal[
    "qwen2.5-0.5b", "qwen2.5-math-1.5b", "qwen2.5-math-7b", "qwen3-0.6b", "llama-3.2-1b", "llama-3.1-8b"
]  # the names of models/presets.py


@dataclasses.dataclass(frozen=True)
class ShapeConfig:
    """Sizes of a decoder trained from scratch; read only where `model.path` is not set."""

    hidden_size: int = 128  # D
    num_layers: int = 4  # L
    num_heads: int = 4  # H
    num_kv_heads: int = 2  # K, divides H
    head_dim: int = 32  # E, even
    mlp_size: int = 384  # F
    rope_theta: float = 10_000.0
    qk_norm: bool = True  # Qwen3 style
    attention_bias: bool = False  # Qwen2 style
    tie_embeddings: bool = True
    max_positions: int = 256


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model that the run starts from."""

    path: str | None = None  # folder in the Hugging Face layout; None: from scratch, with `model.shape`
    tokenizer: str | None = None  # folder of the tokenizer; None: the same as `model.path`
    preset: Preset | None = None  # where `model.path` is not set: a published model's shape instead of `model.shape`
    rope_theta: float | None = None  # base of the rotary wavelengths; None: that of the folder, preset or shape
    max_positions: int | None = None  # longest context, likewise; an exported folder carries both
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; what is trained stays float32
    remat: Literal["none", "full", "dots", "dots_no_batch", "attention", "offload"] = (
        "none"  # what layers keep for the backward pass, see models/remat.py; "full" keeps least and computes most
    )
    attention: Literal["auto", "reference", "chunked", "splash", "cudnn"] = (
        "auto"  # of packed rows, by platform and length; "chunked", "splash" and "cudnn" hold no scores
    )
    attention_block: int = 512  # side of an attention tile, and positions of a long cache read at a time
    logprob_chunk_tokens: int = 2048  # tokens whose logits exist at the same time
    reference: str | None = (
        "start"  # frozen model of KL terms and DPO: "start" (this run's), "base" (without adapters), a folder, None
    )
    teacher: str | None = None  # folder of a frozen model with the same tokenizer, for kdrl
    demonstration_author: str | None = None  # folder of the model that wrote the demonstrations, for pear_*
    shape: ShapeConfig = dataclasses.field(default_factory=ShapeConfig)
