"""`hptjax eval` of suites and files by its command: a random model, and one whose answers are written down."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from hptjax import cli
from hptjax.build import eval_command
from hptjax.build.policy import build_policy
from hptjax.data import tokenizer as text
from hptjax.eval import suites
from hptjax.records import FinishReason, Sample, Source
from hptjax.sharding.host import to_host
from hptjax.verify.expression import countdown_expression
from tests import tiny
from tests.chat_templates import CHAT, byte_tokenizer
from tests.test_bad_input import write_model

SMALL = """--data.max_prompt_tokens 256 --rollout.max_completion_tokens 12 --rollout.slots 8 --rollout.prefill_rows 4
--rollout.tokens_per_call 6 --rollout.stop_ids 4 --reward.workers 1""".split()
ROWS = [
    {"question": f"What is {n} and {n}?", "answer": f"twice\n#### {2 * n:,}", "solution": None} for n in (1, 2, 600)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder with a chat template, and a folder of suites beside it."""
    place = tmp_path_factory.mktemp("model")
    byte_tokenizer(place / "words", CHAT)
    write_model(place / "tiny-math", place / "words", 16, vocab_size=384, max_positions=512)
    folder = place / "suites"
    folder.mkdir()
    lines(folder / "gsm8k.jsonl", ROWS)
    options = {"question": "Which is even?", "options": ["1", "2", "3"], "answer_index": 1, "answer": "B"}
    lines(folder / "mmlu_pro.jsonl", [options])
    lines(folder / "countdown.jsonl", [{"nums": [44, 19, 35], "target": 98}] * 3)
    return place


@pytest.fixture(autouse=True)
def small_countdown(monkeypatch):
    """Three rows stand in for the 1,024 that test_suites.py counts out of 328,704."""
    monkeypatch.setitem(suites.ROWS, "countdown", (0, 3))
    short = [dataclasses.replace(s, counted=s.counted and s.name != "countdown") for s in suites.SUITES]
    monkeypatch.setattr(suites, "SUITES", tuple(short))


