"""`config.json` of a Hugging Face folder: the decoder that it describes, in the form of transformers 4 or 5, and back.

    transformers 4   rope_theta = 5e5   rope_scaling = {rope_type, factor, ...}            torch_dtype
    transformers 5   rope_parameters = {rope_theta = 5e5, rope_type, factor, ...}          dtype

What this decoder does not compute is refused by name: a folder that loads here means here what it means there.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from hptjax.models import llama, qwen
from hptjax.models.keys import CheckpointKey
from hptjax.models.shape import DecoderConfig, Llama3RopeScaling

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"  # of PEFT: no model, but what belongs to one
FAMILIES = {  # model type -> architecture, key table
    llama.MODEL_TYPE: (llama.ARCHITECTURE, llama.KEYS),
    qwen.QWEN2_MODEL_TYPE: (qwen.QWEN2_ARCHITECTURE, qwen.QWEN2_KEYS),
    qwen.QWEN3_MODEL_TYPE: (qwen.QWEN3_ARCHITECTURE, qwen.QWEN3_KEYS),
}
ONLY = (  # what each switch must say, where it is there
    ("hidden_act", "silu"),
    ("attention_bias", False),  # in this field transformers means a bias on the output too
    ("mlp_bias", False),
    ("use_sliding_window", False),
    ("partial_rotary_factor", 1.0),
    ("quantization_config", None),
)
ROPE_TYPES = ("default", "llama3")
NOT_KEPT = ("rope_parameters", "dtype", "quantization_config")  # said in the other form, or no longer true


def read_shape(path: str | os.PathLike[str]) -> tuple[DecoderConfig, Sequence[CheckpointKey]]:
    """The shape and the key table of the model in a folder.

    Raises no `config.json` -> FileNotFoundError; one that this decoder cannot follow -> ValueError naming the folder.
    """
    folder = pathlib.Path(path)
    if os.path.isfile(folder / ADAPTER_CONFIG) and not os.path.isfile(folder / CONFIG_FILE):
        raise ValueError(
            f"expected a model folder, got the PEFT adapter '{folder}'; name it lora.adapter, and its model model.path"
        )
    raw = read_json(folder / CONFIG_FILE)
    if "runs_dir" in raw and "model_type" not in raw:
        raise ValueError(
            f"expected a model folder, got the run folder '{folder}'; `hptjax export` makes a model folder of its "
            "checkpoints, for model.path"
        )
    try:
        return read_config(raw)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}; change model.path") from None


def read_config(raw: Mapping[str, Any]) -> tuple[DecoderConfig, Sequence[CheckpointKey]]:
    """The shape and the key table of a parsed `config.json`, in the form of transformers 4 or 5.

    Defaults for absent fields are those of the family's transformers config class.
    Raises an architecture, activation, bias, window, layer or rope type this decoder lacks, a field that is missing, of
    another type or said twice with two values -> ValueError.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"{CONFIG_FILE}: model_type must be one of {', '.join(FAMILIES)}; got {_short(model_type)}")
    architecture, keys = FAMILIES[model_type]
    named = raw.get("architectures") or [architecture]
    if not isinstance(named, list) or architecture not in named:
        raise ValueError(f"{CONFIG_FILE}: architectures must name {architecture}, a language model; got {named!r}")
    for field, allowed in ONLY:
        if raw.get(field) is not None and raw[field] != allowed:
            raise ValueError(f"{CONFIG_FILE}: this decoder needs {field}={allowed!r}, got {_short(raw[field])}")
    _check_layer_types(raw)
    tied = raw.get("tie_word_embeddings")
    if tied not in (None, False, True):
        raise ValueError(f"{CONFIG_FILE}: tie_word_embeddings must be true or false, got {_short(tied)}")
    heads, hidden = _whole(raw, "num_attention_heads"), _whole(raw, "hidden_size")
    theta, scaling = _read_rope(raw)
    qwen3 = model_type == qwen.QWEN3_MODEL_TYPE
    head_dim = _whole(raw, "head_dim", 128 if qwen3 else hidden // heads or 1)
    if not qwen3 and raw.get("head_dim") is None and hidden % heads:
        raise ValueError(
            f"{CONFIG_FILE}: without head_dim, hidden_size must be a multiple of num_attention_heads; got {hidden} and "
            f"{heads}"
        )
    config = DecoderConfig(
        vocab_size=_whole(raw, "vocab_size"),
        hidden_size=hidden,
        num_layers=_whole(raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_whole(raw, "num_key_value_heads", heads),
        head_dim=head_dim,
        mlp_size=_whole(raw, "intermediate_size"),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        attention_bias=model_type == qwen.QWEN2_MODEL_TYPE,
        qk_norm=qwen3,
        tie_embeddings=bool(tied),
        max_positions=_whole(raw, "max_position_embeddings", 2048 if model_type == llama.MODEL_TYPE else 32_768),
    )
    return config, keys


def write_config(config: DecoderConfig, dtype: str, beside: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` in the form of transformers 4, which 5 reads too.

    Args
      dtype: of the stored tensors, by name.
      beside: fields of another `config.json` (token ids, dropout of training) that stay where they do not say what
        `config` says.
    """
    model_type, _ = family(config)
    scaling = config.rope_scaling
    return {name: value for name, value in beside.items() if name not in NOT_KEPT} | {
        "architectures": [FAMILIES[model_type][0]],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None
        if scaling is None
        else {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        },
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
    }


def family(config: DecoderConfig) -> tuple[str, Sequence[CheckpointKey]]:
    """The model type and key table that a decoder is saved with. Raises a decoder of no family -> ValueError."""
    if config.attention_bias and config.qk_norm:
        raise ValueError("no supported family has both attention_bias and qk_norm; set one of them to false to save it")
    model_type = llama.MODEL_TYPE
    if config.attention_bias:
        model_type = qwen.QWEN2_MODEL_TYPE
    elif config.qk_norm:
        model_type = qwen.QWEN3_MODEL_TYPE
    return model_type, FAMILIES[model_type][1]


def read_eos_ids(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """The tokens that end a completion by the folder's `generation_config.json`; without that file, by `config.json`.

    Chat models name several: the end of a turn beside the end of the text.
    Raises an eos_token_id that is neither a token nor a list of tokens -> ValueError.
    """
    folder = pathlib.Path(path)
    file = folder / (GENERATION_FILE if (folder / GENERATION_FILE).is_file() else CONFIG_FILE)
    found = read_json(file).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError(f"{file}: eos_token_id must be a token or a list of tokens, got {_short(found)}; correct it")
    return tuple(dict.fromkeys(ids))


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder.

    Raises no such file -> FileNotFoundError; no JSON object in UTF-8 -> ValueError.
    """
    if not os.path.isfile(path):  # pathlib raises where a name is too long
        raise FileNotFoundError(f"expected {path.name} in {path.parent}, found none; change model.path")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; put the file back or change model.path") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {_short(value)}; put the file back or change model.path")
    return value


def _check_layer_types(raw: Mapping[str, Any]) -> None:
    """Every layer attends to all that is before it."""
    kinds, layers = raw.get("layer_types"), raw.get("num_hidden_layers")
    if kinds is None:
        return
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ValueError(
            f"{CONFIG_FILE}: layer_types must list {layers} (num_hidden_layers) names, got {_short(kinds)}"
        )
    others = sorted({str(kind) for kind in kinds} - {"full_attention"})
    if others:
        raise ValueError(f"{CONFIG_FILE}: layer_types must be 'full_attention' throughout, got {', '.join(others)}")


def _read_rope(raw: Mapping[str, Any]) -> tuple[float, Llama3RopeScaling | None]:
    """theta and stretch, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4).

    Which of two forms wins differs between the versions, so two that disagree are refused.
    """
    forms = [raw[name] for name in ("rope_scaling", "rope_parameters") if raw.get(name) is not None]
    for form in forms:
        if not isinstance(form, Mapping) or any(isinstance(value, Mapping) for value in form.values()):
            raise ValueError(f"{CONFIG_FILE}: rope parameters must be one object for all layers, got {_short(form)}")
    rope: dict[str, Any] = {}
    for form in [*forms, {"rope_theta": raw.get("rope_theta")}]:
        for name, value in form.items():
            name = "rope_type" if name == "type" else name
            if value is not None and rope.setdefault(name, value) is not value and rope[name] != value:
                raise ValueError(f"{CONFIG_FILE}: {name} stands there twice, as {rope[name]!r} and as {value!r}")
    fields = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if "rope_type" not in rope and (stray := [field for field in fields if field in rope]):
        raise ValueError(  # transformers 4 fails on it, and 5 leaves the stretch out without a word
            f"{CONFIG_FILE}: expected rope_type beside {', '.join(stray)}, got none; add it, or remove them"
        )
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ValueError(f"{CONFIG_FILE}: rope_type must be 'default' or 'llama3', got {kind!r}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{CONFIG_FILE}: partial_rotary_factor must be 1.0, got {rope['partial_rotary_factor']!r}")
    theta = _number(rope, "rope_theta", 10_000.0)
    if kind == "default":
        return theta, None
    absent = [field for field in fields if rope.get(field) is None]
    if absent:
        raise ValueError(f"{CONFIG_FILE}: rope_type 'llama3' needs {', '.join(absent)}")
    factor, low, high, original = (_number(rope, field, 0.0) for field in fields)
    return theta, Llama3RopeScaling(factor, low, high, int(original))


def _whole(raw: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = raw.get(field)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"{CONFIG_FILE}: missing {field}")
    if type(value) is not int or value < 1:
        raise ValueError(f"{CONFIG_FILE}: {field} must be a whole number of at least 1, got {_short(value)}")
    return value


def _number(raw: Mapping[str, Any], field: str, default: float) -> float:
    value = raw.get(field)
    if value is None:
        return default
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{CONFIG_FILE}: {field} must be a number above 0, got {_short(value)}")
    return float(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:120] + " ..."
