"""A plan as tables on the terminal and as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from hptjax.plan.plan import FROZEN, Plan, ProgramPlan

GIB, MIB = 2**30, 2**20
WIDTH = 118


def print_plan(plan: Plan, file: Any) -> None:
    """Writes one plan: memory, programs, exchanges, largest arrays, and the step as a whole."""
    console = Console(file=file, width=WIDTH, highlight=False, soft_wrap=False)
    console.print(headline(plan), markup=False)
    for table in (memory_table(plan), program_table(plan), exchange_table(plan), largest_table(plan)):
        if table.row_count:
            console.print(table)
    for line in [*step_lines(plan), *verdict_lines(plan)]:
        console.print(line, markup=False)
    console.print()


def headline(plan: Plan) -> str:
    """What was planned, in a line."""
    parameters = f"{plan.parameters / 1e9:.2f} B parameters"
    if plan.frozen:
        parameters = f"{plan.frozen / 1e9:.2f} B parameters + {plan.parameters / 1e6:.2f} M of adapters"
    return (
        f"{plan.topology.name}  {plan.topology.chips} chips  mesh {mesh_words(plan)}  batch.rows {plan.rows} x "
        f"{plan.row_tokens} tokens  remat {plan.remat}  {parameters}"
    )


def mesh_words(plan: Plan) -> str:
    """The mesh's axes of more than one device, such as `fsdp=8 tensor=2`."""
    return " ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "of one device"


