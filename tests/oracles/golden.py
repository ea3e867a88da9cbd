"""Writes `golden/`: tiny folders as transformers saves them, and what transformers computes from them.

    python -m tests.oracles.golden

Run it in the environment of `make test-oracle`. The folders are read back by transformers before it is asked anything,
so the answers belong to the files. One is cut into shards, one is stored in bf16.
"""

from __future__ import annotations

import shutil

import numpy as np
import torch

from tests.oracles.cases import FAMILIES, GOLDEN
from tests.oracles.models import load_model, make_model
from tests.oracles.reference import everything

SHARDED, BFLOAT16 = "qwen3", "qwen2_tied"
SMALLEST_GAP = 3e-3  # between the best and the next token of every greedy step
FEWEST_TOKENS = 12  # different ones in every greedy completion: one that goes round in a circle shows little


def write(name: str) -> None:
    """One family's folder and arrays; the first seed whose greedy tokens are varied and no near ties."""
    folder = GOLDEN / name
    for seed in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        model = make_model(name, seed=seed)
        model.generation_config.eos_token_id = [2, 5]
        options = {"max_shard_size": "16KB"} if name == SHARDED else {}
        model.to(torch.bfloat16 if name == BFLOAT16 else torch.float32).save_pretrained(str(folder), **options)
        found = everything(load_model(folder))
        fewest = min(len(set(tokens)) for tokens in found["greedy"].tolist())
        if found["greedy_gap"].min() > SMALLEST_GAP and fewest >= FEWEST_TOKENS:
            break
    else:
        raise RuntimeError(f"{name}: every seed has a near tie or goes round in a circle")
    np.savez_compressed(GOLDEN / f"{name}.npz", **found)
    print(f"{name}: seed {seed}, smallest greedy gap {found['greedy_gap'].min():.4f}")


if __name__ == "__main__":
    for each in FAMILIES:
        write(each)
