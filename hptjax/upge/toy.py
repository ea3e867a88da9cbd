"""A policy whose strings can all be written down: the bias of every row, by enumeration and not by sampling.

Strings of T letters out of V; the policy is a table of logits, one row per prefix. A group of G strings is drawn from
an older policy: all (V^T)^G groups are packed, one to a row, and weighted by their probability. So the expectation of a
row's gradient is exact, and so is the gradient of the expected reward (for rows of rollouts) or of the log-likelihood
of the author's strings (for rows of demonstrations).

A row may be scaled by any factor: a learning rate undoes it. Its bias is what is left of its direction,

    bias = min over s >= 0 of |s E[g] - grad J| / |grad J|  =  sqrt(1 - cos^2) where cos > 0, else 1
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from hptjax.losses.estimator import Need
from hptjax.losses.returns import TokenAdvantageFn
from hptjax.losses.view import TokenView
from hptjax.masked import ratio
from hptjax.upge.rows import MeasuredRow, coefficients, masked

LETTERS, LENGTH, GROUP = 2, 3, 3
PROVIDED = frozenset(
    {Need.ROLLOUT_LOGPROBS, Need.GROUPS, Need.DEMONSTRATIONS, Need.ENTROPY, Need.REFERENCE_LOGPROBS}
    | {Need.DEMONSTRATION_LOGPROBS, Need.SAMPLER_LOGPROBS}
)


@dataclasses.dataclass(frozen=True, eq=False)
class Toy:
    """Three tables of logits [contexts, letters], and the reward of every string."""

    logits: Float[np.ndarray, "C V"]
    old: Float[np.ndarray, "C V"]
    author: Float[np.ndarray, "C V"]
    rewards: Float[np.ndarray, " N"]


@dataclasses.dataclass(frozen=True)
class Bias:
    """How the expected gradient of a row lies to the exact one; cosine, and the bias of the module's head."""

    cosine: float
    bias: float
    masked_frac: float


def strings() -> Int[np.ndarray, "N T"]:
    """Every string, in order."""
    return np.array(list(itertools.product(range(LETTERS), repeat=LENGTH)))


def make_toy(seed: int, drift: float) -> Toy:
    """A random toy. Rewards are 0, 1/2 and 1: with two values only, one question cannot show what a division by the
    group's spread does to the direction.

    Args
      drift: how far the policy has moved since it sampled: the standard deviation of the change of its logits.
    """
    rng = np.random.default_rng(seed)
    contexts = sum(LETTERS**t for t in range(LENGTH))
    old = rng.normal(size=(contexts, LETTERS))
    rewards = np.resize([0.0, 0.0, 0.5, 1.0], LETTERS**LENGTH)
    rng.shuffle(rewards)
    return Toy(
        logits=old + drift * rng.normal(size=old.shape),
        old=old,
        author=rng.normal(size=old.shape),
        rewards=rewards,
    )


def bias_of(entry: MeasuredRow, toy: Toy) -> Bias:
    """The bias of one row on a toy, exactly."""
    demonstrations = entry.on == "demonstrations"
    drawn = _probabilities(toy.author if demonstrations else toy.old)
    members = (
        np.arange(drawn.size)[:, None]
        if demonstrations
        else np.array(list(itertools.product(range(drawn.size), repeat=GROUP)))
    )  # [R G]
    weights = np.prod(drawn[members], axis=1)  # [R]
    view, advantages = _packed(entry, toy, members)
    on_tokens = np.asarray(coefficients(entry.row, view, advantages), np.float64) * weights[:, None]
    expected = _score_sum(toy.logits, members, on_tokens)
    exact = _likelihood_gradient(toy) if demonstrations else _reward_gradient(toy)
    cosine = ratio(float(np.vdot(expected, exact)), float(np.linalg.norm(expected) * np.linalg.norm(exact)))
    off = np.asarray(masked(entry.row, view, advantages)) * weights[:, None]
    told = (np.asarray(advantages) != 0) * weights[:, None]
    return Bias(
        cosine=cosine,
        bias=math.sqrt(max(1.0 - cosine**2, 0.0)) if cosine > 0 else 1.0,
        masked_frac=ratio(float(off.sum()), float(told.sum())) if told.sum() else 0.0,
    )


