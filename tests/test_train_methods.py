"""Every method trains: a few steps of the tiny run each, in one process, through the product's own build."""

from __future__ import annotations

import dataclasses
import typing

import numpy as np
import pytest

from hptjax.build import step as build_step
from hptjax.build.method import REMEDY, build_recipe, met_needs, options
from hptjax.build.policy import build_policy
from hptjax.config_methods import (
    MethodName,
    MicroGroupRow,
    RolloutRow,
    learns_by_sft,
    learns_from_demonstrations,
    learns_from_rollouts,
    samples_per_question,
)
from hptjax.hpt.method import all_needs
from hptjax.hpt.method_parts import ROLLOUT_ROWS
from hptjax.hpt.methods import METHODS
from hptjax.models.folder import save_folder
from hptjax.sharding.host import to_host
from hptjax.train.jsonl import read_rows
from hptjax.train.state import jit_step
from tests import tiny

NAMES = typing.get_args(MethodName)


def test_config_names_are_those_of_the_table(tmp_path):
    config = tiny.tiny_config(tmp_path)
    assert set(NAMES) == set(METHODS)
    assert set(typing.get_args(RolloutRow)) == set(ROLLOUT_ROWS)
    for name in NAMES:
        method = METHODS[name](options(config))
        assert method.name == name
        assert method.most_samples == samples_per_question(name, config.rollout.group_size)
        assert (method.rollouts > 0) == learns_from_rollouts(name)
        demonstrations = any(part.kind == "sft" or part.name in ("off", "prefix") for part in method.parts)
        assert demonstrations == learns_from_demonstrations(name)
        assert any(part.kind == "sft" for part in method.parts) == learns_by_sft(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("methods")


@pytest.fixture(scope="module")
def other_model(folder):
    """A folder with another random decoder of the same vocabulary: teacher, author and reference."""
    config = tiny.tiny_config(folder)
    policy = build_policy(dataclasses.replace(config, seed=7))
    save_folder(folder / "other", policy.config, to_host(policy.params), dtype=np.float32)
    return str(folder / "other")


MODELS = {"kdrl": "teacher", **{f"pear_{kind}": "demonstration_author" for kind in ("token", "block", "sequence")}}
QUICK = ("dpo", "luffy")  # the others: make test-full


MICRO_GROUPS = (MicroGroupRow(2, 0.0, -1.0), MicroGroupRow(1, 0.5, 0.9), MicroGroupRow(1, 1.0, 1.1))


def config_of(folder, name, other_model, **changes):
    config = tiny.tiny_config(folder, name=name, method=name, **changes)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **({MODELS[name]: other_model} if name in MODELS else {})),
        methods=dataclasses.replace(config.methods, relift_buffer=2, trapo_groups=MICRO_GROUPS),
        rollout=dataclasses.replace(config.rollout, prompt_buckets=(24, 44)),
        batch=dataclasses.replace(config.batch, row_tokens=96 if name == "dpo" else 48),
        train=dataclasses.replace(config.train, steps=3, eval_every=0, rollouts_every=0),
        eval=dataclasses.replace(config.eval, train_questions=0),
    )


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_method_trains_and_compiles_the_train_step_once(folder, other_model, name, monkeypatch):
    steps = []

    def noted(*arguments):
        steps.append(jit_step(*arguments))
        return steps[-1]

    monkeypatch.setattr(build_step, "jit_step", noted)
    config = config_of(folder, name, other_model)
    tiny.train(config)
    assert [step.__wrapped__._cache_size() for step in steps] == [1]
    rows = [row for row in read_rows(folder / "runs" / name / "metrics.jsonl") if "witness/ok" in row]
    assert len(rows) == 3
    assert all(row["witness/ok"] == 1 for row in rows)
    assert any(row["actor/grad_norm"] > 0 for row in rows)


@pytest.mark.slow
def test_relift_trains_demonstrations_of_failed_questions_with_a_second_optimizer(folder, other_model):
    """Updates of two demonstrations each come whenever two failed questions wait; the newest leave first."""
    config = config_of(folder, "relift", other_model)
    config = dataclasses.replace(config, name="relift-long", train=dataclasses.replace(config.train, steps=6))
    tiny.train(config)
    rows = read_rows(folder / "runs" / "relift-long" / "ledger.jsonl")
    apart = [row for row in rows if row["tokens_by_term"]["sft"] > 0]
    assert 0 < len(apart) < len(rows)
    assert all(row["tokens_by_term"]["rl"] == 0 and row["sequences"] == 2 for row in apart)
    assert [row["schedule_step"] for row in apart] == list(range(len(apart)))


@pytest.mark.slow
def test_dapo_draws_questions_until_enough_groups_vary(folder, other_model):
    """Two questions a step; live are the whole groups of at most two questions that some rollouts solved."""
    config = config_of(folder, "dapo", other_model)
    config = dataclasses.replace(
        config,
        name="dapo-draws",
        data=dataclasses.replace(config.data, questions_per_step=2),
        train=dataclasses.replace(config.train, steps=4),
    )
    tiny.train(config)
    rows = [row for row in read_rows(folder / "runs" / "dapo-draws" / "metrics.jsonl") if "witness/ok" in row]
    group = config.rollout.group_size
    drawn = [row["batch/rollouts"] // (2 * group) for row in rows]
    assert max(drawn) > 1  # seen: a third of completions is solved, so about a fifth of groups does not vary
    for row in rows:
        varied = row["batch/rollouts"] // group - row["batch/solve_none"] - row["batch/solve_all"]
        assert row["batch/live_rows"] <= group * min(varied, 2)
        assert row["hpt/gate_sft_frac"] == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_method_without_its_needs_is_refused_with_the_list(folder, name):
    """Nothing but a policy and a reward: groups of one, no demonstrations, no frozen models."""
    config = tiny.tiny_config(folder, method=name)
    bare = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, reference=None),
        data=dataclasses.replace(config.data, demonstrations=False),
        rollout=dataclasses.replace(config.rollout, group_size=2 if name == "luffy" else 1),
    )
    needs = all_needs(METHODS[name](options(bare))) - met_needs(bare)
    if not needs:
        assert name in ("reinforce", "reinforce_pp", "ppo")
        return
    with pytest.raises(ValueError, match=f"method '{name}' needs what") as error:
        build_recipe(bare, name, 6)
    assert all(need.value in str(error.value) and REMEDY[need] in str(error.value) for need in needs)
