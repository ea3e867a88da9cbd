"""The Qwen2, Qwen2.5 and Qwen3 families: presets and the checkpoints' key tables. No arithmetic.

The presets repeat the published config.json files from memory of them (not read again here); `load_folder` always
reads the folder's own file, so a preset serves size estimates and fresh models only.
"""

from __future__ import annotations

from hptjax.models import llama
from hptjax.models.keys import CheckpointKey
from hptjax.models.shape import DecoderConfig

QWEN2_MODEL_TYPE = "qwen2"
QWEN2_ARCHITECTURE = "Qwen2ForCausalLM"
QWEN3_MODEL_TYPE = "qwen3"
QWEN3_ARCHITECTURE = "Qwen3ForCausalLM"

QWEN2_KEYS = (
    *llama.KEYS,
    CheckpointKey(("layers", "query_bias"), "model.layers.{layer}.self_attn.q_proj.bias"),
    CheckpointKey(("layers", "key_bias"), "model.layers.{layer}.self_attn.k_proj.bias"),
    CheckpointKey(("layers", "value_bias"), "model.layers.{layer}.self_attn.v_proj.bias"),
)
QWEN3_KEYS = (
    *llama.KEYS,
    CheckpointKey(("layers", "query_norm"), "model.layers.{layer}.self_attn.q_norm.weight"),
    CheckpointKey(("layers", "key_norm"), "model.layers.{layer}.self_attn.k_norm.weight"),
)

QWEN2_5_0_5B = DecoderConfig(
    vocab_size=151_936,
    hidden_size=896,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    mlp_size=4864,
    rope_theta=1_000_000.0,
    attention_bias=True,
    tie_embeddings=True,
    max_positions=32_768,
)
QWEN2_5_MATH_1_5B = DecoderConfig(
    vocab_size=151_936,
    hidden_size=1536,
    num_layers=28,
    num_heads=12,
    num_kv_heads=2,
    head_dim=128,
    mlp_size=8960,
    rope_theta=10_000.0,
    attention_bias=True,
    tie_embeddings=True,
    max_positions=4096,
)
QWEN2_5_MATH_7B = DecoderConfig(
    vocab_size=152_064,
    hidden_size=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    mlp_size=18_944,
    rope_theta=10_000.0,
    attention_bias=True,
    max_positions=4096,
)
QWEN3_0_6B = DecoderConfig(
    vocab_size=151_936,
    hidden_size=1024,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    mlp_size=3072,
    rope_theta=1_000_000.0,
    qk_norm=True,
    tie_embeddings=True,
    max_positions=40_960,
)
