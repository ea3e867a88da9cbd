"""An epoch that ends inside a step: no question is left out, and every sum is over what is in it (T19, T20)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hptjax.build.run as build_run
import hptjax.train.loop as loop
from hptjax.data.stream import QuestionStream
from hptjax.hpt.assemble import assemble
from hptjax.hpt.digest import digest, sample_hashes
from hptjax.hpt.gate import DEMONSTRATION_INDEX
from hptjax.hpt.route import by_gate
from hptjax.hpt.terms import Term
from hptjax.losses.advantages import centred, ones
from hptjax.losses.reducers import token_mean
from hptjax.records import SampleId, Source
from hptjax.sharding.host import to_host
from hptjax.train.accumulate import Status
from hptjax.train.open_step import OpenStep
from hptjax.train.phases import assemble_updates, gate_step
from hptjax.train.state import init_state
from hptjax.train.step import make_micro_step
from hptjax.types import SumCount
from tests import recorded, tiny, toys

QUESTIONS, PER_STEP, GROUP = 17, 5, 4  # a pass is 5 + 5 + 5 + 2 questions
TABLE = np.random.default_rng(5).integers(-8, 9, (recorded.VOCAB, 3)).astype(np.float32)


def test_t19_a_short_last_window_is_flushed_with_its_own_sum_and_counted():
    """23 rows, two to a micro-batch, five of those to a window: the last window is two micro-batches, one ragged."""
    rng = np.random.default_rng(12)
    tokens, mask = toys.rows_of(rng, 23)
    weights = rng.integers(0, 4, tokens.shape)
    pairs = [list(range(first, min(first + 2, 23))) for first in range(0, 23, 2)]
    windows = [pairs[0:5], pairs[5:10], pairs[10:]]
    assert [len(cuts) for cuts in windows] == [5, 5, 2]
    step, state = toys.sgd_setup(toys.linear_losses, toys.linear_params())
    seen = 0
    for number, cuts in enumerate(windows):
        rows = [row for cut in cuts for row in cut]
        before = np.asarray(state.params["policy"]["theta"])
        state = toys.run_window(step, state, toys.window(tokens, mask, weights, cuts, pad_rows=2))
        moved = before - np.asarray(state.params["policy"]["theta"])
        factors = np.where(mask, weights, 0)[rows].astype(np.int64)
        answer = np.einsum("bt,btf->f", factors, toys.FEATURE_TABLE[tokens[rows]].astype(np.int64))
        assert np.array_equal(moved, answer.astype(np.float32))
        assert int(state.report.status) == Status.UPDATED
        assert int(state.report.micro_batches) == len(cuts)
        assert int(state.report.tokens) == mask[rows].sum()
        assert int(state.totals.windows) == int(state.totals.optimizer_steps) == number + 1
        seen += len(cuts)
    assert int(state.totals.micro_batches) == seen == 12
    assert int(state.totals.tokens_low) == mask.sum()


# The stream, the gate, the split into updates, the packing and the step, on a loss whose gradient is known


def plane_losses(params, batch):
    """Per plane, sum of weight x advantage x (x . theta)."""
    scores = jnp.einsum("btf,f->bt", jnp.asarray(TABLE)[batch.target_tokens], params["policy"], precision="highest")
    named = {name: jnp.sum(scores * plane.weights * plane.advantages) for name, plane in batch.planes.items()}
    return named, {"loss/sft": SumCount(total=named["sft"], count=jnp.ones((), jnp.float32))}


TERMS = (
    Term("sft", frozenset({Source.DEMONSTRATION}), 1.0, token_mean, ones),
    Term("rl", frozenset({Source.ROLLOUT}), 1.0, token_mean, centred),
)


def pack(samples, dead, *_):
    return assemble(samples, TERMS, rows=2, row_tokens=48, max_segments=4, max_micro_batches=16, dead=dead)


def solved_none(question):
    """Whether a question's group solves nothing: two of five are gated to their demonstration."""
    return question.question_id % 5 < 2


def rollouts_of(question, visit):
    rng = np.random.default_rng([question.question_id, visit])
    if not solved_none(question):
        return recorded.group(question, rng, size=GROUP, visit=visit)
    return [recorded.rollout(question, index, rng, reward=0.0, visit=visit) for index in range(GROUP)]


def updates_of_a_step(batch, step, updates):
    """What the loop makes of one batch of questions."""
    rolled = [sample for question in batch.questions for sample in rollouts_of(question, batch.round)]
    open_step = OpenStep(step=step, round=batch.round, questions=list(batch.questions))
    open_step.samples = {sample.sample_id: sample for sample in rolled}
    gated = gate_step(open_step, route=by_gate(0, GROUP))
    return assemble_updates(gated, updates=updates, mask_overlong=False, assemble=pack)


