"""What a comparison says of single questions, by hand, and the share of SFT that it tunes."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import hptjax.build.parts as build_parts
from hptjax import compare
from hptjax.compare.arms import chosen_arms
from hptjax.compare.text import as_text
from hptjax.compare.transitions import discoveries, exclusive, fisher_p, forgetting, transitions
from hptjax.config import CompareConfig
from hptjax.config_eval import CompareArm
from tests import tiny
from tests.test_config import changed


def test_transitions_by_hand():
    """Eight samples: 0 of 8 to 8 of 8 is certain, 0 of 8 to 1 of 8 is not."""
    before, after = np.array([0, 0, 3, 8, 0, 8]), np.array([8, 1, 0, 8, 0, 0])
    levels = np.array([0, 0, 0, 1, 1, 1])
    found = transitions(before, after, 8, levels)
    assert {name: found[name] for name in ("kept", "gained", "lost", "never")} == {
        "kept": 1,
        "gained": 2,
        "lost": 2,
        "never": 1,
    }
    assert found["certain"] == {"gained": 1, "lost": 1}
    assert found["by_level"] == {
        "0": {"kept": 0, "gained": 2, "lost": 1, "never": 0},
        "1": {"kept": 1, "gained": 0, "lost": 1, "never": 1},
    }


def test_fisher_p_by_hand():
    """0 of 4 against 4 of 4: both extreme tables of 70 have p 2/70; equal counts have 1."""
    np.testing.assert_allclose(fisher_p(np.array([0, 2]), np.array([4, 2]), 4), [2 / 70, 1.0], rtol=1e-12)


def test_discoveries_are_those_of_benjamini_and_hochberg():
    """p = .01 .02 .03 .04 .5 at 5 %: the bounds are .01 .02 .03 .04 .05, so the first four pass, in any order."""
    p = np.array([0.5, 0.04, 0.02, 0.01, 0.03])
    assert discoveries(p).tolist() == [False, True, True, True, True]
    assert not discoveries(np.array([0.02, 0.9])).size - 2
    assert discoveries(np.array([0.03, 0.9])).tolist() == [False, False]
    assert discoveries(np.zeros(0)).size == 0


def test_exclusive_counts_what_nobody_else_solves():
    counts = {"a": np.array([1, 0, 2, 0]), "b": np.array([0, 0, 3, 1]), "c": np.array([0, 0, 0, 1])}
    assert exclusive(counts) == {"a": 1, "b": 0, "c": 0}


def test_forgetting_chooses_on_one_half_and_measures_on_the_other():
    """Question 0: best at evaluation 1 by the first half (4 of 4), where the second half has 3; at the end 1: 2 lost.

    Question 1 is at its best in the end: 0. Mean over questions and 4 samples: (2 + 0) / 2 / 4.
    """
    first = [np.array([0, 0]), np.array([4, 1]), np.array([2, 1])]
    second = [np.array([0, 4]), np.array([3, 4]), np.array([1, 0])]
    assert forgetting(first, second, 4) == pytest.approx(0.25)


def test_forgetting_of_a_policy_that_stays_is_0_in_the_mean_although_the_best_looks_better():
    rng = np.random.default_rng(0)
    draws = rng.binomial(4, 0.5, (6, 2, 4000))
    assert abs(forgetting(list(draws[:, 0]), list(draws[:, 1]), 4)) < 0.01
    naive = (draws[:, 0].max(axis=0) - draws[-1, 0]).mean() / 4
    assert naive > 0.2


def test_compare_takes_arms_of_the_config_and_methods_by_name(tmp_path):
    config = dataclasses.replace(
        tiny.tiny_config(tmp_path), compare=CompareConfig(arms=(CompareArm("gentle", "hpt", gate=1),))
    )
    assert [arm.name for arm in chosen_arms(config, None)] == ["gentle"]
    assert chosen_arms(config, ["luffy", "gentle"])[0] == CompareArm("luffy", "luffy")
    for names, word in ((["nobody"], "nobody"), ([], "none"), (["hpt", "hpt"], "distinct")):
        with pytest.raises(ValueError, match=word):
            chosen_arms(config, names)


@pytest.mark.slow
def test_compare_tunes_the_learning_rate_and_the_share_of_sft_on_validation_questions(tmp_path, monkeypatch):
    monkeypatch.setattr(build_parts, "build_judge", tiny.hash_judge)
    config = changed(tiny.tiny_config(tmp_path), train__steps=2, checkpoint__every_steps=50)
    arms = (
        CompareArm("hpt", "hpt"),
        CompareArm("both", "dr_grpo", learning_rate=(2e-3, 1e-3), sft_share=(0.5, 1.0), sft_learning_rate=5e-4),
    )
    config = dataclasses.replace(config, compare=CompareConfig(arms=arms, seeds=1))
    report = compare.compare(config)
    root = tmp_path / "runs" / "tiny-compare"
    tuning = json.loads((root / "tuning.json").read_text())["both"]
    best = max(tuning["found"].values())
    assert set(tuning["found"]) == {f"lr{rate:g}-sft{share:g}" for rate in (1e-3, 2e-3) for share in (0.5, 1.0)}
    assert tuning["found"][tuning["chosen"]] == best
    chosen = report["tuned"]["both"]
    assert tuning["chosen"] == f"lr{chosen['learning_rate']:g}-sft{chosen['sft_share']:g}"
    made = json.loads((root / "both-seed0" / "config.json").read_text())
    assert made["optimizer"]["learning_rate"] == chosen["learning_rate"]
    assert [stage["steps"] for stage in made["stages"]] == [round(2 * chosen["sft_share"])]
    assert [stage["learning_rate"] for stage in made["stages"]] == [5e-4]


def test_tables_of_the_results_page_are_those_of_their_json(repository):
    """Made again from the figures, to the last character."""
    report = json.loads((repository / "docs" / "compare-countdown.json").read_text())
    assert as_text(report) in (repository / "docs" / "results.md").read_text()
    assert len(report["seeds"]) == 5
    assert len(report["figures"]["flops"]) == 10
