"""T6 and T7: what every single token does to the sum that `micro_step` leaves, measured one token at a time.

The influence matrix J[p, i, t] is d(sums) / d(weight of token t in micro-batch i). The sums are linear in the weights,
so its column is what a whole window leaves in the sums when that one token has weight 1 and all others have 0. It must
be the token's own gradient, which a second route gives: by hand in NumPy float64 for the toys, from an unpacked
log-softmax for the decoder. A lost micro-batch is then a run of zero columns, and a scale is a scale.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hptjax.build.policy import build_policy
from hptjax.build.stages import build_stages
from hptjax.config_model import ShapeConfig
from hptjax.models import decoder
from hptjax.records import Source
from hptjax.train.accumulate import Status
from hptjax.train.step import make_micro_step
from tests import recorded, tiny, toys
from tests.proofs.test_structure import ADDS, each_leaf, mutated, with_sums

UNIT_ROUNDOFF = 2.0**-24
ROWS, WIDTH = 2, 5
SIZES = (3, 4, 5, 6, 7)  # never only 2: there a first-plus-last bug is invisible


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)])


def window(k, seed=0):
    """(tokens, mask) [k ROWS WIDTH] of a window: every micro-batch has live and dead tokens, each its own number."""
    rng = np.random.default_rng((k, seed))
    tokens = rng.integers(0, toys.VOCAB, (k, ROWS, WIDTH)).astype(np.int32)
    live = 1 + rng.permutation(ROWS * WIDTH - 1)[:k]
    order = rng.permuted(np.tile(np.arange(ROWS * WIDTH), (k, 1)), axis=1)
    return tokens, (order < live[:, None]).reshape(tokens.shape)


def micro_batches(tokens, mask, weights):
    k = len(tokens)
    rows = [range(ROWS * i, ROWS * (i + 1)) for i in range(k)]
    shape = (k * ROWS, WIDTH)
    return toys.window(tokens.reshape(shape), mask.reshape(shape), weights.reshape(shape), rows, pad_rows=ROWS)


def sums_after(step, state, batches, *, flush=False):
    """The gradient sums after these micro-batches, as one vector. `flush`: the last one is told that it is."""
    for index, batch in enumerate(batches):
        state = step(state, batch, jnp.asarray(flush and index == len(batches) - 1))
    return flat(state.chains["policy"].sums.gradients)


def influence(step, state, tokens, mask, *, flush=False):
    """J [k ROWS WIDTH P]: one window per token, dead tokens too."""
    columns = []
    for place in range(tokens.size):
        weights = np.zeros(tokens.size)
        weights[place] = 1.0
        batches = micro_batches(tokens, mask, weights.reshape(tokens.shape))
        columns.append(sums_after(step, state, batches, flush=flush))
    return np.stack(columns).reshape(*tokens.shape, -1)


def linear_by_hand(tokens):
    """d(x . theta) / d theta = x."""
    return toys.FEATURE_TABLE[tokens].astype(np.float64)


def tanh_by_hand(tokens):
    """s = (h . w2)^2 with h = tanh(x w1 / 8): ds/dw2 = 2 (h . w2) h, ds/dw1 = x outer 2 (h . w2) w2 (1 - h^2) / 8."""
    params = toys.tanh_params()["policy"]
    w1, w2 = (np.asarray(params[name], np.float64) for name in ("w1", "w2"))
    x = toys.FEATURE_TABLE[tokens].astype(np.float64)
    h = np.tanh(x @ w1 / 8.0)
    outer = 2.0 * (h @ w2)[..., None]
    d_w1 = x[..., :, None] * (outer * w2 * (1.0 - h**2) / 8.0)[..., None, :]
    return np.concatenate([d_w1.reshape(*tokens.shape, -1), outer * h], axis=-1)


LINEAR = (toys.linear_losses, toys.linear_params, linear_by_hand)
TANH = (toys.tanh_losses, toys.tanh_params, tanh_by_hand)


@functools.cache
def made(net):
    """(jitted shipped step, fresh state) of a toy under SGD of rate 1; one compilation serves every k."""
    losses, params, _ = net
    return toys.sgd_setup(losses, params())


@functools.cache
def measured(net, k):
    """(tokens, mask, J) of the shipped step."""
    tokens, mask = window(k)
    return tokens, mask, influence(*made(net), tokens, mask)


def zero_columns(matrix, mask):
    """Micro-batches all of whose live tokens have no influence at all."""
    return [i for i in range(len(mask)) if not matrix[i][mask[i]].any()]


# T7, by hand


@pytest.mark.parametrize("k", SIZES)
def test_t7_linear_influence_is_bitwise_the_integer_gradient_of_every_token(k):
    tokens, mask, matrix = measured(LINEAR, k)
    assert np.array_equal(matrix, np.where(mask[..., None], linear_by_hand(tokens), 0.0))
    assert not zero_columns(matrix, mask)
    assert (np.abs(matrix[mask]).sum(axis=-1) > 0).all()
    rng = np.random.default_rng(k)
    weights = rng.integers(-3, 4, mask.shape)
    together = sums_after(*made(LINEAR), micro_batches(tokens, mask, weights))
    assert np.array_equal(together, np.einsum("irt,irtp->p", weights, matrix))  # and the sum is no more than its parts


@pytest.mark.parametrize("k", SIZES)
def test_t7_tanh_influence_is_the_float64_gradient_of_every_token(k):
    tokens, mask, matrix = measured(TANH, k)
    expected = tanh_by_hand(tokens)
    norms = np.linalg.norm(expected, axis=-1)
    error = np.linalg.norm(matrix - expected, axis=-1)
    assert (error[mask] <= 16 * (1 + 1) * UNIT_ROUNDOFF * norms[mask]).all()
    assert (norms[mask] > 1e-3).all()
    assert not matrix[~mask].any()
    weights = np.random.default_rng(k).uniform(0.1, 1.0, mask.shape)
    together = sums_after(*made(TANH), micro_batches(tokens, mask, weights))
    parts = np.einsum("irt,irtp->ip", np.where(mask, weights, 0.0), expected)
    bound = 16 * (k + math.sqrt(mask.sum())) * UNIT_ROUNDOFF * np.linalg.norm(parts, axis=-1).sum()
    assert np.linalg.norm(together - parts.sum(axis=0)) <= bound
    assert np.linalg.norm(parts, axis=-1).min() > 100 * bound  # the gap rule: a lost micro-batch would be seen


# T7, broken sums


def keep_sums(after, given, part):
    """What the flush saw stays in the sums, to be read; the update itself was refused (witness, checksum)."""
    return with_sums(after, gradients=jax.tree.map(jnp.copy, given.chains["policy"].sums.gradients))


def twice(total, part, state, micro_batch, is_last):
    return total + jnp.where(micro_batch.micro_index == 1, 2.0, 1.0) * part


BROKEN = {  # name: (add, factor of the columns of micro-batch i of k)
    "shipped": (None, lambda i, k: 1.0),
    "first_and_last": (ADDS["first_and_last_by_select"][0], lambda i, k: float(i in (0, k - 1))),
    "first_only": (ADDS["first_only"][0], lambda i, k: float(i == 0)),
    "last_only": (ADDS["last_only"][0], lambda i, k: float(i == k - 1)),
    "second_counted_twice": (each_leaf(twice), lambda i, k: 2.0 if i == 1 else 1.0),
    "added_to_itself_twice": (each_leaf(lambda total, part, *_: total + (part + part)), lambda i, k: 2.0),
    "halved_sums": (each_leaf(lambda total, part, *_: total * 0.5 + part), lambda i, k: 0.5 ** (k - 1 - i)),
    "running_mean": (ADDS["running_mean"][0], lambda i, k: 1.0 / k),
}


@functools.cache
def broken(name):
    """(jitted broken linear step that leaves its sums, fresh state)."""
    step = make_micro_step(LINEAR[0], {"policy": optax.sgd(1.0)})
    return jax.jit(mutated(step, add=BROKEN[name][0], flush=keep_sums)), made(LINEAR)[1]


@pytest.mark.parametrize("name", BROKEN)
def test_t7_influence_of_a_broken_sum_names_the_micro_batches(name):
    k = 5
    factor = BROKEN[name][1]
    tokens, mask = window(k)
    with jax.numpy_dtype_promotion("standard"):
        matrix = influence(*broken(name), tokens, mask, flush=True)
    lost = [i for i in range(k) if factor(i, k) == 0.0]
    assert zero_columns(matrix, mask) == lost
    factors = np.asarray([factor(i, k) for i in range(k)])[:, None, None, None]
    expected = np.where(mask[..., None], factors * linear_by_hand(tokens), 0.0)
    np.testing.assert_allclose(matrix, expected, rtol=1e-6, atol=1e-6)
    right = np.array_equal(matrix, np.where(mask[..., None], linear_by_hand(tokens), 0.0))
    assert right == (name == "shipped")


def test_t7_first_and_last_survives_two_micro_batches():
    """Why no test here stops at k = 2."""
    tokens, mask = window(2)
    matrix = influence(*broken("first_and_last"), tokens, mask, flush=True)
    assert np.array_equal(matrix, np.where(mask[..., None], linear_by_hand(tokens), 0.0))


def test_t7_mean_of_means_has_no_zero_column_but_the_wrong_ones():
    """A loss that divides by its own live tokens: every micro-batch arrives, each by another factor."""

    def own_mean(params, batch):
        named, stats = toys.linear_losses(params, batch)
        live = jnp.maximum(jnp.sum(batch.completion_mask, dtype=jnp.float32), 1.0)
        return {name: value / live for name, value in named.items()}, stats

    tokens, mask = window(4)
    matrix = influence(*toys.sgd_setup(own_mean, toys.linear_params()), tokens, mask)
    counts = mask.sum(axis=(1, 2))
    assert zero_columns(matrix, mask) == []
    assert len(set(counts)) == 4
    expected = np.where(mask[..., None], linear_by_hand(tokens) / counts[:, None, None, None], 0.0)
    np.testing.assert_allclose(matrix, expected, rtol=1e-6)


# T6, poison


def update_of(net, tokens, mask, weights):
    """What SGD of rate 1 adds to the parameters after a whole window, with the report's status."""
    step, state = made(net)
    after = toys.run_window(step, state, micro_batches(tokens, mask, weights))
    assert int(after.report.status) == Status.UPDATED
    return flat(after.params).astype(np.float64) - flat(state.params)


