"""`hptjax bench`: arithmetic by hand, the file of figures, tables, and the smallest suite through the real loop."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hptjax import cli
from hptjax.bench import command, fit, memory, page, record, suite, table
from hptjax.bench.command import MARKERS, bench_command
from hptjax.bench.point import in_a_process, measured
from hptjax.bench.series import BY_NAME, MEMORY, SERIES, Fit
from hptjax.bench.sizes import DEFAULT, TINY, mixed_settings, step_settings, update_settings
from hptjax.config import Config
from hptjax.config_check import check
from hptjax.config_text import build

MIB = 2**20


def made_up(task):
    """Figures without any work: 2 s and 3 MiB for each unit of the point."""
    unit = task["point"]
    names = BY_NAME[task["series"]].figures
    return {
        "figures": {name: [2.0 * unit, 3.0 * unit, 1.0 * unit] for name in names},
        "counts": {"parameters": 100 * unit, "requests": 4 * unit},
        "peak_mib": 50.0 + 3.0 * unit,
        "timed_peak_mib": 3.0 * unit,
        "device": "cpu",
        "device_peak_mib": None,
    }


@pytest.fixture
def docs(tmp_path):
    """A page with the two lines, and words around them."""
    path = tmp_path / "page.md"
    path.write_text(f"before\n\n{MARKERS[0]}\nold\n{MARKERS[1]}\n\nafter\n", encoding="utf-8")
    return path


def test_bench_fits_by_hand():
    xs, ys = [1.0, 2.0, 4.0], [3.0, 6.0, 12.0]  # y = 3 x
    assert fit.per_unit(xs, ys) == 1.0
    assert fit.growth(xs, ys) == 4.0
    assert fit.slope(xs, ys) == 3.0
    assert fit.exponent(xs, ys) == pytest.approx(1.0, abs=1e-12)
    # y = 5 + x^2: 6 at 1, 9 at 2, 21 at 4. Per unit 21/4 over 6/1 = 0.875; between the ends (21 - 6) / 3 = 5.
    xs, ys = [1.0, 2.0, 4.0], [6.0, 9.0, 21.0]
    assert fit.per_unit(xs, ys) == 0.875
    assert fit.slope(xs, ys) == 5.0
    # with u = 0, 1, 2 (base 2) the slope of v is (v3 - v1) / 2: log2(21 / 6) / 2
    assert fit.exponent(xs, ys) == pytest.approx(math.log2(3.5) / 2, rel=1e-12)
    assert fit.exponent([2.0, 8.0], [7.0, 7.0]) == 0.0
    assert fit.last([5.0], [2.5]) == 2.5


@pytest.mark.parametrize(
    "points", [([1.0], [1.0]), ([2.0, 2.0], [1.0, 2.0]), ([1.0, 2.0], [0.0, 1.0]), ([1.0, 2.0], [1.0])]
)
def test_bench_fit_of_too_little_is_refused(points):
    for how in (fit.per_unit, fit.growth, fit.slope, fit.exponent):
        with pytest.raises(ValueError, match="two points or more"):
            how(*points)


def test_bench_peak_memory_begins_anew():
    """200 MiB that are held for a moment stand in the peak until it is forgotten."""
    if not memory.forget_peak():
        pytest.skip("this system cannot forget a peak")
    low = memory.peak_mib()
    np.ones(200 * MIB, np.uint8).sum()
    assert low + 150 < memory.peak_mib() < low + 250
    assert memory.forget_peak()
    assert memory.peak_mib() < low + 50


@pytest.mark.parametrize("sizes", [DEFAULT, TINY], ids=lambda sizes: sizes.name)
def test_bench_settings_of_every_point_make_a_run(sizes):
    shared = {"model": {"tokenizer": "somewhere"}, "eval": {"ks": [1]}}
    for series in SERIES:
        points = sizes.points[series.name]
        assert len(points) >= 2
        assert list(points) == sorted(set(points))
        for point in points:
            values = series.settings(sizes, point)
            values = {name: value for name, value in values.items() if name not in ("requests", "stops")}
            values["model"] = {**shared["model"], **values["model"]}
            check(build(Config, {**shared, **values}, source="test"))


def test_bench_settings_keep_what_must_not_grow():
    shapes = [update_settings(DEFAULT, n)["batch"] for n in DEFAULT.points["micro_batches"]]
    assert all(shape == shapes[0] for shape in shapes)  # one compiled shape for 1 to 64 micro-batches
    lengths = [step_settings(DEFAULT, response=n)["batch"] for n in DEFAULT.points["response_length"]]
    assert {shape["rows"] * shape["row_tokens"] for shape in lengths} == {DEFAULT.batch_tokens}
    for name, change in (("group_size", "group"), ("questions", "questions")):
        changed = [step_settings(DEFAULT, **{change: n}) for n in DEFAULT.points[name]]
        assert len({one["rollout"]["slots"] for one in changed}) == 1
        assert len({one["batch"]["rows"] for one in changed}) == 1
    mixed = mixed_settings(DEFAULT, 8)
    assert mixed["stops"] / DEFAULT.vocabulary == pytest.approx(4 / DEFAULT.mixed_limit)  # a mean of a quarter


def test_bench_suite_goes_on_where_it_was(tmp_path, monkeypatch):
    path, asked, said = tmp_path / "figures.json", [], []

    def measure(task):
        asked.append((task["series"], task["point"]))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return made_up(task)

    series = [BY_NAME["micro_batches"], BY_NAME["questions"]]
    with pytest.raises(KeyboardInterrupt):
        suite.run_suite(path, series, TINY, repeats=3, say=said.append, measure=measure)
    assert len(json.loads(path.read_text())["points"]) == 3
    records = suite.run_suite(path, series, TINY, repeats=3, say=said.append, measure=measure)
    points = [("micro_batches", 1), ("micro_batches", 2), ("questions", 2), ("questions", 4)]
    assert [(one["series"], one["point"]) for one in records] == points
    assert asked == [*points, points[-1]]  # the interrupted one alone was asked for again
    assert suite.run_suite(path, series, TINY, repeats=3, say=said.append, measure=measure) == records
    assert len(asked) == 5
    assert said[-1] == "4/4 questions 4: measured before"
    suite.run_suite(path, series[:1], TINY, repeats=2, say=said.append, measure=measure)  # other repeats: again
    assert asked[5:] == points[:2]
    monkeypatch.setattr(record, "code_digest", lambda: "other")
    records = suite.run_suite(path, series, TINY, repeats=2, say=said.append, measure=measure)
    assert asked[7:] == points
    assert {one["code"] for one in records} == {"other"}  # and what is old gave way


def test_bench_record_has_what_the_figures_depend_on(tmp_path):
    (one,) = suite.run_suite(
        tmp_path / "figures.json", [BY_NAME["questions"]], TINY, repeats=3, say=lambda text: None, measure=made_up
    )[:1]
    assert one["figures"]["step"] == {"median": 4.0, "min": 2.0, "max": 6.0, "all": [4.0, 6.0, 2.0]}
    assert one["machine"]["cores"] >= 1
    assert {"python", "jax"} <= one["versions"].keys()
    assert {"commit", "dirty", "date", "other_cpu", "settings", "timed_peak_mib"} <= one.keys()


def test_bench_tables_by_hand(tmp_path):
    records = suite.run_suite(
        tmp_path / "figures.json",
        [BY_NAME["micro_batches"], BY_NAME["model_size"]],
        TINY,
        repeats=3,
        say=lambda text: None,
        measure=made_up,
    )
    text = table.tables(records, plot="p.png", source="f.json")
    assert "| 1 | 2 [1, 3] | 2 | 3 | 53 |" in text  # seconds, per unit, MiB while timed, MiB in all
    assert "| 2 | 4 [2, 6] | 2 | 6 | 56 |" in text
    assert "| seconds per micro-batch, 2 over 1 | 1.00 | 0.9 to 1.1 | as expected |" in text
    assert "| memory, 2 over 1 | 2.00 | 0.9 to 1.1 | **not** |" in text
    # hidden sizes 16 and 32 were said to have 1,600 and 3,200 parameters: 48 MiB more for 1,600
    bytes_each = 48 * MIB / 1600
    assert f"| bytes per parameter, between 1,600 and 3,200 | {bytes_each:.2f} | 16 to 32 | **not** |" in text
    assert text.count(table.NOT_MEASURED) == len(SERIES) - 2
    assert "p.png" in text
    assert "`f.json`" in text
    assert table.tables([]) == table.NOT_MEASURED


def test_bench_fit_skips_to_its_first_point(tmp_path):
    figures = {1: 9.0, 2: 9.0, 4: 8.0, 8: 16.0}
    records = [
        {"series": "micro_batches", "point": point, "figures": {"step": {"median": seconds}}, "peak_mib": 5.0}
        for point, seconds in figures.items()
    ]
    records = [{**one, "timed_peak_mib": None, "counts": {}} for one in records]
    one = Fit("{last} over {first}", fit.per_unit, "step", 0.9, 1.1, first=2)
    assert table.fitted(BY_NAME["micro_batches"], one, records) == ("8 over 4", 1.0)
    assert table.fitted(BY_NAME["micro_batches"], one, records[:2]) == ("2 over 1", 0.5)  # too few: the last two
    assert table.fitted(BY_NAME["micro_batches"], one, records[:1]) is None
    assert table.y_of(records[0], MEMORY) == 5.0  # where the system cannot tell, that of the whole process


def test_bench_redraws_the_same_from_its_figures(tmp_path, docs, capsys):
    path = tmp_path / "figures.json"
    options = {"only": None, "repeats": 3, "tiny": True, "json": path, "docs": docs}
    assert bench_command(**options, measure=made_up) == 0
    first, picture = docs.read_text(), (tmp_path / "figures.png").read_bytes()
    assert capsys.readouterr().out.strip() in first
    assert first.startswith("before\n")
    assert first.endswith("\n\nafter\n")
    assert "old" not in first
    assert [first.count(marker) for marker in MARKERS] == [1, 1]
    docs.write_text(f"before\n\n{MARKERS[0]}\nlost\n{MARKERS[1]}\n\nafter\n")
    (tmp_path / "figures.png").unlink()
    assert cli.run(["bench", "--from", str(path), "--docs", str(docs)]) == 0
    assert docs.read_text() == first
    assert (tmp_path / "figures.png").read_bytes() == picture
    assert cli.run(["bench", "--from", str(path), "--docs", "None"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "micro_batches,warp"], ["micro_batches", "got 'micro_batches,warp'", "--only"]),
        (["--only", "questions,questions"], ["distinct series", "--only"]),
        (["--only", ","], ["distinct series", "--only"]),
        (["--repeats", "0"], ["at least 1 repeat", "--repeats"]),
        (["--json", "absent/figures.json"], ["existing folder", "--json"]),
        (["--json", "."], ["path of a file", "--json"]),
        (["--docs", "absent.md"], ["a page that can be written", "--docs"]),
        (["--docs", "bare.md"], ["<!-- growth", "--docs"]),
        (["--from", "absent.json"], ["no file 'absent.json'", "--from"]),
        (["--from", "page.md"], ["expected the figures of `hptjax bench`", "page.md"]),
        (["--from", "list.json"], ["without format, sizes and points"]),
        (["--from", "future.json"], ["format 9"]),
        (["--from", "point.json"], ["point 0 without a fitting series"]),
        (["--json", "default.json", "--tiny"], ["the tiny sizes", "got default", "--json"]),
    ],
)
def test_bench_bad_input_is_one_message_before_any_work(arguments, words, docs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "run_suite", lambda *_, **__: pytest.fail("it measured"))
    (tmp_path / "bare.md").write_text("no lines\n")
    for name, value in {
        "list": [],
        "future": {"format": 9, "sizes": "tiny", "points": []},
        "point": {"format": 1, "sizes": "tiny", "points": [{"series": 1}]},
        "default": {"format": 1, "sizes": "default", "points": []},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    given = ["--json", "figures.json", "--docs", str(docs)]
    assert cli.run(["bench", *given, *arguments]) == cli.BAD_INPUT
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    for word in words:
        assert word in text


def test_bench_figures_of_another_form_are_refused(tmp_path):
    path = tmp_path / "figures.json"
    (good,) = suite.run_suite(path, [BY_NAME["model_size"]], TINY, repeats=1, say=lambda text: None, measure=made_up)[
        :1
    ]
    for broken, words in (
        ({**good, "series": "warp"}, "unknown series 'warp'"),
        ({**good, "peak_mib": "much"}, "a fitting peak_mib"),
        ({**good, "figures": {"step": [1.0]}}, "no median, min and max"),
        ({**good, "figures": {}}, "without the figure 'step'"),
        ({**good, "counts": {}}, "without the count 'parameters'"),
    ):
        path.write_text(json.dumps({"format": 1, "sizes": "tiny", "points": [broken]}))
        with pytest.raises(ValueError, match=words):
            record.read_records(path)


def test_bench_page_needs_its_two_lines_once(tmp_path):
    path = tmp_path / "page.md"
    for text in (MARKERS[0], f"{MARKERS[1]}{MARKERS[0]}", f"{MARKERS[0]}{MARKERS[0]}{MARKERS[1]}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="once each"):
            page.expect_page(path, MARKERS)


def test_bench_page_of_this_repository_is_as_its_figures_say(repository, tmp_path):
    """Where figures were measured, the page is what they draw; where not, it says so."""
    docs, figures = repository / "docs" / "benchmarks.md", repository / "docs" / "growth.json"
    text = docs.read_text(encoding="utf-8")
    found = text[text.index(MARKERS[0]) + len(MARKERS[0]) : text.index(MARKERS[1])].strip()
    records = record.read_records(figures, sizes="default")
    assert found == table.tables(records, plot="growth.png", source="growth.json")


def counts_of(name, point):
    """The counts of a point that is measured in this process; its figures are two numbers above 0 each."""
    (task,) = [task for task in suite.tasks([BY_NAME[name]], TINY, 2) if task["point"] == point]
    found = measured(task)
    assert set(found["figures"]) >= set(BY_NAME[name].figures)
    assert all(len(values) == 2 and min(values) > 0 for values in found["figures"].values())
    return found["counts"]


def test_bench_point_goes_through_the_real_loop():
    """The counts are those of the settings, by hand: 4 questions x 2 rollouts; half are gated to a demonstration."""
    counts = counts_of("questions", 4)
    assert (counts["rollouts"], counts["generated_tokens"]) == (8, 8 * 4)
    assert counts["trained_rows"] == 2 * 2 + 2


@pytest.mark.slow
def test_bench_other_points_go_through_the_real_loop():
    # 16 tokens of micro-batch hold two rows of 8, so 2 micro-batches train 4 demonstrations of 4 tokens
    counts = counts_of("micro_batches", 2)
    assert (counts["micro_batches"], counts["trained_tokens"]) == (2, 16)
    # 2 questions x 2 rollouts of 12 tokens
    assert counts_of("response_length", 12)["generated_tokens"] == 48
    # 2 questions x 4 rollouts; one question is gated: 4 rollouts and 1 demonstration are trained on
    counts = counts_of("group_size", 4)
    assert (counts["rollouts"], counts["trained_rows"]) == (8, 4 + 1)
    assert counts_of("model_size", 32)["parameters"] > 2 * counts_of("model_size", 16)["parameters"]
    counts = counts_of("mixed_lengths", 2)
    assert counts["requests"] == 8
    assert counts["mean_tokens"] < TINY.mixed_limit


def test_bench_point_in_a_process_of_its_own(monkeypatch):
    (task,) = [task for task in suite.tasks([BY_NAME["mixed_lengths"]], TINY, 1) if task["point"] == 1]
    found = in_a_process(task)
    assert set(found["figures"]) == {"continuous", "static", "ratio"}
    assert 50 < found["peak_mib"] < 4000
    assert found["timed_peak_mib"] is None or found["timed_peak_mib"] <= found["peak_mib"]
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="the point mixed_lengths 1, got a process that ended with status 1"):
        in_a_process(task)


@pytest.mark.slow
def test_bench_smallest_suite_by_its_command(tmp_path, docs):
    """Every point in its own process, as a user runs it."""
    path = Path(tmp_path / "figures.json")
    words = [sys.executable, "-m", "hptjax.cli", "bench", "--tiny", "--repeats", "1"]
    words += ["--json", str(path), "--docs", str(docs)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert len(record.read_records(path, sizes="tiny")) == sum(len(points) for points in TINY.points.values())
    assert "Not measured" not in docs.read_text()
    again = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert again.stderr.count("measured before") == sum(len(points) for points in TINY.points.values())
