"""`hptjax upge` on a recorded batch: its figures against gradients taken sample by sample, without rows or planes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hptjax.build.parts import open_parts
from hptjax.build.weights import load_weights
from hptjax.config import Config
from hptjax.models.decoder import forward, unembedding
from hptjax.upge import command
from hptjax.upge.batch import Draw, draws_of, load
from hptjax.upge.command import upge_command
from hptjax.upge.measure import measure
from tests import tiny

OPTIONS = {"checkpoint": "base", "sampler": "base", "questions": 5, "draws": 3}


class Measured(NamedTuple):
    folder: Path
    config: Config
    report: dict[str, Any]
    drifted: dict[str, Any]  # rows
    draws: list[Draw]
    params: Any
    decoder: Any


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What one command wrote, and the same batch measured at weights that have moved."""
    folder = tmp_path_factory.mktemp("upge")
    config = tiny.tiny_config(folder)
    with tiny.hashed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "TOY_SEEDS", 1)
        upge_command(
            config, batch=folder / "batch.json", json=folder / "upge.json", plot=folder / "upge.png", **OPTIONS
        )
        with open_parts(config) as parts:
            params = load_weights(parts, "base")
            draws = draws_of(parts, load(folder / "batch.json", parts)[1])
            moved = jax.tree.map(lambda leaf: leaf + 0.3 * jnp.sin(jnp.arange(leaf.size).reshape(leaf.shape)), params)
            drifted = measure(parts, moved, params, draws)
    report = json.loads((folder / "upge.json").read_text())
    return Measured(folder, config, report, drifted, draws, params, parts.policy.config)


def gradient(params, samples, weights, decoder):
    """grad of sum_s weights_s log pi(completion_s), one padded row per sample."""
    width = max(len(s.prompt_tokens) + len(s.completion_tokens) for s in samples)
    tokens, live = np.zeros((len(samples), width), np.int32), np.zeros((len(samples), width), bool)
    segments = np.zeros_like(tokens)
    for row, sample in enumerate(samples):
        whole = np.concatenate([sample.prompt_tokens, sample.completion_tokens])
        tokens[row, : len(whole)], segments[row, : len(whole)] = whole, 1
        live[row, len(sample.prompt_tokens) : len(whole)] = True
    positions = np.broadcast_to(np.arange(width), tokens.shape)

    @jax.jit
    def total(params):
        hidden = forward(params, tokens, positions, segments, config=decoder, compute_dtype=jnp.float32)
        logprobs = jax.nn.log_softmax(hidden @ unembedding(params, decoder))[:, :-1]
        told = jnp.take_along_axis(logprobs, tokens[:, 1:, None], -1)[..., 0]
        return jnp.sum(jnp.where(live[:, 1:], told, 0) * jnp.asarray(weights, jnp.float32)[:, None])

    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(jax.grad(total)(params))])


def by_hand(draw, row, params, decoder):
    """The token mean of one row's gradient: A = reward - mean of the others', A = +1 or -1, or plain likelihood."""
    if row == "sft":
        samples, advantages = draw.demonstrations, [1.0] * len(draw.demonstrations)
    elif row == "reinforce":
        samples, advantages = draw.rollouts, [1.0 if sample.solved else -1.0 for sample in draw.rollouts]
    else:
        samples, advantages = draw.rollouts, []
        for sample in samples:
            others = [o.reward for o in samples if o.group_id == sample.group_id and o is not sample]
            advantages.append(sample.reward - sum(others) / len(others))
    tokens = sum(len(sample.completion_tokens) for sample in samples)
    return gradient(params, samples, np.asarray(advantages) / tokens, decoder)


@pytest.mark.parametrize("row", ["rloo", "reinforce", "sft"])
def test_measured_figures_are_those_of_gradients_taken_sample_by_sample(measured, row):
    grads = {
        name: np.stack([by_hand(draw, name, measured.params, measured.decoder) for draw in measured.draws])
        for name in {row, "rloo", "sft"}
    }
    figures, own = measured.report["rows"][row], grads[row]
    middle = own.mean(axis=0)
    assert figures["grad_norm"] == pytest.approx(np.linalg.norm(middle), rel=1e-4)
    for other, key in (("sft", "cos_sft"), ("rloo", "cos_rl")):
        there = grads[other].mean(axis=0)
        cosine = middle @ there / np.linalg.norm(middle) / np.linalg.norm(there)
        assert figures[key] == pytest.approx(cosine, abs=1e-4)
    variance = np.var(own, axis=0, ddof=1).sum() / (middle @ middle)
    assert figures["relative_variance"] == pytest.approx(variance, rel=1e-3, abs=1e-5)


def test_measured_rows_agree_where_the_policy_has_not_moved(measured):
    """On-policy no ratio is other than 1 and nothing is masked: rows with one advantage are one gradient."""
    rows = measured.report["rows"]
    for name in ("dapo", "cispo", "gspo", "gmpo", "sapo"):
        assert rows[name]["grad_norm"] == pytest.approx(rows["grpo"]["grad_norm"], rel=1e-5), name
        assert rows[name]["masked_frac"] == 0.0
        assert rows[name]["effective_frac"] == pytest.approx(1.0, abs=1e-6)


def test_measured_rows_differ_once_the_policy_has_moved(measured):
    rows = measured.drifted
    assert rows["grpo"]["masked_frac"] > 0.02
    assert rows["cispo"]["masked_frac"] == rows["rloo"]["masked_frac"] == 0.0
    assert rows["cispo"]["effective_frac"] < 0.999 < rows["rloo"]["effective_frac"]
    assert len({round(rows[name]["grad_norm"], 6) for name in ("grpo", "dapo", "cispo", "gspo", "gmpo")}) == 5


@pytest.mark.slow
def test_same_batch_measures_the_same_again(measured, capsys, monkeypatch):
    monkeypatch.setattr(command, "TOY_SEEDS", 1)
    again = measured.folder / "again.json"
    with tiny.hashed():
        upge_command(measured.config, batch=measured.folder / "batch.json", json=again, plot=None, **OPTIONS)
    assert json.loads(again.read_text()) == measured.report
    told = capsys.readouterr().out
    assert "5 questions x 3 groups sampled by base" in told
    assert all(name in told for name in measured.report["rows"])
    assert (measured.folder / "upge.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_of_upge_says_what_to_change(measured, tmp_path):
    def refused(words, **changes):
        batch = measured.folder / "batch.json"
        options = {**OPTIONS, "batch": batch, "json": None, "plot": None, "config": measured.config} | changes
        with pytest.raises(ValueError, match=words):
            upge_command(options.pop("config"), **options)

    refused("2 draws, got 5 and 1; change --questions or --draws", draws=1)
    refused("expected at least 1 question", questions=0)
    refused("expected a last checkpoint", checkpoint="last")
    (tmp_path / "none.json").write_text("[]")
    refused("expected a batch that .* change --batch", batch=tmp_path / "none.json")
    refused("of this config's model, tokenizer and seed", config=dataclasses.replace(measured.config, seed=1))
