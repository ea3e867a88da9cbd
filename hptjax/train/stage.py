"""What a run is made of beside its state: stages, the world around them, how often things happen, and how far it is."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hptjax.hpt.route import Route
from hptjax.records import Judge, Question, RolloutPlan, Sample
from hptjax.train.open_step import OpenStep, from_json, to_json
from hptjax.train.phases import Assemble, Gated, SampleRollouts
from hptjax.train.second_look import ScorePass, SecondLook
from hptjax.train.state import TrainState
from hptjax.types import MicroBatch, Params


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """One stage of a run: a method as functions and values.

    Args
      steps: rollout batches. route: what the questions learn from. group_size: rollouts per question.
      rolls_out: False where the route reads no rollouts, so nothing needs to be sampled. plan: what is, in rounds.
      rewards_demonstrations: whether the route reads the rewards of demonstrations.
      updates_per_step: optimizer updates per rollout batch. score: set where the method needs the score pass.
      second_look: what is made of it beside `rollout_logprobs`, where there is more.
      add_frozen: fills in the log-probs of frozen models (reference, teacher), where the method reads them.
      start: parameters and lifetime totals -> the stage's first state, with fresh sums and optimizer.
      questions_per_step: that leave something for the update, where there are as many. draws: batches of questions
        that a step may take from the stream to have them.
      penalty: what is added to a rollout's reward beside the verifiers' word; it is never above 0.
      nonfinite: "raise" or "skip_window". clip_norm, apart_clip_norm: of the optimizer, and of
        the second one where there is one, for the ledger.
      micro_step: jitted and donated. learning_rate: optimizer step of this stage -> rate.
      probe: objective gradient norms of an update, (params, micro_batches) -> metrics; None where never asked.
      rollouts_ahead: whether the rollouts of the next step are made while a step trains, see `ahead.py`.
      stream: next_batch, get_state, set_state; first_round is added to its rounds, so that no two stages share an id.
    """

    name: str
    steps: int
    stream: Any
    first_round: int
    route: Route
    group_size: int
    rolls_out: bool
    rewards_demonstrations: bool
    updates_per_step: int
    mask_overlong: bool
    nonfinite: str
    clip_norm: float | None
    apart_clip_norm: float | None
    questions_per_step: int
    draws: int
    penalty: Callable[[Sample], float] | None
    start: Callable[[Mapping[str, Params], Any], TrainState]
    micro_step: Callable[[TrainState, MicroBatch, Any], TrainState]
    plan: RolloutPlan
    assemble: Assemble
    learning_rate: Callable[[int], float]
    score: ScorePass | None = None
    second_look: SecondLook | None = None
    add_frozen: Callable[[MicroBatch], MicroBatch] | None = None
    probe: Callable[[Mapping[str, Params], Sequence[MicroBatch]], dict[str, float]] | None = None
    rollouts_ahead: bool = False


def copied(params: Params) -> Params:
    """The default `World.keep`."""
    return jax.tree.map(jnp.copy, params)


def untraced(step: int) -> AbstractContextManager[None]:
    """The default `World.traced`."""
    return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """What the loop asks of everything around it."""

    questions: Mapping[int, Question]
    sample: SampleRollouts
    judge: Judge
    reward_names: tuple[str, ...]  # of the functions whose verdicts `judge` gives, in its order
    put: Callable[[MicroBatch], MicroBatch]
    read: Callable[[Any], Any]  # the one device-to-host read
    flag: Callable[[bool], Any]  # a host bool as a device scalar
    log_step: Callable[[int, dict[str, Any]], None]
    log_ledger: Callable[[dict[str, Any]], None]
    log_rollouts: Callable[[OpenStep, Gated], None]
    evaluate: Callable[[int, Params], dict[str, Any]]
    save: Callable[..., None]  # (step, state, host, arrays, *, metric, wait)
    should_stop: Callable[[], bool]
    traced: Callable[[int], AbstractContextManager[None]] = untraced  # around each step: a profiler, or nothing
    keep: Callable[[Params], Params] = copied  # what `sample` takes, as new arrays that outlive the next update


@dataclasses.dataclass(frozen=True)
class Cadence:
    """How often things happen, in steps; 0 is never. `metric` names the validation figure that ranks checkpoints."""

    evaluate: int
    evaluate_also: frozenset[int]  # steps at which the evaluation is due as well
    probe: int
    save: int
    metric: str


@dataclasses.dataclass
class Progress:
    """Where a run stands beside its device state; saved with it as JSON."""

    stage: int = 0
    step: int = 0  # steps done over all stages
    stage_step: int = 0
    stage_updates: int = 0  # optimizer steps before this stage
    windows: int = 0  # flushes accepted over all stages; the device must count the same
    history: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    evaluated: int = -1  # last step whose evaluation is in the metrics
    open_step: OpenStep | None = None
    last_metric: float | None = None
    counters: dict[str, float] = dataclasses.field(default_factory=dict)
    waiting: list[list[int]] = dataclasses.field(default_factory=list)  # of a route with a buffer: question, visit
    apart_updates: int = 0  # optimizer steps of the second optimizer in this stage
    controls: dict[str, float] = dataclasses.field(default_factory=dict)  # steered coefficients of this stage
    ahead: OpenStep | None = None  # the next step, where its rollouts were made ahead; they are complete


def progress_to_host(progress: Progress, stream_state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """JSON values and host arrays that, with the device state, are the whole run."""
    open_step = progress.open_step
    host = {field.name: getattr(progress, field.name) for field in dataclasses.fields(Progress)}
    for name in ("open_step", "ahead"):
        host[name] = None if host[name] is None else to_json(host[name])
    arrays = {}
    if open_step is not None and open_step.scores is not None:
        arrays = {
            f"scores_{index:06d}_{name}": array
            for index, named in enumerate(open_step.scores)
            for name, array in named.items()
        }
    return host | {"stream": stream_state}, arrays  # the position is in the stream of the stage


def progress_from_host(
    host: Mapping[str, Any], arrays: Mapping[str, np.ndarray], questions: Mapping[int, Question]
) -> Progress:
    """The inverse of `progress_to_host`, but for the stream's position."""
    host = {"ahead": None, **host}  # which was not always there
    fields = {field.name: host[field.name] for field in dataclasses.fields(Progress)}
    if host["ahead"] is not None:
        fields["ahead"] = from_json(host["ahead"], questions, None)
    if host["open_step"] is not None:
        scores: dict[str, dict[str, np.ndarray]] = {}
        for key in sorted(key for key in arrays if key.startswith("scores_")):
            _, index, name = key.split("_", maxsplit=2)
            scores.setdefault(index, {})[name] = arrays[key]
        fields["open_step"] = from_json(host["open_step"], questions, list(scores.values()) or None)
    return Progress(**fields)
