"""`hptjax data check`: what a run would make of data files, before it is paid for. No model is loaded."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hptjax.build.data import build_limits, build_task, build_verifier
from hptjax.build.files import FileExamples, file_examples, whole_examples
from hptjax.build.prompts import PromptFormat, build_prompts
from hptjax.config import Config
from hptjax.data import tokenizer as text
from hptjax.data.prepare import Limits, judged, outcomes
from hptjax.models.folder_config import read_eos_ids
from hptjax.records import Example, Question
from hptjax.rewards.pool import RewardPool

QUANTILES = {"min": 0.0, "50%": 0.5, "90%": 0.9, "99%": 0.99, "max": 1.0}
SHOWN = 3  # demonstrations that do not verify, as examples
SHOWN_CHARACTERS = 100


def check_data(config: Config, *, split: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """What becomes of the rows of `data.files` (and of the held-out files), as JSON values.

    Without a tokenizer (`model.tokenizer`, `model.path`) nothing is rendered, encoded or judged.

    Args
      split: as a run splits them; else all rows of `data.files` are looked at as training questions.
      say: told what is done, before it takes its time.
    Returns
      files, splits (per split: rows kept and dropped by reason, token lengths, demonstrations that do not verify),
      prompt, shown (one question as the model sees it), and problems: texts, each of which stops a run.
    Raises
      files that cannot be read -> ValueError or FileNotFoundError.
    """
    say(f"reading {', '.join([*config.data.files, *config.data.validation_files, *config.data.test_files])}")
    found = file_examples(config) if split else whole_examples(config)
    report: dict[str, Any] = {
        "files": [dataclasses.asdict(count) for count in found.files],
        "repeated_problems": found.repeated_problems,
        "splits": {name: _counted(found, name) for name in found.splits},
        "limits": {
            "data.max_prompt_tokens": config.data.max_prompt_tokens,
            "rollout.max_completion_tokens": config.rollout.max_completion_tokens,
        },
        "prompt": None,
        "shown": None,
        "problems": [],
    }
    folder = config.model.tokenizer or config.model.path
    if folder is None:
        return report
    tokenizer = text.load_tokenizer(folder)
    try:
        prompts = build_prompts(config, tokenizer, _stop_ids(config, tokenizer))
    except ValueError as error:
        report["problems"].append(str(error))
        return report
    report["prompt"] = dict(prompts.record)
    with RewardPool(workers=config.reward.workers, deadline_s=config.reward.deadline_s) as pool:
        judge = build_verifier(config, build_task(config.task), pool)
        for name, examples in found.splits.items():
            limits = build_limits(config, name)
            if not split:  # questions for evaluation or RL alone, and conversations for SFT alone, are of use, too
                limits = dataclasses.replace(
                    limits,
                    demonstration=any(example.demonstration for example in examples),
                    answer=any(example.answer for example in examples),
                )
            say(f"{name}: encoding {len(examples)} examples, judging their demonstrations")
            looked, shown = _look(examples, prompts, limits, functools.partial(text.decode, tokenizer), judge)
            report["splits"][name] |= looked
            report["shown"] = report["shown"] or (shown and _shown(shown, tokenizer))
            if not looked["kept"]:
                report["problems"].append(f"no question of the {name} split is left: {looked['dropped']}")
    return report


def _counted(found: FileExamples, split: str) -> dict[str, Any]:
    return {"examples": len(found.splits[split]), "left_out": dict(found.left_out[split])}


def _look(
    examples: Sequence[Example], prompts: PromptFormat, limits: Limits, decode: Any, judge: Any
) -> tuple[dict[str, Any], Question | None]:
    """What becomes of the examples of one split, and one that is kept."""
    lengths: dict[str, list[int]] = {"prompt": [], "demonstration": []}
    dropped: Counter[str] = Counter()
    fitting: list[Question] = []
    for outcome in outcomes(examples, prompts.encode, limits):
        if outcome.question is not None:
            lengths["prompt"].append(len(outcome.question.prompt_tokens))
            if len(outcome.question.demonstration_tokens):
                lengths["demonstration"].append(len(outcome.question.demonstration_tokens))
        if outcome.reason is not None:
            dropped[outcome.reason] += 1
        elif outcome.question is not None:
            fitting.append(outcome.question)
    with_one = [question for question in fitting if len(question.demonstration_tokens)]
    verdicts = judged(with_one, decode, judge)
    wrong = [(question, verdict) for question, verdict in verdicts if not verdict.solved]
    if limits.demonstration:
        dropped["demonstration_unverified"] += len(wrong)
        ids = {question.question_id for question, _ in wrong}
        fitting = [question for question in fitting if question.question_id not in ids]
    looked = {
        "kept": len(fitting),
        "dropped": {reason: n for reason, n in dropped.items() if n},
        "tokens": {name: quantiles(values) for name, values in lengths.items()},
        "demonstrations": {
            "judged": len(verdicts),
            "unverified": len(wrong),
            "reasons": dict(Counter(verdict.reason for _, verdict in wrong)),
            "first": [
                {
                    "question": question.example.canonical[:SHOWN_CHARACTERS],
                    "ends": decode(question.demonstration_tokens)[-SHOWN_CHARACTERS:],
                    "answer": question.example.answer,
                    "reason": verdict.reason,
                }
                for question, verdict in wrong[:SHOWN]
            ],
        },
    }
    return looked, next(iter(fitting), None)


def quantiles(values: Sequence[int]) -> dict[str, int] | None:
    """The smallest value that at least so large a share does not exceed; None of nothing."""
    if not values:
        return None
    ordered = np.sort(np.asarray(values, np.int64))
    places = {name: max(int(np.ceil(share * len(ordered))) - 1, 0) for name, share in QUANTILES.items()}
    return {name: int(ordered[place]) for name, place in places.items()}


def _stop_ids(config: Config, tokenizer: Any) -> frozenset[int]:
    """As the policy's, without its model."""
    path = config.model.path
    of_folder = read_eos_ids(path) if path is not None and Path(path, "config.json").is_file() else ()
    return text.stop_ids(tokenizer, (*of_folder, *config.rollout.stop_ids))


