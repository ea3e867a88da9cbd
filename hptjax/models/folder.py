"""A model in the Hugging Face folder layout: `config.json` and safetensors, read and written without torch.

Every key of the checkpoint must be one this decoder uses, and every parameter must be there in its shape; anything
else is an error that names the keys, because a weight that was silently dropped is a different model.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hptjax.models import llama, qwen
from hptjax.models.decoder import param_shapes
from hptjax.models.keys import CheckpointKey
from hptjax.models.shape import DecoderConfig, Llama3RopeScaling
from hptjax.types import Params

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SAVED_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
NAMED_IN_ERROR = 8  # keys shown before a long list is cut


def load_folder(path: str | os.PathLike[str]) -> tuple[DecoderConfig, Params]:
    """The shape and the parameters of a Hugging Face folder.

    Returns the config, and the tree of `hptjax.models.decoder` as float32 NumPy arrays.
    Raises a file absent or unreadable, an architecture or a switch this decoder lacks, a key missing, unexpected or of
    another shape -> ValueError (FileNotFoundError for a file).
    """
    folder = pathlib.Path(path)
    config, keys = read_config(read_json(folder / CONFIG_FILE))
    tensors = _read_tensors(folder)
    check_shapes(folder, config, keys, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    shapes = traverse_util.flatten_dict(param_shapes(config))
    flat = {entry.path: _gather(entry, tensors, shapes[entry.path]) for entry in keys if entry.path in shapes}
    return config, traverse_util.unflatten_dict(flat)


def check_shapes(
    folder: pathlib.Path,
    config: DecoderConfig,
    keys: Sequence[CheckpointKey],
    found: Mapping[str, tuple[int, ...]],
) -> None:
    """Raises ValueError, naming the keys, where the tensors of a folder are not those of its config."""
    expected = _expected(keys, traverse_util.flatten_dict(param_shapes(config)), config.num_layers)
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    wrong = [
        f"{name} (expected {list(expected[name])}, found {list(found[name])})"
        for name in sorted(set(expected) & set(found))
        if found[name] != expected[name]
    ]
    problems = [
        f"{what}: {_shown(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise ValueError(f"the checkpoint in {folder} does not fit its {CONFIG_FILE}: keys " + "; keys ".join(problems))


def save_folder(path: str | os.PathLike[str], config: DecoderConfig, params: Params, *, dtype: Any) -> None:
    """Writes a folder that `load_folder` and transformers read.

    Args
      params: host arrays (`to_host` first), in the shapes of `config`.
      dtype: of the stored tensors; float32, bfloat16 or float16, rounded to nearest even.

    The weights are written beside their final name and moved there, so an interrupted save leaves the old file whole.
    A tied model gets no unembedding key.
    Raises a parameter missing, unexpected, of another shape or on a device, a config of no family -> ValueError.
    """
    stored_dtype = np.dtype(dtype)
    if stored_dtype not in SAVED_DTYPES.values():
        raise ValueError(f"save_folder writes {', '.join(SAVED_DTYPES)}; got dtype {stored_dtype}")
    model_type, architecture, keys = _family(config)
    shapes, flat = traverse_util.flatten_dict(param_shapes(config)), traverse_util.flatten_dict(params)
    if set(shapes) != set(flat):
        raise ValueError(
            "the parameters do not fit the config: "
            f"missing {_shown(sorted('/'.join(p) for p in set(shapes) - set(flat)))}; "
            f"unexpected {_shown(sorted('/'.join(p) for p in set(flat) - set(shapes)))}"
        )
    for place, value in flat.items():
        if not isinstance(value, np.ndarray):
            raise ValueError(f"save_folder takes host arrays (call to_host first); {'/'.join(place)} is {type(value)}")
        if value.shape != shapes[place]:
            raise ValueError(f"{'/'.join(place)} has shape {value.shape}; the config asks for {shapes[place]}")
    tensors: dict[str, np.ndarray] = {}
    for entry in keys:
        if entry.path not in shapes:
            continue
        value = flat[entry.path]
        layers = enumerate(value) if entry.path[0] == "layers" else [(0, value)]
        for number, part in layers:
            tensors[entry.key.format(layer=number)] = np.ascontiguousarray(entry.to_stored(part).astype(stored_dtype))
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{WEIGHTS_FILE}.partial"
    save_file(tensors, partial, metadata={"format": "np"})
    os.replace(partial, folder / WEIGHTS_FILE)
    text = json.dumps(_write_config(config, model_type, architecture, stored_dtype.name), indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def read_config(raw: Mapping[str, Any]) -> tuple[DecoderConfig, Sequence[CheckpointKey]]:
    """The shape and the key table of a parsed `config.json`, in the form of transformers 4 or 5.

    Defaults for absent fields are those of the family's transformers config class.
    Raises a model type, activation, bias, window or rope type this decoder lacks -> ValueError.
    """
    model_type = raw.get("model_type")
    tables = {
        llama.MODEL_TYPE: llama.KEYS,
        qwen.QWEN2_MODEL_TYPE: qwen.QWEN2_KEYS,
        qwen.QWEN3_MODEL_TYPE: qwen.QWEN3_KEYS,
    }
    if model_type not in tables:
        raise ValueError(f"{CONFIG_FILE}: model_type must be one of {', '.join(tables)}; got {model_type!r}")
    for field, allowed in (
        ("hidden_act", "silu"),
        ("attention_bias", False),  # in this field transformers means a bias on the output too
        ("mlp_bias", False),
        ("use_sliding_window", False),
    ):
        if raw.get(field, allowed) != allowed:
            raise ValueError(f"{CONFIG_FILE}: this decoder needs {field}={allowed!r}, got {raw[field]!r}")
    absent = [
        field
        for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        if raw.get(field) is None
    ]
    if absent:
        raise ValueError(f"{CONFIG_FILE}: missing {', '.join(absent)}")
    heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
    theta, scaling = _read_rope(raw)
    config = DecoderConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=hidden,
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or (128 if model_type == qwen.QWEN3_MODEL_TYPE else hidden // heads),
        mlp_size=raw["intermediate_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        attention_bias=model_type == qwen.QWEN2_MODEL_TYPE,
        qk_norm=model_type == qwen.QWEN3_MODEL_TYPE,
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_positions=raw.get("max_position_embeddings") or (2048 if model_type == llama.MODEL_TYPE else 32_768),
    )
    return config, tables[model_type]


def _read_rope(raw: Mapping[str, Any]) -> tuple[float, Llama3RopeScaling | None]:
    """theta and stretch, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"{CONFIG_FILE}: rope_type must be 'default' or 'llama3', got {kind!r}")
    fields = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    absent = [field for field in fields if field not in rope]
    if absent:
        raise ValueError(f"{CONFIG_FILE}: rope_type 'llama3' needs {', '.join(absent)}")
    factor, low, high, original = (rope[field] for field in fields)
    return theta, Llama3RopeScaling(float(factor), float(low), float(high), int(original))


