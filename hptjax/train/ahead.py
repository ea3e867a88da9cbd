"""The rollouts of step n + 1 in a thread of their own, while step n trains.

    main     rollouts of n | gate, assemble, score, updates of n          | join | evaluate, save | n + 1 ...
    thread                 | questions, samples, verdicts of n + 1, by the weights before the updates of n

The thread has to itself what it uses until it is joined: a copy of those weights, its open step, the stream, the
sampler and the judge. It is joined before anybody else takes one of them: at the end of the step, or before a save
inside it. So how the two threads interleave reaches no number. It is stopped half-way only where the run ends by an
error: then what it has is thrown away. Where an outside engine fails, what came is kept, and the rest of that step is
sampled when the run goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import jax

from hptjax.errors import SamplingFailed
from hptjax.train.open_step import OpenStep
from hptjax.train.rounds import open_step, roll_out_in_rounds
from hptjax.train.stage import Progress, Stage, World
from hptjax.train.state import TrainState

Work = Callable[[dict[str, float], Callable[[], bool]], None]
"""(seconds by phase, to be added to; whether to give up) -> nothing; what it makes is in the open step."""


class Ahead:
    """At most one thread with the rollouts of the next step. A context manager; its methods are the main thread's.

    Attributes
      seconds: by phase, of the rollouts joined last, as the thread counted them; empty where none were.
      failure: why they are not complete, where whoever sampled them could not go on.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.failure: SamplingFailed | None = None
        self._step: OpenStep | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._given_up = threading.Event()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *exception: object) -> None:
        """Gives up what is under way, and waits until the thread has ended."""
        self._given_up.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def under_way(self) -> bool:
        """Whether there are rollouts that have not been joined."""
        return self._thread is not None

    def start(self, step: OpenStep, work: Work) -> None:
        """Begins `work`, which fills `step`. Raises RuntimeError where other rollouts are under way."""
        if self._thread is not None:
            raise RuntimeError("expected the rollouts that are under way to be joined before others begin")
        self.seconds, self._step, self._error = {}, step, None

        def run() -> None:
            try:
                work(self.seconds, self._given_up.is_set)
            except SamplingFailed as failure:
                self.failure = failure
            except BaseException as error:  # raised again in the main thread, whatever it is
                self._error = error

        self._thread = threading.Thread(target=run, name="hptjax-rollouts", daemon=True)
        self._thread.start()

    def join(self) -> OpenStep | None:
        """The step whose rollouts were under way, complete but for `failure`; None where there were none.

        Raises what they raised.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread, step = None, self._step
        if self._error is not None:
            raise self._error
        return step

    def taken_seconds(self) -> dict[str, float]:
        """`seconds`, which are empty afterwards."""
        taken, self.seconds = self.seconds, {}
        return taken


def begin_next(stage: Stage, state: TrainState, progress: Progress, step: OpenStep, world: World, ahead: Ahead) -> None:
    """Begins the rollouts of the step after `step`, by the weights as they are; they must not have moved in `step` yet.

    Nothing where the stage does not ask for it or ends with this step, or where those rollouts were made before a stop.
    """
    last = progress.stage_step + 1 == stage.steps
    if not (stage.rollouts_ahead and stage.rolls_out) or last or progress.ahead is not None:
        return
    updates = int(world.read(state.totals.optimizer_steps))
    following = open_step(stage, step.step + 1, weights=(progress.step, updates))
    params = world.keep(state.params["policy"])  # the step that trains donates its own
    stage_step = progress.stage_step + 1

    def work(seconds: dict[str, float], given_up: Callable[[], bool]) -> None:
        try:
            roll_out_in_rounds(
                stage, following, params, world, seconds, stage_step=stage_step, should_stop=given_up, beside=True
            )
        finally:
            jax.tree.map(lambda leaf: leaf.delete(), params)

    ahead.start(following, work)
