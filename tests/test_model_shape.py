"""What a run takes from its model folder beside the weights: shape with the config's edits, and its stop tokens."""

from __future__ import annotations

import dataclasses
import json

import jax
import pytest

from hptjax.build.policy import build_policy
from hptjax.config import Config
from hptjax.data.tokenizer import load_tokenizer
from hptjax.explain import model_shape
from hptjax.model_shape import decoder_shape
from hptjax.models import decoder
from hptjax.models.folder import save_folder
from hptjax.models.presets import PRESETS
from hptjax.plan.model import decoder_shape as planned_shape
from hptjax.sharding.host import to_host
from tests import tiny
from tests.test_config import changed


@pytest.fixture
def with_folder(tmp_path):
    """A tiny run whose model is a folder; the folder is the run's `model.path`."""
    config = tiny.tiny_config(tmp_path)
    tokenizer = load_tokenizer(config.model.tokenizer)
    shape = decoder_shape(config, lambda: len(tokenizer))
    folder = tmp_path / "model"
    save_folder(folder, shape, to_host(decoder.init_params(jax.random.key(0), shape)), dtype="float32")
    tokenizer.save_pretrained(str(folder))
    return changed(config, model__path=str(folder), model__tokenizer=None)


def test_model_shape_edits_reach_every_source_of_a_shape(with_folder):
    edits = {"model__rope_theta": 40_000.0, "model__max_positions": 16_384}
    for config in (
        with_folder,
        changed(with_folder, model__path=None, model__preset="qwen2.5-math-1.5b"),
        changed(with_folder, model__path=None, model__tokenizer=str(with_folder.model.path)),
    ):
        plain, edited = (decoder_shape(each, lambda: 20) for each in (config, changed(config, **edits)))
        assert dataclasses.replace(plain, rope_theta=40_000.0, max_positions=16_384) == edited != plain
        assert planned_shape(changed(config, **edits)) == edited or config.model.path is None
        assert model_shape(changed(config, **edits))[0].max_positions == 16_384
    assert (
        decoder_shape(changed(Config(), model__path=None, model__preset="llama-3.1-8b"), lambda: 0)
        == PRESETS["llama-3.1-8b"]
    )
    policy = build_policy(changed(with_folder, **edits))
    assert (policy.config.rope_theta, policy.config.max_positions) == (40_000.0, 16_384)


def test_model_shape_context_that_is_too_short_is_refused(with_folder):
    longest = with_folder.data.max_prompt_tokens + with_folder.rollout.max_completion_tokens
    assert build_policy(changed(with_folder, model__max_positions=longest)).config.max_positions == longest
    with pytest.raises(ValueError, match=rf"at least {longest} tokens .* got max_position_embeddings {longest - 1}"):
        build_policy(changed(with_folder, model__max_positions=longest - 1))


def test_model_shape_stop_tokens_are_the_tokenizers_the_folders_and_the_configs(with_folder, tmp_path):
    eos = load_tokenizer(with_folder.model.path).eos_token_id
    assert build_policy(with_folder).stop_ids == {eos}
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [eos, 5, 7], "temperature": 0.6}))
    assert build_policy(with_folder).stop_ids == {eos, 5, 7}
    assert build_policy(changed(with_folder, rollout__stop_ids=(3,))).stop_ids == {eos, 3, 5, 7}
    file.write_text(json.dumps({"eos_token_id": 128_001}))
    with pytest.raises(ValueError, match=r"below the vocabulary of \d+ tokens, got \[128001\]"):
        build_policy(with_folder)
