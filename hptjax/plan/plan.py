"""What one config does on one absent topology, per device: bytes, operations, exchanges, time, and whether it fits.

Bytes are the compiler's own for each program; operations are counted by arithmetic; exchanges and memory traffic are
read from the compiled text with loops multiplied out; times are rooflines. What is estimated is named so.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from hptjax.build.mesh import check_mesh
from hptjax.config import Config, StageConfig
from hptjax.config_batch import (
    longest_in_row,
    mesh_sizes,
    micro_batches_needed,
    row_positions,
    samples_per_update,
    shared_tokens,
    stage_list,
)
from hptjax.config_methods import learns_from_rollouts
from hptjax.models.shape import DecoderConfig
from hptjax.plan.chips import Slices
from hptjax.plan.compiled import Compiled, compile_program, kept, key_of
from hptjax.plan.count import bytes_per_device, causal_pairs, entries, model_flops
from hptjax.plan.estimate import Roofline, StepTime, roofline
from hptjax.plan.operations import adapter_flops, program_flops, program_turns
from hptjax.plan.programs import RunPrograms, rollouts_per_step, run_programs
from hptjax.plan.topology import mesh_on

FROZEN = "model beside the adapters"


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """One program on one device.

    Args
      resident_bytes: of the run's other arrays that stay in memory while the program runs.
      flops: of this device in one call. time: its roofline, estimated; of the train step without the update.
      update_time: of the update alone.
    """

    compiled: Compiled
    resident_bytes: float
    flops: float
    time: Roofline
    update_time: Roofline

    @property
    def peak_bytes(self) -> float:
        """The most that the device holds while the program runs."""
        return self.compiled.peak_bytes + self.resident_bytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config on a topology and a mesh.

    Args
      rows: batch.rows. parameters: that are trained; frozen: beside them. programs: by name.
      held: what is held, in bytes per device, by name.
      step: of the whole run, estimated; None where a program does not fit.
      largest_rows: the most batch.rows with which the train step was found to fit, or None where it was not looked for.
      too_many_rows: the fewest with which it was found not to.
    """

    topology: Slices
    mesh: dict[str, int]
    remat: str
    rows: int
    row_tokens: int
    parameters: int
    frozen: int
    held: dict[str, float]
    programs: dict[str, ProgramPlan]
    step: StepTime | None
    largest_rows: int | None = None
    too_many_rows: int | None = None

    @property
    def usable_bytes(self) -> int:
        """What a device's memory has room for."""
        return self.topology.chip.usable_bytes

    def too_large(self) -> list[str]:
        """The programs that do not fit, by name."""
        return [
            name
            for name, program in self.programs.items()
            if program.compiled.refused or program.peak_bytes > self.usable_bytes
        ]


