"""A run from its config: everything put together, started or taken up again, and summed up at the end."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from hptjax.build.parts import TRAIN_KEY, Parts, fingerprint, open_parts
from hptjax.build.plots import plot_run
from hptjax.build.signals import stop_signals
from hptjax.build.stages import build_stages
from hptjax.build.summary import summarise, summary_table
from hptjax.build.weights import export
from hptjax.config import Config, resolved
from hptjax.data import tokenizer as text
from hptjax.masked import mean
from hptjax.records import Objective
from hptjax.rundir import open_run_folder, write_json
from hptjax.sharding.agree import agree, anyone
from hptjax.sharding.host import to_host
from hptjax.sharding.mesh import put_micro_batch
from hptjax.train.checkpoint import CheckpointFailed, Checkpoints, open_checkpoints
from hptjax.train.jsonl import open_jsonl, truncate_after
from hptjax.train.loop import Stopped, run
from hptjax.train.open_step import OpenStep
from hptjax.train.phases import Gated
from hptjax.train.stage import Cadence, Progress, Stage, World, progress_from_host
from hptjax.train.telemetry import (
    Telemetry,
    make_telemetry,
    progress_sink,
    rollout_row,
    tensorboard_sink,
    wandb_sink,
    watch_sampler,
    write_rollouts,
)


def train(config: Config, *, quiet: bool = False) -> dict[str, Any]:
    """Runs a config to its end, from where its run folder stands, and returns its summary.

    A finished run is not run again: its summary is returned.

    Raises ValueError for input that cannot be used (config, data, model, a run folder of another config),
      AccumulationError when an update's evidence fails, SystemExit(0) after a clean stop on SIGTERM or Ctrl-C.
    """
    folder = open_run_folder(config)
    finished = folder / "summary.json"
    if finished.exists():
        summary = json.loads(finished.read_text(encoding="utf-8"))
        if not quiet:
            print(f"{folder} is finished; nothing was run again.\n{summary_table(summary)}")
        return summary
    with open_parts(config) as parts, stop_signals() as should_stop:
        summary = _train(parts, folder, should_stop, quiet=quiet)
    if not quiet:
        print(summary_table(summary))
    return summary


def _train(parts: Parts, folder: Path, should_stop: Callable[[], bool], *, quiet: bool) -> dict[str, Any]:
    config = parts.config
    began = time.monotonic()
    stages = build_stages(config, parts.policy, parts.questions.train)
    by_id = {question.question_id: question for question in parts.questions.train}
    with open_checkpoints(
        folder / "checkpoints",
        keep_last=config.checkpoint.keep_last,
        keep_best=config.checkpoint.keep_best,
        fingerprint=fingerprint(parts),
    ) as checkpoints:
        state, progress = _start_or_resume(parts, stages, checkpoints, by_id)
        written = progress.step if progress.evaluated >= 0 else -1  # rows past it are written again
        seconds_before = progress.counters.get("seconds", 0.0)
        for name in ("metrics.jsonl", "ledger.jsonl", "panel.jsonl"):
            truncate_after(folder / name, written)
        with contextlib.ExitStack() as files:
            telemetry = _telemetry(config, folder, stages, progress, files, quiet=quiet)
            saved = True
            exact = config.model.compute_dtype == "float32"
            if not quiet:
                telemetry.say(opening_line(parts, folder, stages, progress))
            if truncates_sampling(config) and any(stage.rolls_out for stage in stages):
                telemetry.say(
                    f"warning: training on truncated sampling (rollout.top_k {config.rollout.top_k}, rollout.top_p "
                    f"{config.rollout.top_p}): log-probs are those before truncation, so the policy that learns is "
                    "not the one that sampled; 0 and 1 turn it off"
                )
            ledger = files.enter_context(open_jsonl(folder / "ledger.jsonl"))
            write_json(folder / "data.json", _data_record(parts))

            def save(step: int, state: Any, host: dict[str, Any], arrays: Mapping[str, Any], **options: Any) -> None:
                nonlocal saved
                host["counters"]["seconds"] = seconds_before + time.monotonic() - began
                for _ in range(2):  # the first failure may be that of the save before this one
                    try:
                        checkpoints.save(step, state, host, arrays, **options)
                        saved = True
                        return
                    except CheckpointFailed as failure:
                        saved = False
                        telemetry.say(f"warning: {failure}; the run goes on")

            world = World(
                questions=by_id,
                sample=_sampler(parts),
                judge=parts.judge,
                put=lambda micro_batch: put_micro_batch(parts.policy.mesh, micro_batch),
                read=to_host,
                flag=_flags(parts.policy.mesh),
                log_step=watch_sampler(telemetry.write, telemetry.say) if exact else telemetry.write,
                log_ledger=ledger.write,
                log_rollouts=_rollout_log(parts, folder),
                evaluate=parts.evaluator.during_training(folder, sum(stage.steps for stage in stages)),
                save=save,
                should_stop=lambda: agree(should_stop(), anyone),
            )
            cadence = Cadence(
                evaluate=config.train.eval_every,
                evaluate_also=frozenset(config.eval.test_steps),
                probe=config.train.probe_every,
                save=config.checkpoint.every_steps,
                metric=config.checkpoint.metric,
            )
            try:
                state, progress = run(stages, state, progress, world, cadence)
            except Stopped:
                kept = "and saved at" if saved else "without a checkpoint of"
                telemetry.say(f"stopped {kept} step {progress.step}; the same command continues")
                raise SystemExit(0) from None
        if config.checkpoint.export_folder is not None:
            export(parts, state.params["policy"], Path(config.checkpoint.export_folder))
        if config.telemetry.plot:
            try:
                plot_run(folder, ks=config.eval.ks, title=f"{config.name}: {' then '.join(s.name for s in stages)}")
            except Exception as error:  # a picture is worth no run
                print(
                    f"warning: {folder}/plot.png could not be drawn: {type(error).__name__}: {error}", file=sys.stderr
                )
        summary = summarise(folder, seconds=seconds_before + time.monotonic() - began, ks=config.eval.ks)
    write_json(folder / "summary.json", summary)
    return summary


def _start_or_resume(
    parts: Parts, stages: Sequence[Stage], checkpoints: Checkpoints, by_id: Mapping[int, Any]
) -> tuple[Any, Progress]:
    """The state and progress of the newest good checkpoint, or of the beginning."""
    params = {"policy": parts.policy.params}

    def template(host: Mapping[str, Any]) -> Any:
        return stages[min(host["stage"], len(stages) - 1)].start(params, None)

    restored = checkpoints.restore_latest(template)
    if restored is None:
        return stages[0].start(params, None), Progress()
    stages[min(restored.host["stage"], len(stages) - 1)].stream.set_state(restored.host["stream"])  # refuses other data
    return restored.state, progress_from_host(restored.host, restored.arrays, by_id)


def opening_line(parts: Parts, folder: Path, stages: Sequence[Stage], progress: Progress) -> str:
    """What is about to run, on what, and what was dropped of the data."""
    record = _data_record(parts)
    plan = " then ".join(f"{stage.steps} steps of {stage.name}" for stage in stages)
    sizes = ", ".join(f"{count} {name}" for name, count in record["questions"].items())
    dropped = [
        f"{count} {split} ({reason.replace('_', ' ')})"
        for split, reasons in record["dropped"].items()
        for reason, count in reasons.items()
        if count
    ]
    return "\n".join(
        [
            f"{folder}: {plan}, from step {progress.step}; {record['parameters']:,} parameters on "
            f"{parts.policy.mesh.size} {jax.default_backend()} device(s)",
            f"questions: {sizes}" + (f"; dropped: {', '.join(dropped)}" if dropped else ""),
        ]
    )


def truncates_sampling(config: Config) -> bool:
    """Whether rollouts are drawn from a part of the policy's distribution only."""
    return config.rollout.top_k > 0 or config.rollout.top_p < 1.0