def _contexts() -> Int[np.ndarray, "N T"]:
    """Which row of a table predicts each letter of each string: one per prefix, shorter prefixes first."""
    found = np.zeros((LETTERS**LENGTH, LENGTH), np.int64)
    prefix = np.zeros(LETTERS**LENGTH, np.int64)
    first = 0
    for t in range(LENGTH):
        found[:, t] = first + prefix
        first += LETTERS**t
        prefix = prefix * LETTERS + strings()[:, t]
    return found


def _log_table(logits: np.ndarray) -> np.ndarray:
    top = logits.max(axis=1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))


def _logprobs(logits: np.ndarray) -> Float[np.ndarray, "N T"]:
    return _log_table(logits)[_contexts(), strings()]


def _probabilities(logits: np.ndarray) -> Float[np.ndarray, " N"]:
    return np.exp(_logprobs(logits).sum(axis=1))


def _packed(entry: MeasuredRow, toy: Toy, members: Int[np.ndarray, "R G"]) -> tuple[TokenView, jax.Array]:
    """Every group as one packed row of G segments of T tokens, and the advantages of its tokens."""
    count, size = members.shape

    def spread(per_token: np.ndarray) -> jax.Array:
        return jnp.asarray(per_token[members].reshape(count, size * LENGTH), jnp.float32)

    table = _log_table(toy.logits)
    entropy = -(np.exp(table) * table).sum(axis=1)[_contexts()]
    rewards = toy.rewards[members].reshape(-1)
    groups = np.repeat(np.arange(count), size)
    per_token: TokenAdvantageFn | None = entry.row.token_advantage
    if per_token is None:
        advantages = np.repeat(entry.row.advantage(rewards, groups), LENGTH)
    else:
        advantages = per_token(rewards, groups, np.full(count * size, LENGTH))
    segments = np.repeat(np.arange(1, size + 1, dtype=np.int32), LENGTH)
    shape = (count, size * LENGTH)
    return (
        TokenView(
            logprobs=spread(_logprobs(toy.logits)),
            entropy=spread(entropy),
            rollout_logprobs=spread(_logprobs(toy.old)),
            sampler_logprobs=spread(_logprobs(toy.old)),
            reference_logprobs=spread(_logprobs(toy.old)),
            demonstration_logprobs=spread(_logprobs(toy.author)),
            segment_ids=jnp.broadcast_to(jnp.asarray(segments), shape),
            live=jnp.ones(shape, bool),
            max_segments=size,
        ),
        jnp.asarray(advantages.reshape(shape), jnp.float32),
    )


def _score_sum(
    logits: np.ndarray, members: Int[np.ndarray, "R G"], on_tokens: Float[np.ndarray, "R X"]
) -> Float[np.ndarray, "C V"]:
    """Sum over tokens of coefficient x grad log pi, with grad log softmax written out: one-hot minus probabilities."""
    contexts = _contexts()[members].reshape(-1)
    letters = strings()[members].reshape(-1)
    coefficient = on_tokens.reshape(-1)
    out = np.zeros_like(logits)
    np.add.at(out, (contexts, letters), coefficient)
    mass = np.zeros(len(logits))
    np.add.at(mass, contexts, coefficient)
    return out - mass[:, None] * np.exp(_log_table(logits))


def _reward_gradient(toy: Toy) -> Float[np.ndarray, "C V"]:
    """grad E[r] = sum over strings of p r grad log p."""
    weights = (_probabilities(toy.logits) * toy.rewards)[:, None] * np.ones((1, LENGTH))
    return _score_sum(toy.logits, np.arange(len(weights))[:, None], weights)


def _likelihood_gradient(toy: Toy) -> Float[np.ndarray, "C V"]:
    """grad of the mean log-likelihood of the author's strings."""
    weights = _probabilities(toy.author)[:, None] * np.ones((1, LENGTH))
    return _score_sum(toy.logits, np.arange(len(weights))[:, None], weights)


def biases(rows: Sequence[MeasuredRow], *, seeds: int, drifts: Sequence[float]) -> dict[str, dict[str, list[Bias]]]:
    """Row -> drift -> its bias on each of the toys 0 .. seeds - 1."""
    return {
        entry.name: {f"{drift:g}": [bias_of(entry, make_toy(seed, drift)) for seed in range(seeds)] for drift in drifts}
        for entry in rows
        if entry.on != "both" and entry.row.needs <= PROVIDED
    }