def lines(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def evaluate(model, *options, status=0):
    assert cli.run(["eval", str(model / "tiny-math"), *SMALL, *map(str, options)]) == status


def read(out):
    return json.loads((Path(out) / "results.json").read_text())


def rows(out, task):
    return [json.loads(line) for line in (Path(out) / f"samples_{task}.jsonl").read_text().splitlines()]


def test_eval_of_a_suite_writes_the_reports_and_goes_on(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = ("--suite", "gsm8k", "--suites", model / "suites", "--samples", 3)
    evaluate(model, *asked)
    out = tmp_path / "evaluations" / "tiny-math-gsm8k"
    assert "| gsm8k | 1 | strict | 0 | avg@3 |" in capsys.readouterr().out
    whole, kept = read(out), rows(out, "gsm8k")
    assert [(row["doc_id"], row["sample_index"]) for row in kept] == [(q, i) for q in range(3) for i in range(3)]
    assert kept[6]["target"] == "1200"
    system = "Please reason step by step, and put your final answer within \\boxed{}."
    assert kept[0]["arguments"]["gen_args_0"]["arg_0"] == (
        f"[turn]system\n{system}[end]\n[turn]user\nWhat is 1 and 1?[end]\n[turn]assistant\n"
    )
    assert whole["n-samples"]["gsm8k"] == {"original": 3, "effective": 3}
    assert whole["configs"]["gsm8k"]["generation_kwargs"]["top_p"] == 0.95
    assert (out / "report.html").read_text().count("<details>") == 3
    # two thirds of the rows are lost: only the rest is sampled again, the same as before, and so are the figures
    path, content = out / "samples_gsm8k.jsonl", (out / "samples_gsm8k.jsonl").read_bytes()
    path.write_bytes(content[: len(content) // 3])
    evaluate(model, *asked)
    assert path.read_bytes() == content
    assert read(out)["results"] == whole["results"]
    other = (("--eval.temperature", 0.7), ("--rollout.weights_dtype", "int8"), ("--rollout.cache_dtype", "int8"))
    for changed in (*other, ("--rollout.stop_ids", 4, 9), ("--prompt.bos", "True")):
        evaluate(model, *asked, *changed, status=2)
        assert "expected the evaluation that" in capsys.readouterr().err, changed
    evaluate(model, *asked, "--out", tmp_path / "other", "--eval.temperature", 0.7, "--baseline", out)
    assert read(tmp_path / "other")["paired"]["gsm8k"]["pass@1,strict"]["ci95"] == [0.0, 0.0]
    assert cli.run(["compare", str(out), str(tmp_path / "other")]) == 0
    assert "| gsm8k | lenient | pass@2 |" in capsys.readouterr().out
    for wrong in ((), ("nowhere",), (str(out), str(out))):
        assert cli.run(["compare", str(out), *wrong]) == 2
        assert "expected the folders of two evaluations" in capsys.readouterr().err
    # what would be found out at the end is found out before anything is sampled
    a = lines(tmp_path / "a.jsonl", [{"problem": "What is 1+1?", "answer": "2"}])
    Path("file").write_text("")
    for options, words in (
        (("--baseline", out), f"expected a --baseline with one of ['a'], got '{out}' with ['gsm8k']"),
        (("--samples", 2, "--ks", 1, 4), "expected --ks of at most the samples per question, 2, got 4"),
        (("--out", "file"), "expected to make the folder file"),
        (("--out", "file/a"), "expected to make the folder file/a"),
    ):
        evaluate(model, "--data", a, *options, status=2)
        assert words in capsys.readouterr().err
    assert not (tmp_path / "evaluations" / "tiny-math-a").exists()


def scripted(monkeypatch, answers):
    """The model's answers: the prompt's text and the sample's number -> a completion."""

    def with_answers(config):
        policy = build_policy(config)

        def sample(params, requests, key):
            return [_sample(policy.tokenizer, request, answers) for request in requests][::-1]

        return dataclasses.replace(policy, sample=sample)

    monkeypatch.setattr(eval_command, "build_policy", with_answers)


def _sample(tokenizer, request, answers) -> Sample:
    said = answers(text.decode(tokenizer, request.prompt_tokens), request.sample_id.index)
    tokens = text.encode_demonstration(tokenizer, said, np.asarray([4], np.int32))
    return Sample(
        sample_id=request.sample_id,
        group_id=request.sample_id.question,
        source=Source.ROLLOUT,
        prompt_tokens=request.prompt_tokens,
        completion_tokens=tokens,
        sampler_logprobs=np.zeros(len(tokens), np.float32),
        finish_reason=FinishReason.STOP,
    )


def test_eval_figures_are_those_of_the_answers(model, tmp_path, monkeypatch):
    """Question n: sample 0 is boxed and right, 1 right without a box, 2 wrong, 3 says nothing."""

    def answers(prompt, index):
        number = int(re.search(r"What is (\d+)", prompt).group(1))
        return [f"\\boxed{{{2 * number}}}", f"The answer is {2 * number}.", f"\\boxed{{{number}}}", "hm"][index]

    scripted(monkeypatch, answers)
    evaluate(model, "--suite", "gsm8k", "--suites", model / "suites", "--samples", 4, "--out", tmp_path / "out")
    told = read(tmp_path / "out")["results"]["gsm8k"]
    assert (told["avg@4,strict"], told["avg@4,lenient"]) == (0.25, 0.5)
    assert told["pass@4,strict"] == 1.0
    assert told["pass@2,strict"] == pytest.approx(1 - 3 / 6)  # C(3, 2) / C(4, 2) miss
    assert told["pass@2,lenient"] == pytest.approx(1 - 1 / 6)
    assert (told["maj@4,strict"], told["maj@4,lenient"]) == (0.5, 1.0)  # the strict count no vote without a box
    assert told["worst@2,lenient"] == pytest.approx(1 / 6)
    assert (told["format,none"], told["abstained,none"], told["truncated,none"]) == (0.5, 0.25, 0.0)


def test_eval_asks_choice_and_countdown_in_a_form_that_is_judged(model, tmp_path, monkeypatch):
    def answers(prompt, index):
        if "numbers 19, 35, 44" in prompt:
            return ["<answer>44 + 35 + 19</answer>", "44 + 35 + 19"][index]
        assert "`ANSWER: X`" in prompt
        assert "\nB. 2\n" in prompt
        return ["hm.\nANSWER: B", "ANSWER: C"][index]

    scripted(monkeypatch, answers)
    there = ("--suites", model / "suites", "--samples", 2)
    evaluate(model, "--suite", "mmlu_pro", *there, "--out", tmp_path / "choice")
    assert read(tmp_path / "choice")["results"]["mmlu_pro"]["avg@2,strict"] == 0.5
    evaluate(model, "--suite", "countdown", *there, "--out", tmp_path / "countdown")
    assert read(tmp_path / "countdown")["results"]["countdown"]["avg@2,strict"] == 0.5
    # the same question three times has samples of its own each time
    assert read(tmp_path / "countdown")["n-samples"]["countdown"] == {"original": 3, "effective": 3}


def test_eval_of_files_asks_each_question_once_and_counts_the_rest(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_reward.py").write_text(
        "def short(prompt, completion, answer):\n    return float(answer['x'] == 1)\n"
    )
    monkeypatch.chdir(tmp_path)
    scripted(monkeypatch, lambda prompt, index: "\\boxed{1}")
    data = lines(
        tmp_path / "mine.jsonl",
        [
            {"prompt": "One?", "answer": "1"},
            {"prompt": "One?", "answer": 1},
            {"prompt": "Two?", "answer": ["2", "3"]},
            {"prompt": "Why?", "answer": None},
            {"prompt": "so " * 400, "answer": "1"},
            {"prompt": ""},
        ],
    )
    evaluate(model, "--data", data, "--samples", 2)
    whole = read("evaluations/tiny-math-mine")
    assert whole["results"]["mine"]["avg@2,strict"] == 0.5
    assert whole["configs"]["mine"]["left_out"] == {
        "no_question": 1,
        "duplicate": 1,
        "no_answer": 1,
        "prompt_too_long": 1,
    }
    assert "not asked: 1 rows" in capsys.readouterr().out
    own = lines(tmp_path / "own.jsonl", [{"prompt": f"{x}?", "answer": {"x": x}} for x in (1, 2, 3, 4)])
    evaluate(model, "--data", own, "--reward.functions", '[{name = "my_reward:short"}]')
    told = read("evaluations/tiny-math-own")["results"]["own"]
    assert (told["avg@8,strict"], "maj@8,strict" in told, "format,none" in told) == (0.25, False, False)
    # a verdict may carry grades that are not our two; a name that is wrong makes no folder for the right one to meet
    graded = lines(tmp_path / "graded.jsonl", [{"prompt": "One?", "answer": "1"}, {"prompt": "Two?", "answer": "2"}])
    for name, status in (("my_reward:absent", 2), ("math_hpt", 0)):
        evaluate(model, "--data", graded, "--samples", 1, "--reward.functions", f'[{{name = "{name}"}}]', status=status)
    assert read("evaluations/tiny-math-graded")["results"]["graded"]["avg@1,strict"] == 0.5
    mixed = lines(tmp_path / "mixed.jsonl", [{"prompt": "1?", "answer": "1"}, {"prompt": "2?", "answer": {"x": 2}}])
    capsys.readouterr()
    evaluate(model, "--data", mixed, status=2)
    assert "got objects with answer and with x; name a function" in capsys.readouterr().err


def test_eval_of_a_run_takes_its_checkpoint(tmp_path, monkeypatch):
    config = tiny.tiny_config(tmp_path)
    folder = Path(tiny.train(config)["folder"])
    seen = []

    def spy(config):
        policy = build_policy(config)

        def sample(params, requests, key):
            seen.append(np.asarray(to_host(params)["final_norm"]))
            return policy.sample(params, requests, key)

        return dataclasses.replace(policy, sample=sample)

    monkeypatch.setattr(eval_command, "build_policy", spy)
    lines(tmp_path / "countdown.jsonl", [{"nums": [9, 1, 3], "target": 5}] * 3)
    for checkpoint in ("base", "last"):
        words = ["eval", str(folder), "--suite", "countdown", "--suites", str(tmp_path), "--limit", "2"]
        assert cli.run([*words, "--checkpoint", checkpoint, "--out", str(tmp_path / checkpoint)]) == 0
    assert rows(tmp_path / "last", "countdown")[0]["arguments"]["gen_args_0"]["arg_0"] == "1,3,9=5:"
    assert not np.array_equal(seen[0], seen[-1])
    assert np.array_equal(seen[0], np.ones_like(seen[0]))  # the norms of a model that was never trained


@pytest.mark.parametrize(
    ("said", "reason", "lenient"),
    [
        ("<answer>(44 - 19) * 4</answer>", "numeric", True),
        ("<answer>5</answer> no: <answer> 4*(44-19) </answer>", "numeric", True),
        ("so \\boxed{4(44-19)}", "no_answer", True),
        ("<answer>(44 - 19) * 4 = 100</answer>", "parse_error", True),
        ("<answer>100</answer>", "wrong_numbers", False),
        ("<answer>(44 - 19) * 4 * 1</answer>", "wrong_numbers", False),
        ("<answer>(44 + 19) * 4</answer>", "wrong_target", False),
        ("<answer>44 / (19 - 19) * 4</answer>", "wrong_numbers", False),
        ("<answer>4 ^ (44 - 19)</answer>", "parse_error", False),
        ("<answer>__import__('os')</answer>", "parse_error", False),
        ("<answer>" + "(" * 10_000 + "</answer>", "parse_error", False),
        ("<think>(44 - 19) * 4", "no_answer", False),
    ],
)
def test_countdown_expression(said, reason, lenient):
    verdict = countdown_expression(said, {"numbers": [4, 19, 44], "target": 100})
    assert (verdict.reason, verdict.solved) == (reason, reason == "numeric")
    assert verdict.solved_by("lenient") is lenient


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "name --suite or --data"),
        (("--suite", "maths", "--suites", "."), "expected a suite or a group of them, got 'maths'"),
        (("--suite", "other", "--suites", "nowhere"), "expected <set>.parquet or <set>.jsonl in nowhere"),
        (("--suite", "other", "--suites", "nowhere"), "load_dataset('Idavidrein/gpqa', 'gpqa_diamond'"),
        (("--suite", "gsm8k", "--data", "a.jsonl"), "got both"),
        (("--data", "absent.jsonl"), "absent.jsonl"),
        (("--suite", "gsm8k", "--samples", "0"), "--samples of at least 1"),
        (("--suite", "gsm8k", "--ks", "0"), "--ks of at least 1"),
        (("--suite", "gsm8k", "--eval.top_p", "1.5"), "eval.top_p in (0, 1]"),
        (("--suite", "gsm8k", "--baseline", "."), "expected the folder of an evaluation"),
        (("--suite", "gsm8k", "--rollout.top_k", "5"), "no --rollout.top_k here, where it would change nothing"),
        (("--suite", "gsm8k", "--rollout.temperature", "2.0"), "evaluations sample by eval.temperature and eval.top_p"),
        (("--suite", "gsm8k", "--eval.samples_per_question", "16"), "and --samples sets another one"),
        (("--suite", "gsm8k", "--eval.questions", "100"), "no --eval.questions here"),
        (("--suite", "gsm8k", "--checkpoint", "best"), "no --checkpoint here"),
        (("--suite", "gsm8k", "--split", "test"), "no --split here"),
        (("--suite", "gsm8k", "--reward.functions", '[{name = "math_hpt"}]'), "no --reward.functions here"),
        (("--data", "absent.jsonl", "--suites", "."), "no --suites here"),
        (("--suite", "gsm8k", "--rollout.cache_capacity", "9000"), "it follows from data.max_prompt_tokens"),
        (("--suite", "gsm8k", "--prompt.template", "plain", "--prompt.system", "None"), None),
    ],
)
def test_eval_refuses(model, tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    if words is None:
        evaluate(model, *options, "--suites", model / "suites", "--samples", 1)
        return
    named = "--suite" in options and "--suites" not in options
    options = [*options, *(("--suites", str(model / "suites")) if named else ())]
    evaluate(model, *options, status=2)
    assert words in capsys.readouterr().err


def test_eval_refuses_what_is_no_model(tmp_path, capsys):
    for content, words in (
        (None, "with its config.json"),
        ("{", "expected JSON"),
        ("[" * 100_000, "JSON"),
        ("[]", "expected an object"),
    ):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        assert cli.run(["eval", str(tmp_path), "--suite", "math"]) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert cli.run(["eval", str(tmp_path), "--suite", "math"]) == 2
    assert "model_type must be one of" in capsys.readouterr().err
