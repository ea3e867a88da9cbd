"""`hptjax bench`: its options, handed on."""

from __future__ import annotations

import tyro

from hptjax.cli_options import BenchOptions


def command_bench(arguments: list[str]) -> int:
    """Measures what is missing of the suite, and writes its tables and its plot."""
    options = tyro.cli(BenchOptions, args=arguments, prog="hptjax bench", config=(tyro.conf.FlagCreatePairsOff,))
    from hptjax.bench.command import bench_command

    return bench_command(
        only=options.only,
        repeats=options.repeats,
        tiny=options.tiny,
        json=options.json,
        docs=options.docs,
        redraw=options.redraw,
    )
