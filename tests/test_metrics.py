"""The table of metrics: each name once, reduced as declared, nothing reduced by its looks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hptjax.diagnostics.metrics import METRICS, Metric, Reduction, as_markdown, check_names, index, lookup, merge


def test_metrics_are_declared_once_with_a_unit_and_a_meaning():
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    for metric in METRICS:
        assert metric.unit, metric
        assert len(metric.meaning) > 10, metric
        assert not metric.meaning.endswith("."), metric


def test_metrics_families_do_not_overlap_with_each_other():
    exact, patterns = index()
    examples = [*exact, "timing_s/rollout", "hpt/rate_hist_8", "validation/pass@1", "test/pass@8_low", "loss/rl"]
    for name in examples:
        assert sum(bool(pattern.fullmatch(name)) for pattern, _ in patterns) == (0 if name in exact else 1), name


def test_metrics_merge_token_weighted_means_are_not_means_of_means():
    # 10 tokens at 1.0 and 90 at 2.0: 1.9, where the mean of the two means would be 1.5
    assert merge([{"sft/loss": (10.0, 10)}, {"sft/loss": (180.0, 90)}]) == {"sft/loss": 1.9}


def test_metrics_merge_does_not_depend_on_the_split():
    rng = np.random.default_rng(0)
    values, weights = rng.random(64), rng.integers(1, 9, 64)
    whole = merge([{"actor/entropy": (float(values @ weights), int(weights.sum()))}])["actor/entropy"]
    for cuts in ([32], [1, 2, 40], list(range(1, 64))):
        parts = zip(np.split(values, cuts), np.split(weights, cuts), strict=True)
        rows = [{"actor/entropy": (float(v @ w), int(w.sum()))} for v, w in parts]
        assert merge(rows)["actor/entropy"] == pytest.approx(whole, abs=1e-12)


def test_metrics_merge_uses_the_declared_reduction():
    rows = [
        {"response_length/max": 5, "response_length/min": 5, "actor/lr": 0.1, "timing_s/rollout": 1.5, "witness/ok": 1},
        {"response_length/max": 9, "response_length/min": 2, "actor/lr": 0.2, "timing_s/rollout": 0.5, "witness/ok": 0},
        {"response_length/max": 7, "response_length/min": 3, "batch/micro_batches": 4},
    ]
    assert merge(rows) == {
        "response_length/max": 9,
        "response_length/min": 2,
        "actor/lr": 0.2,
        "timing_s/rollout": 2.0,
        "witness/ok": 0,
        "batch/micro_batches": 4,
    }


def test_metrics_are_not_reduced_by_what_their_name_looks_like(monkeypatch):
    # verl takes the minimum of any key that has "min" in it, such as minibatch_loss
    odd = Metric("loss_minibatch/max_of_mean", Reduction.SUM, "1", "a name made of other reductions")
    monkeypatch.setattr("hptjax.diagnostics.metrics.METRICS", (*METRICS, odd))
    index.cache_clear()
    try:
        assert merge([{odd.name: 2.0}, {odd.name: 3.0}]) == {odd.name: 5.0}
    finally:
        monkeypatch.undo()
        index.cache_clear()


def test_metrics_merge_adds_histograms_bin_by_bin():
    assert merge([{"hpt/rate_hist": [3, 0, 1]}, {"hpt/rate_hist": np.array([1, 1, 1])}]) == {
        "hpt/rate_hist_0": 4.0,
        "hpt/rate_hist_1": 1.0,
        "hpt/rate_hist_2": 2.0,
    }


def test_metrics_merge_keeps_nan_in_any_place():
    for values in ([math.nan, 1.0], [1.0, math.nan]):
        for name in ("actor/grad_norm", "critic/score/min", "timing_s/update"):
            assert math.isnan(merge([{name: value} for value in values])[name])
    assert math.isnan(merge([{"sft/loss": (0.0, 0)}])["sft/loss"])


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("actor/entorpy", "actor/entropy"),
        ("hpt/gate_sft_fraction", "hpt/gate_sft_frac"),
        ("timing_s/a/b", "timing_s/<phase>"),
        ("hpt/rate_hist_x", "hpt/rate_hist'"),
        ("panel/pass@1", "<split>/pass@<k>"),
        ("zzz", ""),
    ],
)
def test_metrics_refuse_undeclared_names_with_the_nearest(name, nearest):
    for refused in (lambda: merge([{name: 1.0}]), lambda: check_names(["sft/loss", name])):
        with pytest.raises(ValueError, match=rf"got '{name}'; did you mean '{nearest}"):
            refused()


def test_metrics_refuse_values_that_their_reduction_does_not_take():
    with pytest.raises(ValueError, match=r"'sft/loss' is a sum_ratio: expected \(total, count\) pairs, got \[1\.5\]"):
        merge([{"sft/loss": 1.5}])
    with pytest.raises(ValueError, match="'hpt/rate_hist' is a histogram"):
        merge([{"hpt/rate_hist": [1, 2]}, {"hpt/rate_hist": [1]}])


def test_metrics_markdown_has_a_line_per_metric():
    lines = as_markdown().splitlines()
    assert len(lines) == len(METRICS) + 2
    assert all(line.count("|") == 5 for line in lines)
    assert lookup("timing_s/rollout").name in as_markdown()


def test_metrics_page_of_the_docs_is_the_table(repository):
    """docs/metrics.md is rendered from the table; render it again when the table changes."""
    assert as_markdown() in (repository / "docs" / "metrics.md").read_text()
