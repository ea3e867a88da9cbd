"""Runs on data files: splits, ids, what is left out and counted, and a tiny run that is taken up again."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import textwrap
import tomllib
from pathlib import Path

import numpy as np
import pytest

from hptjax import cli
from hptjax.build.files import file_examples
from hptjax.build.parts import open_parts
from hptjax.build.run import train
from hptjax.config import Config
from hptjax.config_rollout import RewardFunction
from hptjax.data.prepare import DROP_REASONS
from hptjax.data.split import split_position
from hptjax.data.tokenizer import decode, load_tokenizer
from hptjax.tasks.countdown import enumerate_instances, write_examples
from tests import tiny
from tests.chat_templates import CHAT, GENERATES, OPENED, PLAIN, byte_tokenizer
from tests.test_bad_input import config_file
from tests.test_config import changed


def record(example, **changes):
    """A row of our own format, judged by countdown's verifier."""
    numbers = ", ".join(map(str, example.answer["numbers"]))
    row = {"prompt": f"Make {example.answer['target']} of {numbers}.", "demo": example.demonstration}
    return {**row, "answer": dict(example.answer), **changes}


PROBLEMS = write_examples(enumerate_instances(3, 1, 9, 1, 30), seed=0)[::17]
ROWS = [record(example) for example in PROBLEMS[:60]]
HELD_OUT = [record(example) for example in PROBLEMS[60:80]]


SAME_PROBLEMS = [{**ROWS[0], "demo": ROWS[0]["demo"] + " "}, {**ROWS[1], "prompt": ROWS[1]["prompt"].upper()}]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def on_files(folder, rows=ROWS, template=CHAT, **changes) -> Config:
    """A tiny run on a file; dotted fields may be changed as `train__steps=3`."""
    byte_tokenizer(folder / "bytes", template)
    fields = {
        "model__tokenizer": str(folder / "bytes"),
        "data__files": (write_rows(folder / "train.jsonl", rows),),
        "data__train_questions": None,
        "data__validation_questions": 6,
        "data__test_questions": 6,
        "data__questions_per_step": 4,
        "data__max_prompt_tokens": 80,
        "rollout__prompt_buckets": (80,),
        "rollout__cache_capacity": 112,
        "rollout__max_completion_tokens": 32,
        "rollout__group_size": 2,
        "rollout__stop_ids": (4,),
        "reward__functions": (RewardFunction("countdown"),),
        "batch__row_tokens": 128,
        "train__steps": 2,
        "train__eval_every": 0,
        "train__panel_questions": 1,
        "train__updates_per_rollout_batch": 1,
        "eval__questions": 2,
        "eval__samples_per_question": 1,
        "eval__ks": (1,),
        "eval__train_questions": 0,
        **changes,
    }
    return changed(tiny.tiny_config(folder), **fields)


# Splits


def test_files_are_split_by_problem_and_every_row_is_counted(tmp_path):
    found = file_examples(on_files(tmp_path, [*ROWS, *ROWS[:5], *SAME_PROBLEMS, {"prompt": ""}]))
    assert [dataclasses.asdict(count) for count in found.files] == [
        {
            "name": str(tmp_path / "train.jsonl"),
            "format": "native",
            "rows": 68,
            "kept": 67,
            "dropped": {"no_question": 1},
            "first": {"no_question": 68},
        }
    ]
    problems = {name: {example.canonical for example in split} for name, split in found.splits.items()}
    assert sum(map(len, problems.values())) == len(set.union(*problems.values()))
    ids = [example.question_id for split in found.splits.values() for example in split]
    assert len(set(ids)) == len(ids)
    assert found.left_out["train"]["duplicate"] == 5
    assert found.repeated_problems == 2
    left = sum(n for reasons in found.left_out.values() for n in reasons.values())
    assert len(ids) + left == 67


def test_files_give_the_same_questions_in_any_order_of_their_rows(tmp_path):
    rows = [*SAME_PROBLEMS, *ROWS]
    config = on_files(tmp_path, rows, data__train_questions=30, data__validation_questions=99, data__test_questions=99)
    before = file_examples(config)
    for order in (rows[::-1], random.Random(1).sample(rows, len(rows))):
        write_rows(tmp_path / "train.jsonl", order)
        assert file_examples(config).splits == before.splits
    # a problem keeps split and id where the file grows
    write_rows(tmp_path / "train.jsonl", [*rows, *HELD_OUT])
    grown = file_examples(changed(config, data__train_questions=None)).splits
    where = {example.question_id: name for name, split in grown.items() for example in split}
    assert all(where[example.question_id] == name for name, split in before.splits.items() for example in split)


