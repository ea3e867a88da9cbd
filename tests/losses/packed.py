"""A tabular policy on ragged packed rows, and two routes to a gradient on it.

One route goes through the package: a row of the table, packed arrays, weights. The other is a textbook loss, sequence
by sequence on plain lists, differentiated by jax.grad; it shares no code with the package.

Rows hold up to three sequences with prompt tokens that are not live, and end in padding.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hptjax.losses.table import policy_token_loss
from hptjax.losses.upge import weighted_sum
from hptjax.losses.view import TokenView

V = 5
LAYOUT = [[(2, 5), (1, 4), (0, 1)], [(3, 9)], [(1, 3), (2, 2)], [(1, 6), (1, 4)]]  # per row: (prompt, completion)
WIDTH = 14


@dataclasses.dataclass(frozen=True)
class Sequence:
    row: int
    places: np.ndarray  # of its live tokens


@dataclasses.dataclass(frozen=True)
class Toy:
    """logits [B T V], everything else [B T]; `advantages` are per sequence."""

    logits: np.ndarray
    targets: np.ndarray
    segment_ids: np.ndarray
    live: np.ndarray
    pair_ids: np.ndarray
    old: np.ndarray
    sampler: np.ndarray
    reference: np.ndarray
    teacher: np.ndarray
    author: np.ndarray
    sequences: list[Sequence]
    advantages: np.ndarray

    def spread(self, per_sequence):
        """[n] -> [B T], 0 off the sequences' live tokens."""
        out = np.zeros(self.targets.shape)
        for sequence, value in zip(self.sequences, per_sequence, strict=True):
            out[sequence.row, sequence.places] = value
        return out

    @property
    def lengths(self):
        return np.array([len(s.places) for s in self.sequences])

    @property
    def sequence_mean(self):
        """Weights of seq_mean_token_mean, written out."""
        return self.spread(1 / (self.lengths * len(self.sequences)))

    @property
    def token_mean(self):
        return self.spread(np.full(len(self.sequences), 1 / self.lengths.sum()))


def make_toy(seed=0, *, on_policy=False, layout=LAYOUT, width=WIDTH):
    rng = np.random.default_rng(seed)
    shape = (len(layout), width)
    segment_ids, pair_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    live, sequences = np.zeros(shape, bool), []
    for row, segments in enumerate(layout):
        at = 0
        for number, (prompt, completion) in enumerate(segments, start=1):
            segment_ids[row, at : at + prompt + completion] = number
            pair_ids[row, at : at + prompt + completion] = 1 if len(segments) == 2 else 0
            live[row, at + prompt : at + prompt + completion] = True
            sequences.append(Sequence(row, np.arange(at + prompt, at + prompt + completion)))
            at += prompt + completion
    # per token and in a fixed order of the sequences, so that a wider row holds the same numbers
    logits, targets = np.zeros((*shape, V)), np.zeros(shape, np.int32)
    old, sampler, reference, teacher, author = (np.zeros(shape) for _ in range(5))
    for s in sequences:
        n = len(s.places)
        logits[s.row, s.places] = rng.normal(size=(n, V))
        targets[s.row, s.places] = rng.integers(0, V, n)
        z = logits[s.row, s.places]
        own = (z - np.log(np.exp(z).sum(1, keepdims=True)))[np.arange(n), targets[s.row, s.places]]
        old[s.row, s.places] = own if on_policy else own - np.log(rng.uniform(0.3, 2.0, n)) - rng.normal() * 0.3
        sampler[s.row, s.places] = old[s.row, s.places] + rng.normal(size=n) * 0.3
        for array in (reference, teacher, author):
            array[s.row, s.places] = own + rng.normal(size=n) * 0.5
    advantages = rng.normal(size=len(sequences))
    advantages[:2] = np.abs(advantages[:2]) * [1, -1]
    return Toy(
        logits, targets, segment_ids, live, pair_ids, old, sampler, reference, teacher, author, sequences, advantages
    )


def logprobs_of(logits, targets):
    return jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(targets)[:, :, None], axis=-1)[:, :, 0]


def view_of(toy, logits, **changed):
    everything = jax.nn.log_softmax(logits)
    view = TokenView(
        logprobs=logprobs_of(logits, toy.targets),
        entropy=-jnp.sum(jnp.exp(everything) * everything, axis=-1),
        rollout_logprobs=toy.old,
        sampler_logprobs=toy.sampler,
        reference_logprobs=toy.reference,
        teacher_logprobs=toy.teacher,
        demonstration_logprobs=toy.author,
        segment_ids=toy.segment_ids,
        live=toy.live,
        pair_ids=toy.pair_ids,
        max_segments=3,
    )
    return dataclasses.replace(view, **changed)


def row_gradient(row, toy, weights, advantages=None, **changed):
    """Route one: gradient in the logits of the row's packed, weighted loss."""
    per_token = toy.spread(toy.advantages if advantages is None else advantages)

    def loss(logits):
        return weighted_sum(policy_token_loss(row, view_of(toy, logits, **changed), per_token), weights)

    return np.asarray(jax.grad(loss)(jnp.asarray(toy.logits)))


def literal_gradient(toy, loss_of_sequence, advantages=None):
    """Route two: gradient of the sum over sequences of `loss_of_sequence(lp, A, s)`.

    lp: log-probs of the sequence's tokens [n]; A: its advantage; s: the stored log-probs of the same tokens by name.
    """
    advantages = toy.advantages if advantages is None else advantages
    return joint_gradient(
        toy,
        lambda sequences: sum(
            loss_of_sequence(lp, float(a), stored) for (lp, stored), a in zip(sequences, advantages, strict=True)
        ),
    )


def joint_gradient(toy, loss_of_all):
    """Gradient of `loss_of_all([(lp, s), ...])`, for losses that compare sequences."""
    rows = np.concatenate([np.full(len(s.places), s.row) for s in toy.sequences])
    places = np.concatenate([s.places for s in toy.sequences])
    chosen, stops = toy.targets[rows, places], np.cumsum(toy.lengths)
    cuts = [slice(int(stop - n), int(stop)) for stop, n in zip(stops, toy.lengths, strict=True)]
    names = ("old", "sampler", "reference", "teacher", "author")
    stored = {name: getattr(toy, name)[rows, places] for name in names}

    def loss(logits):
        z = logits[rows, places]
        lp = z[jnp.arange(len(chosen)), chosen] - jnp.log(jnp.sum(jnp.exp(z), axis=1))
        return loss_of_all([(lp[cut], {name: values[cut] for name, values in stored.items()}) for cut in cuts])

    return np.asarray(jax.grad(loss)(jnp.asarray(toy.logits)))


def same(got, want, *, atol=1e-12):
    assert np.abs(want).max() > 1e-4  # two zeros prove nothing
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=atol)


def silent_tokens(gradient, toy):
    """How many live tokens have no gradient at all."""
    return int((np.abs(gradient).max(-1)[toy.live] == 0).sum())
