"""Figures of judged samples against plain Python; their files against a reader of the harness's shape (P23)."""

from __future__ import annotations

import collections
import dataclasses
import html.parser
import json
import math
import statistics

import numpy as np
import pytest

from hptjax.eval.figures import figures, lengths, paired
from hptjax.eval.harness import TaskResult, results, table
from hptjax.eval.report import hardest, markdown, page
from hptjax.eval.samples import Graded, by_question, from_row, to_row

QUESTIONS, N = 12, 8
GENERATION = {"temperature": 0.6, "top_p": 0.95, "max_gen_toks": 100}
EVIL = '</pre><script>alert(1)</script><img src=x onerror="alert(2)">&'


def judged(seed: int = 0, questions: int = QUESTIONS, n: int = N, lift: float = 0.0) -> list[Graded]:
    """Samples of questions of different difficulty; what the strict policy accepts, the lenient one accepts too."""
    rng = np.random.default_rng(seed)
    made = []
    for question in range(questions):
        for index in range(n):
            lenient = bool(rng.random() < (question + 0.5) / questions + lift)
            strict = lenient and bool(rng.random() < 0.9)
            answer = "7" if lenient else (None if rng.random() < 0.2 else str(rng.integers(3)))
            made.append(
                Graded(
                    question=question,
                    index=index,
                    seed=seed,
                    problem=f"problem {question}",
                    prompt=f"asked: problem {question}",
                    gold="7",
                    completion=f"so {answer} {EVIL}",
                    answer=answer,
                    formatted=strict,
                    strict=strict,
                    lenient=lenient,
                    reason="equal" if lenient else "differs",
                    finish_reason="stop" if rng.random() < 0.8 else "length",
                    length=int(rng.integers(5, 100)),
                )
            )
    return made


def task_of(samples, name="sums", ks=(1, 4, 8)):
    return TaskResult(
        name=name,
        figures=figures(samples, ks=ks),
        lengths=lengths(samples),
        questions=QUESTIONS,
        evaluated=QUESTIONS,
        data_hash="0" * 64,
        config={"generation_kwargs": GENERATION, "repeats": N},
    )


def test_figures_are_those_of_plain_python():
    samples = judged()
    found = {(figure.name, figure.filter): figure.estimate.value for figure in figures(samples, ks=(1, 4, 8))}
    groups = [samples[i : i + N] for i in range(0, len(samples), N)]
    for policy in ("strict", "lenient"):
        counts = [sum(getattr(sample, policy) for sample in group) for group in groups]
        assert found[f"avg@{N}", policy] == pytest.approx(sum(counts) / N / QUESTIONS)
        missed = [math.comb(N - c, 4) / math.comb(N, 4) for c in counts]
        assert found["pass@4", policy] == pytest.approx(1 - sum(missed) / QUESTIONS)
        assert found["worst@4", policy] == pytest.approx(sum(math.comb(c, 4) for c in counts) / math.comb(N, 4) / 12)
        half = sum(math.comb(c, j) * math.comb(N - c, 4 - j) for c in counts for j in (2, 3, 4))
        assert found["g-pass@4(0.5)", policy] == pytest.approx(half / math.comb(N, 4) / QUESTIONS)
        credits = []
        for group in groups:
            voters = [s for s in group if s.answer is not None and (s.formatted or policy == "lenient")]
            votes = collections.Counter(s.answer for s in voters)
            tops = [answer for answer, count in votes.items() if count == max(votes.values())]
            firsts = [next(s for s in voters if s.answer == answer) for answer in tops]
            credits.append(statistics.fmean(getattr(s, policy) for s in firsts) if firsts else 0.0)
        assert found[f"maj@{N}", policy] == pytest.approx(statistics.fmean(credits))
    cut = [sample.finish_reason == "length" for sample in samples]
    assert found["truncated", "none"] == pytest.approx(sum(cut) / len(cut))
    assert found["format", "none"] == pytest.approx(sum(s.formatted for s in samples) / len(samples))
    assert found["abstained", "none"] == pytest.approx(sum(s.answer is None for s in samples) / len(samples))
    assert found["length", "none"] == pytest.approx(statistics.fmean(s.length for s in samples))


