"""Every mutant dies by the layer that is named for it; `make kill-matrix` runs all layers on all mutants."""

from __future__ import annotations

import pytest

from tests.proofs import kill_matrix, layers, mutants


def test_every_layer_passes_on_the_right_code():
    """As the matrix runs them: a layer that fails on the right code kills every mutant by accident."""
    assert {name: seen for name, seen in layers.verdicts(layers.LAYERS).items() if seen is not None} == {}


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_killed_by_the_named_layer(mutant):
    with mutants.broken(mutant):
        assert layers.verdicts([mutant.killed_by], devices=mutant.devices)[mutant.killed_by] is not None


@pytest.mark.parametrize(
    "mutant", [mutant for mutant in mutants.MUTANTS if mutant.kind == "sum"], ids=lambda mutant: mutant.name
)
@pytest.mark.slow
def test_mutant_of_the_sum_stands_far_above_the_tolerance(mutant):
    """The gap rule: 100 times the bound that the right code keeps (k <= 16, T <= 1024)."""
    with mutants.broken(mutant):
        assert mutants.margin(mutant) >= kill_matrix.GAP_RULE


def test_first_and_last_is_invisible_at_two_micro_batches():
    """Why windows of 3 or more are everywhere: the DeepSpeed fault gives the right sum, bit for bit, at k = 2."""
    errors = mutants.first_and_last_by_size([1, 2, 3, 4, 7, 16])
    assert errors[1] == errors[2] == 0.0
    assert all(errors[k] > 0.1 for k in (3, 4, 7, 16)), errors


def test_kill_matrix_names_a_survivor_and_a_thin_margin():
    right = kill_matrix.Row("first + last", dict.fromkeys(layers.LAYERS, "seen"), 1e4)
    assert kill_matrix.complaints([right]) == []
    alive = right._replace(seen=dict.fromkeys(layers.LAYERS))
    assert "P7 reference did not see it" in kill_matrix.complaints([alive])[0]
    assert "margin 7" in kill_matrix.complaints([right._replace(margin=7.0)])[0]
