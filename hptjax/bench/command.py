"""`hptjax bench`: measures what is missing, writes tables and plot from the file of raw figures, prints the tables."""

from __future__ import annotations

import pathlib
import sys

from hptjax.bench.page import expect_page, write_between
from hptjax.bench.plots import plot_growth
from hptjax.bench.point import in_a_process
from hptjax.bench.record import read_records
from hptjax.bench.series import chosen
from hptjax.bench.sizes import DEFAULT, TINY
from hptjax.bench.suite import Measure, run_suite
from hptjax.bench.table import tables
from hptjax.cli_parse import expect_writable

MARKERS = ("<!-- growth: hptjax bench -->", "<!-- end of growth -->")


def bench_command(
    *,
    only: str | None,
    repeats: int,
    tiny: bool,
    json: pathlib.Path,
    docs: pathlib.Path | None,
    redraw: pathlib.Path | None = None,
    measure: Measure = in_a_process,
) -> int:
    """Everything that the options say; 0.

    Args
      json: the file of raw figures; the plot stands beside it, with the same name. docs: the page whose tables are
        written. redraw: a file of raw figures that is only drawn again.
    Raises an unknown series, files that cannot be written, a file of another form -> ValueError, before any work.
    """
    series = chosen(only)
    if repeats < 1:
        raise ValueError(f"expected at least 1 repeat, got {repeats}; change --repeats.")
    if docs is not None:
        expect_page(docs, MARKERS)
    if redraw is not None:
        if not redraw.is_file():
            raise ValueError(f"expected the figures of `hptjax bench`, got no file '{redraw}'; change --from.")
        records = read_records(redraw)
    else:
        expect_writable(json)
        sizes = TINY if tiny else DEFAULT
        read_records(json, sizes=sizes.name)
        records = run_suite(
            json, series, sizes, repeats=repeats, say=lambda text: print(text, file=sys.stderr), measure=measure
        )
    source = json if redraw is None else redraw
    if docs is None:
        print(tables(records))
        return 0
    plot = docs.parent / f"{source.stem}.png"
    expect_writable(plot, "--docs")
    plot_growth(records, plot)
    text = tables(records, plot=plot.name, source=source.name)
    write_between(docs, MARKERS, text)
    print(text)
    print(f"\ntables in {docs}, plot in {plot}, raw figures in {source}", file=sys.stderr)
    return 0