def test_figures_do_not_depend_on_the_order_of_the_rows():
    samples = judged()
    assert figures(samples[::-1], ks=(1, 8)) == figures(samples, ks=(1, 8))


def test_vote_takes_answers_as_one_that_the_verifier_calls_equal():
    """Votes 7, 7.0 and 3, 3: text alone loses to 3, 3 in a tie-free vote of four only if 7 and 7.0 are apart."""
    base = judged(questions=1, n=5)
    answers = ["7", "7.0", "07", "3", "3"]
    samples = [
        dataclasses.replace(sample, answer=answer, formatted=True, strict="7" in answer, lenient="7" in answer)
        for sample, answer in zip(base, answers, strict=True)
    ]
    told = {(f.name, f.filter): f.estimate.value for f in figures(samples, ks=(5,))}
    assert told["maj@5", "strict"] == 0.0
    voted = figures(samples, ks=(5,), same=lambda a, b: float(a) == float(b))
    told = {(f.name, f.filter): f.estimate.value for f in voted}
    assert told["maj@5", "strict"] == 1.0


def test_pass_at_1024_of_2048_samples_is_the_known_one():
    """Rates p drawn from Beta(1/2, 200): the mean of 1 - (1 - p)^1024 is known in closed form."""
    rng = np.random.default_rng(1)
    rates = rng.beta(0.5, 200.0, size=400)
    base = judged(questions=1, n=1)[0]
    counts = rng.binomial(2048, rates)
    from hptjax.diagnostics.passk import estimate_pass_at_k

    told = estimate_pass_at_k(counts, 2048, 1024)
    exact = 1 - math.exp(math.lgamma(200.5) + math.lgamma(200 + 1024) - math.lgamma(200.0) - math.lgamma(200.5 + 1024))
    assert abs(told.value - exact) <= 4 * told.se
    assert told.low <= told.value <= told.high
    few = [
        dataclasses.replace(base, question=q, index=i, strict=bool(i < c), lenient=bool(i < c))
        for q, c in enumerate(counts[:3])
        for i in range(2048)
    ]
    whole = {(f.name, f.filter): f.estimate.value for f in figures(few, ks=(1024,))}
    assert whole["pass@1024", "strict"] == pytest.approx(estimate_pass_at_k(counts[:3], 2048, 1024).value)


def test_saved_rows_give_every_figure_again():
    """Through the text of the file: re-scoring reproduces results.json exactly."""
    samples = judged()
    lines = [json.dumps(to_row(sample, GENERATION)) for sample in samples]
    again = [from_row(json.loads(line)) for line in lines]
    assert again == samples
    options = {"model": "m", "run": {"seed": 0}, "date": "2026-01-01", "seconds": 1.0}
    assert json.dumps(results([task_of(again)], **options)) == json.dumps(results([task_of(samples)], **options))