def test_files_of_their_own_hold_out_their_problems_from_training(tmp_path):
    test = write_rows(tmp_path / "test.jsonl", [*HELD_OUT[:8], ROWS[3]])
    validation = write_rows(tmp_path / "validation.jsonl", [*HELD_OUT[8:14], ROWS[5], HELD_OUT[0]])
    config = on_files(tmp_path, data__test_files=(test,), data__validation_files=(validation,))
    found = file_examples(changed(config, data__validation_questions=99, data__test_questions=99))
    assert found.left_out["train"] == {
        "duplicate": 0,
        "also_in_test": 1,
        "also_in_validation": 1,
        "outside_fractions": 0,
        "over_limit": 0,
    }
    assert found.left_out["validation"] == {"duplicate": 0, "also_in_test": 1, "over_limit": 0}
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 58, "validation": 7, "test": 9}
    for split in found.splits.values():
        positions = [split_position(example.canonical, config.data.split_seed) for example in split]
        assert positions == sorted(positions)


def test_files_over_a_limit_are_counted(tmp_path):
    config = on_files(tmp_path, data__train_questions=10)
    found = file_examples(config)
    whole = file_examples(changed(config, data__train_questions=None))
    assert len(found.splits["train"]) == 10
    assert found.left_out["train"]["over_limit"] == len(whole.splits["train"]) - 10
    assert whole.splits["train"][:10] == found.splits["train"]


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        ([{"question": "a", "text": "b"}], {}, ["known format", "['question', 'text']", "data.format"]),
        ([{"prompt": ""}], {"data__format": "native"}, ["has 1 rows, 1 no_question (first: row 1)", "data.format"]),
        (ROWS[:2], {}, ["at least one question in the", "got none out of 2"]),
        (ROWS, {"data__files": ("absent.jsonl",)}, ["found no 'absent.jsonl'", "change data.files"]),
        (ROWS, {"data__max_prompt_tokens": 10}, ["'prompt_too_long'", "change data.max_prompt_tokens (10)"]),
        (ROWS, {"rollout__max_completion_tokens": 4}, ["'demonstration_too_long'"]),
        ([{**row, "demo": None} for row in ROWS], {}, ["'no_demonstration'"]),
        ([{**row, "demo": "1+1=2"} for row in ROWS], {}, ["'demonstration_unverified'"]),
        (ROWS, {"rollout__stop_ids": ()}, ["a token that stops sampling", "add 4 to rollout.stop_ids"]),
        (ROWS, {"prompt__template": "plain", "prompt__plain": "x"}, ["prompt.plain to hold {question}"]),
    ],
)
def test_files_that_cannot_be_trained_on_are_one_message_that_names_the_field(
    tmp_path, capsys, monkeypatch, rows, changes, words
):
    monkeypatch.chdir(tmp_path)
    config = on_files(tmp_path, rows, **changes)
    assert cli.run(["train", config_file(config, tmp_path / "run.toml")]) == cli.BAD_INPUT
    text = capsys.readouterr().err
    assert text.startswith("hptjax train: expected")
    assert text.count("\n") == 1
    for word in words:
        assert word in text


# Questions


def test_files_become_questions_by_the_chat_template(tmp_path):
    with open_parts(on_files(tmp_path, prompt__system="Be brief.", prompt__suffix=" Show your steps.")) as parts:
        question = parts.questions.train[0]
        tokenizer = parts.policy.tokenizer
        row = next(row for row in ROWS if row["demo"] == question.example.demonstration)
        assert tokenizer.decode(question.prompt_tokens) == question.example.prompt
        assert question.example.prompt == (
            f"[turn]system\nBe brief.[end]\n[turn]user\n{row['prompt']} Show your steps.[end]\n[turn]assistant\n"
        )
        assert tokenizer.decode(question.demonstration_tokens) == row["demo"] + "[end]"
        assert decode(tokenizer, question.demonstration_tokens) == row["demo"]
        assert parts.questions.record["prompt"]["end"] == "[end]"


