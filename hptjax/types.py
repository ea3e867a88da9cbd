"""The device-side records that cross a package border: frozen pytrees with their shapes.

Alignment, said once: `logprobs[b, t]` belongs to `target_tokens[b, t]` given `input_tokens[b, :t + 1]`, and every
[B T] array uses this alignment. A token is *live* where `completion_mask` is True: it is trained on.

Dims: B packed rows, T target positions in a row, P positions of a shared prompt, S segments in a row, N samples, K term
planes, M micro-batches.
"""

from __future__ import annotations

from typing import Any

from flax import struct
from jaxtyping import Bool, Float, Int, UInt32

Array = Any  # a jax.Array on a device or an np.ndarray on the host; shapes are written with jaxtyping
Params = Any  # a pytree of arrays


@struct.dataclass
class TermPlane:
    """One term of the objective over a packed micro-batch.

    Args
      weights: mask x coefficient / normaliser of the whole update; >= 0; no advantage inside. Micro-batch terms add.
      advantages: the A of this term, or what a regression is fitted to; 0 where the weight is 0.
    """

    weights: Float[Array, "B T"]
    advantages: Float[Array, "B T"]


@struct.dataclass
class MicroBatch:
    """What one forward and backward pass sees: a fixed [B T] budget of packed segments.

    Args
      segment_ids: 0 is padding, 1..S count the segments of a row; attention never crosses them.
      positions: restart in each segment, at 0 or behind the shared prompt.
      completion_mask: True on live tokens.
      planes: term name -> its weights and advantages; the names are static.
      sampler_logprobs, rollout_logprobs, reference_logprobs, teacher_logprobs, demonstration_logprobs: nats; zeros
        where a method does not need them.
      temperature: per segment; 1 for demonstrations and empty segments.
      sample_index: per segment, the place in the update's flat list; -1 where there is no segment.
      sample_hash: per segment, 64 mixed bits of the sample's id, as two words; noise is keyed by it. 0 if no segment.
      source: per segment, a `Source`; -1 where there is no segment.
      first_written: per segment, the position of the first target that the segment's author wrote: those before it are
        prompt and forced prefix; 0 if no segment. None: nothing is forced.
      rollout_values: of the critic at sampling weights, reward units; only where a method has a critic.
      pair_ids: per segment, 1 upwards; the segments of a row that are compared with each other share it; 0: none.
      shared_tokens, shared_mask: of each row, the prompt that all its segments go on from but for its last token, and
        where there is one; each segment then begins at that last token, its positions where the prompt's stop. None:
        every segment holds its own prompt.
      optimizer: which of a tree's optimizers takes the update (`train.optimizer.alternating`); None: there is one.
      micro_index: which micro-batch of its update this is, 0 upwards.
      planned_tokens: live tokens of every micro-batch of the update, counted on the host from the samples, not from
        the packed arrays; zeros past the last. The witness is compared with it.
      planned_digest: per micro-batch of the update, the sum of its samples' hashes, each word modulo 2^32, from the
        list of their ids. What the packed rows hold is compared with it.
    """

    input_tokens: Int[Array, "B T"]
    target_tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    completion_mask: Bool[Array, "B T"]
    planes: dict[str, TermPlane]
    sampler_logprobs: Float[Array, "B T"]
    rollout_logprobs: Float[Array, "B T"]
    reference_logprobs: Float[Array, "B T"]
    temperature: Float[Array, "B S"]
    sample_index: Int[Array, "B S"]
    sample_hash: UInt32[Array, "B S 2"]
    source: Int[Array, "B S"]
    micro_index: Int[Array, ""]
    planned_tokens: Int[Array, " M"]
    planned_digest: UInt32[Array, "M 2"]
    teacher_logprobs: Float[Array, "B T"] | None = None
    demonstration_logprobs: Float[Array, "B T"] | None = None
    rollout_values: Float[Array, "B T"] | None = None
    pair_ids: Int[Array, "B S"] | None = None
    first_written: Int[Array, "B S"] | None = None
    shared_tokens: Int[Array, "B P"] | None = None
    shared_mask: Bool[Array, "B P"] | None = None
    optimizer: Int[Array, ""] | None = None


@struct.dataclass
class SumCount:
    """A total and what it counts over; merged by adding, divided once on the host (`masked.ratio`)."""

    total: Float[Array, ""]
    count: Float[Array, ""]


@struct.dataclass
class Peak:
    """A largest value; merged by max."""

    value: Float[Array, ""]


Stat = SumCount | Peak
