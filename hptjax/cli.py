"""The commands. Each reads a config, checks it, and calls one function; heavy modules load only when it runs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from hptjax.cli_bench import command_bench
from hptjax.cli_eval import command_eval, compare_evaluations
from hptjax.cli_options import (
    AUDIT_HELP,
    AuditOptions,
    CompareOptions,
    ConvertOptions,
    DataCheckOptions,
    DoctorOptions,
    ExplainOptions,
    ExportOptions,
    InspectOptions,
    MethodsOptions,
    PlanOptions,
    SampleOptions,
    TrainOptions,
    UpgeOptions,
)
from hptjax.cli_parse import as_switch, expect_writable, parse, refuse_processes
from hptjax.config import Config, DataConfig, RolloutConfig
from hptjax.config_check import check, check_rows
from hptjax.config_load import read_file
from hptjax.config_text import command_line
from hptjax.errors import BAD_INPUT, INPUT_ERRORS, INTERRUPTED, exit_status, raised_here

T = TypeVar("T")
FOR_DATA_CHECK = Config(  # where no config is named: the limits of the published recipes
    data=DataConfig(max_prompt_tokens=1024), rollout=RolloutConfig(max_completion_tokens=8192)
)
KEEPS_WORK = ("train", "compare", "eval", "bench")  # an interrupted one goes on where it was

HELP = """\
usage: hptjax COMMAND [CONFIG.toml] [OPTIONS]

hptjax trains language models by SFT, RL and HPT as one gradient.

commands
  train CONFIG     train, evaluate and write runs/<name>/summary.json; the same command resumes a run
  eval MODEL       pass@k of a run on its own questions; of a run or a model folder on suites or files, with reports
  sample CONFIG    completions of a prompt, with the verifier's word on them
  compare CONFIG   several methods from the same base under the same budget: one table, one plot; of two folders
                   that eval has written: what changed, question by question
  explain CONFIG   batches, bytes per device, operations, token weights, every field's source, before anything runs
  data check FILE  rows kept and dropped, lengths, duplicates, wrong demonstrations, template faults, before a run
  upge CONFIG      every row of the token table on one recorded batch: norm, direction, variance, weights, bias
  plan CONFIG      bytes, FLOPs, collectives and time on a TPU that need not be there, and whether it fits
  methods [NAME]   the table of the methods; of one: formula, source, needs and a config that trains it (--toml)
  export RUN OUT   a run's checkpoint as a Hugging Face folder
  convert IN OUT   a model folder in another dtype or other shards
  inspect PATH     what a model folder or checkpoint holds, tensor by tensor, and what is wrong with it
  audit TARGET     whether a trainer, yours or another, adds up every micro-batch; names those it does not
  bench            what a step costs as the work grows: micro-batches, lengths, groups, parameters, questions
  doctor           what this machine has and lacks

Every field of the config is an option:
  hptjax train configs/quickstart.toml --train.steps 50 --hpt.gate 1
  hptjax train --help                  lists them with their defaults
  hptjax train CONFIG --help           lists them with the file's values