def test_files_become_questions_as_the_docs_have_them_for_llama(tmp_path, repository):
    """Llama-3.1-8B in HPT (spec/hpt.md 3.2): no chat template, no bos, the eos after the demonstration."""
    blocks = re.findall(r"    \[prompt\]\n(?:    .*\n)+", (repository / "docs" / "data.md").read_text())
    qwen, llama = (tomllib.loads(textwrap.dedent(block))["prompt"] for block in blocks)
    assert qwen == {"system": "", "end": "eos"}
    fields = {f"prompt__{name}": value for name, value in llama.items()}
    rows = [{**row, "prompt": [{"role": "system", "content": "Think."}, *_turns(row)]} for row in ROWS]
    config = on_files(tmp_path, rows, None, data__max_prompt_tokens=160, rollout__prompt_buckets=(160,),
                      rollout__cache_capacity=192, batch__row_tokens=192, **fields)  # fmt: skip
    for bos in (False, True):
        with open_parts(changed(config, prompt__bos=bos)) as parts:
            question, tokenizer = parts.questions.train[0], parts.policy.tokenizer
            asked = next(row["prompt"][1]["content"] for row in rows if row["demo"] == question.example.demonstration)
            assert question.example.prompt == (
                f"Question:\n{asked}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
                "\nAnswer:\nLet's think step by step."
            )
            tokens = question.prompt_tokens.tolist()
            assert tokenizer.decode(tokens) == ("[start]" if bos else "") + question.example.prompt
            assert question.demonstration_tokens[-1] == tokenizer.eos_token_id


def test_files_with_reasoning_lose_the_tag_that_the_prompt_has_opened_and_nothing_else(tmp_path):
    """spec/hpt.md 3.1: `<think>` and its line end go only where the rendered prompt ends with them."""
    rows = [{**row, "demo": f"<think>\nhm\n</think>\n{row['demo']}", "answer": "5"} for row in ROWS]
    for template, expected in ((OPENED, "hm\n</think>\n"), (CHAT, "<think>\nhm\n</think>\n")):
        config = on_files(tmp_path, rows, template, method="grpo", prompt__end="eos", data__demonstrations=False)
        with open_parts(config) as parts:
            (written, *_) = parts.questions.validation
            text = parts.policy.tokenizer.decode(written.demonstration_tokens)
            assert text.startswith(expected)
            assert text.endswith("[eos]")
            assert written.example.answer.get("thinking", False) == (template is OPENED)
            assert all(len(question.demonstration_tokens) == 0 for question in parts.questions.train)


def test_files_rows_that_do_not_fit_are_dropped_by_reason_and_the_rest_is_whole(tmp_path):
    bad = {
        "no_demonstration": {**ROWS[0], "demo": None},
        "no_answer": {**ROWS[1], "answer": None},
        "not_encodable": {**ROWS[2], "prompt": ROWS[2]["prompt"] + "[end]"},
        "template_refused": {**ROWS[3], "prompt": [{"role": "system", "content": "adult"}, *_turns(ROWS[3])]},
        "template_changed": {**ROWS[4], "demo": "secret " + ROWS[4]["demo"]},
        "prompt_too_long": {**ROWS[5], "prompt": ROWS[5]["prompt"] + " please" * 40},
        "demonstration_too_long": {**ROWS[6], "demo": ROWS[6]["demo"] + ",1-1=0" * 20},
        "demonstration_unverified": {**ROWS[7], "demo": "1+1=2"},
    }
    template = (
        "{%- if messages[0].content == 'adult' -%}{{ raise_exception('no') }}{%- endif -%}"
        + PLAIN.replace("{{ message.content }}", "{{ message.content | replace('secret ', '') }}")
        + GENERATES
    )
    held_out = {
        "data__test_files": (write_rows(tmp_path / "test.jsonl", HELD_OUT[:8]),),
        "data__validation_files": (write_rows(tmp_path / "validation.jsonl", HELD_OUT[8:]),),
    }
    with open_parts(on_files(tmp_path, [*ROWS[8:], *bad.values()], template, **held_out)) as parts:
        train, dropped = parts.questions.train, parts.questions.dropped["train"]
    assert {reason: dropped[reason] for reason in DROP_REASONS if dropped[reason]} == dict.fromkeys(bad, 1)
    assert sorted(question.example.demonstration for question in train) == sorted(row["demo"] for row in ROWS[8:])


def _turns(row):
    return [{"role": "user", "content": row["prompt"]}]


# Runs


def training_rows(summary):
    """What training measured, without times; evaluations at the end of a shorter run are left out."""
    text = (Path(summary["folder"]) / "metrics.jsonl").read_text()
    kept = ("step", "loss", "grad", "hpt", "rewards", "entropy", "response")
    rows = [row for row in map(json.loads, text.splitlines()) if "witness/ok" in row]
    return [{name: value for name, value in row.items() if name.startswith(kept)} for row in rows]


