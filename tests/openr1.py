"""Rows in the form of OpenR1-Math-46k-8192, verl's columns: `python -m tests.openr1 FILE.parquet` writes ten."""

from __future__ import annotations

import sys
from pathlib import Path

import datasets

ROWS = 10


def verl_row(index, *, target=True, gold=None):
    """A row with the columns of OpenR1-Math-46k-8192."""
    trace = f"<think>\nTwo and {index}.\n</think>\n\nIt is \\boxed{{{index + 2}}}."
    return {
        "data_source": "math",
        "prompt": [
            {"content": "Reason step by step.", "role": "system"},
            {"content": f"What is 2+{index}?", "role": "user"},
        ],
        "target": [{"content": trace, "role": "assistant"}] if target else None,
        "ability": "math",
        "reward_model": {"ground_truth": gold or str(index + 2), "style": "rule"},
        "extra_info": {"index": index, "split": "train"},
    }


def parquet(path, rows):
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def ten_rows(path):
    """Ten rows, two of them without a demonstration."""
    return parquet(path, [verl_row(i, target=i % 5 != 4) for i in range(ROWS)])


if __name__ == "__main__":
    print(ten_rows(Path(sys.argv[1])))
