"""The order of a run, top to bottom: stages, their steps, and in each step

    questions -> rollout -> reward -> gate -> assemble -> [score] -> updates -> metrics

Everything it calls is a function it was given; nothing here knows a model, a method or a file. It may be stopped at
any `should_stop`, saves where it stands, and taken up again it ends with the same bits.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from hptjax.diagnostics.metrics import merge
from hptjax.hpt.assemble import Update
from hptjax.hpt.terms import target_length
from hptjax.records import Question
from hptjax.train.ledger import check, ledger_row
from hptjax.train.open_step import OpenStep, from_json, to_json
from hptjax.train.phases import (
    Assemble,
    Gated,
    Judge,
    MakeRequests,
    SampleRollouts,
    assemble_updates,
    gate_step,
    judge_rollouts,
    roll_out,
    rollout_metrics,
    visit_metrics,
)
from hptjax.train.state import TrainState
from hptjax.types import MicroBatch, Params


class Stopped(Exception):
    """The run was asked to stop and has saved where it stands."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """One stage of a run: a method as functions and values.

    Args
      steps: rollout batches. threshold: the gate's; -1 is pure RL, group_size pure SFT.
      rolls_out: False where every question is gated whatever it solves, so nothing needs to be sampled.
      updates_per_step: optimizer updates per rollout batch. score: set where the method needs the score pass; given
        (params, micro_batch) it returns log-probs under those parameters, [B T].
      start: parameters and lifetime totals -> the stage's first state, with fresh sums and optimizer.
      micro_step: jitted and donated. learning_rate: optimizer step of this stage -> rate.
      probe: objective gradient norms of an update, (params, micro_batches) -> metrics; None where never asked.
      stream: next_batch, get_state, set_state; first_round is added to its rounds, so that no two stages share an id.
    """

    name: str
    steps: int
    stream: Any
    first_round: int
    threshold: int
    group_size: int
    rolls_out: bool
    updates_per_step: int
    mask_overlong: bool
    nonfinite: str
    start: Callable[[Mapping[str, Params], Any], TrainState]
    micro_step: Callable[[TrainState, MicroBatch, Any], TrainState]
    make_requests: MakeRequests
    assemble: Assemble
    learning_rate: Callable[[int], float]
    score: Callable[[Params, MicroBatch], Any] | None = None
    add_reference: Callable[[MicroBatch], MicroBatch] | None = None
    probe: Callable[[Mapping[str, Params], Sequence[MicroBatch]], dict[str, float]] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """What the loop asks of everything around it."""

    questions: Mapping[int, Question]
    sample: SampleRollouts
    judge: Judge
    put: Callable[[MicroBatch], MicroBatch]
    read: Callable[[Any], Any]  # the one device-to-host read
    flag: Callable[[bool], Any]  # a host bool as a device scalar
    log_step: Callable[[int, dict[str, Any]], None]
    log_ledger: Callable[[dict[str, Any]], None]
    log_rollouts: Callable[[OpenStep, Gated], None]
    evaluate: Callable[[int, Params], dict[str, Any]]
    save: Callable[..., None]  # (step, state, host, arrays, *, metric, wait)
    should_stop: Callable[[], bool]


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
    history: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    evaluated: int = -1  # last step whose evaluation is in the metrics
    open_step: OpenStep | None = None
    last_metric: float | None = None
    counters: dict[str, float] = dataclasses.field(default_factory=dict)


def progress_to_host(progress: Progress, stream_state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """JSON values and host arrays that, with the device state, are the whole run."""
    open_step = progress.open_step
    host = {field.name: getattr(progress, field.name) for field in dataclasses.fields(Progress)}
    host["open_step"] = None if open_step is None else to_json(open_step)
    arrays = {}
    if open_step is not None and open_step.scores is not None:
        arrays = {f"scores_{index:06d}": scores for index, scores in enumerate(open_step.scores)}
    return host | {"stream": stream_state}, arrays  # the position is in the stream of the stage


def progress_from_host(
    host: Mapping[str, Any], arrays: Mapping[str, np.ndarray], questions: Mapping[int, Question]
) -> Progress:
    """The inverse of `progress_to_host`, but for the stream's position."""
    fields = {field.name: host[field.name] for field in dataclasses.fields(Progress)}
    if host["open_step"] is not None:
        scores = [arrays[name] for name in sorted(arrays) if name.startswith("scores_")] or None
        fields["open_step"] = from_json(host["open_step"], questions, scores)
    return Progress(**fields)