def test_results_have_the_shape_of_the_harness():
    told = json.loads(
        json.dumps(
            results([task_of(judged())], model="m", run={"seed": 0}, date="2026-01-01", seconds=1.0), allow_nan=False
        )
    )
    task = told["results"]["sums"]
    metrics = {key for key in task if "," in key and not any(end in key for end in ("_stderr,", "_ci95,"))}
    assert {f"avg@{N},strict", "pass@8,lenient", "maj@8,strict", "truncated,none"} <= metrics
    for key in metrics:
        name, policy = key.split(",")
        assert isinstance(task[key], float)
        assert isinstance(task[f"{name}_stderr,{policy}"], float)
        low, high = task[f"{name}_ci95,{policy}"]
        assert low <= task[key] <= high
        assert isinstance(told["higher_is_better"]["sums"][name], bool)
        assert told["stderr_method"]["sums"][key]
    assert f"avg@{N}_sampling_stderr,strict" in task
    assert told["n-samples"]["sums"] == {"original": QUESTIONS, "effective": QUESTIONS}
    for field in ("group_subtasks", "configs", "versions", "n-shot", "task_hashes"):
        assert set(told[field]) == {"sums"}
    rows = [to_row(sample, GENERATION) for sample in judged()]
    for row in rows:
        assert {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"} <= set(row)
        assert all(len(row[name]) == 64 for name in ("doc_hash", "prompt_hash", "target_hash"))
        assert set(row["metrics"]) <= set(row)
    assert len(rows) == QUESTIONS * N


def test_paired_evaluations():
    before, after = judged(), judged(seed=5, lift=0.25)
    same = paired(before, before, 4)
    assert (same.difference.value, same.difference.low, same.difference.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    assert same.won == same.lost == []
    told, back = paired(before, after, 1), paired(after, before, 1)
    assert told.difference.value == pytest.approx(-back.difference.value)
    assert (told.won, told.lost) == (back.lost, back.won)
    rates = [[sum(s.strict for s in group) / N for group in by_question(side)] for side in (before, after)]
    change = [b - a for a, b in zip(*rates, strict=True)]
    assert told.difference.value == pytest.approx(statistics.fmean(change))
    assert [change[q] for q in told.won] == sorted((c for c in change if c > 0), reverse=True)
    with pytest.raises(ValueError, match="same questions, got 12 and 11 that differ at question 11"):
        paired(before, judged(questions=11), 1)
    other = [dataclasses.replace(s, gold="8") if s.question == 3 else s for s in before]
    with pytest.raises(ValueError, match="differ at question 3"):
        paired(before, other, 1)


class Tags(html.parser.HTMLParser):
    """Every tag that a browser would see."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))


def test_page_shows_model_output_as_text():
    samples = judged()
    samples[0] = dataclasses.replace(samples[0], problem=EVIL, gold=EVIL, reason=EVIL, answer=EVIL)
    text = page(f"title {EVIL}", [task_of(samples, name=f"sums {EVIL}")], {f"sums {EVIL}": samples})
    tags = Tags()
    tags.feed(text)
    assert [tag for tag, _ in tags.seen].count("script") == 1  # ours, that sorts the table
    assert not {"img", "iframe", "link"} & {tag for tag, _ in tags.seen}
    assert not any(
        name.startswith("on") or name in ("src", "href") for _, attributes in tags.seen for name in attributes
    )
    assert "&lt;script&gt;alert(1)" in text


def test_page_opens_with_the_hardest_questions():
    chosen = hardest(judged())
    counts = [sum(sample.strict for sample in group) for group in chosen]
    assert counts == sorted(counts)
    assert len(chosen) == 10


def test_report_has_a_line_per_figure():
    task = task_of(judged())
    assert len(table([task]).splitlines()) == 2 + len(task.figures)
    text = markdown("Model m", [task])
    assert text.startswith("# Model m\n")
    assert f"| {N * QUESTIONS}, " in text


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: [], "as many samples of every question, got none"),
        (lambda s: s[:-1], "as many samples of every question"),
        (lambda s: [*s, s[0]], "got sample 0 of question 0 twice"),
        (lambda s: [*s[:-1], dataclasses.replace(s[-1], index=9)], r"samples 0\.\.7 of question 11"),
        (lambda s: [*s, dataclasses.replace(s[0], completion="else")], "got sample 0 of question 0 twice"),
    ],
)
def test_samples_that_do_not_fit_are_refused(spoil, words):
    with pytest.raises(ValueError, match=words):
        figures(spoil(judged()), ks=(1,))


def test_row_of_somebody_else_is_refused():
    with pytest.raises(ValueError, match=r"samples_<task>\.jsonl"):
        from_row({"doc_id": 0})
    with pytest.raises(ValueError, match=r"eval.ks in 1..8.*got \[9\]"):
        figures(judged(), ks=(9,))
