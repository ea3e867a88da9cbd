"""Recorded rollouts: the same questions sampled several times over, judged, and kept in a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from hptjax.build.data import build_requests
from hptjax.build.parts import Parts, fingerprint
from hptjax.hpt.plan import free_group
from hptjax.records import Question, Sample
from hptjax.rundir import write_json
from hptjax.train.open_step import OpenStep, from_json, to_json
from hptjax.train.phases import judge_demonstrations, judge_rollouts, roll_out
from hptjax.types import Params

UPGE_KEY = 3  # beside the keys of training, evaluation and sampling
FORMAT = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Draw:
    """One sampling of all questions: their judged rollouts, and their judged demonstrations."""

    rollouts: list[Sample]
    demonstrations: list[Sample]


def sampled(parts: Parts, params: Params, questions: Sequence[Question], draws: int) -> list[OpenStep]:
    """The questions rolled out `draws` times, as visits 0, 1, ...; judged."""
    config = parts.config
    plan = build_requests(config, parts.policy.stop_ids, free_group(config.rollout.group_size))
    key = jax.random.fold_in(parts.key, UPGE_KEY)
    steps = []
    for visit in range(draws):
        step = OpenStep(step=visit, round=visit, questions=list(questions))
        roll_out(
            step,
            params,
            plan=plan,
            stage_step=0,
            sample=lambda weights, requests, **options: parts.policy.sample(weights, requests, key, **options),
            should_stop=lambda: False,
        )
        judge_rollouts(step, parts.judge)
        steps.append(step)
    return steps


def draws_of(parts: Parts, steps: Sequence[OpenStep]) -> list[Draw]:
    """The samples of recorded steps, with their demonstrations judged."""
    return [
        Draw(
            rollouts=[step.samples[key] for key in sorted(step.samples)],
            demonstrations=[
                entry
                for _, entry in sorted(judge_demonstrations(step, parts.judge).items())
                if len(entry.completion_tokens)
            ],
        )
        for step in steps
    ]


def save(path: Path, parts: Parts, sampler: str, steps: Sequence[OpenStep]) -> None:
    """Writes recorded steps, with what they belong to."""
    write_json(
        path, {"format": FORMAT, "sampler": sampler, "run": _identity(parts), "steps": [to_json(s) for s in steps]}
    )


def load(path: Path, parts: Parts) -> tuple[str, list[OpenStep]]:
    """(who sampled, the steps) of a file that `save` wrote.

    Raises a file of another model, tokenizer or seed, or one that is none -> ValueError.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["format"] != FORMAT:
            raise KeyError("format")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected a batch that `hptjax upge` saved in '{path}', got {error!r}; change --batch"
        ) from error
    if saved["run"] != _identity(parts):
        raise ValueError(
            f"expected the rollouts in '{path}' to be of this config's model, tokenizer and seed, got others; change "
            "--batch, or the config back"
        )
    questions = {question.question_id: question for question in parts.questions.train}
    return saved["sampler"], [from_json(step, questions, None) for step in saved["steps"]]


def _identity(parts: Parts) -> dict[str, Any]:
    kept = fingerprint(parts)
    return json.loads(json.dumps({name: kept[name] for name in ("model", "base_weights", "tokenizer", "seed")}))