def other_token(rng, token):
    """Another token than this one."""
    return (token + rng.integers(1, toys.VOCAB)) % toys.VOCAB


@pytest.mark.parametrize("k", SIZES)
def test_t6_a_poisoned_token_changes_the_update_by_exactly_what_it_must(k):
    """Integers: bitwise. For each micro-batch in turn, one live token's target, one's weight, and one dead token."""
    rng = np.random.default_rng(60 + k)
    tokens, mask = window(k, seed=6)
    weights = rng.integers(1, 4, mask.shape).astype(np.float64)
    clean = update_of(LINEAR, tokens, mask, weights)
    for i in range(k):
        live = (i, *rng.permutation(np.argwhere(mask[i]))[0])
        dead = (i, *rng.permutation(np.argwhere(~mask[i]))[0])
        target = tokens.copy()
        target[live] = other_token(rng, tokens[live])
        change = weights[live] * (linear_by_hand(target[live]) - linear_by_hand(tokens[live]))
        assert change.any()
        assert np.array_equal(update_of(LINEAR, target, mask, weights), clean - change), i
        heavier = weights.copy()
        heavier[live] += 2.0
        assert np.array_equal(update_of(LINEAR, tokens, mask, heavier), clean - 2.0 * linear_by_hand(tokens[live])), i
        hidden, unread = tokens.copy(), weights.copy()
        hidden[dead], unread[dead] = other_token(rng, tokens[dead]), 1e9
        assert np.array_equal(update_of(LINEAR, hidden, mask, unread), clean), i


