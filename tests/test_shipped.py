"""What the repository ships: configs that check, a base model in the real format, and data that never meet."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open

from hptjax.build.data import build_splits, build_task
from hptjax.config_check import check
from hptjax.config_load import load_config, read_file
from hptjax.data.tokenizer import decode, encode_demonstration, encode_prompt, load_tokenizer
from hptjax.models.folder import load_folder

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def canonical(path):
    """Split name -> the canonical instances of a shipped config."""
    config = load_config(path)
    return {
        name: {instance.canonical for instance in instances}
        for name, instances in build_splits(config, build_task(config.task)).items()
    }


@pytest.fixture
def in_root(monkeypatch):
    """Shipped configs name folders from the repository's root."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_check(path, in_root):
    config = read_file(path)
    check(config, sized_only=True)
    if config.model.path is None and config.model.tokenizer is None:  # for `hptjax plan`, until a folder is named
        assert config.model.preset
        check(dataclasses.replace(config, model=dataclasses.replace(config.model, path="folder")))
    else:
        check(config)
    assert config.name == path.stem
    assert "test" not in config.checkpoint.metric


def test_shipped_base_corpus_meets_no_question_of_a_later_run(in_root):
    corpus = canonical(ROOT / "configs" / "base_model.toml")["train"]
    assert len(corpus) > 5000
    for name in ("quickstart", "countdown"):
        later = canonical(ROOT / "configs" / f"{name}.toml")
        assert not corpus & (later["train"] | later["validation"] | later["test"])
        assert not later["train"] & (later["validation"] | later["test"])
        assert not later["validation"] & later["test"]
        assert len(later["test"]) >= 500


def test_shipped_base_model_is_a_small_hugging_face_folder(in_root):
    folder = ROOT / "hptjax" / "base_model"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4 * 2**20
    with safe_open(folder / "model.safetensors", "numpy") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert kinds == {"BF16"}
    assert "model_type" in json.loads((folder / "config.json").read_text())
    config, params = load_folder(folder)
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) <= config.vocab_size
    assert np.all(np.isfinite(params["embedding"]))
    assert params["embedding"].std() > 0.03  # trained, not as it was made (0.02)
    text = "19-8=11,11*3=33"
    assert decode(tokenizer, encode_demonstration(tokenizer, text)) == text
    assert encode_prompt(tokenizer, "3,8,19=33:")[0] == tokenizer.bos_token_id


def test_shipped_longer_base_model_is_another_checkpoint_of_the_same_model(in_root):
    folders = [ROOT / "hptjax" / name for name in ("base_model", "base_model_longer")]
    assert sum(path.stat().st_size for path in folders[1].iterdir()) < 2**20
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    (config, base), (longer_config, longer) = (load_folder(folder) for folder in folders)
    assert config == longer_config
    left, right = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)]) for params in (base, longer))
    assert np.all(np.isfinite(right))
    cosine = left @ right / (np.linalg.norm(left) * np.linalg.norm(right))
    assert 0.5 < cosine < 0.99  # seen: the same training, further on
