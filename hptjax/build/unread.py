"""What a method reads of its options, and which choices of a config change nothing under it."""

from __future__ import annotations

import dataclasses
from typing import Any

from hptjax.build.method import options
from hptjax.config import Config, HptConfig
from hptjax.config_methods import MethodName
from hptjax.hpt.method import ROLLOUTS, Method
from hptjax.hpt.methods import METHODS
from hptjax.hpt.options import Options
from hptjax.losses.estimator import Estimator


class _Recorded(Options):
    """Options that remember which of them were read."""

    def __getattribute__(self, name: str) -> Any:
        if name in Options.__dataclass_fields__:
            vars(self).setdefault("read", []).append(name)
        return super().__getattribute__(name)


def method_and_options_read(config: Config, name: MethodName) -> tuple[Method, list[str]]:
    """The method as the config chooses it, and the options that making it has read, in the order of `Options`."""
    chosen = options(config)
    recorded = _Recorded(**{field.name: getattr(chosen, field.name) for field in dataclasses.fields(Options)})
    vars(recorded)["read"] = []
    method = METHODS[name](recorded)
    return method, [field for field in Options.__dataclass_fields__ if field in vars(recorded)["read"]]


def unread_choices(config: Config, name: MethodName) -> list[str]:
    """Fields of `hpt` that are set to something else than their default and that method `name` does not read.

    A config shared by several methods has them rightly, so they are said and not refused. Left out are coefficients and
    whatever else says by its name, or beside it in the config, which methods it is for.
    """
    method, read = method_and_options_read(config, name)
    rows = [part for part in method.parts if isinstance(part.row, Estimator) and part.sources == ROLLOUTS]
    learns_by_rl = any(part.name == "rl" for part in method.parts)
    chosen, default = config.hpt, HptConfig()
    clips = "clip" in read or (chosen.clip_kind != "row" and bool(rows))
    penalised = bool(chosen.kl_coefficient)
    reads = {
        "gate": "gate" in read,
        "rl_estimator": "rollout_row" in read,
        "clip_low": clips,
        "clip_high": clips,
        "clip_kind": bool(rows),
        "sampler_correction": bool(rows),
        "correction_normalised": learns_by_rl,
        "entropy_target": learns_by_rl,
        "top_entropy": learns_by_rl,
        "kl_coefficient": learns_by_rl or not penalised,  # 0 turns a published penalty off, and there is none to miss
        "kl_estimator": learns_by_rl and penalised and chosen.kl_in == "loss",
        "kl_in": learns_by_rl or not penalised,
    }
    return [
        f"hpt.{field}"
        for field, is_read in reads.items()
        if not is_read and getattr(chosen, field) != getattr(default, field)
    ]