def _data_record(parts: Parts) -> dict[str, Any]:
    questions = parts.questions
    prompts = np.asarray([len(question.prompt_tokens) for question in questions.train])
    demonstrations = np.asarray([len(question.demonstration_tokens) for question in questions.train])
    return {
        "questions": {name: len(getattr(questions, name)) for name in ("train", "validation", "test")},
        "dropped": questions.dropped,
        "mean_prompt_tokens": mean(prompts),
        "mean_demonstration_tokens": mean(demonstrations),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(parts.policy.params)),
    }


def _sampler(parts: Parts) -> Callable[..., Any]:
    key = jax.random.fold_in(parts.key, TRAIN_KEY)

    def sample(params: Any, requests: Sequence[Any], **options: Any) -> Any:
        return parts.policy.sample(params, requests, key, **options)

    return sample


def _flags(mesh: jax.sharding.Mesh) -> Callable[[bool], Any]:
    """The two truth values on the devices, made once."""
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    values = {value: jax.device_put(jnp.asarray(value), replicated) for value in (False, True)}
    return lambda value: values[value]


def _telemetry(
    config: Config,
    folder: Path,
    stages: Sequence[Stage],
    progress: Progress,
    files: contextlib.ExitStack,
    *,
    quiet: bool,
) -> Telemetry:
    metrics = files.enter_context(open_jsonl(folder / "metrics.jsonl"))
    console = Console(stderr=True)  # one for all, or a warning would break the progress line
    sinks = []
    if config.telemetry.tensorboard:
        sinks.append(tensorboard_sink(folder / "tensorboard", first_step=progress.step + 1))
    if config.telemetry.wandb:
        sinks.append(wandb_sink(folder, name=config.name, config=resolved(config)))
    if config.telemetry.progress and not quiet:
        sinks.append(
            progress_sink(
                sum(stage.steps for stage in stages),
                first_step=progress.step,
                stages=[stage.name for stage in stages],
                log_every=config.train.log_every,
                console=console,
            )
        )
    telemetry = make_telemetry(metrics.write, sinks, console=console)
    files.callback(telemetry.close)
    return telemetry


def _rollout_log(parts: Parts, folder: Path) -> Callable[[OpenStep, Gated], None]:
    """Every n steps, all rollouts of the step as text, with reward, verdict and the gate's decision."""
    every = parts.config.train.rollouts_every

    def log(step: OpenStep, gated: Gated) -> None:
        if not every or step.step % every or not step.samples:
            return
        decisions = {
            question.question_id: (question.example, Objective(objective).name, int(solved))
            for question, objective, solved in zip(step.questions, gated.objectives, gated.solved, strict=True)
        }
        rows = []
        for key, sample in sorted(step.samples.items()):
            example, objective, solved = decisions[key.question]
            rows.append(
                rollout_row(
                    step=step.step + 1,
                    sample_id=str(key),
                    prompt=example.prompt,
                    completion=text.decode(parts.policy.tokenizer, sample.completion_tokens),
                    reward=float(sample.reward or 0.0),
                    solved=sample.solved,
                    reason=step.verdicts[key][0].reason,
                    objective=objective,
                    group_solved=solved,
                    finish_reason=sample.finish_reason.name.lower(),
                    answer=example.answer,
                    completion_tokens=len(sample.completion_tokens),
                )
            )
        write_rollouts(folder, step.step + 1, rows)

    return log
