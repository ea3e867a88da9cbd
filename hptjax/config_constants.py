"""What is wrong with the constants of single methods, before anything runs; those of prefixes are in config_prefix."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hptjax.config import Config
from hptjax.config_batch import steps_of
from hptjax.config_problem import Problem

AT_MOST_ONE = "ppo_gamma ppo_lambda trsft_floor pear_gamma dapo_cushion_frac chord_peak chord_valley".split()


def constant_problems(config: Config) -> Iterator[Problem]:
    """What is wrong, whether a method reads it or not; `config_check` has their lower ends."""
    constants = config.methods
    for name in AT_MOST_ONE:
        value = getattr(constants, name)
        if value > 1:
            yield f"methods.{name} of at most 1", f"{value}", f"methods.{name}"
    yield from _gate_off(config)
    yield from _soft_table(config)


def _gate_off(config: Config) -> Iterator[Problem]:
    gate, off, group_size = config.hpt.gate, config.methods.gate_off, config.rollout.group_size
    if not gate <= off <= group_size and any(method == "hpt_off_band" for _, method, _ in steps_of(config)):
        yield f"methods.gate_off in hpt.gate..rollout.group_size ({gate}..{group_size})", f"{off}", "methods.gate_off"


def _soft_table(config: Config) -> Iterator[Problem]:
    table, group_size = config.methods.soft_table, config.rollout.group_size
    if table and len(table) != group_size + 1:
        yield (
            f"a row of methods.soft_table for each of 0..{group_size} solved (rollout.group_size)",
            f"{len(table)} rows",
            "methods.soft_table",
        )
    for solved, row in enumerate(table):
        values = (row.rl, row.off, row.sft)
        if not all(0 <= value < math.inf for value in values):
            yield (
                f"finite coefficients of at least 0 in methods.soft_table for {solved} solved",
                f"{values}",
                "methods.soft_table",
            )
    if table and not any((row.rl, row.off, row.sft) != (0, 0, 0) for row in table):
        yield "a coefficient in methods.soft_table that is not 0", "none", "methods.soft_table"
