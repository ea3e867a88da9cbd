"""What a decoder is made of: its sizes and its family's switches. Plain numbers, checked once, no arrays."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's stretch of the rotary wavelengths, which carries a model beyond the context it was trained on.

    Args
      factor: how far the long wavelengths are stretched; >= 1.
      low_freq_factor, high_freq_factor: wavelengths above original / low are stretched in full, those below
        original / high are kept, and those between are blended.
      original_max_positions: context of the training before the stretch, in positions.

    Source: Llama 3.1 model release (2407.21783); `rope_type: "llama3"` of the Hugging Face config.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"rope_scaling.factor must be at least 1, got {self.factor}")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "rope_scaling needs 0 < low_freq_factor < high_freq_factor, got "
                f"low_freq_factor={self.low_freq_factor}, high_freq_factor={self.high_freq_factor}"
            )
        _require_positive("rope_scaling.original_max_positions", self.original_max_positions)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The sizes and switches of one dense decoder; every supported family is a choice of these.

    Args
      vocab_size V, hidden_size D, num_layers L, num_heads H, num_kv_heads K, head_dim E, mlp_size F: sizes.
      rope_theta: base of the rotary wavelengths. rope_scaling: None, or Llama 3.1's stretch.
      rms_norm_eps: added to the mean square.
      attention_bias: biases on query, key and value, none on the output (Qwen2).
      qk_norm: RMSNorm over E of each query and key head, before the rotation (Qwen3).
      tie_embeddings: the unembedding is the embedding, transposed.
      max_positions: longest context, in positions; used by whoever sizes a cache, not by the arithmetic.

    Raises a size below 1, heads that the kv heads do not divide, an odd head_dim -> ValueError.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    rope_theta: float = 10_000.0
    rope_scaling: Llama3RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    max_positions: int = 4096

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "mlp_size",
            "max_positions",
        ):
            _require_positive(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got num_heads={self.num_heads}, "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (rotary pairs), got {self.head_dim}")
        if self.rope_theta <= 0:
            raise ValueError(f"rope_theta must be positive, got {self.rope_theta}")
        if self.rms_norm_eps <= 0:
            raise ValueError(f"rms_norm_eps must be positive, got {self.rms_norm_eps}")


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
