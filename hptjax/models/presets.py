"""Published models' shapes by the name that `model.preset` takes."""

from __future__ import annotations

from collections.abc import Mapping

from hptjax.models import llama, qwen
from hptjax.models.shape import DecoderConfig

PRESETS: Mapping[str, DecoderConfig] = {
    "qwen2.5-0.5b": qwen.QWEN2_5_0_5B,
    "qwen2.5-math-1.5b": qwen.QWEN2_5_MATH_1_5B,
    "qwen2.5-math-7b": qwen.QWEN2_5_MATH_7B,
    "qwen3-0.6b": qwen.QWEN3_0_6B,
    "llama-3.2-1b": llama.LLAMA_3_2_1B,
    "llama-3.1-8b": llama.LLAMA_3_1_8B,
}
