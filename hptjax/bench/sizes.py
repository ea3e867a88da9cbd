"""The settings of every point, as values of a config: what all share, and what one series changes. No jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

SPECIALS = 3  # ids of the character tokenizer that are no text: pad, bos, eos
MIXED_SHARE = 4  # of the limit, mixed lengths have this part for a mean
STOPS = 8  # the most stop tokens that a request may have


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One size of the suite.

    Args
      points: series -> what its points are made of, ascending: micro-batches, response tokens, rollouts per question,
        hidden sizes, questions, batches of `mixed_slots` requests.
      hidden_size, num_layers, head_dim: of the decoder; half as many kv heads as heads, an mlp four times as wide.
      batch_tokens: positions of a micro-batch, shared by rows of one sample each.
      vocabulary: tokens; of mixed lengths one in `mixed_limit / MIXED_SHARE` stops a completion.
      mixed_slots, mixed_limit: slots and completion limit of the series of mixed lengths.
    """

    name: str
    points: Mapping[str, tuple[int, ...]]
    hidden_size: int
    num_layers: int
    head_dim: int
    vocabulary: int
    prompt_tokens: int
    response_tokens: int
    training_tokens: int
    questions: int
    group_size: int
    slots: int
    batch_tokens: int
    mixed_slots: int
    mixed_limit: int


DEFAULT = Sizes(
    name="default",
    points={
        "micro_batches": (1, 2, 4, 16, 64),
        "response_length": (48, 112, 240, 496),
        "group_size": (4, 8, 16, 32),
        "model_size": (64, 128, 256, 512),
        "questions": (4, 8, 16, 32),
        "mixed_lengths": (2, 8),
    },
    hidden_size=128,
    num_layers=4,
    head_dim=32,
    vocabulary=128,
    prompt_tokens=16,
    response_tokens=48,
    training_tokens=128,
    questions=4,
    group_size=8,
    slots=32,
    batch_tokens=512,
    mixed_slots=64,
    mixed_limit=128,
)
TINY = Sizes(
    name="tiny",
    points={
        "micro_batches": (1, 2),
        "response_length": (4, 12),
        "group_size": (2, 4),
        "model_size": (16, 32),
        "questions": (2, 4),
        "mixed_lengths": (1, 2),
    },
    hidden_size=16,
    num_layers=2,
    head_dim=8,
    vocabulary=32,
    prompt_tokens=4,
    response_tokens=4,
    training_tokens=8,
    questions=2,
    group_size=2,
    slots=4,
    batch_tokens=16,
    mixed_slots=4,
    mixed_limit=16,
)


def step_settings(
    sizes: Sizes,
    *,
    response: int | None = None,
    group: int | None = None,
    questions: int | None = None,
    hidden: int | None = None,
) -> dict[str, Any]:
    """A step of HPT: every question rolls out, half of them learn from their rollouts, half from a demonstration."""
    response, group = response or sizes.response_tokens, group or sizes.group_size
    questions = questions or sizes.questions
    total = sizes.prompt_tokens + response
    rows = max(1, sizes.batch_tokens // total)
    return {
        "method": "hpt",
        "model": _model(sizes, hidden or sizes.hidden_size, total),
        "data": {"max_prompt_tokens": sizes.prompt_tokens, "questions_per_step": questions},
        "rollout": {
            "group_size": group,
            "max_completion_tokens": response,
            "slots": sizes.slots,
            "prefill_rows": min(sizes.slots, sizes.questions),
            "prompt_buckets": [sizes.prompt_tokens],
            "cache_capacity": total,
        },
        "batch": {
            "rows": rows,
            "row_tokens": total,
            "max_segments": 1,
            "max_micro_batches": math.ceil(questions * group / rows),
        },
    }


def update_settings(sizes: Sizes, micro_batches: int) -> dict[str, Any]:
    """An update of SFT in so many full micro-batches, all of one compiled shape."""
    rows = max(1, sizes.batch_tokens // sizes.training_tokens)
    prompt, limit = sizes.prompt_tokens, sizes.training_tokens - sizes.prompt_tokens
    return {
        "method": "sft",
        "model": _model(sizes, sizes.hidden_size, sizes.training_tokens),
        "data": {"max_prompt_tokens": prompt, "questions_per_step": micro_batches * rows},
        "rollout": {
            "max_completion_tokens": limit,
            "slots": sizes.slots,
            "prefill_rows": 1,
            "prompt_buckets": [prompt],
            "cache_capacity": prompt + limit,
        },
        "batch": {
            "rows": rows,
            "row_tokens": sizes.training_tokens,
            "max_segments": 1,
            "max_micro_batches": max(micro_batches, *sizes.points["micro_batches"]),
        },
    }


def mixed_settings(sizes: Sizes, batches: int) -> dict[str, Any]:
    """Requests for `batches` times the slots, in groups; `requests` and `stops` are no fields of a config."""
    values = step_settings(sizes, response=sizes.mixed_limit)
    stops = sizes.vocabulary * MIXED_SHARE // sizes.mixed_limit
    assert 0 < stops <= STOPS, f"{stops} stop tokens, between 1 and {STOPS} can be asked for"
    slots = {"slots": sizes.mixed_slots, "prefill_rows": max(1, sizes.mixed_slots // sizes.group_size)}
    return {
        **values,
        "rollout": {**values["rollout"], **slots},
        "requests": batches * sizes.mixed_slots,
        "stops": stops,
    }


def _model(sizes: Sizes, hidden: int, longest: int) -> dict[str, Any]:
    heads = hidden // sizes.head_dim
    return {
        "shape": {
            "hidden_size": hidden,
            "num_layers": sizes.num_layers,
            "num_heads": heads,
            "num_kv_heads": max(1, heads // 2),
            "head_dim": sizes.head_dim,
            "mlp_size": 4 * hidden,
            "max_positions": longest,
        }
    }
