"""How completions are sampled, and what rewards them."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from hptjax.config_server import ServerConfig
from hptjax.config_text import struct_list


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Sampling. The sizes are compiled shapes and are stored with each sample."""

    group_size: int = 8  # G, rollouts per question
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    stop_ids: tuple[int, ...] = ()  # tokens that end a completion beside the tokenizer's eos
    max_completion_tokens: int = 24  # limit of a completion, stop token and forced prefix included
    slots: int = 256  # rows decoded together
    prefill_rows: int = 32  # prompts prefilled together
    prompt_buckets: tuple[int, ...] = (24,)  # padded prompt lengths, ascending
    tokens_per_call: int = 8  # tokens decoded per call from the host
    cache_capacity: int = 48  # positions of the KV cache per slot
    # positions of the KV cache of all slots together, in pages that samples take as they grow, so that memory follows
    # real lengths; None: cache_capacity for each slot
    cache_positions: int | None = None
    cache_page: int = 64  # positions of a page
    # "int8" takes half of bf16, and samples, in evaluations too, from a policy a little off the one that learns:
    # rollout/logp_diff_mean says how far, hpt.sampler_correction weighs samples by it
    weights_dtype: Literal["compute_dtype", "int8"] = "compute_dtype"  # the layers' matrices, a scale per output
    cache_dtype: Literal["compute_dtype", "int8"] = "compute_dtype"  # keys and values, a scale per position and head
    engine: Literal["own", "server"] = "own"  # who samples for training; evaluations are always our own engine's
    server: ServerConfig = dataclasses.field(default_factory=ServerConfig)  # docs/outside_engine.md


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """A reward by name, with its weight in the sum."""

    # "verify" is the task's verifier, "well_formed" looks at the form alone; with data.files they are "math_strict" and
    # "math_format", and there are "math_lenient", "math_hpt" (HPT's published grader) and "countdown" too;
    # module:function is your own, (prompt, completion, answer) -> float or Verdict. The first named decides "solved"
    name: str
    weight: float = 1.0  # rewards add as weight x value


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Verification in killable worker processes."""

    functions: Annotated[tuple[RewardFunction, ...], struct_list(RewardFunction)] = (RewardFunction("verify"),)
    workers: int = 1  # processes
    deadline_s: float = 5.0  # per completion; past it the worker is killed, counted, reward 0
