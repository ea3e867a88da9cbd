"""The questions: a task's problems or rows of files, their splits, and how they are put to the model."""

from __future__ import annotations

import dataclasses
from typing import Literal

RowFormat = Literal["auto", "verl", "prompt_completion", "messages", "native", "problem_answer", "alpaca"]


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """The problems: a generator with a solver, a writer of demonstrations and a verifier."""

    name: Literal["countdown"] = "countdown"
    instances: int = 12_000  # distinct problems generated, before they are split
    seed: int = 0  # of the generator; the run's own seed is `seed`
    numbers: int = 3  # how many numbers a problem gives, 2 to 5
    numbers_to: int | None = None  # problems give `numbers` to so many numbers, each as often; None: `numbers` only
    low: int = 1  # smallest number
    high: int = 20  # largest number
    target_low: int = 1  # smallest target
    target_high: int = 60  # largest target
    operators: str = "+-*/"
    negative: bool = False  # whether a value may be negative
    max_value: int = 9999  # no value of a demonstration exceeds it
    style: Literal["random", "first"] = "random"  # which of the solutions a demonstration shows
    shuffle: bool = True  # whether a prompt lists its numbers in random order
    corrupt: float = 0.0  # share of training demonstrations that miss the target; only for a base model's corpus


@dataclasses.dataclass(frozen=True)
class FractionsConfig:
    """Shares of all problems; the base model is trained on a share that nothing else uses.

    Of `data.files`, the training questions have the base model's share and that of each split with files of its own.
    """

    base: float = 0.4
    train: float = 0.4
    validation: float = 0.1
    test: float = 0.1


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """How a question of `data.files` is put to the model; a task's own questions are written out already."""

    template: Literal["chat", "plain"] = "chat"  # "chat": by the tokenizer's chat template; "plain": by `plain`
    plain: str = "{question}"  # template "plain": the prompt, for models without a chat template
    bos: bool = False  # template "plain": whether the tokenizer's bos stands before it
    system: str | None = None  # None: the rows' own system turns; "": none; a text: this one instead of theirs
    suffix: str = ""  # stands after the question, unless the question ends with it
    end: Literal["turn", "eos"] = "turn"  # of a demonstration: as the template ends a turn, or the tokenizer's eos
    date: str = "2024-07-26"  # the day that a template is told, so that it renders the same every day


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The questions: from files, or from the task's generator. Splits are seeded, and disjoint by problem."""

    files: tuple[str, ...] = ()  # to learn from: files, folders, or owner/name:config@split of the hub; none: the task
    validation_files: tuple[str, ...] = ()  # none: a share of `files`
    test_files: tuple[str, ...] = ()  # none: a share of `files`
    format: RowFormat = "auto"  # of the rows in these; "auto": by their columns
    long_demonstrations: Literal["drop", "cut"] = "drop"  # over rollout.max_completion_tokens; "cut": the end is lost
    train_split: Literal["train", "base"] = "train"  # "base": this run makes the base model
    train_questions: int | None = None  # at most so many are kept of this split; None: all; likewise below
    validation_questions: int = 512  # choose the best checkpoint
    test_questions: int = 1024  # for figures only; they choose nothing
    fractions: FractionsConfig = dataclasses.field(default_factory=FractionsConfig)
    split_seed: int = 0  # of the splits
    questions_per_step: int = 64  # P
    max_prompt_tokens: int = 24  # longer questions are dropped and counted
    demonstrations: bool = True  # whether methods may learn from the demonstrations