def run(
    stages: Sequence[Stage], state: TrainState, progress: Progress, world: World, cadence: Cadence
) -> tuple[TrainState, Progress]:
    """All stages from where `progress` stands to the end.

    Raises Stopped after a clean save when `world.should_stop()` says so, AccumulationError when an update's evidence
    fails (nothing of that update is applied).
    """
    if progress.evaluated < 0:
        _evaluate(state, progress, world, cadence)
    while progress.stage < len(stages):
        stage = stages[progress.stage]
        while progress.stage_step < stage.steps:
            state = _step(stage, state, progress, world, cadence)
            progress.open_step = None
            progress.step += 1
            progress.stage_step += 1
            at_end = progress.stage == len(stages) - 1 and progress.stage_step == stage.steps
            if at_end or progress.step in cadence.evaluate_also or _due(cadence.evaluate, progress.step):
                _evaluate(state, progress, world, cadence)
            if _due(cadence.save, progress.step) and not at_end:
                _save(stage, state, progress, world)
        progress.stage += 1
        if progress.stage < len(stages):
            progress.stage_step = 0
            progress.stage_updates = int(world.read(state.totals.optimizer_steps))
            state = stages[progress.stage].start(state.params, state.totals)
        else:
            _save(stage, state, progress, world, wait=True)
    return state, progress


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _save(stage: Stage, state: TrainState, progress: Progress, world: World, *, wait: bool = False) -> None:
    host, arrays = progress_to_host(progress, stage.stream.get_state())
    world.save(progress.step, state, host, arrays, metric=progress.last_metric, wait=wait)
    progress.last_metric = None


def _stop_here(stage: Stage, state: TrainState, progress: Progress, world: World) -> None:
    """Saves and raises, if the run was asked to stop."""
    if world.should_stop():
        _save(stage, state, progress, world, wait=True)
        raise Stopped


def _evaluate(state: TrainState, progress: Progress, world: World, cadence: Cadence) -> None:
    """The validation figures at this step: before the first step, every n steps, and after the last.

    It comes before the save of the same step, so that a resumed run never evaluates a step twice.
    """
    row = world.evaluate(progress.step, state.params["policy"])
    progress.last_metric = row.get(cadence.metric)
    progress.evaluated = progress.step
    world.log_step(progress.step, row)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def _step(stage: Stage, state: TrainState, progress: Progress, world: World, cadence: Cadence) -> TrainState:
    """One rollout batch: from its questions to its updates and its row of metrics."""
    seconds: dict[str, float] = {}
    if progress.open_step is None:
        batch = stage.stream.next_batch()
        visit = stage.first_round + batch.round
        progress.open_step = OpenStep(step=progress.step, round=visit, questions=list(batch.questions))
    step = progress.open_step
    _stop_here(stage, state, progress, world)
    if stage.rolls_out:
        with _timed(seconds, "rollout"):
            complete = roll_out(
                step,
                state.params["policy"],
                make_requests=stage.make_requests,
                sample=world.sample,
                should_stop=world.should_stop,
            )
        if not complete:
            _save(stage, state, progress, world, wait=True)
            raise Stopped
        with _timed(seconds, "reward"):
            judge_rollouts(step, world.judge)
    with _timed(seconds, "assemble"):
        gated = gate_step(step, threshold=stage.threshold, group_size=stage.group_size)
        updates = assemble_updates(
            gated, updates=stage.updates_per_step, mask_overlong=stage.mask_overlong, assemble=stage.assemble
        )
    rows = [rollout_metrics(step, gated, updates, group_size=stage.group_size), {"train/stage": progress.stage}]
    batches = [[world.put(micro_batch) for micro_batch in update.micro_batches] for update in updates]
    if stage.add_reference is not None:
        with _timed(seconds, "reference"):
            batches = [[stage.add_reference(micro_batch) for micro_batch in part] for part in batches]
    if stage.score is not None:
        with _timed(seconds, "score"):
            batches = _score(stage, state, step, batches, world)
    if stage.probe is not None and _due(cadence.probe, progress.stage_step) and step.update_index == 0:
        with _timed(seconds, "probe"):
            rows.append(stage.probe(state.params, batches[0]))
    with _timed(seconds, "update"):
        state = _apply_updates(stage, state, progress, step, updates, batches, world)
    if stage.rolls_out:
        rows.append(visit_metrics(gated, step.questions, progress.history))
    rows.append(_update_metrics(step, updates, seconds))
    for entry in step.ledger_rows:
        world.log_ledger(entry)
    world.log_rollouts(step, gated)
    world.log_step(progress.step + 1, merge(rows))
    return state


