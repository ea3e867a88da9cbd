"""Statistics of sequences in packed rows against a loop, and the factors that are made of them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hptjax.losses import reducers, table
from hptjax.losses.stability import band, sequence_band
from hptjax.losses.table import DR_GRPO, SFT
from hptjax.losses.view import block_suffix, pair_sum, segment_mean, segment_rank, segment_suffix, segment_sum
from hptjax.losses.weights import (
    entropy_weight,
    masked_is,
    sequence_tis,
    token_tis,
    top_entropy,
    top_entropy_of_sequence,
)
from tests.losses.packed import make_toy, row_gradient, same, view_of


def loop(toy, values, function):
    """`function(values of the sequence's live tokens) -> their statistic`, sequence by sequence; elsewhere 0."""
    out = np.zeros(values.shape)
    for s in toy.sequences:
        out[s.row, s.places] = function(values[s.row, s.places])
    return out


def suffix(x):
    return np.array([x[t + 1 :].sum() for t in range(len(x))])


def blocks_of_two(x):
    return np.array([x[(t // 2 + 1) * 2 :].sum() for t in range(len(x))])


def rank(x):
    """Place in falling order, the earlier of equals first."""
    return np.array([sum(y > x[t] or (y == x[t] and i < t) for i, y in enumerate(x)) for t in range(len(x))])


STATISTICS = (
    (segment_rank, rank),
    (lambda view, values: segment_rank(view, np.round(values)), lambda x: rank(np.round(x))),
    (segment_sum, np.sum),
    (segment_mean, np.mean),
    (segment_suffix, suffix),
    (lambda view, values: block_suffix(view, values, 2), blocks_of_two),
    (lambda view, values: block_suffix(view, values, 1), suffix),
)


@pytest.mark.parametrize(("statistic", "by_hand"), STATISTICS)
@pytest.mark.parametrize("jitted", [False, True])
def test_sequence_statistics_equal_a_loop_and_ignore_what_is_not_live(statistic, by_hand, jitted):
    toy = make_toy(40)
    view = view_of(toy, toy.logits)
    statistic = jax.jit(statistic) if jitted else statistic
    values = np.random.default_rng(0).normal(size=toy.live.shape)
    clean = np.asarray(statistic(view, values))
    np.testing.assert_allclose(np.where(toy.live, clean, 0), loop(toy, values, by_hand), rtol=0, atol=1e-12)
    for junk in (np.nan, np.inf, 1e300):
        got = np.asarray(statistic(view, np.where(toy.live, values, junk)))
        np.testing.assert_array_equal(got[toy.live], clean[toy.live])


@pytest.mark.parametrize(("statistic", "by_hand"), STATISTICS)
def test_sequence_statistics_see_no_neighbour_bitwise(statistic, by_hand):
    toy = make_toy(41)
    view, values = view_of(toy, toy.logits), np.random.default_rng(1).normal(size=toy.live.shape)
    clean = np.asarray(statistic(view, values))
    for s in toy.sequences[:3]:  # the three sequences of the first row
        mine = np.zeros(toy.live.shape, bool)
        mine[s.row, s.places] = True
        got = np.asarray(statistic(view, np.where(mine, values, np.nan)))
        np.testing.assert_array_equal(got[mine], clean[mine])


def test_pair_sum_adds_over_the_sequences_of_a_pair_only():
    toy = make_toy(42)
    values = np.random.default_rng(2).normal(size=toy.live.shape)
    got = np.asarray(pair_sum(view_of(toy, toy.logits), values))
    for row in range(len(values)):
        paired = toy.live[row] & (toy.pair_ids[row] == 1)
        np.testing.assert_allclose(got[row][paired], values[row][paired].sum(), atol=1e-12)
        np.testing.assert_array_equal(got[row][toy.pair_ids[row] == 0], 0)
    assert 0 < (toy.pair_ids == 1).sum() < toy.pair_ids.size


def test_block_suffix_refuses_blocks_of_nothing():
    toy = make_toy(43)
    with pytest.raises(ValueError, match="block_tokens"):
        block_suffix(view_of(toy, toy.logits), toy.old, 0)


def factor_of(toy, factor):
    view = view_of(toy, toy.logits)
    return np.asarray(factor(view, toy.spread(toy.advantages))), np.exp(toy.old - toy.sampler), np.asarray(view.entropy)


def test_mismatch_factors_by_their_definition():
    toy = make_toy(44)
    for factor, want in (
        (token_tis(1.2), lambda rho: np.minimum(rho, 1.2)),
        (token_tis(1.2, scale=3.0), lambda rho: 3 * np.minimum(rho, 1.2)),
        (masked_is(0.8, 1.2), lambda rho: np.where((rho >= 0.8) & (rho <= 1.2), rho, 0)),
        (band(0.8, 1.2), lambda rho: ((rho >= 0.8) & (rho <= 1.2)).astype(float)),
    ):
        got, rho, _ = factor_of(toy, factor)
        np.testing.assert_allclose(got[toy.live], want(rho)[toy.live], rtol=1e-12)
        assert 0 < (rho[toy.live] > 1.2).sum() < toy.live.sum()
    got, rho, _ = factor_of(toy, sequence_band(0.9, 1.1))
    means = np.exp(loop(toy, np.log(rho), np.mean))
    want = (means >= 0.9) & (means <= 1.1)
    np.testing.assert_array_equal(got[toy.live], want[toy.live])
    assert 0 < want[toy.live].sum() < toy.live.sum()
    for wrong in (lambda: band(1.2, 5.0), lambda: masked_is(0.5, 0.9), lambda: token_tis(0.0)):
        with pytest.raises(ValueError, match=r"band|masked_is|cap"):
            wrong()


def test_entropy_factors_by_their_definition():
    toy = make_toy(45)
    for sign in (-1, 1):
        got, _, entropy = factor_of(toy, entropy_weight(0.5, sign))
        want = loop(toy, entropy, lambda h, sign=sign: 0.5 * np.exp(sign * h.mean()))
        np.testing.assert_allclose(got[toy.live], want[toy.live], rtol=1e-12)
    got, _, entropy = factor_of(toy, top_entropy(1.2))
    np.testing.assert_array_equal(got, entropy >= 1.2)
    assert 0 < got[toy.live].sum() < toy.live.sum()
    got, _, entropy = factor_of(toy, top_entropy_of_sequence(0.3))
    want = loop(toy, entropy, lambda h: rank(h) < len(h) - np.floor(0.7 * len(h)))
    np.testing.assert_array_equal(got[toy.live], want[toy.live])
    np.testing.assert_array_equal(factor_of(toy, top_entropy_of_sequence(1.0))[0][toy.live], 1)
    with pytest.raises(ValueError, match="sign"):
        entropy_weight(0.5, 0)
    with pytest.raises(ValueError, match="share"):
        top_entropy_of_sequence(0.0)


def test_selections_and_weights_multiply_the_coefficient_and_carry_no_gradient():
    toy, weights = make_toy(46), make_toy(46).token_mean
    plain = row_gradient(DR_GRPO(), toy, weights)
    row = dataclasses.replace(DR_GRPO(), select=(top_entropy(1.2),), weights=(token_tis(1.2), entropy_weight(0.5, -1)))
    rho, entropy = np.exp(toy.old - toy.sampler), factor_of(toy, top_entropy(0.0))[2]
    factor = (entropy >= 1.2) * np.minimum(rho, 1.2) * loop(toy, entropy, lambda h: 0.5 * np.exp(-h.mean()))
    same(row_gradient(row, toy, weights), plain * factor[:, :, None])

    def by_stored(stored):
        view = dataclasses.replace(view_of(toy, toy.logits), **stored)
        return jnp.sum(weights * table.policy_token_loss(row, view, toy.spread(toy.advantages)))

    stored = {"rollout_logprobs": toy.old, "sampler_logprobs": toy.sampler, "entropy": entropy}
    for name, gradient in jax.grad(by_stored)({k: jnp.asarray(v) for k, v in stored.items()}).items():
        np.testing.assert_array_equal(gradient, 0, err_msg=name)


def test_no_gradient_flows_through_mask_denominator_or_factor():
    toy = make_toy(47)
    components = [getattr(row, part) for row in all_rows() for part in ("stability_mask", "denominator")]
    components += [token_tis(), sequence_tis(), masked_is(0.5, 2.0), entropy_weight(0.5, 1), band(), sequence_band()]

    def total(fields):
        view = dataclasses.replace(view_of(toy, toy.logits), **fields)
        return sum(jnp.sum(component(view, toy.spread(toy.advantages))) for component in components)

    fields = {"logprobs": view_of(toy, toy.logits).logprobs, "entropy": view_of(toy, toy.logits).entropy}
    fields |= {"rollout_logprobs": jnp.asarray(toy.old), "sampler_logprobs": jnp.asarray(toy.sampler)}
    fields |= {"reference_logprobs": jnp.asarray(toy.reference), "demonstration_logprobs": jnp.asarray(toy.author)}
    for name, gradient in jax.grad(total)(fields).items():
        np.testing.assert_array_equal(gradient, 0, err_msg=name)


def all_rows():
    makers = """TRSFT PEAR_TOKEN PEAR_BLOCK PEAR_SEQUENCE IMPLICIT_REWARD REINFORCE_PP PPO GRPO DR_GRPO DAPO CISPO
    CISPO_TABLE GSPO GMPO SAPO DPO""".split()
    rows = [SFT, table.DFT, table.CHORD_PHI, table.REINFORCE, table.RLOO]
    return [*rows, *(getattr(table, name)() for name in makers)]


def test_rows_name_a_reducer_that_exists_and_say_where_they_come_from():
    rows = all_rows()
    assert len({row.name for row in rows}) == len(rows) == 21
    for row in rows:
        assert callable(getattr(reducers, row.reducer))
        assert row.formula
        assert row.source
