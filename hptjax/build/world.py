"""What the loop asks of everything around it, for one run folder: sampling, files on disk, the screen, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from hptjax.build.adapters import Frozen, as_used
from hptjax.build.outside import outside_sampler
from hptjax.build.parts import TRAIN_KEY, Parts
from hptjax.build.sampler import int8_parts
from hptjax.config import Config, resolved
from hptjax.data import tokenizer as text
from hptjax.records import Judge, Objective, Question, Sample, Verdict
from hptjax.rewards.combine import FAILURES
from hptjax.sharding.agree import agree, anyone
from hptjax.sharding.host import to_host
from hptjax.sharding.mesh import put_micro_batch
from hptjax.sharding.peers import is_first, several
from hptjax.sharding.rules import replicated
from hptjax.train.checkpoint import CheckpointFailed, Checkpoints
from hptjax.train.jsonl import open_jsonl
from hptjax.train.open_step import OpenStep
from hptjax.train.phases import Gated
from hptjax.train.stage import Cadence, Progress, Stage, World, copied
from hptjax.train.telemetry import (
    Telemetry,
    make_telemetry,
    progress_sink,
    rollout_row,
    say_sampler_gap,
    tensorboard_sink,
    wandb_sink,
    watch_sampler,
    write_rollouts,
)
from hptjax.types import Params


@dataclasses.dataclass(eq=False)
class Saver:
    """Saves through `checkpoints`. A save that fails is said, and the run goes on without it.

    Args
      seconds: wall time of the run so far, over all processes that worked on it; kept with each checkpoint.
      saved: whether the newest save is on disk or under way.
    """

    checkpoints: Checkpoints
    say: Callable[[str], None]
    seconds: Callable[[], float]
    saved: bool = True

    def __call__(self, step: int, state: Any, host: dict[str, Any], arrays: Mapping[str, Any], **options: Any) -> None:
        host["counters"]["seconds"] = self.seconds()
        for _ in range(2):  # the first failure may be that of the save before this one
            try:
                self.checkpoints.save(step, state, host, arrays, **options)
                self.saved = True
                return
            except CheckpointFailed as failure:
                if several():  # the others wait in the same save: all end, and start again from the last good one
                    raise
                self.saved = False
                self.say(f"warning: {failure}; the run goes on")


def build_world(
    parts: Parts,
    folder: Path,
    stages: Sequence[Stage],
    questions: Mapping[int, Question],
    *,
    telemetry: Telemetry,
    ledger: Callable[[dict[str, Any]], None],
    save: Callable[..., None],
    should_stop: Callable[[], bool],
) -> World:
    """The `World` of a run that writes into `folder`.

    Args
      questions: the training questions by id. ledger: appends a row to ledger.jsonl.
    """
    outside = parts.config.rollout.engine == "server"
    names = tuple(function.name for function in parts.config.reward.functions)
    int8, log_step = int8_parts(parts.config), telemetry.write
    if int8 and not outside:
        log_step = say_sampler_gap(log_step, telemetry.say, f"int8 {' and '.join(int8)}")
    elif parts.config.model.compute_dtype == "float32" and not outside:  # else they may differ by more
        log_step = watch_sampler(log_step, telemetry.say)
    return World(
        questions=questions,
        sample=outside_sampler(parts) if outside else _sampler(parts),
        judge=watch_rewards(parts.judge, names, telemetry.say),
        reward_names=names,
        put=lambda micro_batch: put_micro_batch(parts.policy.mesh, micro_batch, parts.policy.rules),
        read=to_host,
        flag=_flags(parts.policy.mesh),
        log_step=log_step,
        log_ledger=ledger,
        log_rollouts=_rollout_log(parts, folder),
        evaluate=parts.evaluator.during_training(folder, sum(stage.steps for stage in stages)),
        save=save,
        should_stop=lambda: agree(should_stop(), anyone, what="asking whether to stop"),
        keep=copied
        if outside or "weights" in int8
        else _keeper(parts.policy.frozen, jnp.dtype(parts.config.model.compute_dtype)),
    )


def watch_rewards(judge: Judge, names: Sequence[str], say: Callable[[str], None]) -> Judge:
    """The judge; the first time that one of its functions fails on most of the completions it is asked about, it is
    said: a single failure is counted and no more, but a function that fails throughout teaches nothing.

    Args
      names: of the functions, in the order of the verdicts.
    """
    told: set[str] = set()

    def watched(samples: Sequence[Sample], questions: Mapping[int, Question]) -> list[tuple[Sample, list[Verdict]]]:
        judged = judge(samples, questions)
        for place, name in enumerate(names):
            reasons = Counter(verdicts[place].reason for _, verdicts in judged)
            failed = Counter({reason: n for reason, n in reasons.items() if reason.partition(":")[0] in FAILURES})
            if 2 * failed.total() > len(judged) and name not in told:
                told.add(name)
                say(
                    f"warning: {name} of reward.functions has failed on {failed.total()} of {len(judged)} completions, "
                    f"most of them with '{failed.most_common(1)[0][0]}': they get reward 0 for it; the run goes on"
                )
        return judged

    return watched


def build_cadence(config: Config) -> Cadence:
    """How often the loop evaluates, probes and saves."""
    return Cadence(
        evaluate=config.train.eval_every,
        evaluate_also=frozenset(config.eval.test_steps),
        probe=config.train.probe_every,
        save=config.checkpoint.every_steps,
        metric=config.checkpoint.metric,
    )


def build_telemetry(
    config: Config,
    folder: Path,
    stages: Sequence[Stage],
    progress: Progress,
    files: contextlib.ExitStack,
    *,
    quiet: bool,
) -> Telemetry:
    """metrics.jsonl and the chosen sinks; they end with `files`, and the screen stays empty where `quiet`.

    Of several processes the first one alone writes and speaks.
    """
    if not is_first():
        return Telemetry(write=lambda step, metrics: None, say=lambda text: None, close=lambda: None)
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


def _sampler(parts: Parts) -> Callable[..., Any]:
    key = jax.random.fold_in(parts.key, TRAIN_KEY)

    def sample(params: Any, requests: Sequence[Any], **options: Any) -> Any:
        return parts.policy.sample(params, requests, key, **options)

    return sample


def _keeper(frozen: Frozen, dtype: Any) -> Callable[[Params], Params]:
    """Copies of weights for rollouts beside training: in the type that our engine uses, which changes no number.

    Adapters are copied as they are: sampling merges them with the model, which stays.
    """
    if frozen.trees or dtype == jnp.float32:
        return copied
    return jax.jit(lambda params: jax.tree.map(jnp.copy, as_used(params, dtype=dtype)))


def _flags(mesh: jax.sharding.Mesh) -> Callable[[bool], Any]:
    """The two truth values on the devices, made once."""
    values = {value: jax.device_put(jnp.asarray(value), replicated(mesh)) for value in (False, True)}
    return lambda value: values[value]


def _rollout_log(parts: Parts, folder: Path) -> Callable[[OpenStep, Gated], None]:
    """Every n steps, all rollouts of the step as text, with reward, verdict and the gate's decision."""
    every = parts.config.train.rollouts_every

    def log(step: OpenStep, gated: Gated) -> None:
        if not every or step.step % every or not step.samples or not is_first():
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
