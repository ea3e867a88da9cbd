"""The toy whose truth is known: which rows are unbiased there, and which are not."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hptjax.hpt.options import Options
from hptjax.upge.rows import measured_rows
from hptjax.upge.toy import PROVIDED, bias_of, make_toy, strings

ROWS = {entry.name: entry for entry in measured_rows(Options(group_size=3), PROVIDED)}


def central_differences(toy, value, step=1e-5):
    """By an independent route: loops over strings and prefixes in plain NumPy."""

    def probability(logits, string):
        p, place = 1.0, 0
        for t, letter in enumerate(string):
            row = logits[sum(2**k for k in range(t)) + place]
            p *= np.exp(row[letter]) / np.exp(row).sum()
            place = place * 2 + letter
        return p

    out = np.zeros_like(toy.logits)
    for at in np.ndindex(*out.shape):
        bump = np.zeros_like(out)
        bump[at] = step
        out[at] = sum(
            (value(i, probability(toy.logits + bump, s)) - value(i, probability(toy.logits - bump, s))) / (2 * step)
            for i, s in enumerate(strings())
        )
    return out


def test_exact_gradients_of_the_toy_are_central_differences():
    from hptjax.upge.toy import _likelihood_gradient, _probabilities, _reward_gradient

    toy = make_toy(0, 0.3)
    np.testing.assert_allclose(
        _reward_gradient(toy), central_differences(toy, lambda i, p: toy.rewards[i] * p), atol=1e-8
    )
    author = _probabilities(toy.author)
    np.testing.assert_allclose(
        _likelihood_gradient(toy), central_differences(toy, lambda i, p: author[i] * np.log(p)), atol=1e-7
    )


@pytest.mark.parametrize("name", ["rloo", "dr_grpo", "sft"])
def test_row_without_drift_is_unbiased_where_theory_says_so(name):
    """On-policy, a baseline that leaves a factor: leave-one-out and the group's mean; SFT for its own objective."""
    assert bias_of(ROWS[name], make_toy(1, 0.0)).bias < 1e-3  # float32 coefficients


def test_row_that_divides_by_the_groups_spread_is_biased_even_on_policy():
    assert bias_of(ROWS["grpo"], make_toy(1, 0.0)).bias > 0.02


def test_drift_biases_what_does_not_correct_for_it_and_clips_mask():
    """REINFORCE with a group baseline takes old samples as its own; token ratios correct only in part."""
    drifted = make_toy(2, 0.5)
    assert bias_of(ROWS["rloo"], drifted).bias > 0.05
    assert bias_of(ROWS["grpo"], drifted).masked_frac > 0.05
    assert bias_of(ROWS["cispo"], drifted).masked_frac == 0.0
    assert bias_of(ROWS["dft"], drifted).bias > bias_of(ROWS["sft"], drifted).bias


def test_table_of_the_results_page_is_that_of_its_json(repository):
    """Every cell of the page, to its last digit."""
    report = json.loads((repository / "docs" / "upge-quickstart.json").read_text())
    lines = (repository / "docs" / "results.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| row | norm | cos SFT"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[name] = cells
    assert set(rows) == set(report["rows"])
    for name, row in report["rows"].items():
        toy = report["toy"].get(name)
        told = [row["grad_norm"], row["cos_sft"], row["cos_rl"], row["relative_variance"], row["masked_frac"]]
        told += [row["weights"]["1"], *(toy[drift]["bias"] for drift in ("0", "0.3", "1"))] if toy else [None] * 4
        for cell, value in zip(rows[name], told, strict=True):
            if value is not None:
                scale = 100 if cell.endswith("%") else 1
                assert float(cell.rstrip(" %")) == pytest.approx(scale * value, rel=6e-3, abs=0.051 / 100 * scale)
