"""Held-out evaluation: n samples per question, counts of what was solved, pass@k with error bars.

Everything it calls is given: how requests are made, how they are sampled and how samples are judged. It works on
validation and test questions alike; which of them may choose a checkpoint is the caller's business (validation only).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from hptjax.diagnostics.intervals import Estimate, paired_difference, sign_flip_p
from hptjax.diagnostics.passk import estimate_pass_at_k, pass_at_k
from hptjax.masked import mean, ratio
from hptjax.records import FinishReason, Judge, MakeRequests, Question, Request, Sample, SampleId, Verdict
from hptjax.sharding.host import to_host
from hptjax.types import MicroBatch, Params

SampleRequests = Callable[[Params, Sequence[Request], Any], list[Sample]]
"""Parameters, requests and a random key -> one sample per request, in any order."""

ScoreFn = Callable[[Params, MicroBatch], Any]
"""Parameters and a micro-batch -> log-probs of its target tokens, [B T]."""


@dataclasses.dataclass(frozen=True, eq=False)
class EvalResult:
    """What an evaluation found.

    Args
      question_ids: [Q]. solved_counts: [Q], in 0..samples_per_question, for pairing with another evaluation.
      pass_at_k: k -> mean pass@k with its 95 % interval over questions.
      length_clip_ratio: share of completions that met their limit. mean_length: tokens per completion.
      judged: the samples with their verdicts, by id; for panels and rollout files.
    """

    question_ids: Int[np.ndarray, " Q"]
    solved_counts: Int[np.ndarray, " Q"]
    samples_per_question: int
    pass_at_k: Mapping[int, Estimate]
    length_clip_ratio: float
    mean_length: float
    judged: Mapping[SampleId, tuple[Sample, list[Verdict]]]


class Comparison(NamedTuple):
    """Two evaluations of the same questions: pass@k after minus before, and the p of a sign-flip test."""

    difference: Estimate
    p: float


class DemonstrationLoss(NamedTuple):
    """-log p of demonstrations: the sum over tokens, in nats, and their number."""

    nll_sum: float
    tokens: int

    @property
    def per_token(self) -> float:
        """The token-weighted mean; NaN where there was no token."""
        return ratio(self.nll_sum, self.tokens)


def evaluate(
    params: Params,
    questions: Sequence[Question],
    key: Any,
    *,
    make_requests: MakeRequests,
    sample: SampleRequests,
    judge: Judge,
    samples_per_question: int,
    visit: int = 0,
    ks: Sequence[int] = (1, 8),
    seed: int = 0,
) -> EvalResult:
    """Samples n completions per question, asks the verifiers, and counts.

    Args
      key: handed to `sample`. The same key, visit and questions give the same random numbers, so two checkpoints are
        compared with common noise.
      make_requests: must ask for exactly `samples_per_question` completions of each question.
      ks: for pass@k, each in 1..samples_per_question. seed: of the bootstrap.
    Raises
      no questions, or two with one id; a k out of range; requests, samples or verdicts that are not one for each
      sample asked for -> ValueError.
    """
    ids = [question.question_id for question in questions]
    if not ids or len(set(ids)) != len(ids):
        raise ValueError(f"expected questions with distinct ids, got {len(ids)} with {len(set(ids))} ids; see eval")
    if bad := [k for k in ks if not 1 <= k <= samples_per_question]:
        raise ValueError(
            f"expected eval.ks in 1..{samples_per_question} (eval.samples_per_question), got {bad}; change either"
        )
    requests = make_requests(questions, visit)
    asked = {request.sample_id for request in requests}
    per_question = Counter(sample_id.question for sample_id in asked)
    if len(asked) != len(requests) or per_question != dict.fromkeys(ids, samples_per_question):
        raise ValueError(
            f"expected {samples_per_question} requests for each of {len(ids)} questions, got {len(asked)} distinct "
            f"ones for {len(per_question)} questions"
        )
    samples = sample(params, requests, key)
    by_id = {question.question_id: question for question in questions}
    judged = {entry.sample_id: (entry, verdicts) for entry, verdicts in judge(samples, by_id)}
    if set(judged) != asked or len(samples) != len(asked):
        raise ValueError(
            f"expected one judged sample for each of {len(asked)} requests, "
            f"got {len(samples)} samples and {len(judged)} judged"
        )
    entries = [entry for entry, _ in judged.values()]
    hits = Counter(entry.sample_id.question for entry in entries if entry.solved)
    solved = np.array([hits[question_id] for question_id in ids], np.int64)
    return EvalResult(
        question_ids=np.asarray(ids, np.int64),
        solved_counts=solved,
        samples_per_question=samples_per_question,
        pass_at_k={k: estimate_pass_at_k(solved, samples_per_question, k, seed=seed) for k in ks},
        length_clip_ratio=mean(np.array([entry.finish_reason == FinishReason.LENGTH for entry in entries])),
        mean_length=mean(np.array([len(entry.completion_tokens) for entry in entries])),
        judged=judged,
    )


def eval_metrics(result: EvalResult, split: str) -> dict[str, float]:
    """The evaluation as metrics of `split` (train, validation or test), by the names of `diagnostics.metrics`."""
    row: dict[str, float] = {}
    for k, estimate in result.pass_at_k.items():
        name = f"{split}/pass@{k}"
        row |= {name: estimate.value, f"{name}_se": estimate.se}
        row |= {f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    row[f"{split}/solve_none"] = mean(result.solved_counts == 0)
    row[f"{split}/response_length"] = result.mean_length
    row[f"{split}/length_clip_ratio"] = result.length_clip_ratio
    return row


def compare_paired(
    before_counts: Int[np.ndarray, " Q"], after_counts: Int[np.ndarray, " Q"], samples: int, k: int, *, seed: int = 0
) -> Comparison:
    """pass@k after minus before on the same questions, with the interval of a paired bootstrap by question.

    Args
      before_counts, after_counts: solved samples per question, in the same order of questions. samples: n of both.
    Raises: counts of different questions by their number, or out of 0..n; k out of 1..n -> ValueError.
    """
    before, after = pass_at_k(before_counts, samples, k), pass_at_k(after_counts, samples, k)
    return Comparison(
        difference=paired_difference(before, after, samples=samples, seed=seed),
        p=sign_flip_p(after - before, seed=seed),
    )


def heldout_demonstration_nll(params: Params, micro_batches: Iterable[MicroBatch], score: ScoreFn) -> DemonstrationLoss:
    """-log p of held-out demonstrations under the policy: sum and count over packed micro-batches, added as float64.

        nll_sum = - sum over live tokens of log p

    It does not depend on how the demonstrations are packed; prompt tokens and padding are not live.

    Args
      micro_batches: demonstrations as `hpt.assemble` packs them, placed as `score` wants them.
    """
    nll_sum, tokens = 0.0, 0
    for micro_batch in micro_batches:
        logprobs, live = to_host((score(params, micro_batch), micro_batch.completion_mask))
        # what stands where nothing is live (NaN, infinity) takes no part
        nll_sum -= float(np.sum(logprobs[live], dtype=np.float64))
        tokens += int(np.sum(live))
    return DemonstrationLoss(nll_sum, tokens)


def panel_rows(
    result: EvalResult,
    questions: Sequence[Question],
    decode: Callable[[Int[np.ndarray, " c"]], str],
    *,
    step: int,
    samples: int = 1,
) -> list[dict[str, Any]]:
    """A fixed panel of questions at one step: text, reward and verdict of their first `samples` completions.

    The same questions at every evaluation, with the same sample ids, show what training changes in them.

    Args
      questions: the panel, each of them evaluated in `result`. decode: completion tokens -> text.
    Returns one JSON object per completion, in the order of `questions`.
    Raises: a question that was not evaluated -> ValueError.
    """
    by_question: dict[int, list[SampleId]] = {}
    for sample_id in sorted(result.judged):
        by_question.setdefault(sample_id.question, []).append(sample_id)
    if missing := [question.question_id for question in questions if question.question_id not in by_question]:
        raise ValueError(f"expected panel questions that were evaluated, got {missing}; change train.panel_questions")
    counts = dict(zip(result.question_ids.tolist(), result.solved_counts.tolist(), strict=True))
    rows = []
    for question in questions:
        for sample_id in by_question[question.question_id][:samples]:
            entry, verdicts = result.judged[sample_id]
            rows.append(
                {
                    "step": step,
                    "question": question.question_id,
                    "index": sample_id.index,
                    "prompt": question.example.prompt,
                    "completion": decode(entry.completion_tokens),
                    "reward": entry.reward,
                    "solved": bool(entry.solved),
                    "verdict": [verdict.reason for verdict in verdicts],
                    "finish_reason": entry.finish_reason.name.lower(),
                    "length": len(entry.completion_tokens),
                    "solved_count": counts[question.question_id],
                    "samples": result.samples_per_question,
                }
            )
    return rows