def _shown(question: Question, tokenizer: Any) -> dict[str, str]:
    """A question as the model sees it: special tokens written out."""
    return {
        "prompt": tokenizer.decode(question.prompt_tokens),
        "demonstration": tokenizer.decode(question.demonstration_tokens),
    }


def check_text(report: Mapping[str, Any]) -> str:
    """The report for a person."""
    lines: list[str] = []
    for file in report["files"]:
        lines.append(f"{file['name']}: {file['rows']} rows as {file['format']}, {file['kept']} kept{_reasons(file)}")
    for name, split in report["splits"].items():
        lines += ["", f"{name}: {split['examples']} examples{_left_out(split['left_out'])}"]
        if "kept" not in split:
            continue
        lines.append(f"  kept            {split['kept']}{_left_out(split['dropped'])}")
        for what, limit in zip(("prompt", "demonstration"), report["limits"].items(), strict=True):
            lines.append(f"  {what:15s} {_tokens(split['tokens'][what], *limit)}")
        demonstrations = split["demonstrations"]
        if demonstrations["judged"]:
            counts = f"{demonstrations['judged']} judged, {demonstrations['unverified']} do not verify"
            lines.append(f"  demonstrations  {counts}{_left_out(demonstrations['reasons'])}")
            for first in demonstrations["first"]:
                lines.append(f"    {first['reason']}: {first['question']!r}, answer {dict(first['answer'])}")
                lines.append(f"      ends {first['ends']!r}")
    if report["repeated_problems"]:
        lines += [
            "",
            f"examples with the problem of another one, whose split they share: {report['repeated_problems']}",
        ]
    if report["prompt"] is not None:
        lines += ["", "prompt format: " + ", ".join(f"{key} {value}" for key, value in report["prompt"].items())]
    elif not report["problems"]:
        lines += ["", "no tokenizer was named: nothing was rendered, measured or verified; --model.path FOLDER"]
    if report["shown"] is not None:
        lines += ["", "one question, as the model sees it:", f"  prompt         {_short(report['shown']['prompt'])}"]
        lines += [f"  demonstration  {_short(report['shown']['demonstration'])}"]
    lines += ["", *(f"problem: {problem}" for problem in report["problems"])] if report["problems"] else []
    return "\n".join(lines)


def _reasons(file: Mapping[str, Any]) -> str:
    told = [f"{n} {reason} (first: row {file['first'][reason]})" for reason, n in file["dropped"].items()]
    return f"; dropped: {', '.join(told)}" if told else ""


def _left_out(reasons: Mapping[str, int]) -> str:
    told = [f"{n} {reason.replace('_', ' ')}" for reason, n in reasons.items() if n]
    return f"; {', '.join(told)}" if told else ""


def _tokens(found: Mapping[str, int] | None, field: str, limit: int) -> str:
    if found is None:
        return "none"
    return "tokens " + ", ".join(f"{name} {value}" for name, value in found.items()) + f"; limit {limit} ({field})"


def _short(said: str) -> str:
    whole = (
        said
        if len(said) <= 4 * SHOWN_CHARACTERS
        else f"{said[: 2 * SHOWN_CHARACTERS]} ... {said[-2 * SHOWN_CHARACTERS :]}"
    )
    return repr(whole)
