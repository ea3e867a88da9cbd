"""A config that trains a method: the quickstart, with the fields that supply what the method needs."""

from __future__ import annotations

import pathlib
import tomllib
from collections.abc import Mapping
from typing import Any

from hptjax.build.method import options
from hptjax.config import Config
from hptjax.config_methods import CONTINUED, GATED, MethodName
from hptjax.hpt.method import all_needs
from hptjax.hpt.methods import METHODS
from hptjax.losses.estimator import Need

QUICKSTART = pathlib.Path("configs/quickstart.toml")
LONGER = "hptjax/base_model_longer"  # the base model's training, carried on: `make base-model-longer`

PROVIDES: Mapping[Need, Mapping[str, Any]] = {
    Need.DEMONSTRATIONS: {"data.demonstrations": True},
    Need.GROUPS: {"rollout.group_size": 8},
    Need.PAIRS: {"rollout.group_size": 8},  # of solved and unsolved ones, by the verifier
    Need.REFERENCE_LOGPROBS: {"model.reference": "start"},
    Need.TEACHER_LOGPROBS: {"model.teacher": LONGER},
    Need.DEMONSTRATION_LOGPROBS: {"model.demonstration_author": LONGER},
}
"""Fields that supply a need on the quickstart; log-probs of trainer and sampler, and the entropy, are always there."""

# the quickstart's prompts have up to 14 tokens and its demonstrations up to 22, of which one is left to write
ROOM_FOR_PREFIXES: Mapping[str, Any] = {"rollout.prompt_buckets": [14, 35], "rollout.cache_capacity": 57}


def overlay(name: MethodName) -> dict[str, Any]:
    """Dotted field -> value: what a config of the quickstart must say so that the method has what it needs."""
    needs = all_needs(METHODS[name](options(Config())))
    supplied = {field: value for need in Need if need in needs for field, value in PROVIDES.get(need, {}).items()}
    return {**supplied, **(ROOM_FOR_PREFIXES if name in CONTINUED else {})}


def example(name: MethodName) -> dict[str, Any]:
    """The fields of a run of the method on the quickstart's task and model, as a config file has them.

    Raises a folder without the quickstart's config -> FileNotFoundError.
    """
    values = {**_quickstart(), "name": f"quickstart_{name}", "method": name}
    if name not in GATED | {"hpt_soft"}:
        del values["hpt"]  # the quickstart's gate and coefficient are HPT's
    for field, value in overlay(name).items():
        *sections, last = field.split(".")
        section = values
        for each in sections:
            section = section.setdefault(each, {})
        section[last] = value
    return values


def _quickstart() -> dict[str, Any]:
    path = pathlib.Path(__file__).resolve().parent.parent.parent / QUICKSTART
    if not path.is_file():
        raise FileNotFoundError(
            f"expected the quickstart's config at '{path}', found no such file; a method's example is made from it, so "
            "run this in a copy of the repository (pip install -e .)"
        )
    return tomllib.loads(path.read_text(encoding="utf-8"))
