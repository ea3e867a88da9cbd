"""Our decoder against what transformers said about the folders in `tests/oracles/golden`; no torch is needed.

Logits within 1e-4, gradients within 1e-4 relative, greedy tokens identical: for rows with padding, for packed rows and
through the cache. `tests/test_oracle_live.py` asks transformers again where it is installed.
"""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest

from hptjax.models.folder import load_folder
from hptjax.models.folder_config import read_eos_ids
from hptjax.models.shape import Llama3RopeScaling
from tests import decoder_calls
from tests.oracles.cases import (
    FAMILIES,
    GREEDY_TOKENS,
    LENGTHS,
    PROMPT_LENGTHS,
    SAMPLED_TOKENS,
    TEMPERATURE,
    golden,
    padded,
    sequences,
)

LOGITS = 1e-4  # absolute
GRADIENTS = 1e-4  # of a gradient's norm, and of its largest entry


@functools.cache
def loaded(name):
    folder, said = golden(name)
    return *load_folder(folder), said


@pytest.fixture(params=FAMILIES)
def family(request):
    """Shape, parameters and the reference's arrays of one family."""
    return loaded(request.param)


def prompts():
    return [part[:length] for part, length in zip(sequences(), PROMPT_LENGTHS, strict=True)]


def test_oracle_folders_hold_what_each_family_has():
    configs = {name: loaded(name)[0] for name in FAMILIES}
    assert [name for name, config in configs.items() if config.attention_bias] == ["qwen2", "qwen2_tied"]
    assert [name for name, config in configs.items() if config.qk_norm] == ["qwen3"]
    assert [name for name, config in configs.items() if config.tie_embeddings] == ["llama_tied", "qwen2_tied"]
    assert configs["llama"].rope_scaling == Llama3RopeScaling(8.0, 1.0, 4.0, 64)
    assert configs["qwen3"].rope_theta == 1000.0
    folder = golden("qwen3")[0]
    assert (folder / "model.safetensors.index.json").exists()
    assert "rope_parameters" in json.loads((folder / "config.json").read_text())
    assert read_eos_ids(folder) == (2, 5)
    for name in FAMILIES:
        layers = loaded(name)[1]["layers"]
        moved = [key for key in layers if key.endswith(("norm", "bias"))]
        assert len(moved) == 2 + 3 * configs[name].attention_bias + 2 * configs[name].qk_norm
        for key in moved:
            assert np.std(layers[key]) > 0.1, f"{name}: {key} is as transformers makes it, so its loss would not show"


def test_oracle_logits_of_padded_and_of_packed_rows(family):
    config, params, said = family
    parts = sequences()
    *alone, together = decoder_calls.forward_logits(params, config, *decoder_calls.padded_and_packed(parts))
    for number, (part, beside) in enumerate(zip(parts, decoder_calls.apart(together, parts), strict=True)):
        expected = said["logits"][number, : len(part)]
        np.testing.assert_allclose(alone[number][: len(part)], expected, rtol=0, atol=LOGITS)
        np.testing.assert_allclose(beside, expected, rtol=0, atol=LOGITS)
        assert np.std(expected) > 1, "logits so small that the tolerance says nothing"


def test_oracle_logits_through_the_cache(family):
    config, params, said = family
    found = decoder_calls.cached_logits(params, config, padded(sequences()), LENGTHS, PROMPT_LENGTHS)
    np.testing.assert_allclose(np.concatenate(found), said["cached"], rtol=0, atol=LOGITS)


def test_oracle_loss_and_gradients(family):
    config, params, said = family
    loss, gradients = decoder_calls.loss_and_gradients(params, config, sequences(), PROMPT_LENGTHS)
    assert loss == pytest.approx(float(said["loss"]), rel=1e-5)
    expected = {key.removeprefix("gradient "): value for key, value in said.items() if key.startswith("gradient ")}
    assert gradients.keys() == expected.keys()
    for key, value in expected.items():
        error = gradients[key] - value
        assert np.linalg.norm(error) <= GRADIENTS * np.linalg.norm(value), key
        assert np.abs(error).max() <= GRADIENTS * np.abs(value).max(), key
        assert np.abs(value).max() > 1e-4, f"{key}: a gradient of nothing"


def test_oracle_greedy_tokens_are_identical(family):
    config, params, said = family
    found = decoder_calls.sample(params, config, prompts(), GREEDY_TOKENS, temperature=1.0, top_k=1)
    assert [sample.completion_tokens.tolist() for sample in found] == said["greedy"].tolist()
    assert said["greedy"].shape == (3, GREEDY_TOKENS)
    assert all(len(set(tokens)) >= 12 for tokens in said["greedy"].tolist()), "a text that goes round in circles"
    assert said["greedy_gap"].min() > 10 * LOGITS


def test_oracle_sampled_tokens_score_equally(family):
    config, params, said = family
    parts = [np.concatenate(pair) for pair in zip(prompts(), said["sampled"], strict=True)]
    found = decoder_calls.completion_logprobs(params, config, parts, PROMPT_LENGTHS, TEMPERATURE)
    assert said["sampled"].shape == (3, SAMPLED_TOKENS)
    for ours, theirs in zip(found, said["sampled_logprobs"], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=LOGITS)


def test_oracle_sees_a_missing_bias_or_norm_or_stretch(family):
    """Each part of the model moves the logits by far more than the tolerance, so the tests above would miss none."""
    config, params, said = family
    parts = sequences()

    def distance(changed_params, changed_config=config):
        found = decoder_calls.forward_logits(changed_params, changed_config, *decoder_calls.padded_and_packed(parts))
        return np.abs(found[0, : len(parts[0])] - said["logits"][0]).max()

    for key, value in params["layers"].items():
        if key.endswith(("norm", "bias")):
            plain = np.ones_like(value) if key.endswith("norm") else np.zeros_like(value)
            assert distance(params | {"layers": params["layers"] | {key: plain}}) > 100 * LOGITS, key
    if config.rope_scaling is not None:
        assert distance(params, dataclasses.replace(config, rope_scaling=None)) > 100 * LOGITS