def print_ranking(ranked: list[tuple[float, Plan]], considered: int, file: Any) -> None:
    """Writes the compiled candidates of a search, best first: (tokens per second of the train step, plan)."""
    table = Table(
        title=f"{considered} candidates may fit; these were compiled (tokens/s estimated, at most)",
        title_justify="left",
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("mesh")
    for name in ("batch.rows", "remat", "peak GiB", "train tokens/s"):
        table.add_column(name, justify="right")
    table.add_column("bound by")
    for speed, plan in ranked:
        train = plan.programs["train step"]
        shown = f"{speed:,.0f}" if speed else "too large"
        cells = (mesh_words(plan), str(plan.rows), plan.remat, gib(train.peak_bytes), shown, train.time.bottleneck)
        table.add_row(*cells)
    Console(file=file, width=WIDTH, highlight=False).print(table)


def memory_table(plan: Plan) -> Table:
    """Bytes per device: what is held, and the peak of each program against the memory."""
    table = Table(title="Memory per device", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("held between programs")
    table.add_column("GiB", justify="right")
    table.add_column("program")
    for name in ("arguments", "temporary", "beside it", "peak", f"of {plan.usable_bytes / GIB:.2f} GiB"):
        table.add_column(name, justify="right")
    held = [(name, gib(size)) for name, size in plan.held.items() if size]
    programs = [(name, *_memory_cells(plan, program)) for name, program in plan.programs.items()]
    for place in range(max(len(held), len(programs))):
        left = held[place] if place < len(held) else ("", "")
        right = programs[place] if place < len(programs) else ("",) * 6
        table.add_row(*left, *right)
    return table


def _memory_cells(plan: Plan, program: ProgramPlan) -> tuple[str, ...]:
    compiled = program.compiled
    share = f"{100 * program.peak_bytes / plan.usable_bytes:.0f} %"
    if compiled.refused:
        return "", "", gib(program.resident_bytes), gib(program.peak_bytes), f"{share} TOO LARGE"
    fits = "" if program.peak_bytes <= plan.usable_bytes else " TOO LARGE"
    return (
        gib(compiled.argument_bytes),
        gib(compiled.temp_bytes),
        gib(program.resident_bytes),
        gib(program.peak_bytes),
        share + fits,
    )


def program_table(plan: Plan) -> Table:
    """Operations, traffic and estimated time of a call of each program, on one device."""
    table = Table(title="One call, per device (times estimated)", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("program", no_wrap=True)
    for name in ("TFLOP", "moved GiB", "sent GiB", "compute ms", "memory ms", "links ms", "network ms", "at least"):
        table.add_column(name, justify="right")
    table.add_column("bound by")
    for name, program in plan.programs.items():
        if program.compiled.refused:
            continue
        parts = [(name, program.time, program.flops, program.compiled.memory_bytes, False)]
        if program.update_time.seconds:
            parts.append(("its update", program.update_time, 0.0, program.compiled.update_memory_bytes, True))
        for words, time, flops, memory, update in parts:
            sent = sum((e.ici_bytes + e.dcn_bytes for e in program.compiled.exchanged if e.update == update), 0.0)
            seconds = (time.compute_s, time.memory_s, time.ici_s, time.dcn_s, time.seconds)
            table.add_row(
                words,
                f"{flops / 1e12:.2f}",
                gib(memory),
                gib(sent),
                *(f"{1e3 * s:.1f}" for s in seconds),
                time.bottleneck,
            )
    return table


def exchange_table(plan: Plan) -> Table:
    """Collectives of each program by kind and size of group."""
    table = Table(
        title="Collectives in one call (loops multiplied out)", title_justify="left", show_edge=False, pad_edge=False
    )
    for name in ("program", "kind"):
        table.add_column(name)
    for name in ("devices", "slices", "times", "arrays GiB", "sent per device GiB"):
        table.add_column(name, justify="right")
    for name, program in plan.programs.items():
        for entry in program.compiled.exchanged:
            if entry.bytes >= MIB:
                table.add_row(
                    f"{name}: update" if entry.update else name,
                    entry.kind,
                    str(entry.devices),
                    str(entry.slices),
                    str(entry.times),
                    gib(entry.bytes),
                    gib(entry.ici_bytes + entry.dcn_bytes),
                )
    return table


def largest_table(plan: Plan, count: int = 3) -> Table:
    """The largest intermediate arrays of each program, and the place in the traced program that they come from."""
    table = Table(title="Largest intermediate arrays", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("program")
    table.add_column("MiB", justify="right")
    table.add_column("array")
    table.add_column("from", overflow="fold")
    for name, program in plan.programs.items():
        for size, kind, where in program.compiled.largest[:count]:
            table.add_row(name, f"{size / MIB:.0f}", kind, where.removeprefix("jit(leaves_after)/"))
    return table


def step_lines(plan: Plan) -> list[str]:
    """The whole step, estimated."""
    if plan.step is None:
        return []
    step, chips = plan.step, plan.topology.chips
    lines = [
        f"One step, estimated (every sample as long as allowed, rows full): {step.seconds:.0f} s or more = "
        f"rollouts {step.rollout_s:.0f} + score {step.score_s:.0f} + train {step.train_s:.0f}",
        f"Model FLOPs of its training: {step.model_flops:.3g}; while training at most "
        f"{step.tokens / step.train_s:,.0f} tokens/s, MFU {100 * step.mfu(plan.topology.chip, chips):.0f} %; over the "
        f"step {step.tokens / step.seconds:,.0f} tokens/s",
    ]
    guessed = [name for name, program in plan.programs.items() if program.compiled.unknown_loops]
    if guessed:
        lines.append(f"Loops whose length depends on data ({', '.join(guessed)}) are taken to run their course.")
    return lines


def verdict_lines(plan: Plan) -> list[str]:
    """Whether it fits, and what would where it does not."""
    beyond = "" if plan.too_many_rows is None else f"; {plan.too_many_rows} does not"
    lines = [f"Largest batch.rows found to fit: {plan.largest_rows}{beyond}"] if plan.largest_rows is not None else []
    large = plan.too_large()
    if not large:
        return [*lines, f"FITS in {plan.usable_bytes / GIB:.2f} GiB per device."]
    for name in large:
        program = plan.programs[name]
        lines.append(
            f"DOES NOT FIT: {name} needs {gib(program.peak_bytes)} GiB per device ({gib(program.resident_bytes)} of it "
            f"held beside it), {plan.topology.chip.name} has {plan.usable_bytes / GIB:.2f}."
        )
    return [*lines, *advice(plan)]


def advice(plan: Plan) -> list[str]:
    """What would make it fit: the numbers that the plan knows."""
    large, held = plan.too_large(), plan.held
    words = []
    state = held["parameters"] + held["optimizer"] + held["accumulator"] + held.get(FROZEN, 0.0)
    if state > 0.6 * plan.usable_bytes:
        words.append(
            f"parameters, optimizer and accumulator alone hold {gib(state)} GiB: more chips, or a larger mesh.fsdp or "
            "mesh.tensor in the place of mesh.data or mesh.replica"
        )
    if set(large) & {"train step", "score"}:
        words.append(
            "for the train step: fewer batch.rows (a multiple of the data axes), model.remat, a smaller "
            "model.logprob_chunk_tokens, or mesh.sequence"
        )
    if set(large) & {"reshard", "prefill", "enter", "decode"}:
        words.append(
            f"for rollouts: fewer rollout.slots (the KV cache holds {gib(held['KV cache'])} GiB), a smaller "
            "rollout.prefill_rows, or another mesh.rollout_rules"
        )
    return [f"What would work: {word}." for word in words] + ["--search tries other meshes, rows and remat policies."]


def gib(size: float) -> str:
    """Bytes in GiB, two digits after the point."""
    return f"{size / GIB:.2f}"


def to_json(plans: list[Plan]) -> str:
    """All plans with everything that the tables show, and more."""
    return json.dumps([as_values(plan) for plan in plans], indent=2) + "\n"


def as_values(plan: Plan) -> dict[str, Any]:
    """A plan as JSON values."""
    chip = plan.topology.chip
    programs = {
        name: {
            **dataclasses.asdict(program.compiled),
            "peak_bytes": program.peak_bytes,
            "resident_bytes": program.resident_bytes,
            "flops_per_device": program.flops,
            "estimated": {
                **dataclasses.asdict(program.time),
                "seconds": program.time.seconds,
                "bottleneck": program.time.bottleneck,
                "update_seconds": program.update_time.seconds,
            },
        }
        for name, program in plan.programs.items()
    }
    step = None
    if plan.step is not None:
        step = {
            **dataclasses.asdict(plan.step),
            "seconds": plan.step.seconds,
            "mfu_training": plan.step.mfu(chip, plan.topology.chips),
            "tokens_per_s_training": plan.step.tokens / plan.step.train_s,
            "tokens_per_s": plan.step.tokens / plan.step.seconds,
        }
    return {
        "topology": plan.topology.name,
        "chips": plan.topology.chips,
        "mesh": plan.mesh,
        "rows": plan.rows,
        "row_tokens": plan.row_tokens,
        "remat": plan.remat,
        "parameters": plan.parameters,
        "frozen_parameters": plan.frozen,
        "usable_bytes": plan.usable_bytes,
        "fits": not plan.too_large(),
        "too_large": plan.too_large(),
        "largest_rows": plan.largest_rows,
        "too_many_rows": plan.too_many_rows,
        "held_bytes": plan.held,
        "programs": programs,
        "step_estimated": step,
    }
