"""One task evaluated: its questions in chunks, each sampled, judged and saved before the next one begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hptjax.eval.samples import Graded
from hptjax.eval.store import append, saved
from hptjax.eval.suites import Item


class Completion(NamedTuple):
    """A sampled completion, as text. finish_reason: "stop" or "length". length: tokens."""

    text: str
    finish_reason: str
    length: int


class Judged(NamedTuple):
    """The verifier's word on a completion, as `Graded` keeps it."""

    answer: str | None
    formatted: bool
    strict: bool
    lenient: bool
    reason: str


SampleItems = Callable[[Sequence[int]], list[list[Completion]]]
"""Places of questions -> their n completions each, sample 0 first. A question's do not depend on its neighbours."""

JudgeItems = Callable[[Sequence[tuple[int, Completion]]], list[Judged]]
"""Completions with the places of their questions -> a word on each."""


def evaluate_items(
    items: Sequence[Item],
    prompts: Mapping[int, str],
    path: Path,
    *,
    n: int,
    seed: int,
    sample: SampleItems,
    judge: JudgeItems,
    generation: Mapping[str, Any],
    chunk: int,
    should_stop: Callable[[], bool] = lambda: False,
    on_chunk: Callable[[int, int], None] = lambda done, asked: None,
) -> list[Graded]:
    """The judged samples of a task: those saved in `path`, and the rest sampled and saved there, chunk by chunk.

    Args
      prompts: place of a question -> the prompt as the model sees it; questions that are not here are not asked (they
        do not fit the model), which the caller counts.
      n: samples per question. generation: the settings of the sampling, kept with each row. chunk: questions at a time.
      should_stop: asked between chunks; what is saved then stays, and the rest is missing from the result.
      on_chunk: (questions done, questions asked).
    Raises rows of another number of samples, or of questions that are not asked; a sampler or judge that returns
      another number than it was asked for -> ValueError.
    """
    known = saved(path, n)
    complete = _complete(known, prompts, n, path)
    todo = [place for place in sorted(prompts) if place not in complete]
    for start in range(0, len(todo), chunk):
        if should_stop():
            break
        places = todo[start : start + chunk]
        made = _chunk(items, prompts, places, n=n, seed=seed, sample=sample, judge=judge)
        append(path, made, generation)
        known += made
        on_chunk(len(complete) + start + len(places), len(prompts))
    return known


def _complete(known: Sequence[Graded], prompts: Mapping[int, str], n: int, path: Path) -> set[int]:
    """The questions that have all their samples; no other can be among the known ones."""
    indices: dict[int, list[int]] = {}
    for entry in known:
        indices.setdefault(entry.question, []).append(entry.index)
    for place, found in indices.items():
        if place not in prompts or sorted(found) != list(range(n)):
            raise ValueError(
                f"expected samples 0..{n - 1} of the questions that are asked in {path}, got {sorted(found)[:8]} of "
                f"question {place}; change --out, or remove that file"
            )
    return set(indices)


def _chunk(
    items: Sequence[Item],
    prompts: Mapping[int, str],
    places: Sequence[int],
    *,
    n: int,
    seed: int,
    sample: SampleItems,
    judge: JudgeItems,
) -> list[Graded]:
    completions = sample(places)
    if [len(group) for group in completions] != [n] * len(places):
        raise ValueError(f"expected {n} completions of each of {len(places)} questions, got {len(completions)} groups")
    asked = [
        (place, index, completion)
        for place, group in zip(places, completions, strict=True)
        for index, completion in enumerate(group)
    ]
    judged = judge([(place, completion) for place, _, completion in asked])
    return [
        Graded(
            question=place,
            index=index,
            seed=seed,
            problem=items[place].problem,
            prompt=prompts[place],
            gold=items[place].gold,
            completion=completion.text,
            answer=word.answer,
            formatted=word.formatted,
            strict=word.strict,
            lenient=word.lenient,
            reason=word.reason,
            finish_reason=completion.finish_reason,
            length=completion.length,
        )
        for (place, index, completion), word in zip(asked, judged, strict=True)
    ]
