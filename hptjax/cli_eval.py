"""`hptjax eval`, and `hptjax compare` of two evaluations."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence

from hptjax.cli_options import EvalOptions
from hptjax.cli_parse import parse, refuse_processes
from hptjax.config import Config
from hptjax.config_check import check
from hptjax.eval_source import FOLDER, RUN, Source, fitted, read_source

MAX_NAME = 120  # characters of a folder that is named after a model and what it was asked


def command_eval(arguments: list[str]) -> int:
    """Evaluates a run on its own questions, printed as JSON, or any model on suites and files, written as reports."""
    source = _source(arguments)
    options = parse("eval", arguments, lambda config: EvalOptions(config=config), lambda _: source.config)
    config, asked = options.config, options.suite is not None or bool(options.data)
    if source.kind == FOLDER:
        config = fitted(config)
        if not asked:
            raise ValueError("expected questions for a model folder, got none; name --suite or --data.")
    check(config)
    refuse_processes("eval", config)
    if not asked:
        from hptjax import build

        print(json.dumps(build.evaluate(config, checkpoint=options.checkpoint, split=options.split), indent=2))
        return 0
    return _eval_sets(options, config, source)


def _source(arguments: Sequence[str]) -> Source:
    """What `eval` is pointed at; the defaults of a config where only help is asked for."""
    if arguments and not arguments[0].startswith("-"):
        return read_source(arguments[0])
    return Source(Config(), "", RUN)


def _eval_sets(options: EvalOptions, config: Config, source: Source) -> int:
    if options.suite is not None and options.data:
        raise ValueError("expected --suite or --data, got both; evaluate one after the other.")
    for name, given in (("samples", options.samples), ("limit", options.limit), ("ks", min(options.ks, default=None))):
        if given is not None and given < 1:
            raise ValueError(f"expected --{name} of at least 1, got {given}.")
    from hptjax.build.eval_command import evaluate_sets
    from hptjax.build.eval_sets import file_sets, suite_sets

    if options.suite is not None:
        sets = suite_sets(options.suite, options.suites, as_task=source.kind == RUN and not config.data.files)
    else:
        sets = file_sets(config, options.data)
    what = options.suite or "-".join(each.name for each in sets)
    checkpoint = options.checkpoint if source.kind == RUN else None
    name = source.name if checkpoint is None else f"{source.name}-{checkpoint}"
    out = options.out or pathlib.Path("evaluations") / f"{name}-{what}"[:MAX_NAME]
    evaluate_sets(
        config,
        sets,
        out,
        name=name,
        checkpoint=checkpoint,
        samples=options.samples,
        ks=options.ks,
        limit=options.limit,
        baseline=options.baseline,
        say=lambda said: print(said, file=sys.stderr),
    )
    print((out / "report.md").read_text(encoding="utf-8"), end="")
    print(f"\n{out}: report.html, report.md, results.json, samples_<task>.jsonl", file=sys.stderr)
    return 0


def compare_evaluations(before: pathlib.Path, after: pathlib.Path) -> int:
    """Prints what changed from one evaluation to another of the same questions."""
    from hptjax.eval.changes import changes, changes_table, read_evaluation

    told = changes(read_evaluation(before), read_evaluation(after))
    print(changes_table(told))
    for task, change in told.items():
        for (k, policy), pair in change.pairs.items():
            if policy == "strict":
                print(f"\n{task}, pass@{k}: won {pair.won}, lost {pair.lost}")
    return 0
