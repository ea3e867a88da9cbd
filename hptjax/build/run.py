"""A run from its config: everything put together, started or taken up again, and summed up at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hptjax.build.frozen import let_go_of_start
from hptjax.build.mesh import offer_cpu_devices
from hptjax.build.opening import data_record, notes, opening_line
from hptjax.build.parts import Parts, fingerprint, open_parts
from hptjax.build.plots import plot_run
from hptjax.build.profile import time_table, tracing
from hptjax.build.signals import stop_signals
from hptjax.build.stages import build_stages, stage_list
from hptjax.build.summary import summarise, summary_table
from hptjax.build.weights import export
from hptjax.build.world import Saver, build_cadence, build_telemetry, build_world
from hptjax.config import Config, resolved
from hptjax.errors import SamplingFailed
from hptjax.records import Question
from hptjax.rundir import check_seen, has_begun, held, mark, open_run_folder, read_json, run_folder, write_json
from hptjax.sharding.agree import check_same, from_first
from hptjax.sharding.distributed import initialize
from hptjax.sharding.host import to_host
from hptjax.sharding.peers import is_first, several
from hptjax.sharding.watchdog import shared_fate
from hptjax.train.checkpoint import Checkpoints, open_checkpoints
from hptjax.train.jsonl import open_jsonl, read_rows, truncate_after
from hptjax.train.ledger import check_totals
from hptjax.train.loop import Stopped, run
from hptjax.train.stage import Progress, Stage, progress_from_host
from hptjax.train.state import Totals, check_after_resume


def train(config: Config, *, quiet: bool = False, profile: bool = False) -> dict[str, Any]:
    """Runs a config to its end, from where its run folder stands, and returns its summary.

    A finished run is not run again: its summary is returned. With a larger `train.steps` it goes on where it ended.

    Args
      quiet: print nothing. profile: record a trace of two steps, and print where the time went.

    Raises ValueError for input that cannot be used (config, data, model, a run folder of another config or in use),
      AccumulationError when an update's evidence fails, SystemExit(0) after a clean stop on SIGTERM or Ctrl-C.
    """
    offer_cpu_devices(config)
    chosen = config.distributed
    initialize(
        chosen.mode,
        coordinator=chosen.coordinator,
        processes=chosen.processes,
        process=chosen.process,
        timeout_s=chosen.timeout_s,
    )
    with shared_fate(chosen.timeout_s):
        return _train_together(config, quiet=quiet or not is_first(), profile=profile and is_first())


def _train_together(config: Config, *, quiet: bool, profile: bool) -> dict[str, Any]:
    """`train` in every process of the run; the first alone holds and writes the run folder, but for the checkpoints."""
    asked = {name: value for name, value in resolved(config).items() if name != "distributed"}
    check_same(asked, "the config", "start every process with the same file and options")
    folder = run_folder(config)
    with contextlib.ExitStack() as holding:

        def open_folder() -> tuple[str, dict[str, Any] | None]:
            holding.enter_context(held(folder))
            open_run_folder(config)
            return mark(folder) if several() else "", _summary_of_finished(config, folder)

        sign, summary = from_first(open_folder, "opening the run folder")
        if several():
            check_seen(folder, sign)
        if summary is not None:
            if not quiet:
                print(f"{folder} is finished; nothing was run again.\n{summary_table(summary)}")
            return summary
        with open_parts(config) as parts, stop_signals() as should_stop:
            check_same(fingerprint(parts), "the model folder and tokenizer", "give every process the same files")
            summary = _train(parts, folder, should_stop, quiet=quiet, profile=profile)
    if not quiet:
        print(summary_table(summary))
    if profile:
        print(time_table(read_rows(folder / "metrics.jsonl")))
    return summary


def _summary_of_finished(config: Config, folder: Path) -> dict[str, Any] | None:
    """The summary in the run folder, if it is that of all the steps that the config asks for."""
    path = folder / "summary.json"
    if not path.exists():
        return None
    summary = read_json(path)
    return summary if summary["steps"] == sum(stage.steps for stage in stage_list(config)) else None


def _train(
    parts: Parts, folder: Path, should_stop: Callable[[], bool], *, quiet: bool, profile: bool
) -> dict[str, Any]:
    """The run from where its folder stands to its summary; every part of it stands below or in `build.world`."""
    config = parts.config
    began = time.monotonic()
    from_first(lambda: _check_prompt_format(parts, folder), "comparing the prompt format")
    stages = build_stages(config, parts.policy, parts.questions.train)
    questions = {question.question_id: question for question in parts.questions.train}
    with open_checkpoints(
        folder / "checkpoints",
        keep_last=config.checkpoint.keep_last,
        keep_best=config.checkpoint.keep_best,
        fingerprint=fingerprint(parts),
    ) as checkpoints:
        state, progress = _start_or_resume(parts, stages, checkpoints, questions)
        let_go_of_start(config, parts.policy)
        seconds_before = progress.counters.get("seconds", 0.0)

        def seconds() -> float:
            return seconds_before + time.monotonic() - began

        totals = to_host(state.totals)

        def take_up_files() -> None:
            _drop_unsaved_rows(folder, progress)
            _check_ledger(folder, totals, progress)

        from_first(take_up_files, "taking up the run folder's files")
        with contextlib.ExitStack() as files:
            telemetry = build_telemetry(config, folder, stages, progress, files, quiet=quiet)
            if not quiet:
                telemetry.say(opening_line(parts, folder, stages, progress))
            for note in notes(config, stages):
                telemetry.say(note)
            write_ledger = _nowhere
            if is_first():
                write_ledger = files.enter_context(open_jsonl(folder / "ledger.jsonl")).write
                write_json(folder / "data.json", data_record(parts))
            saver = Saver(checkpoints, telemetry.say, seconds)
            world = build_world(
                parts,
                folder,
                stages,
                questions,
                telemetry=telemetry,
                ledger=write_ledger,
                save=saver,
                should_stop=should_stop,
            )
            if profile:
                traced = files.enter_context(tracing(folder, progress.step, telemetry.say))
                world = dataclasses.replace(world, traced=traced)
            try:
                state, progress = run(stages, state, progress, world, build_cadence(config))
            except Stopped:
                kept = "and saved at" if saver.saved else "without a checkpoint of"
                telemetry.say(f"stopped {kept} step {progress.step}; the same command continues")
                raise SystemExit(0) from None
            except SamplingFailed:
                kept = "what was sampled is saved" if saver.saved else "nothing of it is saved"
                telemetry.say(f"sampling failed in step {progress.step + 1}; {kept}, the same command continues")
                raise
        totals = to_host(state.totals)
        exported = to_host(state.params["policy"]) if config.checkpoint.export_folder is not None else None

        def sum_up() -> dict[str, Any]:
            _check_ledger(folder, totals, progress)
            if config.checkpoint.export_folder is not None:
                export(parts, exported, Path(config.checkpoint.export_folder))
            _draw(config, folder, stages)
            summary = summarise(folder, seconds=seconds(), ks=config.eval.ks)
            write_json(folder / "summary.json", summary)
            return summary

        return from_first(sum_up, "summing up the run")


def _check_prompt_format(parts: Parts, folder: Path) -> None:
    """Raises ValueError where a run that has begun was started with prompts that read differently."""
    path = folder / "data.json"
    recorded = read_json(path).get("prompt") if path.exists() and has_begun(folder) else None
    present = parts.questions.record.get("prompt")
    if recorded is not None and recorded != present:
        raise ValueError(
            f"expected the prompt format that run folder '{folder}' was started with, {recorded}, got {present}: the "
            "tokenizer's chat template, or what renders it, has changed; put it back, or give the run another name "
            "(--name)."
        )


def _nowhere(row: Mapping[str, Any]) -> None:
    """Where the rows of a process go that writes no files."""


def _start_or_resume(
    parts: Parts, stages: Sequence[Stage], checkpoints: Checkpoints, questions: Mapping[int, Question]
) -> tuple[Any, Progress]:
    """The state and progress of the newest good checkpoint, or of the beginning."""
    params = {"policy": parts.policy.params}

    def template(host: Mapping[str, Any]) -> Any:
        return stages[min(host["stage"], len(stages) - 1)].start(params, None)

    restored = checkpoints.restore_latest(template)
    if restored is None:
        return stages[0].start(params, None), Progress()
    stages[min(restored.host["stage"], len(stages) - 1)].stream.set_state(restored.host["stream"])  # refuses other data
    progress = progress_from_host(restored.host, restored.arrays, questions)
    if progress.stage == len(stages) and progress.stage_step < stages[-1].steps:
        progress.stage -= 1  # the run had ended, and train.steps was raised since
    return check_after_resume(restored.state), progress


def _drop_unsaved_rows(folder: Path, progress: Progress) -> None:
    """Removes the rows past the checkpoint that the run goes on from: they are written again.

    Raises ValueError, before anything is removed, where rows up to the checkpoint are lost: a summary of the rest
    would be wrong.
    """
    last = progress.step if progress.evaluated >= 0 else -1
    for name, first in (("metrics.jsonl", 0), ("ledger.jsonl", 1)):
        lost = set(range(first, last + 1)) - {row["step"] for row in read_rows(folder / name)}
        if lost:
            raise ValueError(
                f"expected {folder / name} to hold every step up to {last}, where the checkpoint stands, got no step "
                f"{min(lost)}; put the file back, remove the checkpoints past what it holds, or change name"
            )
    for name in ("metrics.jsonl", "ledger.jsonl", "panel.jsonl"):
        truncate_after(folder / name, last)


def _check_ledger(folder: Path, totals: Totals, progress: Progress) -> None:
    """Raises AccumulationError where the ledger's rows do not add up to what the state has counted."""
    under_way = progress.open_step.ledger_rows if progress.open_step is not None else []
    check_totals([*read_rows(folder / "ledger.jsonl"), *under_way], totals)


def _draw(config: Config, folder: Path, stages: Sequence[Stage]) -> None:
    """plot.png, where it is wanted and can be drawn."""
    if not config.telemetry.plot:
        return
    try:
        plot_run(folder, ks=config.eval.ks, title=f"{config.name}: {' then '.join(stage.name for stage in stages)}")
    except Exception as error:  # a picture is worth no run
        print(f"warning: {folder}/plot.png could not be drawn: {type(error).__name__}: {error}", file=sys.stderr)