def test_files_run_trains_is_taken_up_and_is_bound_to_its_prompts(tmp_path):
    config = on_files(tmp_path, [*ROWS, {"prompt": ""}], train__steps=1)
    folder = Path(tiny.train(config)["folder"])
    data = json.loads((folder / "data.json").read_text())
    assert data["files"][0]["rows"] == 61
    assert data["dropped"][str(tmp_path / "train.jsonl")] == {"no_question": 1}
    assert (data["prompt"]["template"], data["prompt"]["date"]) == ("chat", None)
    # the same rows in another order are the same questions: the run goes on
    write_rows(tmp_path / "train.jsonl", [{"prompt": ""}, *ROWS[::-1]])
    assert tiny.train(changed(config, train__steps=2))["steps"] == 2
    # a changed template is refused by name
    byte_tokenizer(tmp_path / "bytes", CHAT.replace("careful", "careless"))
    with pytest.raises(ValueError, match=r"expected the prompt format that run folder .* was started with"):
        tiny.train(changed(config, train__steps=3))


@pytest.mark.slow
def test_files_run_that_is_taken_up_is_the_run_that_was_never_stopped(tmp_path):
    config = on_files(tmp_path, train__steps=1)
    whole = tiny.train(changed(config, name="whole", train__steps=3))
    tiny.train(config)
    write_rows(tmp_path / "train.jsonl", ROWS[::-1])
    assert training_rows(tiny.train(changed(config, train__steps=3))) == training_rows(whole)
    write_rows(tmp_path / "train.jsonl", [*ROWS, *HELD_OUT])
    with pytest.raises(ValueError, match="data position with"):
        tiny.train(changed(config, train__steps=4))


@pytest.mark.slow
def test_files_without_demonstrations_train_by_rl_alone(tmp_path):
    """verl's validation files, and any set of questions with answers."""
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in ROWS]
    config = on_files(tmp_path, rows, method="dr_grpo", train__steps=1, train__eval_every=1)
    summary = tiny.train(config)
    metrics = [json.loads(line) for line in (Path(summary["folder"]) / "metrics.jsonl").read_text().splitlines()]
    assert summary["witness_ok"]
    assert all("probe/heldout_demo_nll" not in row for row in metrics)  # there is none to measure
    with pytest.raises(ValueError, match="'no_demonstration'"):
        train(changed(config, method="hpt", name="hpt"), quiet=True)


def test_files_sample_puts_a_prompt_through_the_template(tmp_path, capsys):
    config = on_files(tmp_path, prompt__system="")
    assert cli.run(["sample", config_file(config, tmp_path / "r.toml"), "--prompt", "Hello", "--count", "1",
                    "--checkpoint", "base"]) == 0  # fmt: skip
    assert "[turn]user\nHello[end]\n[turn]assistant\n" in capsys.readouterr().out
    assert cli.run(["sample", config_file(config, tmp_path / "r.toml"), "--prompt", "Hi [end]",
                    "--checkpoint", "base"]) == cli.BAD_INPUT  # fmt: skip
    assert "special token '[end]'" in capsys.readouterr().err


def test_files_tokenizer_is_read_from_the_folder(tmp_path):
    tokenizer = byte_tokenizer(tmp_path, CHAT)
    assert load_tokenizer(tmp_path).chat_template == tokenizer.chat_template == CHAT
    assert np.asarray(load_tokenizer(tmp_path).encode("🙂 é", add_special_tokens=False)).size > 2


def test_files_without_answers_are_for_sft_alone(tmp_path):
    """TRL's prompt and completion: nothing is judged in training; what is evaluated needs answers."""
    rows = [{"prompt": row["prompt"], "completion": row["demo"]} for row in ROWS[:40]]
    held_out = {
        "data__test_files": (write_rows(tmp_path / "test.jsonl", HELD_OUT[:8]),),
        "data__validation_files": (write_rows(tmp_path / "validation.jsonl", HELD_OUT[8:]),),
    }
    config = on_files(tmp_path, rows, method="sft", train__steps=1, **held_out)
    with open_parts(config) as parts:
        assert len(parts.questions.train) == 40
        assert [len(split) for split in (parts.questions.validation, parts.questions.test)] == [6, 6]
    with pytest.raises(ValueError, match="'no_answer': 40"), open_parts(changed(config, method="hpt")):
        pass


@pytest.mark.slow
def test_files_without_answers_train_and_are_evaluated_on_those_that_have_one(tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["demo"]} for row in ROWS[:40]]
    held_out = {
        "data__test_files": (write_rows(tmp_path / "test.jsonl", HELD_OUT[:8]),),
        "data__validation_files": (write_rows(tmp_path / "validation.jsonl", HELD_OUT[8:]),),
    }
    config = on_files(tmp_path, rows, method="sft", train__steps=1, eval__train_questions=4, **held_out)
    assert tiny.train(config)["witness_ok"]
