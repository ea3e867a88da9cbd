"""Tiny models of transformers' own classes, saved as transformers saves them.

transformers starts biases at 0 and norms at 1, where a missing bias or norm would not show: here every one is random.

    python -m tests.oracles.models qwen2 FOLDER      with tokenizer and chat template, for the commands of README
"""

from __future__ import annotations

import argparse
import math
import pathlib
from typing import Any

import numpy as np
import torch
import transformers

from tests.oracles.cases import VOCAB_SIZE

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# of the rotary wavelengths 6, 17, 44 and 118, one is kept, two are blended and one is stretched
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
QWEN_ROPE = {"rope_type": "default", "rope_theta": 1000.0}
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
FIELDS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 8, "rope_parameters": LLAMA3_ROPE, "rms_norm_eps": 1e-5},
    "llama_tied": {"head_dim": 8, "rope_parameters": LLAMA3_ROPE, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    "qwen2": {"rope_parameters": QWEN_ROPE},
    "qwen2_tied": {"rope_parameters": QWEN_ROPE, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 8, "rope_parameters": QWEN_ROPE},
}
TEMPLATE = """\
{%- for message in messages %}<|start|>{{ message.role }}
{{ message.content }}<|end|>
{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant
{% endif %}"""
SPECIAL = ("<|pad|>", "<|endoftext|>", "<|start|>", "<|end|>")


def make_model(name: str, *, seed: int = 0, **fields: Any) -> Any:
    """A model of a family with random weights, biases and norms; fp32.

    Args
      name: one of `FIELDS`. fields: of its config, instead of the tiny sizes.
    """
    config_class, model_class = CLASSES[name.split("_")[0]]
    config = config_class(**(SIZES | FIELDS[name] | fields))
    config._attn_implementation = "eager"
    model = model_class(config).to(torch.float32).eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.from_numpy(_random(rng, key, tuple(parameter.shape))))
    return model


def load_model(folder: pathlib.Path) -> Any:
    """The folder as transformers reads it, fp32. Raises AssertionError where it misses a key or does not expect one."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, output_loading_info=True, local_files_only=True, attn_implementation="eager"
    )
    problems = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    assert not problems, f"{folder}: {problems}"
    return model.eval()


def _random(rng: np.random.Generator, key: str, shape: tuple[int, ...]) -> np.ndarray:
    centre, spread = 0.0, 1.5 / math.sqrt(shape[-1])
    if "norm" in key:
        centre, spread = 1.0, 0.3
    elif key.endswith(("bias", "embed_tokens.weight", "lm_head.weight")):
        spread = 0.5
    return (centre + spread * rng.normal(size=shape)).astype(np.float32)


def make_tokenizer() -> Any:
    """A tokenizer of bytes, which can spell any text, with our own chat template and four special tokens."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=SPECIAL[0], eos_token=SPECIAL[1], clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_folder(name: str, folder: pathlib.Path, *, dtype: Any = torch.bfloat16, **fields: Any) -> pathlib.Path:
    """A whole model folder with tokenizer, chat template and two stop tokens, as the hub has them."""
    tokenizer = make_tokenizer()
    stop = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL[1:4:2]]
    model = make_model(name, vocab_size=264, bos_token_id=None, eos_token_id=stop[0], **fields)
    model.generation_config.eos_token_id = stop
    model.to(dtype).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Makes a tiny model folder with transformers' own classes.")
    parser.add_argument("family", choices=FIELDS)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--positions", type=int, default=16_384, help="max_position_embeddings")
    parser.add_argument("--hidden-size", type=int, default=32)
    given = parser.parse_args()
    made = make_folder(
        given.family, given.folder, hidden_size=given.hidden_size, max_position_embeddings=given.positions
    )
    print(f"{made}: {given.family}, random weights")