HPTJAX_TRACEBACK=1 shows the traceback of an error.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0 done, 1 found wanting, 2 bad input, 130 interrupted."""
    try:
        status = run(list(sys.argv[1:] if arguments is None else arguments))
    except Exception as error:
        if not _one_of_several():
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        status = exit_status(error)
    if status and _one_of_several():
        from hptjax.sharding.watchdog import leave

        leave(status)
    sys.exit(status)


def _one_of_several() -> bool:
    """Whether this process has joined others; jax is not loaded to find out."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def run(arguments: list[str]) -> int:
    """Runs one command; its exit status. An error about the input is one message on stderr, without a traceback."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if arguments else BAD_INPUT
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        print(f"hptjax: unknown command '{command}'; expected one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return BAD_INPUT
    try:
        return COMMANDS[command](rest)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
    except KeyboardInterrupt:
        again = "; the same command continues from what is saved" if command in KEEPS_WORK else ""
        print(f"hptjax: interrupted{again}.", file=sys.stderr)
        return INTERRUPTED
    except INPUT_ERRORS as error:
        if os.environ.get("HPTJAX_TRACEBACK") == "1" or not raised_here(error):
            raise
        print(f"hptjax {command}: {error}", file=sys.stderr)
        return exit_status(error)


def command_train(arguments: list[str]) -> int:
    """Trains a config."""
    options = parse("train", as_switch(arguments, "--profile"), lambda config: TrainOptions(config=config))
    check(options.config)
    from hptjax import build

    build.train(options.config, profile=options.profile)
    return 0


def command_sample(arguments: list[str]) -> int:
    """Prints completions, one per line."""
    options = parse("sample", arguments, lambda config: SampleOptions(config=config))
    check(options.config)
    refuse_processes("sample", options.config)
    if options.count < 1:
        raise ValueError(f"expected at least 1 completion, got {options.count}; change --count.")
    from hptjax import build

    for line in build.sample(options.config, options.prompt, count=options.count, checkpoint=options.checkpoint):
        print(line)
    return 0


def command_compare(arguments: list[str]) -> int:
    """Runs the arms, or continues them, and writes the table and the plot; of two evaluations, what changed."""
    if arguments and pathlib.Path(arguments[0]).is_dir():
        if len(arguments) != 2 or not pathlib.Path(arguments[1]).is_dir():
            raise ValueError(f"expected the folders of two evaluations or a config, got {' '.join(arguments)}.")
        return compare_evaluations(*map(pathlib.Path, arguments))
    options = parse("compare", arguments, lambda config: CompareOptions(config=config))
    check(options.config)
    refuse_processes("compare", options.config)
    named = None if options.arms is None else tuple(arm.strip() for arm in options.arms.split(",") if arm.strip())
    if named is not None and (not named or len(set(named)) != len(named)):
        raise ValueError(f"expected distinct arms separated by commas, got '{options.arms}'; change --arms.")
    if options.seeds is not None and options.seeds < 1:
        raise ValueError(f"expected at least 1 seed, got {options.seeds}; change --seeds.")
    from hptjax import compare

    compare.compare(options.config, arms=named, seeds=options.seeds)
    return 0


def command_explain(arguments: list[str]) -> int:
    """Prints what a config amounts to."""
    options = parse("explain", arguments, lambda config: ExplainOptions(config=config))
    check(options.config, sized_only=True)
    from hptjax.config_sources import field_sources
    from hptjax.explain import explain
    from hptjax.explain_flops import lengths_asked

    lengths = lengths_asked(options.config, options.rollout_tokens, options.demonstration_tokens)
    print(explain(options.config, given=field_sources(arguments[0], arguments[1:]), lengths=lengths))
    return 0


def command_data(arguments: list[str]) -> int:
    """`hptjax data check FILE ... [CONFIG.toml]`; status 2 where no run could use the files."""
    asks_help = any(argument in ("-h", "--help") for argument in arguments)
    if arguments[:1] != ["check"] and not asks_help:
        raise ValueError(
            f"expected `hptjax data check FILE [CONFIG.toml] [--model.path FOLDER]`, got {' '.join(arguments)!r}."
        )
    words = arguments[1:] if arguments[:1] == ["check"] else arguments
    named = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    files, configs = ([word for word in named if word.endswith(".toml") == toml] for toml in (False, True))
    if len(configs) > 1 or (not named and not asks_help):
        raise ValueError(f"expected data files, and one config at the most, got {named}.")
    default = read_file(configs[0]) if configs else FOR_DATA_CHECK
    options = command_line(DataCheckOptions(config=default), words[len(named) :], prog="hptjax data check FILE")
    expect_writable(options.json)
    config = options.config
    if files:
        data = dataclasses.replace(config.data, files=tuple(files), validation_files=(), test_files=())
        config = dataclasses.replace(config, data=data)
        check_rows(config)
    else:
        check(config)
    if not config.data.files:
        raise ValueError(f"expected data.files in {configs[0]}, got none; name a file: `hptjax data check FILE`.")
    from hptjax.build.data_check import check_data, check_text

    report = check_data(config, split=not files, say=lambda said: print(said, file=sys.stderr))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(check_text(report))
    return BAD_INPUT if report["problems"] else 0


def _refuse_adapters(command: str, config: Config) -> None:
    if config.lora.on:
        raise ValueError(
            f"expected a config that trains the whole model for `hptjax {command}`, which knows no adapters, got "
            "lora.rank or lora.adapter; leave them out."
        )


def command_upge(arguments: list[str]) -> int:
    """Measures every row of the token table on one recorded batch."""
    options = parse("upge", arguments, lambda config: UpgeOptions(config=config))
    check(options.config)
    refuse_processes("upge", options.config)
    _refuse_adapters("upge", options.config)
    for path, flag in ((options.batch, "--batch"), (options.json, "--json"), (options.plot, "--plot")):
        expect_writable(path, flag)
    from hptjax.upge.command import upge_command

    return upge_command(
        options.config,
        batch=options.batch,
        checkpoint=options.checkpoint,
        sampler=options.sampler,
        questions=options.questions,
        draws=options.draws,
        json=options.json,
        plot=options.plot,
    )


def command_plan(arguments: list[str]) -> int:
    """Plans a config on absent TPUs; status 1 where it does not fit."""
    options = parse("plan", as_switch(arguments, "--search"), lambda config: PlanOptions(config=config))
    check(options.config, sized_only=True)
    expect_writable(options.json)
    if options.slices < 1:
        raise ValueError(f"expected at least 1 slice, got {options.slices}; change --slices.")
    from hptjax.plan.environment import expect_no_chips

    expect_no_chips()
    from hptjax.plan.command import plan_command

    return plan_command(
        options.config,
        options.topology,
        slices=options.slices,
        largest=options.largest,
        search=options.search,
        cache=options.cache,
        json_path=options.json,
    )


def command_audit(arguments: list[str]) -> int:
    """Audits a trainer's gradient accumulation; status 1 where there is a fault."""
    options = tyro.cli(
        AuditOptions,
        args=arguments,
        prog="hptjax audit",
        config=(tyro.conf.FlagCreatePairsOff,),
        description=AUDIT_HELP,
    )
    expect_writable(options.json)
    from hptjax.audit.kit import audit
    from hptjax.audit.report import print_report, to_json
    from hptjax.audit.targets import load

    output = sys.stdout
    report = audit(
        load(options.target),
        name=options.target,
        model=options.model,
        own_optimizer=options.own_optimizer or None,
        inject_drop=options.inject_drop,
    )
    if options.json is not None:
        options.json.write_text(to_json(report), encoding="utf-8")
    print_report(report, file=sys.stderr if output.closed else output)  # a target may have closed or replaced it
    return 1 if report.faults else 0


