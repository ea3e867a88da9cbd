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
    _refuse_unread(options, source)
    if not asked:
        from hptjax import build

        checkpoint, split = options.checkpoint or "last", options.split or "test"
        print(json.dumps(build.evaluate(config, checkpoint=checkpoint, split=split), indent=2))
        return 0
    return _eval_sets(options, config, source)


def _refuse_unread(options: EvalOptions, source: Source) -> None:
    """Raises ValueError for an option that would change nothing: it was given for a reason."""
    asked, before, config = options.suite is not None or bool(options.data), source.config, options.config
    folder, sampling = source.kind == FOLDER, "evaluations sample by eval.temperature and eval.top_p"
    sizes = "it follows from data.max_prompt_tokens and rollout.max_completion_tokens here"
    for option, given, why in (
        ("rollout.temperature", config.rollout.temperature != before.rollout.temperature, sampling),
        ("rollout.top_p", config.rollout.top_p != before.rollout.top_p, sampling),
        ("rollout.top_k", config.rollout.top_k != before.rollout.top_k, f"{sampling}, without a top-k"),
        ("rollout.cache_capacity", folder and config.rollout.cache_capacity != before.rollout.cache_capacity, sizes),
        ("rollout.prompt_buckets", folder and config.rollout.prompt_buckets != before.rollout.prompt_buckets, sizes),
        ("batch.row_tokens", folder and config.batch.row_tokens != before.batch.row_tokens, sizes),
        (
            "reward.functions",
            options.suite is not None and config.reward.functions != before.reward.functions,
            "published sets are judged by the verifier of their answers, and only --data by functions of your own",
        ),
        ("checkpoint", folder and options.checkpoint not in (None, "base"), "a model folder has no checkpoints"),
        (
            "eval.questions",
            asked and config.eval.questions != before.eval.questions,
            "--limit says it of sets and files",
        ),
        (
            "eval.samples_per_question",
            options.suite is not None and config.eval.samples_per_question != before.eval.samples_per_question,
            "published sets have numbers of their own, and --samples sets another one",
        ),
        ("split", asked and options.split is not None, "--suite and --data are asked whole"),
        ("suites", options.suites is not None and options.suite is None, "it holds the sets of --suite"),
        *(
            (
                name,
                not asked and value,
                "a run is asked its own questions as eval.* says; it goes with --suite or --data",
            )
            for name, value in (
                ("out", options.out is not None),
                ("samples", options.samples is not None),
                ("ks", bool(options.ks)),
                ("limit", options.limit is not None),
                ("baseline", options.baseline is not None),
            )
        ),
    ):
        if given:
            raise ValueError(f"expected no --{option} here, where it would change nothing: {why}; leave it out.")


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
    checkpoint = (options.checkpoint or "last") if source.kind == RUN else None
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
