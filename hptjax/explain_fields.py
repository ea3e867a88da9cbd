"""Every field of a config with the value that it comes to and who has set it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hptjax.build.method import options
from hptjax.config import Config, flatten, resolved
from hptjax.config_batch import schedule_of, stage_alone, stage_list
from hptjax.config_text import toml_value
from hptjax.hpt.methods import METHODS
from hptjax.losses.estimator import Estimator
from hptjax.losses.words import words_of
from hptjax.methods_text import method_words
from hptjax.models.shape import DecoderConfig

DEFAULT, SET = "default", "set"


def field_lines(config: Config, shape: DecoderConfig, given: Mapping[str, str] | None) -> list[str]:
    """One line per field: name, value, source. The source is the file, the command line, a method or the default.

    A field that is not set and that something else decides has that thing's value: the method's clip and penalty, the
    model's rope_theta, the stage's schedule.

    Args
      given: field -> who has set it; None: "set" wherever it differs from the default.
    """
    values, defaults = flatten(resolved(config)), flatten(resolved(Config()))
    if given is None:
        given = {name: SET for name in values if values[name] != defaults[name]}
    of_methods = constants_read(config)
    meant = decided(config, shape)
    lines = []
    for name, value in values.items():
        shown, source = "not set" if value is None else toml_value(value), given.get(name, DEFAULT)
        if name not in given and name in of_methods:
            source = f"method {of_methods[name]}"
        elif name not in given and name.startswith("methods."):
            source = f"{DEFAULT}, not read"
        if value is None and name in meant:
            shown, by = meant[name]
            source = by if name not in given else f"{source}, {by}"
        lines.append(f"{name:<34} {shown:<28} {source}")
    return lines


def constants_read(config: Config) -> dict[str, str]:
    """Field of `[methods]` -> the method of a stage that reads it, the last one if several do."""
    return {
        name: stage.method
        for stage in stage_list(config)
        for name in method_words(stage.method)["constants"]
        if name.startswith("methods.")
    }


def decided(config: Config, shape: DecoderConfig) -> dict[str, tuple[str, str]]:
    """Field -> (what it comes to where it is not set, who decides)."""
    last = stage_list(config)[-1]
    whose = "model folder" if config.model.path else "model.preset" if config.model.preset else "model.shape"
    found = {
        "model.rope_theta": (toml_value(shape.rope_theta), whose),
        "model.max_positions": (toml_value(shape.max_positions), whose),
        "optimizer.decay_steps": (toml_value(schedule_of(config, last).decay_steps), "the stage's updates"),
        "optimizer.critic_learning_rate": (toml_value(config.optimizer.learning_rate), "optimizer.learning_rate"),
        "mesh.rollout_rules": (toml_value(config.mesh.rules), "mesh.rules"),
    }
    if config.model.path is not None:
        found["model.tokenizer"] = (toml_value(config.model.path), "model.path")
    for stage in stage_list(config):
        found |= _decided_by_method(stage_alone(config, stage))
    return found


def _decided_by_method(config: Config) -> dict[str, tuple[str, str]]:
    """The clip of the rollouts and the penalty to the reference, as the method of the last stage has them."""
    method = METHODS[config.method](options(config))
    by = f"method {config.method}"
    found: dict[str, tuple[str, str]] = {}
    for part in method.parts:
        row: Any = part.row
        if part.name == "rl" and isinstance(row, Estimator):
            mask = words_of(row.stability_mask)
            found |= dict.fromkeys(("hpt.clip_low", "hpt.clip_high"), ("no mask" if mask == "1" else mask, by))
        if part.name == "kl":
            found["hpt.kl_coefficient"] = (f"{part.coefficient:g}", by)
    if "hpt.clip_low" in found:
        found.setdefault("hpt.kl_coefficient", ("0", by))
    return found
