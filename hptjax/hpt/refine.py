"""Advantages computed a second time, from what a score pass says of a whole update. On the host, in float64.

    refinement     advantages of the policy's tokens                                        for
    critic_gae     whitened GAE of rewards and values; the returns are the critic's targets    ppo
    top_entropy    unchanged where the entropy is among the highest, else 0                    hpt.top_entropy
    mean_one       divided by the mean importance weight                                       hpt.correction_normalised

Packing and weights do not depend on advantages, so an update that is assembled again with refined ones has the same
packed rows, and the scores stay where they belong (`train/second_look.py` compares them).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped

from hptjax.hpt.assemble import Update
from hptjax.hpt.unpack import by_sample
from hptjax.losses.mismatch import scale_to_mean_one, truncated_weights
from hptjax.losses.returns import gae, reward_at_end, whitened
from hptjax.losses.selection import entropy_threshold
from hptjax.records import Sample, SampleId

PerSample = Mapping[SampleId, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class ScoredUpdate:
    """An update beside what its score pass says; tokens stand in the order of sample ids.

    Args
      scores: name -> sample -> values at its target positions: "rollout_logprobs", "entropy", "rollout_values".
      runs: term -> samples that it weighs -> True on the target positions of its run.
      advantages: term -> sample -> one per token of its run.
    """

    samples: Sequence[Sample]
    scores: Mapping[str, PerSample]
    runs: Mapping[str, PerSample]
    advantages: Mapping[str, PerSample]

    def lengths(self, term: str) -> Int[np.ndarray, " n"]:
        """Tokens of each sample that the term weighs."""
        return np.asarray([int(run.sum()) for run in self.runs[term].values()], np.int64)

    def flat(self, term: str, name: str) -> Float[np.ndarray, " X"]:
        """The scores of that name on the term's tokens, sample after sample."""
        parts = [np.asarray(self.scores[name][key], np.float64)[run] for key, run in self.runs[term].items()]
        return np.concatenate([np.zeros(0), *parts])

    def split(self, term: str, values: Shaped[np.ndarray, " X"]) -> dict[SampleId, np.ndarray]:
        """The inverse of `flat`: one value per token of the term -> sample -> its own."""
        return dict(zip(self.runs[term], np.split(values, np.cumsum(self.lengths(term))[:-1]), strict=False))


Refined = Mapping[str, PerSample]
"""Term -> sample -> one advantage (or target) per token of its run."""

Refinement = Callable[[ScoredUpdate], Refined]


def scored_update(update: Update, scores: Sequence[Mapping[str, np.ndarray]]) -> ScoredUpdate:
    """The update by sample.

    Args
      scores: of each micro-batch, name -> [B T].
    """
    names = sorted(scores[0]) if scores else []
    weights, advantages = {}, {}
    for term in update.terms:
        planes = [micro_batch.planes[term] for micro_batch in update.micro_batches]
        weights[term] = by_sample(update, [np.asarray(plane.weights) for plane in planes])
        advantages[term] = by_sample(update, [np.asarray(plane.advantages) for plane in planes])
    ids = update.sample_ids
    runs = {term: {key: held[key] > 0 for key in ids if (held[key] > 0).any()} for term, held in weights.items()}
    return ScoredUpdate(
        samples=update.samples,
        scores={name: by_sample(update, [np.asarray(each[name]) for each in scores]) for name in names},
        runs=runs,
        advantages={
            term: {key: np.asarray(advantages[term][key], np.float64)[run] for key, run in held.items()}
            for term, held in runs.items()
        },
    )


def in_turn(refinements: Sequence[Refinement]) -> Refinement:
    """One after the other, each on the advantages of the one before."""

    def refine(update: ScoredUpdate) -> Refined:
        changed: dict[str, PerSample] = {}
        for refinement in refinements:
            found = refinement(update)
            changed |= found
            update = dataclasses.replace(update, advantages={**update.advantages, **found})
        return changed

    return refine


def critic_gae(*, gamma: float, smoothing: float) -> Refinement:
    """GAE of the reward at the last token and the critic's values, whitened over the update's tokens; and its returns.

    The value after a sample's last token is 0, also where the sample met its length limit.
    Source arXiv 1506.02438 Eq. 16; whitening as in verl (`losses/returns.py`).
    """

    def refine(update: ScoredUpdate) -> Refined:
        rewards = {sample.sample_id: sample.reward for sample in update.samples}
        lengths = update.lengths("value")
        mine = np.asarray([rewards[key] for key in update.runs["value"]], np.float64)
        values = update.flat("value", "rollout_values")
        found = gae(reward_at_end(mine, lengths), values, lengths, gamma=gamma, smoothing=smoothing)
        return {
            "rl": update.split("value", whitened(found.advantages)),
            "value": update.split("value", found.returns),
        }

    return refine


def top_entropy(share: float) -> Refinement:
    """The `share` of the rollouts' tokens with the highest entropy keep their advantage, the others get 0.

    By the advantages and not by the weights, so that a sequence's own statistics (GSPO's mean) still count all of it.
    Source arXiv 2506.01939, with 0.2.
    """

    def refine(update: ScoredUpdate) -> Refined:
        entropies = update.flat("rl", "entropy")
        if not entropies.size:
            return {}
        kept = update.split("rl", entropies >= entropy_threshold(entropies, share))
        return {"rl": {key: np.where(kept[key], held, 0.0) for key, held in update.advantages["rl"].items()}}

    return refine


def mean_one(*, cap: float, whole_sequence: bool) -> Refinement:
    """Advantages of the rollouts divided by the mean of their truncated weights, which multiply them on the device.

    The weights are taken from the score pass and `Sample.sampler_logprobs`; dividing advantages scales the gradient as
    dividing the weights would. Source `spec/methods.md` 2.11: normalised after truncation.
    """

    def refine(update: ScoredUpdate) -> Refined:
        sampler = {
            s.sample_id: np.concatenate([np.zeros(len(s.prompt_tokens) - 1), s.sampler_logprobs])
            for s in update.samples
        }
        before = [sampler[key][run] for key, run in update.runs["rl"].items()]
        log_ratio = update.flat("rl", "rollout_logprobs") - np.concatenate([np.zeros(0), *before])
        weights = truncated_weights(log_ratio, update.lengths("rl"), cap=cap, whole_sequence=whole_sequence)
        scale = scale_to_mean_one(weights)
        return {"rl": {key: scale * held for key, held in update.advantages["rl"].items()}}

    return refine