def test_t6_a_poisoned_token_of_a_net_changes_the_sums_as_predicted():
    k = 4
    rng = np.random.default_rng(64)
    tokens, mask = window(k, seed=7)
    weights = rng.uniform(0.5, 1.0, mask.shape)
    clean = sums_after(*made(TANH), micro_batches(tokens, mask, weights))
    total = np.linalg.norm(tanh_by_hand(tokens)[mask] * weights[mask][:, None], axis=-1).sum()
    bound = 16 * (k + math.sqrt(mask.sum())) * UNIT_ROUNDOFF * total
    for i in range(k):
        live = (i, *rng.permutation(np.argwhere(mask[i]))[0])
        dead = (i, *rng.permutation(np.argwhere(~mask[i]))[0])
        poisoned = tokens.copy()
        poisoned[live] = other_token(rng, tokens[live])
        change = weights[live] * (tanh_by_hand(poisoned)[live] - tanh_by_hand(tokens)[live])
        got = sums_after(*made(TANH), micro_batches(poisoned, mask, weights)).astype(np.float64) - clean
        assert np.linalg.norm(got - change) <= bound < np.linalg.norm(change) / 100, i
        hidden = tokens.copy()
        hidden[dead] = other_token(rng, tokens[dead])
        assert np.array_equal(sums_after(*made(TANH), micro_batches(hidden, mask, weights)), clean), i


