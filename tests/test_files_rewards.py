"""Rows of mathematics from file to verdict: demonstrations verified, samples judged, users' rewards, think sections."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hptjax.build.parts import open_parts
from hptjax.config_rollout import RewardFunction
from hptjax.records import Sample, SampleId, Source
from tests.chat_templates import OPENED
from tests.test_files import on_files

VERIFY = (RewardFunction("verify"),)
ROWS = [
    {"prompt": f"What is {n} + {n + 1}?", "demo": f"It is \\boxed{{{2 * n + 1}}}.", "answer": str(2 * n + 1)}
    for n in range(48)
]


def _sample(parts, question, text: str) -> Sample:
    tokens = np.asarray(parts.policy.tokenizer.encode(text, add_special_tokens=False), np.int32)
    sample_id = SampleId(question.question_id, 0, 0)
    return Sample(sample_id, 0, Source.ROLLOUT, question.prompt_tokens, tokens, np.zeros(len(tokens), np.float32))


def _judged(parts, question, *texts: str):
    samples = [_sample(parts, question, text) for text in texts]
    return [verdicts for _, verdicts in parts.judge(samples, {question.question_id: question})]


def test_files_of_mathematics_are_verified_and_judged(tmp_path):
    wrong = [{**ROWS[0], "demo": r"It is \boxed{2}."}, {**ROWS[1], "demo": "It is 3."}]
    functions = (
        *VERIFY,
        RewardFunction("math_hpt", 0.5),
        RewardFunction("tests.user_rewards:ends_like_its_prompt", 0.25),
    )
    with open_parts(on_files(tmp_path, [*ROWS[2:], *wrong], reward__functions=functions)) as parts:
        assert parts.questions.dropped["train"]["demonstration_unverified"] == 2
        question = parts.questions.train[0]
        gold = question.example.answer["answer"]
        right, unboxed, asked = _judged(parts, question, rf"\boxed{{{gold}.0}}", f"The answer is {gold}.", "What is 1?")
        assert [verdict.reason for verdict in right] == ["numeric", "symbolic", "scored"]
        assert [grade.correct for grade in right[0].grades] == [True, True]
        assert (unboxed[0].reason, unboxed[0].solved_by("lenient")) == ("no_answer", True)
        assert [verdicts[2].reward for verdicts in (right, unboxed, asked)] == [0.0, 0.0, 1.0]
        ((judged, _),) = parts.judge([_sample(parts, question, rf"\boxed{{{gold}}}")], {question.question_id: question})
        assert (judged.reward, judged.solved) == (1.5, True)


def test_files_whose_prompt_opens_a_think_section_ask_for_its_end(tmp_path):
    """A box in a thought that was cut off is no answer, although the completion holds no tag at all."""
    rows = [{**row, "demo": f"<think>\nhm\n</think>\n\\boxed{{{row['answer']}}}"} for row in ROWS]
    config = on_files(tmp_path, rows, OPENED, prompt__end="eos", reward__functions=VERIFY)
    with open_parts(config) as parts:
        question = parts.questions.train[0]
        gold = question.example.answer["answer"]
        assert question.example.answer == {"answer": gold, "thinking": True}
        ended, cut = _judged(parts, question, f"hm\n</think>\n\\boxed{{{gold}}}", f"so \\boxed{{{gold}}}, but wait")
        assert (ended[0].reason, cut[0].reason) == ("exact", "no_answer")
    with open_parts(dataclasses.replace(config, prompt=dataclasses.replace(config.prompt, system=""))) as parts:
        assert parts.questions.train[0].example.answer["thinking"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("math_strct", "data.files.*math_strict.*module:function.*math_strct"),
        ("tests.user_rewards:absent", "worker can import.*tests.user_rewards:absent"),
        ("my rewards:f", "module:function.*my rewards:f"),
    ],
)
def test_files_reward_that_does_not_exist_is_an_error_at_the_start(tmp_path, name, words):
    config = on_files(tmp_path, ROWS, reward__functions=(*VERIFY, RewardFunction(name)))
    with pytest.raises(ValueError, match=words) as raised, open_parts(config):
        pass
    assert "reward.functions" in str(raised.value)
