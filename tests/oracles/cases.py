"""What the reference is asked: the families, the sequences, and where the answers are kept. No torch here."""

from __future__ import annotations

import pathlib

import numpy as np

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
FAMILIES = ("llama", "llama_tied", "qwen2", "qwen2_tied", "qwen3")
VOCAB_SIZE = 61
LENGTHS = (20, 7, 13)  # tokens of the sequences, right-padded to the longest; packed, they make one row of 40
PROMPT_LENGTHS = (6, 2, 9)  # of each, what is the prompt
GREEDY_TOKENS = 64
SAMPLED_TOKENS = 24
TEMPERATURE = 0.7


def sequences() -> list[np.ndarray]:
    """The sequences; int32."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB_SIZE, length).astype(np.int32) for length in LENGTHS]


def padded(parts: list[np.ndarray], value: int = 0) -> np.ndarray:
    """Sequences as rows, filled up at the right."""
    rows = np.full((len(parts), max(map(len, parts))), value, np.asarray(parts[0]).dtype)
    for row, part in zip(rows, parts, strict=True):
        row[: len(part)] = part
    return rows


def golden(name: str) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    """A family's folder as transformers wrote it, and what transformers says about it."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return GOLDEN / name, {key: file[key] for key in file.files}
