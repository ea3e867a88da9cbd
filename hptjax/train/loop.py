"""The order of a run, top to bottom: stages, their steps, and in each step

    questions -> rollout -> reward -> gate -> assemble -> [score] -> updates -> metrics

Everything it calls is a function it was given; nothing here knows a model, a method or a file. It may be stopped at
any `should_stop`, saves where it stands, and taken up again it ends with the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from hptjax.diagnostics.metrics import merge
from hptjax.errors import SamplingFailed
from hptjax.hpt.assemble import Update
from hptjax.records import Sample
from hptjax.sharding.agree import check_same
from hptjax.sharding.peers import phase
from hptjax.train.ahead import Ahead, begin_next
from hptjax.train.ledger import AccumulationError, check, ledger_row
from hptjax.train.open_step import OpenStep
from hptjax.train.phases import assemble_updates, gate_step, judge_demonstrations
from hptjax.train.rounds import open_step, roll_out_in_rounds
from hptjax.train.second_look import advantage_sums, filled, look_again
from hptjax.train.stage import Cadence, Progress, Stage, World, progress_to_host
from hptjax.train.state import TrainState
from hptjax.train.step_metrics import merge_stats, rollout_metrics, staleness_metrics, update_metrics, visit_metrics
from hptjax.train.timing import timed
from hptjax.types import MicroBatch


class Stopped(Exception):
    """The run was asked to stop and has saved where it stands."""


def run(
    stages: Sequence[Stage], state: TrainState, progress: Progress, world: World, cadence: Cadence
) -> tuple[TrainState, Progress]:
    """All stages from where `progress` stands to the end.

    Raises Stopped after a clean save when `world.should_stop()` says so, SamplingFailed after such a save when who
    samples cannot go on, AccumulationError when an update's evidence fails (nothing of that update is applied).
    """
    if progress.evaluated < 0:
        _evaluate(state, progress, world, cadence)
    between: dict[str, float] = {}  # seconds of what is done between two steps, for the row of the next one
    with Ahead() as ahead:
        while progress.stage < len(stages):
            stage = stages[progress.stage]
            while progress.stage_step < stage.steps:
                with world.traced(progress.step):
                    state = _step(stage, state, progress, world, cadence, between, ahead)
                between = {}
                progress.open_step = None
                progress.step += 1
                progress.stage_step += 1
                if ahead.under_way:  # from here to the next step it may not be: what follows needs judge and sampler
                    with timed(between, "rollout"):
                        progress.ahead = ahead.join()
                at_end = progress.stage == len(stages) - 1 and progress.stage_step == stage.steps
                if at_end or progress.step in cadence.evaluate_also or _due(cadence.evaluate, progress.step):
                    _evaluate(state, progress, world, cadence)
                if ahead.failure is not None:
                    _save(stage, state, progress, world, wait=True)
                    raise ahead.failure
                if _due(cadence.save, progress.step) and not at_end:
                    with timed(between, "checkpoint"):
                        _save(stage, state, progress, world)
            progress.stage += 1
            if progress.stage < len(stages):
                progress.stage_step = 0
                progress.waiting, progress.apart_updates = [], 0
                progress.controls = {}
                progress.stage_updates = int(world.read(state.totals.optimizer_steps))
                state = stages[progress.stage].start(state.params, state.totals)
            else:
                _save(stage, state, progress, world, wait=True)
    return state, progress


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _save(stage: Stage, state: TrainState, progress: Progress, world: World, *, wait: bool = False) -> None:
    phase("checkpoint")
    host, arrays = progress_to_host(progress, stage.stream.get_state())
    world.save(progress.step, state, host, arrays, metric=progress.last_metric, wait=wait)
    progress.last_metric = None


def _stop_here(stage: Stage, state: TrainState, progress: Progress, world: World, ahead: Ahead) -> None:
    """Saves and raises, if the run was asked to stop; rollouts that are under way are finished before."""
    if world.should_stop():
        progress.ahead = ahead.join() or progress.ahead
        _save(stage, state, progress, world, wait=True)
        raise ahead.failure or Stopped


def _evaluate(state: TrainState, progress: Progress, world: World, cadence: Cadence) -> None:
    """The validation figures at this step: before the first step, every n steps, and after the last.

    It comes before the save of the same step, so that a resumed run never evaluates a step twice.
    """
    phase("evaluation")
    row = world.evaluate(progress.step, state.params["policy"])
    progress.last_metric = row.get(cadence.metric)
    progress.evaluated = progress.step
    world.log_step(progress.step, row)


def _step(
    stage: Stage,
    state: TrainState,
    progress: Progress,
    world: World,
    cadence: Cadence,
    between: dict[str, float],
    ahead: Ahead,
) -> TrainState:
    """One rollout batch: from its questions to its updates and its row of metrics.

    The row's seconds add up to the step's wall time and those `between` this step and the one before; what is in no
    phase is "other".
    """
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    beside = ahead.taken_seconds()
    if progress.open_step is None:
        progress.open_step, progress.ahead = progress.ahead or open_step(stage, progress.step), None
    step = progress.open_step
    _stop_here(stage, state, progress, world, ahead)
    demonstrations: dict[int, Sample] = {}
    if stage.rolls_out:
        if progress.ahead is None:  # else this step has all of its own, and the stream is past its questions
            _roll_out(stage, state, progress, step, world, seconds)
        with timed(seconds, "reward"):
            demonstrations = judge_demonstrations(step, world.judge) if stage.rewards_demonstrations else demonstrations
        begin_next(stage, state, progress, step, world, ahead)
    with timed(seconds, "assemble"):
        gated = gate_step(
            step,
            route=stage.route,
            demonstrations=demonstrations,
            waiting=[(question, visit) for question, visit in progress.waiting],
            bank=world.questions,
            wanted=stage.questions_per_step,
        )
        assembled = partial(
            assemble_updates,
            gated,
            updates=stage.updates_per_step,
            stage_step=progress.stage_step,
            mask_overlong=stage.mask_overlong,
            assemble=stage.assemble,
        )
        updates = assembled()
        plan = [[update.digest.tolist(), update.planned_tokens.tolist()] for update in updates]
        check_same([step.step, plan], "the plan of the updates", "keep the run folder and report it")
    rows: list[dict[str, Any]] = [{"train/stage": progress.stage}]
    batches = [[world.put(micro_batch) for micro_batch in update.micro_batches] for update in updates]
    if stage.score is not None:
        with timed(seconds, "score"):
            batches = _score(stage, state, step, batches, world)
    controls = progress.controls
    if stage.second_look is not None:
        with timed(seconds, "second_look"):
            looked = look_again(updates, step.scores or [], stage.second_look, controls, reassemble=assembled)
            updates, controls = looked.updates, dict(looked.controls_after)
            check_same([step.step, advantage_sums(updates)], "the advantages", "keep the run folder and report it")
            batches = [[world.put(micro_batch) for micro_batch in part] for part in looked.micro_batches]
            rows.append(looked.metrics)
    rows.append(rollout_metrics(step, gated, updates, group_size=stage.group_size, reward_names=world.reward_names))
    if stage.add_frozen is not None:
        with timed(seconds, "reference"):
            batches = [[stage.add_frozen(micro_batch) for micro_batch in part] for part in batches]
    if stage.probe is not None and _due(cadence.probe, progress.stage_step) and step.probe is None:
        with timed(seconds, "probe"):
            step.probe = stage.probe(state.params, batches[0])
    with timed(seconds, "update"):
        state = _apply_updates(stage, state, progress, step, updates, batches, world, ahead)
    progress.controls = controls
    progress.waiting = [list(entry) for entry in gated.routed.waiting]
    if stage.rolls_out:
        rows.append(visit_metrics(gated, step.questions, progress.history))
        rows.append(staleness_metrics(step) if stage.rollouts_ahead else {})
    seconds["other"] = max(time.perf_counter() - began - sum(seconds.values()), 0.0)
    for name, spent in between.items():
        seconds[name] = seconds.get(name, 0.0) + spent
    rows += [step.probe or {}, update_metrics(step, updates, seconds, beside)]
    for entry in step.ledger_rows:
        world.log_ledger(entry)
    world.log_rollouts(step, gated)
    world.log_step(progress.step + 1, merge(rows))
    return state


def _roll_out(
    stage: Stage, state: TrainState, progress: Progress, step: OpenStep, world: World, seconds: dict[str, float]
) -> None:
    """All rollouts of the step, judged. It saves where stopped, and where whoever samples cannot go on."""
    failure: SamplingFailed | None = None
    complete = False
    try:
        complete = roll_out_in_rounds(
            stage,
            step,
            state.params["policy"],
            world,
            seconds,
            stage_step=progress.stage_step,
            should_stop=world.should_stop,
        )
    except SamplingFailed as error:
        failure = error
    if not complete:  # not in the handler above: a save asks whether anything has failed in it
        _save(stage, state, progress, world, wait=True)
        raise failure or Stopped


def _score(
    stage: Stage, state: TrainState, step: OpenStep, batches: list[list[MicroBatch]], world: World
) -> list[list[MicroBatch]]:
    """The same packed micro-batches with the scores that losses read: by the trainer, at the sampling weights.

    The open step keeps them on the host where they are needed after the weights have moved, or by the second look.
    """
    flat: list[dict[str, Any]]
    if step.scores is None:
        assert stage.score is not None
        flat = [stage.score(state.params, micro_batch) for part in batches for micro_batch in part]
        step.scores = world.read(flat) if len(batches) > 1 or stage.second_look is not None else None
    else:
        flat = step.scores
    scored = iter(flat)
    return [[filled(micro_batch, next(scored)) for micro_batch in part] for part in batches]


def _apply_updates(
    stage: Stage,
    state: TrainState,
    progress: Progress,
    step: OpenStep,
    updates: Sequence[Update],
    batches: Sequence[Sequence[MicroBatch]],
    world: World,
    ahead: Ahead,
) -> TrainState:
    """Every live micro-batch of every update once, from where the step stands; a ledger row per update."""
    while step.update_index < len(updates):
        update, micro_batches = updates[step.update_index], batches[step.update_index]
        while step.micro_index < len(micro_batches):
            _stop_here(stage, state, progress, world, ahead)
            last = step.micro_index == len(micro_batches) - 1
            state = stage.micro_step(state, micro_batches[step.micro_index], world.flag(last))
            step.micro_index += 1
        report = world.read(state.report)
        apart = update.micro_batches[0].optimizer == 1
        done = int(report.optimizer_steps) - progress.stage_updates  # of both optimizers, this update included
        schedule_step = progress.apart_updates if apart else max(done - 1 - progress.apart_updates, 0)
        entry = ledger_row(
            report,
            update,
            step=progress.step + 1,
            place=step.update_index,
            window=progress.windows + 1,
            learning_rate=stage.learning_rate(schedule_step),
            schedule_step=schedule_step,
            clip_norm=stage.apart_clip_norm if apart else stage.clip_norm,
        )
        step.ledger_rows.append(entry)
        try:
            check(entry, nonfinite=stage.nonfinite)
        except AccumulationError:
            for row in step.ledger_rows:  # the evidence stays on disk; a resumed run drops it with the unfinished step
                world.log_ledger(row)
            raise
        progress.windows += 1
        progress.apart_updates += int(apart and entry["status"] == "updated")
        stats = dict(report.stats)
        if step.update_index > 0:  # the weights have moved since the samples were drawn: no measure of the sampler
            stats = {name: stat for name, stat in stats.items() if not name.startswith("rollout/logp_diff")}
        merge_stats(step.stats, stats)
        step.update_index += 1
        step.micro_index = 0
    return state
