"""An evaluation that is stopped, or killed inside a line, goes on and ends as if it had never been."""

from __future__ import annotations

import hashlib
import json

import pytest

from hptjax.eval.figures import figures
from hptjax.eval.run import Completion, Judged, evaluate_items
from hptjax.eval.store import begin, rows_file, saved
from hptjax.eval.suites import Item

N = 3
ITEMS = [Item(f"problem {place}", str(place % 2), "math") for place in range(7)]
PROMPTS = {place: f"asked: {item.problem}" for place, item in enumerate(ITEMS) if place != 4}  # 4 does not fit
GENERATION = {"temperature": 0.6}


def completion(place: int, index: int) -> Completion:
    digest = hashlib.sha256(f"{place}/{index}".encode()).digest()
    return Completion(f"{digest[0] % 2} \ud800 \x00", "length" if digest[1] % 4 == 0 else "stop", digest[2])


def judge(asked):
    right = [c.text[0] == ITEMS[place].gold for place, c in asked]
    return [Judged(c.text[0], True, word, word, "equal") for (_, c), word in zip(asked, right, strict=True)]


def evaluated(path, *, chunk=2, chunks=99, **changes):
    """(samples, the questions that were sampled): at most so many chunks."""
    told: list[list[int]] = []

    def sample(places):
        told.append(list(places))
        return [[completion(place, index) for index in range(N)] for place in places]

    options = {
        "n": N,
        "seed": 0,
        "sample": sample,
        "judge": judge,
        "generation": GENERATION,
        "chunk": chunk,
        "should_stop": lambda: len(told) >= chunks,
    }
    found = evaluate_items(ITEMS, PROMPTS, path, **(options | changes))
    return found, told


def test_evaluation_asks_every_question_that_fits_once(tmp_path):
    found, told = evaluated(tmp_path / "samples_a.jsonl")
    assert told == [[0, 1], [2, 3], [5, 6]]
    assert [(s.question, s.index) for s in found] == [(p, i) for p in (0, 1, 2, 3, 5, 6) for i in range(N)]
    assert saved(tmp_path / "samples_a.jsonl", N) == found
    for entry in found:
        assert entry.completion == completion(entry.question, entry.index).text
        assert (entry.gold, entry.prompt) == (ITEMS[entry.question].gold, PROMPTS[entry.question])


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_stopped_evaluation_goes_on(tmp_path, chunk):
    whole, _ = evaluated(tmp_path / "whole.jsonl")
    first, told = evaluated(tmp_path / "parts.jsonl", chunks=1, chunk=chunk)
    assert len(told) == 1
    second, more = evaluated(tmp_path / "parts.jsonl", chunk=2)
    assert sorted([*told[0], *(place for places in more for place in places)]) == sorted(PROMPTS)
    assert second == whole
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert figures(second, ks=(1, 3)) == figures(whole, ks=(1, 3))
    assert first == whole[: len(first)]


def test_killed_evaluation_loses_the_chunk_that_was_being_written(tmp_path):
    """A write may be cut anywhere: a question that lacks a sample, or the end of one, is asked again."""
    whole, _ = evaluated(tmp_path / "whole.jsonl")
    content = (tmp_path / "whole.jsonl").read_bytes()
    lines = content.splitlines(keepends=True)
    for rows in range(len(lines) + 1):
        for rest in (0, 20):
            left = b"".join(lines[:rows]) + (lines[rows][:rest] if rows < len(lines) else b"")
            (tmp_path / "cut.jsonl").write_bytes(left)
            found, told = evaluated(tmp_path / "cut.jsonl")
            assert sum(map(len, told)) == len(PROMPTS) - rows // N
            assert (tmp_path / "cut.jsonl").read_bytes() == content
            assert found == whole


def test_rows_that_are_not_of_this_evaluation_are_refused(tmp_path):
    evaluated(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"samples 0\.\.1 .* got \[0, 1, 2\] of question 0; change --out"):
        evaluated(tmp_path / "a.jsonl", n=2)
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_text("".join([lines[0].replace('"doc_id": 0', '"doc_id": 4'), *lines[1:]]))
    with pytest.raises(ValueError, match="question 4"):
        evaluated(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_text("".join([lines[0], "{damaged\n", *lines[1:]]))
    (tmp_path / "e.jsonl").write_text("".join([lines[0], "[" * 100_000 + "\n", *lines[1:]]))
    for name in ("c", "e"):
        with pytest.raises(ValueError, match=rf"{name}\.jsonl, line 2: .*; change --out"):
            evaluated(tmp_path / f"{name}.jsonl")
    with pytest.raises(ValueError, match="3 completions of each of 2 questions"):
        evaluated(tmp_path / "d.jsonl", sample=lambda places: [[completion(0, 0)] for _ in places])


def test_folder_belongs_to_one_evaluation(tmp_path):
    manifest = {"model": "a", "samples": 3, "seed": 0}
    begin(tmp_path / "out", manifest)
    begin(tmp_path / "out", dict(reversed(manifest.items())))
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert rows_file(tmp_path / "out", "aime24").name == "samples_aime24.jsonl"
    with pytest.raises(ValueError, match=r"\(samples\): samples was 3, is 4; change --out"):
        begin(tmp_path / "out", manifest | {"samples": 4})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="with files in it; change --out"):
        begin(tmp_path / "other", manifest)
    for taken in ("thesis.txt", "thesis.txt/out"):
        with pytest.raises(ValueError, match=r"expected to make the folder .*; change --out"):
            begin(tmp_path / "other" / taken, manifest)
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        begin(tmp_path / "out", manifest)
