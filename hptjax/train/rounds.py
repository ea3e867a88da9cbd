"""The rollouts of a step from its questions to its verdicts, in the main thread or beside it (`ahead.py`)."""

from __future__ import annotations

from collections.abc import Callable

from hptjax.train.open_step import OpenStep
from hptjax.train.phases import judge_rollouts, roll_out, unjudged, varied_questions
from hptjax.train.stage import Stage, World
from hptjax.train.timing import timed
from hptjax.types import Params


def open_step(stage: Stage, number: int, *, weights: tuple[int, int] | None = None) -> OpenStep:
    """Step `number`, counted over all stages, with the next questions of the stage's stream. `weights` are its own."""
    batch = stage.stream.next_batch()
    visit = stage.first_round + batch.round
    return OpenStep(step=number, round=visit, questions=list(batch.questions), weights=weights)


def roll_out_in_rounds(
    stage: Stage,
    step: OpenStep,
    params: Params,
    world: World,
    seconds: dict[str, float],
    *,
    stage_step: int,
    should_stop: Callable[[], bool],
    beside: bool = False,
) -> bool:
    """Samples and judges until the stage's plan asks for nothing new, in one round for most; False where stopped.

    Args
      stage_step: steps of the stage before this one. seconds: are added to. beside: as in `timing.timed`.
    """
    while True:
        with timed(seconds, "rollout", beside=beside):
            complete = roll_out(
                step, params, plan=stage.plan, stage_step=stage_step, sample=world.sample, should_stop=should_stop
            )
        if not complete:
            return False
        if unjudged(step):
            with timed(seconds, "reward", beside=beside):
                judge_rollouts(step, world.judge, stage.penalty)
        elif not _draw_more(stage, step):
            return True


def _draw_more(stage: Stage, step: OpenStep) -> bool:
    """Adds the stream's next questions to a step that has too few to learn from; False where there is nothing to add.

    It stays within a pass over the data: no question comes twice, and all have the step's visit.
    """
    if step.draws >= stage.draws or stage.stream.at_end_of_pass():
        return False
    if varied_questions(step) >= stage.questions_per_step:
        return False
    step.questions.extend(stage.stream.next_batch().questions)
    step.draws += 1
    return True