def command_methods(arguments: list[str]) -> int:
    """Prints the table of methods, or one of them."""
    options = tyro.cli(MethodsOptions, args=arguments, prog="hptjax methods", config=(tyro.conf.FlagCreatePairsOff,))
    if options.toml and (options.name is None or options.json):
        raise ValueError("expected one method and no --json beside --toml, as in `hptjax methods luffy --toml`.")
    from rich.console import Console

    from hptjax import methods_text

    names = methods_text.all_names() if options.name is None else [methods_text.closest(options.name)]
    if options.json:
        found = [methods_text.method_words(name) for name in names]
        print(json.dumps(found if options.name is None else found[0], indent=2))
    elif options.name is None:
        methods_text.print_table(Console(width=None if sys.stdout.isatty() else methods_text.WIDTH))
    else:
        print(methods_text.toml(names[0]) if options.toml else methods_text.method_text(names[0]), end="")
    return 0


def command_export(arguments: list[str]) -> int:
    """Writes a run's checkpoint as a model folder."""
    options = _options(ExportOptions, "export", arguments)
    from hptjax.build.export import export_run

    said = export_run(
        options.source,
        options.out,
        checkpoint=options.checkpoint,
        dtype=options.dtype,
        shard_bytes=_shard_bytes(options.shard_gb),
        tokenizer=options.tokenizer,
        as_adapter=options.adapter,
    )
    print(said)
    return 0


def command_convert(arguments: list[str]) -> int:
    """Writes a model folder anew."""
    options = _options(ConvertOptions, "convert", arguments)
    from hptjax.models.folder_copy import convert_folder

    convert_folder(options.source, options.out, dtype=options.dtype, shard_bytes=_shard_bytes(options.shard_gb))
    print(f"{options.out}: {options.source}, {options.dtype or 'as stored'}")
    return 0


def command_inspect(arguments: list[str]) -> int:
    """Prints what a folder or checkpoint holds; status 1 where there are problems."""
    options = _options(InspectOptions, "inspect", arguments)
    from hptjax.inspection import inspect, report_text

    report = inspect(options.path, everything=options.all)
    print(json.dumps(report, indent=2) if options.json else report_text(report))
    return 1 if report["problems"] else 0


def _options(options: type[T], command: str, arguments: list[str]) -> T:
    """The options of a command that takes no config."""
    return tyro.cli(options, args=arguments, prog=f"hptjax {command}", config=(tyro.conf.FlagCreatePairsOff,))


def _shard_bytes(gigabytes: float) -> int:
    if not 0 < gigabytes < float("inf"):
        raise ValueError(f"expected a shard size above 0, got {gigabytes}; change --shard-gb.")
    return max(1, round(gigabytes * 10**9))


def command_doctor(arguments: list[str]) -> int:
    """Prints what this machine has; status 1 where training cannot run."""
    options = command_line(DoctorOptions(), arguments, prog="hptjax doctor")
    from hptjax import doctor

    findings = doctor.examine(runs_dir=options.runs_dir)
    print(doctor.report(findings))
    return 1 if any(finding.status == "lacks" for finding in findings) else 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": command_train,
    "eval": command_eval,
    "sample": command_sample,
    "compare": command_compare,
    "explain": command_explain,
    "plan": command_plan,
    "data": command_data,
    "upge": command_upge,
    "methods": command_methods,
    "export": command_export,
    "convert": command_convert,
    "inspect": command_inspect,
    "audit": command_audit,
    "bench": command_bench,
    "doctor": command_doctor,
}


if __name__ == "__main__":
    main()
