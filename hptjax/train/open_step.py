"""The step that is under way, as a record that can be saved at any moment and taken up again.

Samples and verdicts are kept by sample id, so that a run stopped in the middle of its rollouts samples only what is
missing, and never asks a verifier twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hptjax.records import (
    FinishReason,
    Question,
    Sample,
    SampleId,
    Source,
    Verdict,
    verdict_from_json,
    verdict_to_json,
)


@dataclasses.dataclass
class OpenStep:
    """What the step under way has so far; the loop's only mutable record.

    Args
      step: 0-based, counted over all stages. questions: of this step, in stream order. round: the visit of its ids.
      samples: rollouts by id, with reward and solved once judged. verdicts: per sample, one per reward function.
      update_index, micro_index: the next micro-batch to be added.
      scores: what the score pass said, by name, for the micro-batches of all updates in order; host arrays.
      ledger_rows, stats: of the updates of this step that are done; stats are (total, count), or (peak,).
      draws: batches of the stream that the questions are of.
      probe: norms of each objective's gradient at the start of the step, where they were due.
      weights: (steps, optimizer updates) behind the weights that draw all of its samples; None: those of its start.
    """

    step: int
    round: int
    questions: list[Question]
    samples: dict[SampleId, Sample] = dataclasses.field(default_factory=dict)
    verdicts: dict[SampleId, list[Verdict]] = dataclasses.field(default_factory=dict)
    update_index: int = 0
    micro_index: int = 0
    scores: list[dict[str, np.ndarray]] | None = None
    ledger_rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    stats: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    probe: dict[str, float] | None = None
    draws: int = 1
    weights: tuple[int, int] | None = None


def to_json(step: OpenStep) -> dict[str, Any]:
    """JSON values only; log-probs survive exactly (an fp32 number is a double). `scores` travel as arrays instead."""
    return {
        "step": step.step,
        "round": step.round,
        "questions": [question.question_id for question in step.questions],
        "samples": [_sample_to_json(sample) for sample in step.samples.values()],
        "verdicts": [
            [list(key), [verdict_to_json(verdict) for verdict in verdicts]] for key, verdicts in step.verdicts.items()
        ],
        "update_index": step.update_index,
        "micro_index": step.micro_index,
        "ledger_rows": step.ledger_rows,
        "stats": step.stats,
        "probe": step.probe,
        "draws": step.draws,
        "weights": None if step.weights is None else list(step.weights),
    }


def from_json(
    saved: Mapping[str, Any], questions: Mapping[int, Question], scores: list[dict[str, np.ndarray]] | None
) -> OpenStep:
    """The inverse of `to_json`, given the questions by id."""
    weights = saved.get("weights")  # older records have none
    samples = [_sample_from_json(entry, questions) for entry in saved["samples"]]
    return OpenStep(
        step=saved["step"],
        round=saved["round"],
        questions=[questions[question_id] for question_id in saved["questions"]],
        samples={sample.sample_id: sample for sample in samples},
        verdicts={SampleId(*key): [_verdict(verdict) for verdict in verdicts] for key, verdicts in saved["verdicts"]},
        update_index=saved["update_index"],
        micro_index=saved["micro_index"],
        scores=scores,
        ledger_rows=list(saved["ledger_rows"]),
        stats=dict(saved["stats"]),
        probe=saved["probe"],
        draws=saved["draws"],
        weights=None if weights is None else (weights[0], weights[1]),
    )


def _verdict(saved: Sequence[Any] | Mapping[str, Any]) -> Verdict:
    """A saved verdict; before verdicts had grades they were saved by field name."""
    return Verdict(**saved) if isinstance(saved, Mapping) else verdict_from_json(saved)


def _sample_to_json(sample: Sample) -> dict[str, Any]:
    return {
        "sample_id": list(sample.sample_id),
        "group_id": sample.group_id,
        "source": int(sample.source),
        "completion_tokens": sample.completion_tokens.tolist(),
        "sampler_logprobs": sample.sampler_logprobs.tolist(),
        "finish_reason": int(sample.finish_reason),
        "prefix_len": sample.prefix_len,
        "reward": sample.reward,
        "solved": sample.solved,
        "temperature": sample.temperature,
        "decode_shape": sample.decode_shape,
    }


def _sample_from_json(saved: Mapping[str, Any], questions: Mapping[int, Question]) -> Sample:
    sample_id = SampleId(*saved["sample_id"])
    return Sample(
        sample_id=sample_id,
        group_id=saved["group_id"],
        source=Source(saved["source"]),
        prompt_tokens=questions[sample_id.question].prompt_tokens,
        completion_tokens=np.asarray(saved["completion_tokens"], np.int32),
        sampler_logprobs=np.asarray(saved["sampler_logprobs"], np.float32),
        finish_reason=FinishReason(saved["finish_reason"]),
        prefix_len=saved["prefix_len"],
        reward=saved["reward"],
        solved=saved["solved"],
        temperature=saved["temperature"],
        decode_shape=saved["decode_shape"],
    )
