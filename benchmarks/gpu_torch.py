"""The cases of `benchmarks/gpu.py` by torch and transformers: `gpu_torch.py --case JSON`, in an interpreter of theirs.

Training: float32 weights under bf16 autocast, the model's own loss, AdamW, clipping, gradient checkpointing where the
case's variant says remat full; rows are not packed but whole, which attends to more and is counted as it is. Decoding:
`generate` in bf16, sampling, to a short and a long limit.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
import transformers

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "0.6B": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8},
    "1.5B": {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2},
    "7B": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
}
WIDE = {"tiny": 64, "0.6B": 3072, "1.5B": 8960, "7B": 18_944}
VOCABULARY = {"tiny": 128, "0.6B": 151_936, "1.5B": 151_936, "7B": 152_064}
CLIP, RATE = 1.0, 1e-5


def make_model(shape: str, longest: int, device: str, dtype: torch.dtype) -> Any:
    """A model of random weights; 0.6B is Qwen3, the others are Qwen2."""
    sizes = {**SHAPES[shape], "intermediate_size": WIDE[shape], "vocab_size": VOCABULARY[shape]}
    sizes |= {"tie_word_embeddings": shape != "7B", "max_position_embeddings": longest}
    qwen3 = shape == "0.6B"
    config = transformers.Qwen3Config(**sizes, head_dim=128) if qwen3 else transformers.Qwen2Config(**sizes)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def flops(model: Any, tokens: int, rows: int) -> float:
    """6 N n + 12 L H E n (n + 1) / 2 for each row of n tokens, without an embedding that is only looked up."""
    config = model.config
    weights = sum(parameter.numel() for parameter in model.parameters())
    weights -= 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wide = config.num_hidden_layers * config.num_attention_heads * head_dim
    return rows * (6.0 * weights * tokens + 6.0 * wide * tokens * (tokens + 1))


def time_training(case: dict[str, Any], device: str) -> dict[str, Any]:
    """Updates of `micro` micro-batches."""
    rows, tokens, micro = case["rows"], case["row_tokens"], case["micro"]
    model = make_model(case["shape"], tokens, device, torch.float32)
    if case.get("remat") == "full":
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=device == "cuda")
    drawn = torch.randint(3, model.config.vocab_size, (micro, rows, tokens), device=device)
    seconds = []
    for _ in range(case["repeats"] + 1):
        wait(device)
        began = time.perf_counter()
        for ids in drawn:
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss / micro
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait(device)
        seconds.append(time.perf_counter() - began)
    count = micro * rows
    return {"seconds": seconds[1:], "tokens": count * tokens, "flops": flops(model, tokens, count)}


@torch.no_grad()
def time_decoding(case: dict[str, Any], device: str) -> dict[str, Any]:
    """Seconds of the tokens between a short and a long limit."""
    slots, prompt, short, long = case["slots"], case["prompt"], case["short"], case["long"]
    model = make_model(case["shape"], prompt + long, device, torch.bfloat16).eval()
    ids = torch.randint(3, model.config.vocab_size, (slots, prompt), device=device)
    mask = torch.ones_like(ids)
    seconds: dict[int, list[float]] = {short: [], long: []}
    for _ in range(case["repeats"] + 1):
        for limit, values in seconds.items():
            wait(device)
            began = time.perf_counter()
            model.generate(ids, attention_mask=mask, do_sample=True, min_new_tokens=limit, max_new_tokens=limit)
            wait(device)
            values.append(time.perf_counter() - began)
    config, steps = model.config, long - short
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weights = sum(parameter.numel() for parameter in model.parameters())
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    read = 2 * steps * (weights + cache * slots * (prompt + (short + long) / 2))
    apart = [slow - fast for slow, fast in zip(seconds[long][1:], seconds[short][1:], strict=True)]
    return {"seconds": apart, "tokens": slots * steps, "bytes": read}


def main() -> None:
    """One case; prints its figures as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", required=True)
    case = json.loads(parser.parse_args().case)
    if "lora" in case:
        raise SystemExit("adapters are not measured here")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    work = time_training if case["kind"] == "torch training" else time_decoding
    print(json.dumps({"device": name, "torch": torch.__version__, **work(case, device)}))


if __name__ == "__main__":
    main()
