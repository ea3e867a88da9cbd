"""The endless, shuffled stream of questions, whose position is a few integers.

Each pass over the data is shuffled anew and holds every question once. Where it does not divide into whole batches its
last batch is the smaller rest, and the next pass begins a batch of its own: so no question comes twice in a batch,
where two visits would be taken for one group, and none is left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from hptjax.records import Question


@dataclasses.dataclass(frozen=True)
class QuestionBatch:
    """One process's share of the questions of one rollout batch; fewer at the end of a pass, where there is a rest.

    Args
      index: how many batches came before it. round: which pass over the data it belongs to, 0 upwards; the `round` of
        the sample ids of its questions.
    """

    index: int
    round: int
    questions: tuple[Question, ...]


class QuestionStream:
    """Batches of questions from `next_batch`, a function of the seed and the position alone.

    The global order does not depend on the number of processes: process i of n takes rows i, i + n, ... of each batch.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        *,
        questions_per_step: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """
        Args
          questions_per_step: questions in one batch, over all processes. Of a pass's last, smaller batch the shares may
            differ by one.
        Raises
          a batch larger than the data, or one that the processes cannot share evenly -> ValueError with the field.
        """
        _check(len(questions), questions_per_step, process_index, process_count)
        self._questions = list(questions)
        self._share = slice(process_index, None, process_count)
        self._batches_per_round = -(-len(questions) // questions_per_step)
        self._identity = {
            "seed": seed,
            "questions_per_step": questions_per_step,
            "questions": len(questions),
            "digest": _digest(questions),
        }
        order = grain.MapDataset.range(len(questions)).seed(seed).shuffle()
        batches = order.batch(questions_per_step, drop_remainder=False).repeat()
        # No read-ahead: indices cost nothing, and the position is then exactly that of the last batch given out.
        self._iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))

    def next_batch(self) -> QuestionBatch:
        """The next batch; the stream does not end."""
        index = self._next_index()
        rows = np.asarray(next(self._iterator))[self._share]
        chosen = tuple(self._questions[int(row)] for row in rows)
        return QuestionBatch(index=index, round=index // self._batches_per_round, questions=chosen)

    def at_end_of_pass(self) -> bool:
        """Whether the next batch begins another pass over the data."""
        return self._next_index() % self._batches_per_round == 0

    def get_state(self) -> dict[str, Any]:
        """The position and what it is a position in; JSON values only, equal on every process."""
        return {"next_index": self._next_index(), **self._identity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues where `get_state` was called.

        Raises
          a position in another stream (seed, batch size or questions differ) -> ValueError naming what differs.
        """
        expected = {**self._identity, "next_index": self._next_index()}
        if set(state) != set(expected):
            raise ValueError(f"expected a data position with the keys {sorted(expected)}, got {sorted(state)}")
        for name, value in self._identity.items():
            if state[name] != value:
                raise ValueError(
                    f"expected a saved data position with {name} = {value}, got {state[name]}: the data, seed or "
                    f"data.questions_per_step changed since it was saved; restore them or start a new run folder"
                )
        self._iterator.set_state({"next_index": int(state["next_index"])})

    def _next_index(self) -> int:
        return int(self._iterator.get_state()["next_index"])


def _digest(questions: Sequence[Question]) -> str:
    """Fingerprint of which questions the stream holds, in which order."""
    digest = hashlib.sha256()
    for question in questions:
        example = question.example
        fields = (str(example.question_id), example.canonical, example.prompt, example.demonstration)
        digest.update("\x00".join((*fields, "")).encode())
    return digest.hexdigest()[:16]


def _check(count: int, questions_per_step: int, process_index: int, process_count: int) -> None:
    if questions_per_step < 1:
        raise ValueError(f"expected data.questions_per_step >= 1, got {questions_per_step}")
    if questions_per_step > count:
        raise ValueError(
            f"expected data.questions_per_step to be at most the number of training questions, {count}, got "
            f"{questions_per_step}; lower it or widen the task's space"
        )
    if questions_per_step % process_count:
        raise ValueError(
            f"expected data.questions_per_step to be a multiple of the number of processes, {process_count}, got "
            f"{questions_per_step}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"expected a process index in 0..{process_count - 1}, got {process_index}")