def make_plan(
    config: Config,
    shape: DecoderConfig,
    slices: Slices,
    devices: list[Any],
    *,
    cache: pathlib.Path | None,
    only: tuple[str, ...] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """The plan of the last stage of a config whose mesh fits the topology.

    Args
      devices: compile-only ones, or real. cache: folder of earlier results. only: names of the programs to compile;
        None is all. say: told what is being compiled.

    Raises what does not divide over the mesh -> ValueError.
    """
    check_mesh(config, shape)
    stage = stage_list(config)[-1]
    mesh = mesh_on(config, devices)
    programs = run_programs(config, stage, shape, mesh)
    slice_of = [getattr(device, "slice_index", 0) or 0 for device in mesh.devices.flat]
    held = held_bytes(programs)
    planned: dict[str, ProgramPlan] = {}
    for name, lower in programs.lower.items():
        if only is not None and name not in only:
            continue

        def make(name: str = name, lower: Any = lower) -> Compiled:
            say(f"{slices.name} {name}")
            turns = program_turns(config, name)
            return compile_program(lower, slice_of=slice_of, turns=turns, has_update=name == "train step")

        compiled = kept(cache, key_of(config, slices.name + devices[0].device_kind, name, shape), make)
        flops = program_flops(config, shape, name, platform=devices[0].platform).total / len(devices)
        planned[name] = ProgramPlan(
            compiled=compiled,
            resident_bytes=_resident(name, held, programs),
            flops=flops,
            time=roofline(slices.chip, flops, compiled, update=False),
            update_time=roofline(slices.chip, 0.0, compiled, update=True),
        )
    plan = Plan(
        topology=slices,
        mesh=mesh_sizes(config),
        remat=str(config.model.remat),
        rows=config.batch.rows,
        row_tokens=config.batch.row_tokens,
        parameters=entries(programs.state.params),
        frozen=entries(programs.frozen),
        held=held,
        programs=planned,
        step=None,
    )
    complete = only is None and not plan.too_large()
    return dataclasses.replace(plan, step=step_time(config, stage, shape, plan, programs)) if complete else plan


def held_bytes(programs: RunPrograms) -> dict[str, float]:
    """Bytes per device of what a run holds between its programs, from the shardings; the last line in the host."""
    chain = programs.state.chains["policy"]
    parameters = bytes_per_device(programs.state.params)
    known = {
        "parameters": parameters,
        "optimizer": bytes_per_device(chain.optimizer),
        "accumulator": bytes_per_device(chain.sums),
    }
    return {
        **known,
        **({FROZEN: bytes_per_device(programs.frozen)} if programs.frozen else {}),
        "counters and checks": bytes_per_device(programs.state) - sum(known.values()),
        "micro-batch": bytes_per_device(programs.micro_batch),
        "weights of rollouts": bytes_per_device(programs.decode_params) if programs.copies_weights else 0.0,
        "KV cache": bytes_per_device(programs.cache),
        "prefilled prompts": bytes_per_device(programs.rows),
        "on the host: optimizer": bytes_per_device(chain.optimizer, on_host=True),
    }


def _resident(name: str, held: dict[str, float], programs: RunPrograms) -> float:
    """What stays in memory beside a program's arguments: the rest of the train state, or all of it."""
    state = held["parameters"] + held["optimizer"] + held["accumulator"] + held["counters and checks"]
    frozen = held.get(FROZEN, 0.0)
    if name == "train step":
        return 0.0
    if name in ("score", "merge") or (name == "reshard" and not frozen):
        return state - held["parameters"]
    if name == "reshard":
        return state + frozen
    if name == "enter":
        return state + frozen + held["weights of rollouts"]
    beside = held["KV cache"] if name == "prefill" else held["prefilled prompts"]
    return beside + (state + frozen if programs.copies_weights else state - held["parameters"])


def step_time(config: Config, stage: StageConfig, shape: DecoderConfig, plan: Plan, programs: RunPrograms) -> StepTime:
    """A step of the run, estimated from its programs: every sample as long as allowed, every row full."""
    updates = config.train.updates_per_rollout_batch
    questions = stage.questions_per_step or config.data.questions_per_step
    samples = samples_per_update(config, method=stage.method, questions=questions)
    micro_batches = micro_batches_needed(config, samples=samples, method=stage.method)
    sampled = 0.0
    if learns_from_rollouts(stage.method):
        fills, prefills = rollouts_per_step(config, stage)
        calls = -(-config.rollout.max_completion_tokens // config.rollout.tokens_per_call)
        seconds = {name: program.time.seconds for name, program in plan.programs.items()}
        sampled = prefills * seconds["prefill"] + fills * (seconds["enter"] + calls * seconds["decode"])
        sampled += seconds.get("merge", 0.0) + seconds.get("reshard", 0.0)
    train = plan.programs["train step"]
    rows = updates * micro_batches * config.batch.rows
    tokens = rows * row_positions(config)
    pairs = causal_pairs(rows, config.batch.row_tokens, longest_in_row(config))
    if config.batch.share_prompts:  # each position of the prompt sees those before it, each behind it the whole prompt
        prompt = shared_tokens(config)
        pairs += rows * prompt * ((prompt + 1) / 2 + config.batch.row_tokens)
    scored = updates * micro_batches * plan.programs["score"].time.seconds if programs.scores else 0.0
    return StepTime(
        rollout_s=sampled,
        score_s=scored,
        train_s=updates * (micro_batches * train.time.seconds + train.update_time.seconds),
        tokens=float(tokens),
        model_flops=model_flops(shape, tokens=tokens, pairs=pairs, adapters=adapter_flops(config, shape, tokens)),
    )