def _write_config(config: DecoderConfig, model_type: str, architecture: str, dtype: str) -> dict[str, Any]:
    """The form of transformers 4, which 5 reads too."""
    scaling = config.rope_scaling
    return {
        "architectures": [architecture],
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


def _family(config: DecoderConfig) -> tuple[str, str, Sequence[CheckpointKey]]:
    if config.attention_bias and config.qk_norm:
        raise ValueError("no supported family has both attention_bias and qk_norm; set one of them to false to save it")
    if config.attention_bias:
        return qwen.QWEN2_MODEL_TYPE, qwen.QWEN2_ARCHITECTURE, qwen.QWEN2_KEYS
    if config.qk_norm:
        return qwen.QWEN3_MODEL_TYPE, qwen.QWEN3_ARCHITECTURE, qwen.QWEN3_KEYS
    return llama.MODEL_TYPE, llama.ARCHITECTURE, llama.KEYS


def _expected(
    keys: Sequence[CheckpointKey], shapes: Mapping[tuple[str, ...], tuple[int, ...]], num_layers: int
) -> dict[str, tuple[int, ...]]:
    """Every key the checkpoint must hold, with its shape there."""
    expected = {}
    for entry in keys:
        if entry.path not in shapes:
            continue
        shape = shapes[entry.path]
        if entry.path[0] != "layers":
            expected[entry.key] = entry.stored_shape(shape)
            continue
        for number in range(num_layers):
            expected[entry.key.format(layer=number)] = entry.stored_shape(shape[1:])
    return expected


def _gather(entry: CheckpointKey, tensors: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    result = np.empty(shape, np.float32)
    if entry.path[0] != "layers":
        result[...] = entry.from_stored(tensors[entry.key], shape)
        return result
    for number in range(shape[0]):
        result[number] = entry.from_stored(tensors[entry.key.format(layer=number)], shape[1:])
    return result


def _read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor of the folder."""
    tensors: dict[str, np.ndarray] = {}
    with contextlib.ExitStack() as files:
        for opened in open_files(folder, files):
            tensors |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
    return tensors


def open_files(folder: pathlib.Path, files: contextlib.ExitStack) -> list[Any]:
    """The folder's weights, opened: one file, or the shards that its index lists; they are closed with `files`."""
    names = [WEIGHTS_FILE]
    if (folder / INDEX_FILE).exists():
        names = sorted(set(read_json(folder / INDEX_FILE)["weight_map"].values()))
    opened = []
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"expected the weights {name} in {folder}, found none; change model.path")
        try:
            opened.append(files.enter_context(safe_open(folder / name, framework="np")))
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is not a whole safetensors file: {error}") from error
    return opened


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder."""
    if not path.is_file():
        raise FileNotFoundError(f"expected {path.name} in {path.parent}, found none; change model.path")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _shown(names: Sequence[str]) -> str:
    more = len(names) - NAMED_IN_ERROR
    return ", ".join(names[:NAMED_IN_ERROR]) + (f" and {more} more" if more > 0 else "") if names else "none"
