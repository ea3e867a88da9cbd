"""The Llama 3 family: presets and the checkpoint's key table. No arithmetic.

The presets repeat the published config.json files from memory of them (not read again here); `load_folder` always
reads the folder's own file, so a preset serves size estimates and fresh models only.
"""

from __future__ import annotations

from hptjax.models.keys import CheckpointKey
from hptjax.models.shape import DecoderConfig, Llama3RopeScaling

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"

KEYS = (
    CheckpointKey(("embedding",), "model.embed_tokens.weight"),
    CheckpointKey(("final_norm",), "model.norm.weight"),
    CheckpointKey(("unembedding",), "lm_head.weight", input_axes=1),
    CheckpointKey(("layers", "attention_norm"), "model.layers.{layer}.input_layernorm.weight"),
    CheckpointKey(("layers", "query"), "model.layers.{layer}.self_attn.q_proj.weight", input_axes=1),
    CheckpointKey(("layers", "key"), "model.layers.{layer}.self_attn.k_proj.weight", input_axes=1),
    CheckpointKey(("layers", "value"), "model.layers.{layer}.self_attn.v_proj.weight", input_axes=1),
    CheckpointKey(("layers", "output"), "model.layers.{layer}.self_attn.o_proj.weight", input_axes=2),
    CheckpointKey(("layers", "mlp_norm"), "model.layers.{layer}.post_attention_layernorm.weight"),
    CheckpointKey(("layers", "gate"), "model.layers.{layer}.mlp.gate_proj.weight", input_axes=1),
    CheckpointKey(("layers", "up"), "model.layers.{layer}.mlp.up_proj.weight", input_axes=1),
    CheckpointKey(("layers", "down"), "model.layers.{layer}.mlp.down_proj.weight", input_axes=1),
)

LLAMA_3_1_8B = DecoderConfig(
    vocab_size=128_256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_size=14_336,
    rope_theta=500_000.0,
    rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 8192),
    rms_norm_eps=1e-5,
    max_positions=131_072,
)
LLAMA_3_2_1B = DecoderConfig(
    vocab_size=128_256,
    hidden_size=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    mlp_size=8192,
    rope_theta=500_000.0,
    rope_scaling=Llama3RopeScaling(32.0, 1.0, 4.0, 8192),
    rms_norm_eps=1e-5,
    tie_embeddings=True,
    max_positions=131_072,
)