# the product's own decoder, packed, against an unpacked log-softmax

SHAPE = ShapeConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=32, qk_norm=False)
LONGEST = 40


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """One HPT update of demonstrations and rollouts in several micro-batches.

    Args
      sums: micro-batches -> vector of gradient sums. gradients: per sample, d logp_p / d params: [LONGEST P].
    """

    samples: list
    plan: tuple
    sums: object
    gradients: list


@pytest.fixture(scope="module")
def product(tmp_path_factory):
    config = tiny.tiny_config(tmp_path_factory.mktemp("influence"))
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, shape=SHAPE),
        batch=dataclasses.replace(config.batch, rows=1, row_tokens=LONGEST),
    )
    policy = build_policy(config)
    stage = build_stages(config, policy, recorded.questions())[-1]
    samples = recorded.mixed(2, 1)
    update = stage.assemble(samples, frozenset())

    def sums(plan):
        return sums_after(stage.micro_step, stage.start({"policy": policy.params}, None), plan)

    @jax.jit
    @jax.jacrev
    def token_gradients(params, inputs, targets):
        time = jnp.arange(LONGEST, dtype=jnp.int32)[None, :]
        hidden = decoder.forward(
            params, inputs[None, :], time, jnp.ones_like(time), config=policy.config, compute_dtype=jnp.float32
        )
        all_logprobs = jax.nn.log_softmax(hidden[0] @ decoder.unembedding(params, policy.config), axis=-1)
        return jnp.take_along_axis(all_logprobs, targets[:, None], axis=1)[:, 0]  # [T]

    gradients = []
    for sample in update.samples:
        tokens = np.concatenate([sample.prompt_tokens, sample.completion_tokens])
        padded = np.pad(tokens, (0, LONGEST + 1 - len(tokens))).astype(np.int32)
        tree = token_gradients(policy.params, padded[:-1], padded[1:])
        leaves = [np.asarray(leaf, np.float64).reshape(LONGEST, -1) for leaf in jax.tree.leaves(tree)]
        gradients.append(np.concatenate(leaves, axis=1))
    return Product(list(update.samples), update.micro_batches, sums, gradients)


def with_weights(plan, weights):
    """The plan with other weights: plane name -> [k B T]."""
    return [
        dataclasses.replace(
            batch,
            planes={
                name: dataclasses.replace(plane, weights=weights[name][i].astype(np.float32))
                for name, plane in batch.planes.items()
            },
        )
        for i, batch in enumerate(plan)
    ]


def stacked(plan, read):
    return np.stack([read(batch) for batch in plan])


def planned_weights(plan):
    return {name: stacked(plan, lambda batch, name=name: batch.planes[name].weights) for name in plan[0].planes}


def owner(product, place):
    """(sample, its target position, plane, factor of grad logp) of a packed live token (micro-batch, row, position)."""
    i, row, t = place
    batch = product.plan[i]
    number = int(batch.sample_index[row, batch.segment_ids[row, t] - 1])
    sample = product.samples[number]
    plane = "sft" if sample.source == Source.DEMONSTRATION else "rl"
    position = int(batch.positions[row, t])
    tokens = np.concatenate([sample.prompt_tokens, sample.completion_tokens])
    assert tokens[position + 1] == batch.target_tokens[row, t]
    return number, position, plane, -1.0 if plane == "sft" else -float(batch.planes["rl"].advantages[row, t])


