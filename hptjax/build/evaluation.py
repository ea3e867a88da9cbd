"""What is measured when: validation during a run, test and training questions at its ends, all with counts on disk."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hptjax.build.adapters import with_frozen
from hptjax.build.data import Questions, request_maker
from hptjax.build.policy import Policy
from hptjax.config import Config
from hptjax.config_batch import row_room
from hptjax.data import tokenizer as text
from hptjax.diagnostics.intervals import Estimate
from hptjax.eval.evaluate import EvalResult, eval_metrics, evaluate, heldout_demonstration_nll, panel_rows
from hptjax.hpt.assemble import assemble
from hptjax.hpt.gate import demonstration_sample
from hptjax.hpt.terms import Term
from hptjax.losses.advantages import ones
from hptjax.losses.reducers import token_mean
from hptjax.records import Judge, Question, Source
from hptjax.rundir import write_json
from hptjax.sharding.mesh import put_micro_batch
from hptjax.sharding.peers import is_first
from hptjax.train.jsonl import open_jsonl
from hptjax.types import MicroBatch, Params

DuringTraining = Callable[[int, Params], dict[str, float]]


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
    """`measure(split, params)` gives figures; `during_training(folder, total_steps)` gives the loop's function."""

    measure: Callable[[str, Params], dict[str, Any]]
    during_training: Callable[[Path, int], DuringTraining]


def build_evaluator(config: Config, policy: Policy, questions: Questions, judge: Judge, key: Any) -> Evaluator:
    """The evaluator of a run. Its random numbers depend on the question alone, so checkpoints share their noise."""
    options = config.eval
    splits = {
        "validation": questions.validation[: options.questions],
        "test": questions.test,
        "train": [q for q in questions.train if q.example.answer][: max(options.train_questions, 1)],
    }
    make_requests = request_maker(
        count=options.samples_per_question,
        max_completion_tokens=config.rollout.max_completion_tokens,
        stop_ids=policy.stop_ids,
        temperature=options.temperature,
        top_p=options.top_p,
    )
    decode = functools.partial(text.decode, policy.tokenizer)
    demonstrations = functools.cache(lambda: _demonstration_batches(config, policy, splits["validation"]))
    stats, policy_of = policy.token_stats(False), policy.frozen.policy_of
    scored = with_frozen(policy.frozen, lambda trees, batch: stats(policy_of(trees), batch).logprobs)

    def score(params: Params, batch: MicroBatch) -> Any:
        return scored({"policy": params}, batch)

    def run(params: Params, chosen: Sequence[Question]) -> EvalResult:
        return evaluate(
            params,
            chosen,
            key,
            make_requests=make_requests,
            sample=policy.sample,
            judge=judge,
            samples_per_question=options.samples_per_question,
            ks=options.ks,
        )

    def measure(split: str, params: Params) -> dict[str, Any]:
        result = run(params, splits[split])
        figures = {f"pass@{k}": estimate_json(estimate) for k, estimate in result.pass_at_k.items()}
        return figures | {
            "questions": len(splits[split]),
            "samples_per_question": options.samples_per_question,
            "mean_length": result.mean_length,
            "length_clip_ratio": result.length_clip_ratio,
        }

    def during_training(folder: Path, total_steps: int) -> DuringTraining:
        def at_step(step: int, params: Params) -> dict[str, float]:
            ends = step in (0, total_steps)
            names = ["validation"]
            names += ["test"] if ends or step in options.test_steps else []
            names += ["train"] if ends and options.train_questions and splits["train"] else []
            row: dict[str, float] = {}
            for name in names:
                result = run(params, splits[name])
                row |= eval_metrics(result, name)
                if is_first():
                    levels = [question.example.level for question in splits[name]]
                    write_counts(folder, name, step, result, levels)
                if name == "validation" and is_first():
                    panel = splits[name][: config.train.panel_questions]
                    with open_jsonl(folder / "panel.jsonl") as file:
                        for line in panel_rows(result, panel, decode, step=step):
                            file.write(line)
            loss = heldout_demonstration_nll(params, demonstrations(), score)
            return row | ({"probe/heldout_demo_nll": loss.per_token} if loss.tokens else {})

        return at_step

    return Evaluator(measure, during_training)


def estimate_json(estimate: Estimate) -> dict[str, Any]:
    """A figure with its interval, in the one form that summaries and commands print."""
    return {
        "value": estimate.value,
        "ci95": [estimate.low, estimate.high],
        "se": estimate.se,
        "questions": estimate.questions,
        "samples": estimate.samples,
        "method": estimate.method,
    }


def write_counts(folder: Path, split: str, step: int, result: EvalResult, levels: list[int]) -> None:
    """Solved counts per question of one evaluation, for pairing by question later.

    Args
      levels: the difficulty of each question.
    """
    path = counts_path(folder, split, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "split": split,
        "step": step,
        "samples": result.samples_per_question,
        "question_ids": result.question_ids.tolist(),
        "solved": result.solved_counts.tolist(),
        "solved_by_half": _halves(result),
        "levels": levels,
    }
    write_json(path, record)


def read_counts(folder: Path, split: str, step: int) -> tuple[np.ndarray, int]:
    """(solved counts per question [Q], samples per question) of an evaluation.

    Raises FileNotFoundError where that evaluation was not made.
    """
    record = json.loads(counts_path(folder, split, step).read_text(encoding="utf-8"))
    return np.asarray(record["solved"], np.int64), int(record["samples"])


def read_halves(folder: Path, split: str, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Solved counts of the first and of the second half of each question's samples; an odd one out is in neither."""
    record = json.loads(counts_path(folder, split, step).read_text(encoding="utf-8"))
    return np.asarray(record["solved_by_half"][0], np.int64), np.asarray(record["solved_by_half"][1], np.int64)


def read_levels(folder: Path, split: str, step: int) -> np.ndarray:
    """The difficulty of each question of an evaluation."""
    return np.asarray(json.loads(counts_path(folder, split, step).read_text(encoding="utf-8"))["levels"], np.int64)


def counts_path(folder: Path, split: str, step: int) -> Path:
    """`evaluations/<split>_<step>.json` of a run folder."""
    return folder / "evaluations" / f"{split}_{step:06d}.json"


def _halves(result: EvalResult) -> list[list[int]]:
    half = result.samples_per_question // 2
    counts: list[Counter[int]] = [Counter(), Counter()]
    for sample_id, (sample, _) in result.judged.items():
        if sample_id.index < 2 * half:
            counts[sample_id.index // half][sample_id.question] += int(sample.solved)
    return [[count[question] for question in result.question_ids.tolist()] for count in counts]


def _demonstration_batches(config: Config, policy: Policy, questions: Sequence[Question]) -> list[MicroBatch]:
    """The demonstrations of those held-out questions that have one, packed and placed."""
    questions = [question for question in questions if len(question.demonstration_tokens)]
    if not questions:
        return []
    term = Term("demonstration", frozenset({Source.DEMONSTRATION}), 1.0, token_mean, ones)
    update = assemble(
        [demonstration_sample(question) for question in questions],
        [term],
        **row_room(config),
        max_micro_batches=len(questions),
    )
    return [put_micro_batch(policy.mesh, micro_batch, policy.rules) for micro_batch in update.micro_batches]