def reference(questions, visit, *, sft_tokens=None):
    """The gradient of one update by float64 loops over its samples; `sft_tokens` replaces the SFT normaliser."""
    gradient, scale = np.zeros(3), 0.0
    demonstrations = [question.demonstration_tokens for question in questions if solved_none(question)]
    groups = [rollouts_of(question, visit) for question in questions if not solved_none(question)]
    count = sum(len(tokens) for tokens in demonstrations) if sft_tokens is None else sft_tokens
    parts = [(tokens, 1.0 / count) for tokens in demonstrations]
    rolled = sum(len(sample.completion_tokens) for group in groups for sample in group)
    for group in groups:
        mean = sum(sample.reward for sample in group) / len(group)
        parts += [(sample.completion_tokens, (sample.reward - mean) / rolled) for sample in group]
    for tokens, factor in parts:
        for token in tokens:
            gradient += factor * TABLE[token].astype(np.float64)
            scale += abs(factor) * np.linalg.norm(TABLE[token])
    return gradient, scale


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_t20_every_update_across_epoch_ends_is_that_of_the_concatenated_stream(updates):
    """Two passes of 17 questions, five to a step, cut into 1, 2 or 3 updates: each question once per pass, in order;
    every update's normaliser is the tokens of its own micro-batches, and its gradient the float64 one."""
    questions = recorded.questions(QUESTIONS)
    stream = QuestionStream(questions, questions_per_step=PER_STEP, seed=3)
    optimizers = {"policy": optax.sgd(1.0)}
    params = {"policy": jnp.zeros(3)}
    step = jax.jit(make_micro_step(plane_losses, optimizers))
    state = init_state(
        params, optimizers, jax.eval_shape(plane_losses, params, pack([], frozenset()).micro_batches[0])[1], 16
    )
    consumed, sizes, other_tokens, gaps = {0: [], 1: []}, [], 1, []
    for number in range(8):
        batch = stream.next_batch()
        assert batch.round == number // 4
        left = list(batch.questions)
        made = updates_of_a_step(batch, number, updates)
        sizes.append([len({sample.sample_id.question for sample in update.samples}) for update in made])
        for update in made:
            ids = [sample.sample_id for sample in update.samples]
            chosen, left = left[: len({i.question for i in ids})], left[len({i.question for i in ids}) :]
            assert {i.question for i in ids} == {question.question_id for question in chosen}
            assert {i.round for i in ids} == {batch.round}
            consumed[batch.round] += [question.question_id for question in chosen]
            before = np.asarray(state.params["policy"], np.float64)
            state = toys.run_window(step, state, update.micro_batches)
            report = to_host(state.report)
            assert int(report.status) == Status.UPDATED
            assert int(report.micro_batches) == len(update.micro_batches)
            assert np.array_equal(report.witness, update.planned_tokens.astype(np.float32))
            tokens = sum(len(q.demonstration_tokens) for q in chosen if solved_none(q))
            assert update.terms["sft"].tokens == tokens
            if tokens:
                assert update.terms["sft"].normaliser == pytest.approx(tokens, rel=1e-12)
            expected, scale = reference(chosen, batch.round)
            tolerance = 16 * (len(update.micro_batches) + np.sqrt(int(report.tokens))) * 2.0**-24 * (scale + 8.0)
            gap = np.linalg.norm(before - np.asarray(state.params["policy"], np.float64) - expected)
            assert gap <= tolerance
            if (
                tokens and tokens != other_tokens
            ):  # the normaliser of the update before: what a straddled epoch would do
                gaps.append(
                    np.linalg.norm(reference(chosen, batch.round, sft_tokens=other_tokens)[0] - expected) / tolerance
                )
            other_tokens = tokens or other_tokens
        assert left == []
    for seen in consumed.values():
        assert sorted(seen) == [question.question_id for question in questions]
    assert consumed[0] != consumed[1]
    short = {1: [2], 2: [1, 1], 3: [1, 1]}[updates]  # two questions make at most two updates
    assert sizes[3] == sizes[7] == short
    assert len(sizes[0]) == updates
    assert int(state.totals.windows) == sum(len(made) for made in sizes)
    assert np.median(gaps) > 100


class Ended(Exception):
    """The loop came to its end; there is no evaluation to sum up."""


def test_t20_a_run_takes_every_question_once_in_every_epoch(tmp_path, monkeypatch):
    """`train` over two epochs of 7 questions, six to a step, two updates to a step: 3 + 3, then 1, and again."""
    config = tiny.tiny_config(tmp_path, method="sft")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, train_questions=7),
        train=dataclasses.replace(config.train, steps=4, eval_every=0, updates_per_rollout_batch=2),
        eval=dataclasses.replace(config.eval, train_questions=0),
    )
    known = []

    def watched(stages, state, progress, world, cadence):
        known.extend(sorted(world.questions))
        loop.run(stages, state, progress, dataclasses.replace(world, evaluate=lambda step, params: {}), cadence)
        raise Ended

    monkeypatch.setattr(build_run, "run", watched)
    with pytest.raises(Ended):
        tiny.train(config)
    assert len(known) == 7
    ledger = [json.loads(line) for line in (Path(config.runs_dir) / "tiny" / "ledger.jsonl").read_text().splitlines()]
    assert [(row["step"], row["update"], row["sequences"]) for row in ledger] == [
        (1, 0, 3),
        (1, 1, 3),
        (2, 0, 1),
        (3, 0, 3),
        (3, 1, 3),
        (4, 0, 1),
    ]
    assert {row["status"] for row in ledger} == {"updated"}
    for epoch, rows in enumerate((ledger[:3], ledger[3:])):
        ids = [SampleId(question_id, epoch, DEMONSTRATION_INDEX) for question_id in known]
        added = np.sum([row["digest"] for row in rows], axis=0, dtype=np.int64) % 2**32
        assert added.tolist() == digest(sample_hashes(ids)).tolist()