def column_by_hand(product, place):
    number, position, _, factor = owner(product, place)
    return factor * product.gradients[number][position]


TOKEN_BOUND = 16 * (1 + math.sqrt(LONGEST)) * UNIT_ROUNDOFF  # accumulation spec 3.6, for one micro-batch


def test_t7_product_influence_is_the_gradient_of_every_live_token(product):
    mask = stacked(product.plan, lambda batch: batch.completion_mask)
    assert len(mask) >= 3
    counts = mask.sum(axis=(1, 2))
    assert len(set(counts)) > 1
    assert counts.sum() == sum(len(sample.completion_tokens) for sample in product.samples)
    planned = planned_weights(product.plan)
    total = np.zeros(product.gradients[0].shape[1])
    norms = 0.0
    seen = set()
    for place in map(tuple, np.argwhere(mask)):
        number, position, plane, factor = owner(product, place)
        weights = {name: np.zeros(mask.shape) for name in planned}
        weights[plane][place] = 1.0
        column, expected = product.sums(with_weights(product.plan, weights)), column_by_hand(product, place)
        assert factor != 0.0
        assert np.linalg.norm(expected) > 0.0
        assert np.linalg.norm(column - expected) <= TOKEN_BOUND * np.linalg.norm(expected), place
        seen.add((number, position))
        total += planned[plane][place] * expected
        norms += planned[plane][place] * np.linalg.norm(expected)
    assert len(seen) == counts.sum()  # every live token of every sample once
    bound = 16 * (len(mask) + math.sqrt(counts.sum())) * UNIT_ROUNDOFF * norms
    assert np.linalg.norm(product.sums(product.plan) - total) <= bound < np.linalg.norm(total) / 100


def test_t7_product_influence_of_dead_tokens_is_exactly_zero(product):
    """Prompt, padding: whatever weight and advantage stand there."""
    rng = np.random.default_rng(70)
    mask = stacked(product.plan, lambda batch: batch.completion_mask)
    assert (~mask).sum() > 20
    poisoned = []
    for i, batch in enumerate(product.plan):
        dead = np.where(mask[i], 0.0, rng.uniform(1.0, 2.0, mask[i].shape)).astype(np.float32)
        plane = dataclasses.replace(next(iter(batch.planes.values())), weights=dead, advantages=np.ones_like(dead))
        poisoned.append(dataclasses.replace(batch, planes=dict.fromkeys(batch.planes, plane)))
    assert not product.sums(poisoned).any()


def test_t6_product_poison_in_each_micro_batch_is_seen_and_elsewhere_is_not(product):
    rng = np.random.default_rng(61)
    clean = product.sums(product.plan)
    planned = planned_weights(product.plan)
    for i, batch in enumerate(product.plan):
        live, dead = (rng.permutation(np.argwhere(m))[0] for m in (batch.completion_mask, ~batch.completion_mask))
        place = (i, *live)
        plane = owner(product, place)[2]
        heavier = {name: values.copy() for name, values in planned.items()}
        heavier[plane][place] += 100.0 * planned[plane][place]
        added = (heavier[plane][place] - planned[plane][place]) * column_by_hand(product, place)
        got = product.sums(with_weights(product.plan, heavier)).astype(np.float64) - clean
        assert np.linalg.norm(got - added) <= 1e-4 * np.linalg.norm(added), i
        targets = batch.target_tokens.copy()
        targets[tuple(dead)] = 3 + (targets[tuple(dead)] + 1) % 10
        unread = [*product.plan[:i], dataclasses.replace(batch, target_tokens=targets), *product.plan[i + 1 :]]
        assert np.array_equal(product.sums(unread), clean), i
        targets = batch.target_tokens.copy()
        targets[tuple(live)] = 3 + (targets[tuple(live)] + 1) % 10
        read = [*product.plan[:i], dataclasses.replace(batch, target_tokens=targets), *product.plan[i + 1 :]]
        assert not np.array_equal(product.sums(read), clean), i
