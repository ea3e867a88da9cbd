"""What an evaluation keeps of one completion: a row of samples_<task>.jsonl, in lm-evaluation-harness's keys.

Every figure is a function of these rows alone, so a saved evaluation can be scored again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

FILTERS = ("strict", "lenient")  # whose word on a completion: the policy for rewards, and the one for evaluation
FINISHED = ("stop", "length")


@dataclasses.dataclass(frozen=True)
class Graded:
    """One completion of one question, judged.

    Args
      question: place of the question in its task, from 0. index: which of its samples, from 0. seed: of the sampling.
      problem: as the data has it. prompt: as the model saw it. gold: the right answer.
      answer: what the verifier read in the completion, in the form that is compared and voted on; None where it found
        none (an abstention). formatted: whether there is one in the format that was asked for.
      strict, lenient: right, by either policy. reason: the verifier's word.
      finish_reason: "stop" (it ended by itself) or "length" (it met its limit). length: tokens.
    """

    question: int
    index: int
    seed: int
    problem: str
    prompt: str
    gold: str
    completion: str
    answer: str | None
    formatted: bool
    strict: bool
    lenient: bool
    reason: str
    finish_reason: str
    length: int

    def __post_init__(self) -> None:
        if self.finish_reason not in FINISHED:
            raise ValueError(f"expected a finish_reason among {', '.join(FINISHED)}, got {self.finish_reason!r}")


def to_row(sample: Graded, generation: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a sample.

    Args
      generation: how it was sampled (temperature and so on), the second argument of lm-evaluation-harness's requests.
    """
    return {
        "doc_id": sample.question,
        "doc": {"problem": sample.problem, "answer": sample.gold},
        "target": sample.gold,
        "arguments": {"gen_args_0": {"arg_0": sample.prompt, "arg_1": dict(generation)}},
        "resps": [[sample.completion]],
        "filtered_resps": [sample.answer],
        "filter": "strict",
        "metrics": list(FILTERS),
        "doc_hash": digest(json.dumps({"problem": sample.problem, "answer": sample.gold}, sort_keys=True)),
        "prompt_hash": digest(sample.prompt),
        "target_hash": digest(sample.gold),
        "strict": float(sample.strict),
        "lenient": float(sample.lenient),
        "formatted": float(sample.formatted),
        "sample_index": sample.index,
        "seed": sample.seed,
        "finish_reason": sample.finish_reason,
        "length": sample.length,
        "verdict": sample.reason,
    }


def from_row(row: Mapping[str, Any]) -> Graded:
    """The sample of a row. Raises a row that `to_row` did not write -> ValueError."""
    try:
        return Graded(
            question=row["doc_id"],
            index=row["sample_index"],
            seed=row["seed"],
            problem=row["doc"]["problem"],
            prompt=row["arguments"]["gen_args_0"]["arg_0"],
            gold=row["target"],
            completion=row["resps"][0][0],
            answer=row["filtered_resps"][0],
            formatted=row["formatted"] == 1.0,
            strict=row["strict"] == 1.0,
            lenient=row["lenient"] == 1.0,
            reason=row["verdict"],
            finish_reason=row["finish_reason"],
            length=row["length"],
        )
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"expected a row of samples_<task>.jsonl as `hptjax eval` writes it, got one where {error!r}"
        ) from error


def by_question(samples: Sequence[Graded]) -> list[list[Graded]]:
    """The samples of each question in the order of their indices, questions in order.

    Raises no samples, a sample twice or missing -> ValueError.
    """
    found: dict[int, dict[int, Graded]] = {}
    for sample in samples:
        entries = found.setdefault(sample.question, {})
        if sample.index in entries:
            raise ValueError(
                f"expected each sample once, got sample {sample.index} of question {sample.question} twice"
            )
        entries[sample.index] = sample
    sizes = {len(entries) for entries in found.values()}
    if len(sizes) != 1:
        raise ValueError(f"expected as many samples of every question, got {sorted(sizes) or 'none'}")
    wanted = list(range(sizes.pop()))
    for question, entries in found.items():
        if sorted(entries) != wanted:
            raise ValueError(f"expected samples 0..{wanted[-1]} of question {question}, got {sorted(entries)[:8]}")
    return [[found[question][index] for index in wanted] for question in sorted(found)]


def digest(text: str) -> str:
    """SHA-256 of a text, as hexadecimal digits; lone surrogates count as they stand."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
