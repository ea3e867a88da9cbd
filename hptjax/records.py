"""The host-side records that cross a package border, and the functions between them.

Nothing here imports jax, so that a verifier's worker stays small.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int


class SampleId(NamedTuple):
    """What a sample's randomness is keyed by: which question, which visit to it, which of its rollouts."""

    question: int
    round: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks of an id

    def __str__(self) -> str:
        return f"{self.question}/{self.round}/{self.index}"


class Source(enum.IntEnum):
    """Who wrote the tokens of a sample."""

    ROLLOUT = 0
    DEMONSTRATION = 1
    PREFIX = 2  # a demonstration's prefix, continued by the policy


class FinishReason(enum.IntEnum):
    """Why a completion ended: it wrote a stop token, or it met its limit."""

    STOP = 0
    LENGTH = 1


class Objective(enum.IntEnum):
    """What a question's update learns from."""

    RL = 0  # its rollouts
    SFT = 1  # its demonstration
    OFF_POLICY = 2  # its demonstration, as a rollout that somebody else made
    BOTH = 3
    NOTHING = 4  # all of its rollouts are solved, or none, and the method drops such groups


@dataclasses.dataclass(frozen=True)
class Example:
    """One problem of a task, as text.

    Args
      question_id: unique within a task and split; keys all randomness of the question.
      prompt, demonstration: text; the demonstration holds the completion without the stop token.
      answer: what the verifier needs, made of JSON values only (it travels to another process).
      canonical: equal for two instances that are the same problem; splits are disjoint in it.
      level: difficulty, 0 upwards.
      messages: the turns before the completion, each with `role` and `content`, that `prompt` is a rendering of; empty
        where the prompt is a text of its own.
      tools: what the turns may call, as JSON schemas.
    """

    question_id: int
    prompt: str
    demonstration: str
    answer: Mapping[str, Any]
    canonical: str
    level: int = 0
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """An example with its tokens. `demonstration_tokens` ends with the stop token.

    Args
      demonstration_logprobs: of those tokens, by the model that wrote them; nats; None if not known.
    """

    example: Example
    prompt_tokens: Int[np.ndarray, " p"]
    demonstration_tokens: Int[np.ndarray, " c"]
    demonstration_logprobs: Float[np.ndarray, " c"] | None = None

    @property
    def question_id(self) -> int:
        return self.example.question_id


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One completion to be sampled.

    Args
      prompt_tokens, prefix_tokens: context; the prefix is forced and counts as the start of the completion.
      max_completion_tokens: limit on the completion, prefix included.
      temperature: > 0. top_k: 0 turns it off. top_p: 1.0 turns it off.
      stop_ids: any of these ends the completion and is its last token.
    """

    sample_id: SampleId
    prompt_tokens: Int[np.ndarray, " p"]
    max_completion_tokens: int
    stop_ids: frozenset[int]
    prefix_tokens: Int[np.ndarray, " x"] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One prompt with one completion, whoever wrote it: an entry of the flat list that an update is made of.

    Args
      group_id: samples that share a baseline; the question id unless a method says otherwise.
      completion_tokens: includes the stop token where there is one, and the forced prefix.
      sampler_logprobs: as decoded, after temperature, before top-k and top-p; nats; 0 on the forced prefix; zeros for
        demonstrations.
      prefix_len: tokens at the start of the completion that the policy did not write.
      reward: None until a verifier has spoken. solved: the verifier's yes or no, which the gate counts.
      pair_id: samples that need each other in one forward pass share it (a bundle the packer never splits); -1: none.
      temperature: the log-probs of this sample are those of logits / temperature.
      decode_shape: the compiled shape that sampled it (contract 4), empty where nothing was sampled.
      demonstration_logprobs: of a demonstration's tokens, by the model that wrote it; nats; None if not stored.
    """

    sample_id: SampleId
    group_id: int
    source: Source
    prompt_tokens: Int[np.ndarray, " p"]
    completion_tokens: Int[np.ndarray, " c"]
    sampler_logprobs: Float[np.ndarray, " c"]
    finish_reason: FinishReason = FinishReason.STOP
    prefix_len: int = 0
    reward: float | None = None
    solved: bool = False
    pair_id: int = -1
    temperature: float = 1.0
    decode_shape: str = ""
    demonstration_logprobs: Float[np.ndarray, " c"] | None = None


@dataclasses.dataclass(frozen=True)
class Grade:
    """What an answer verifier says of one completion under one policy.

    Args
      policy: "strict", "lenient" or "hpt".
      reason: the route that found the answers equal, "exact", "numeric", "symbolic", "set", "choice" or "math_verify";
        "none" where none did.
      status: "ok" where both answers were read, also when only math-verify could; else "no_answer", "parse_error" or
        "no_gold".
      extracted: the text that was taken for the answer, at most 256 characters of it.
      canonical: that text in the form that was compared, likewise cut.
    """

    policy: str
    correct: bool
    reason: str
    status: str
    extracted: str | None = None
    canonical: str | None = None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A verifier's word on one completion: a reward, whether it counts as solved, and why.

    Args
      grades: the same completion by each policy of an answer verifier, the one that gave the reward first; empty for
        other verifiers.
    """

    reward: float
    solved: bool
    reason: str
    grades: tuple[Grade, ...] = dataclasses.field(default=(), repr=False)

    def solved_by(self, policy: str) -> bool:
        """The word of one policy; `solved` where the verifier has no such policy."""
        return next((grade.correct for grade in self.grades if grade.policy == policy), self.solved)


def verdict_to_json(verdict: Verdict) -> list[Any]:
    """A verdict as JSON values: [reward, solved, reason] or, with grades, [reward, solved, reason, grades]."""
    fields: list[Any] = [verdict.reward, verdict.solved, verdict.reason]
    return [*fields, [list(dataclasses.astuple(grade)) for grade in verdict.grades]] if verdict.grades else fields


def verdict_from_json(fields: Sequence[Any]) -> Verdict:
    """The verdict that `verdict_to_json` wrote. Raises TypeError or ValueError where it is not of that form."""
    reward, solved, reason, *rest = fields
    (grades,) = rest or [[]]
    return Verdict(reward, solved, reason, tuple(Grade(*grade) for grade in grades))


RewardFunction = Callable[[str, Mapping[str, Any]], Verdict]
"""Judges one completion against the answer of its example; at a module's top level: a worker imports it by name."""

MakeRequests = Callable[[Sequence[Question], int], list[Request]]
"""Questions and the round of their visit -> the requests of their groups."""

RolloutPlan = Callable[[Sequence[Question], int, Mapping[SampleId, Sample], int], list[Request]]
"""Questions, the round of their visit, what was sampled and judged of it, steps done in the stage -> all requests known
so far. It is asked again until it asks for nothing new, so that verdicts of one round may decide the next."""

Judge = Callable[[Sequence[Sample], Mapping[int, Question]], list[tuple[Sample, list[Verdict]]]]
"""Samples and their questions by id -> the samples with reward and solved, each with its verdicts."""