def _score(
    stage: Stage, state: TrainState, step: OpenStep, batches: list[list[MicroBatch]], world: World
) -> list[list[MicroBatch]]:
    """The same packed micro-batches with `rollout_logprobs` filled: by the trainer, at the sampling weights."""
    if step.scores is None:
        flat = [stage.score(state.params["policy"], micro_batch) for part in batches for micro_batch in part]
        step.scores = world.read(flat) if len(batches) > 1 else None
    else:
        flat = step.scores
    scored = iter(flat)
    return [
        [dataclasses.replace(micro_batch, rollout_logprobs=next(scored)) for micro_batch in part] for part in batches
    ]


def _apply_updates(
    stage: Stage,
    state: TrainState,
    progress: Progress,
    step: OpenStep,
    updates: Sequence[Update],
    batches: Sequence[Sequence[MicroBatch]],
    world: World,
) -> TrainState:
    """Every live micro-batch of every update once, from where the step stands; a ledger row per update."""
    while step.update_index < len(updates):
        update, micro_batches = updates[step.update_index], batches[step.update_index]
        while step.micro_index < len(micro_batches):
            _stop_here(stage, state, progress, world)
            last = step.micro_index == len(micro_batches) - 1
            state = stage.micro_step(state, micro_batches[step.micro_index], world.flag(last))
            step.micro_index += 1
        report = world.read(state.report)
        entry = ledger_row(
            report,
            step=progress.step + 1,
            update=step.update_index,
            planned_tokens=update.planned_tokens,
            micro_batches=len(micro_batches),
            term_tokens={name: count.tokens for name, count in update.terms.items()},
            sequences=len(update.samples),
            digest=update.digest,
            learning_rate=stage.learning_rate(max(int(report.optimizer_steps) - 1 - progress.stage_updates, 0)),
        )
        check(entry, nonfinite=stage.nonfinite)
        step.ledger_rows.append(entry)
        stats = dict(report.stats)
        if step.update_index > 0:  # the weights have moved since the samples were drawn: no measure of the sampler
            stats = {name: stat for name, stat in stats.items() if not name.startswith("rollout/logp_diff")}
        _merge_stats(step.stats, stats)
        step.update_index += 1
        step.micro_index = 0
    return state


def _merge_stats(totals: dict[str, list[float]], stats: Mapping[str, Any]) -> None:
    """Adds sums and counts, and takes the larger peak, over the updates of a step."""
    for name, stat in stats.items():
        leaves = [float(leaf) for leaf in jax.tree.leaves(stat)]
        before = totals.get(name)
        if before is None:
            totals[name] = leaves
        elif len(leaves) == 1:
            totals[name] = [max(before[0], leaves[0])]
        else:
            totals[name] = [before[0] + leaves[0], before[1] + leaves[1]]


def _update_metrics(step: OpenStep, updates: Sequence[Update], seconds: Mapping[str, float]) -> dict[str, Any]:
    """What the updates of a step say: losses, norms, the witness, times and throughput."""
    row: dict[str, Any] = {
        name: parts[0] if len(parts) == 1 else (parts[0], parts[1]) for name, parts in step.stats.items()
    }
    rows = step.ledger_rows
    trained = sum(int(update.planned_tokens.sum()) for update in updates)
    generated = sum(len(sample.completion_tokens) - sample.prefix_len for sample in step.samples.values())
    prompts = {sample.sample_id.question: len(sample.prompt_tokens) for sample in step.samples.values()}
    row |= {
        "actor/grad_norm": max(norm for entry in rows for norm in entry["grad_norm"].values()),
        "actor/lr": rows[-1]["learning_rate"],
        "actor/skipped_updates": sum(entry["status"] != "updated" for entry in rows),
        "witness/ok": int(all(entry["witness_ok"] for entry in rows)),
        "train/optimizer_step": rows[-1]["optimizer_step"],
        "train/updates": len(rows),
        "perf/trained_tokens": trained,
        "perf/generated_tokens": generated,
        "perf/packed_tokens": sum(target_length(sample) for update in updates for sample in update.samples),
        "perf/prefilled_tokens": sum(prompts.values()),
        "perf/time_per_step": sum(seconds.values()),
        "perf/throughput": (trained + generated, sum(seconds.values()) * jax.device_count()),
        "perf/update_tokens_per_s": (trained, seconds["update"]),
    }
    if "rollout" in seconds:
        row["perf/rollout_tokens_per_s"] = (generated, seconds["rollout"])
    return row | {f"timing_s/{name}": value for name, value in seconds.items()}
