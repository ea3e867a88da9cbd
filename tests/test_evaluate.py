"""Evaluation with a made-up sampler and verifier: the counts are known, so every figure is."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from hptjax.diagnostics.metrics import check_names
from hptjax.eval.evaluate import compare_paired, eval_metrics, evaluate, heldout_demonstration_nll, panel_rows
from hptjax.records import Example, FinishReason, Question, Request, Sample, SampleId, Source, Verdict
from hptjax.types import MicroBatch

STOP = 9


def a_question(question_id: int) -> Question:
    example = Example(question_id, f"question {question_id}", "demo", {"target": question_id}, f"c{question_id}")
    return Question(example, np.array([1, question_id], np.int32), np.array([2, STOP], np.int32))


def requests_of(count: int):
    def make_requests(questions, visit):
        return [
            Request(SampleId(q.question_id, visit, index), q.prompt_tokens, 4, frozenset({STOP}))
            for q in questions
            for index in range(count)
        ]

    return make_requests


def fake_sample(params, requests, key):
    """Writes `index` and the stop token; the last index of each question runs into the limit. In reverse order."""
    assert key == "key"
    samples = []
    for request in requests:
        index = request.sample_id.index
        tokens = [index, 7, 7, 7] if index == params["longest"] else [index, STOP]
        reason = FinishReason.LENGTH if index == params["longest"] else FinishReason.STOP
        samples.append(
            Sample(
                sample_id=request.sample_id,
                group_id=request.sample_id.question,
                source=Source.ROLLOUT,
                prompt_tokens=request.prompt_tokens,
                completion_tokens=np.array(tokens, np.int32),
                sampler_logprobs=np.zeros(len(tokens)),
                finish_reason=reason,
            )
        )
    return samples[::-1]


def fake_judge(samples, questions):
    """Question q is solved by the samples with index below q."""
    judged = []
    for sample in samples:
        target = questions[sample.sample_id.question].example.answer["target"]
        solved = int(sample.completion_tokens[0]) < target
        verdict = Verdict(float(solved), solved, "correct" if solved else "wrong value")
        judged.append((dataclasses.replace(sample, reward=verdict.reward, solved=solved), [verdict]))
    return judged


def run(questions, *, count=8, **changes):
    arguments = {
        "make_requests": requests_of(count),
        "sample": fake_sample,
        "judge": fake_judge,
        "samples_per_question": 8,
        **changes,
    }
    return evaluate({"longest": 7}, questions, "key", **arguments)


def test_evaluate_counts_what_was_solved():
    result = run([a_question(q) for q in (0, 8, 2, 1)])
    assert result.question_ids.tolist() == [0, 8, 2, 1]
    assert result.solved_counts.tolist() == [0, 8, 2, 1]
    assert result.pass_at_k[1].value == pytest.approx(11 / 32)
    assert result.pass_at_k[8].value == pytest.approx(3 / 4)
    assert (result.pass_at_k[8].questions, result.pass_at_k[8].samples) == (4, 8)
    assert result.length_clip_ratio == pytest.approx(1 / 8)
    assert result.mean_length == pytest.approx((7 * 2 + 4) / 8)
    assert len(result.judged) == 32


def test_evaluate_metrics_have_declared_names():
    row = eval_metrics(run([a_question(q) for q in (0, 8, 2, 1)], ks=(1, 4, 8)), "validation")
    check_names(row)
    assert row["validation/pass@1"] == pytest.approx(11 / 32)
    assert row["validation/pass@1_low"] < row["validation/pass@1"] < row["validation/pass@1_high"]
    assert row["validation/solve_none"] == 0.25
    assert {"validation/pass@4", "validation/pass@8_se", "validation/response_length"} <= row.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ks": (1, 9)}, r"eval\.ks in 1\.\.8 \(eval\.samples_per_question\), got \[9\]"),
        ({"count": 7}, "expected 8 requests for each of 2 questions, got 14 distinct ones for 2"),
        ({"sample": lambda *a: fake_sample(*a)[1:]}, "for each of 16 requests, got 15 samples"),
        ({"judge": lambda *a: fake_judge(*a)[1:]}, "got 16 samples and 15 judged"),
    ],
)
def test_evaluate_refuses_what_does_not_add_up(changes, message):
    with pytest.raises(ValueError, match=message):
        run([a_question(1), a_question(2)], **changes)


@pytest.mark.parametrize("ids", [[], [3, 3]])
def test_evaluate_refuses_no_questions_and_repeated_ones(ids):
    with pytest.raises(ValueError, match="expected questions with distinct ids"):
        run([a_question(q) for q in ids])


def test_compare_paired_by_hand():
    before, after = np.array([0, 0, 4, 8]), np.array([0, 1, 4, 8])
    at_1, at_8 = compare_paired(before, after, 8, 1), compare_paired(before, after, 8, 8)
    assert at_1.difference.value == pytest.approx(1 / 32)
    assert at_8.difference.value == pytest.approx(1 / 4)
    assert at_1.p == 1.0  # one question changed: its sign says nothing
    same = compare_paired(before, before, 8, 1).difference
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_compare_paired_sees_a_gain_that_separate_intervals_hide():
    rng = np.random.default_rng(0)
    before = rng.choice([0, 0, 4, 8], size=200)
    after = np.minimum(before + (rng.random(200) < 0.3), 8)
    difference, p = compare_paired(before, after, 8, 1)
    assert difference.low > 0
    assert p < 0.001


def demonstration_batch(live, fill: float) -> tuple[MicroBatch, np.ndarray]:
    """A micro-batch whose log-probs are -0.5, -1.5, -2.5 ... on live tokens and `fill` elsewhere."""
    live = np.array(live, np.bool_)
    logprobs = np.full(live.shape, fill, np.float32)
    logprobs[live] = -0.5 - np.arange(live.sum())
    tokens = np.zeros(live.shape, np.int32)
    floats = np.zeros(live.shape, np.float32)
    segments = np.zeros((live.shape[0], 1), np.int32)
    batch = MicroBatch(
        input_tokens=tokens,
        target_tokens=tokens,
        positions=tokens,
        segment_ids=tokens,
        completion_mask=live,
        planes={},
        sampler_logprobs=floats,
        rollout_logprobs=floats,
        reference_logprobs=floats,
        temperature=np.ones((live.shape[0], 1), np.float32),
        sample_index=segments,
        sample_hash=np.zeros((live.shape[0], 1, 2), np.uint32),
        source=segments,
        micro_index=np.int32(0),
        planned_tokens=np.zeros(2, np.int32),
        planned_digest=np.zeros((2, 2), np.uint32),
    )
    return batch, logprobs


@pytest.mark.parametrize("fill", [0.0, -7.0, float("nan"), float("-inf")])
def test_heldout_nll_weighs_tokens_and_ignores_prompt_and_padding(fill):
    one, one_logprobs = demonstration_batch([[0, 1, 1, 0], [0, 0, 0, 0]], fill)  # 0.5 + 1.5
    other, other_logprobs = demonstration_batch([[0, 0, 0, 1], [0, 0, 0, 0]], fill)  # 0.5
    scored = {id(one): jnp.asarray(one_logprobs), id(other): jnp.asarray(other_logprobs)}
    loss = heldout_demonstration_nll(None, [one, other], lambda params, batch: scored[id(batch)])
    assert (loss.nll_sum, loss.tokens) == (2.5, 3)
    assert loss.per_token == pytest.approx(2.5 / 3)  # the mean of the two means would be 0.75


def test_heldout_nll_of_nothing_is_nan():
    assert np.isnan(heldout_demonstration_nll(None, [], lambda params, batch: None).per_token)


def test_panel_follows_the_same_questions():
    questions = [a_question(q) for q in (5, 0, 2)]
    result = run(questions)
    rows = panel_rows(result, [questions[2], questions[0]], lambda tokens: f"<{tokens[0]}>", step=40, samples=3)
    assert [(row["question"], row["index"]) for row in rows] == [(2, 0), (2, 1), (2, 2), (5, 0), (5, 1), (5, 2)]
    assert rows[2] == {
        "step": 40,
        "question": 2,
        "index": 2,
        "prompt": "question 2",
        "completion": "<2>",
        "reward": 0.0,
        "solved": False,
        "verdict": ["wrong value"],
        "finish_reason": "stop",
        "length": 2,
        "solved_count": 2,
        "samples": 8,
    }
    assert json.loads(json.dumps(rows)) == rows
    with pytest.raises(ValueError, match=r"panel questions that were evaluated, got \[77\]"):
        panel_rows(result, [a_question(77)], str, step=0)
