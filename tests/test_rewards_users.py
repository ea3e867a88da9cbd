"""Users' own rewards by `module:function`, named rewards, grades on their way back, the spare worker, throughput."""

from __future__ import annotations

import dataclasses
import pathlib
import time

import numpy as np
import pytest

from hptjax.build.data import build_task
from hptjax.build.rewards import FILE_REWARDS, reward_functions
from hptjax.build.world import watch_rewards
from hptjax.config import TaskConfig
from hptjax.records import Grade, Sample, SampleId, Source, Verdict, verdict_from_json, verdict_to_json
from hptjax.rewards.functions import UserReward
from hptjax.rewards.pool import RewardPool
from hptjax.tasks import countdown_verifier
from hptjax.verify.rewards import math_format, math_lenient, math_strict
from tests import bad_verifiers

HERE = "tests.user_rewards"
DEADLINE_S = 1.0


@pytest.fixture(scope="module")
def pool():
    with RewardPool(workers=2, deadline_s=DEADLINE_S) as opened:
        yield opened


def test_users_reward_gets_prompt_completion_and_answer(pool):
    texts = [str(index) for index in range(200)]
    answers, prompts = [{"answer": text} for text in texts], [f"p{text}" for text in texts]
    verdicts = pool.judge(UserReward(f"{HERE}:echo"), texts, answers, prompts)
    assert verdicts == [Verdict(1.0, True, "scored")] * 200


GRADES = (Grade("mine", True, "exact", "ok", "5", "5"),)


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("one", Verdict(1.0, True, "scored")),
        ("half", Verdict(0.5, False, "scored")),
        ("minus", Verdict(-1.0, False, "scored")),
        ("true", Verdict(1.0, True, "scored")),
        ("float32", Verdict(0.25, False, "scored")),
        ("bool_", Verdict(1.0, True, "scored")),
        ("verdict", Verdict(0.5, True, "mine")),
        ("graded", Verdict(0.5, True, "mine", GRADES)),
        ("nan", Verdict(0.0, False, "raised: ValueError")),
        ("inf", Verdict(0.0, False, "raised: ValueError")),
        ("nan verdict", Verdict(0.0, False, "raised: ValueError")),
        ("huge", Verdict(0.0, False, "raised: OverflowError")),
        *((name, Verdict(0.0, False, "raised: TypeError")) for name in ("text", "none", "complex", "decimal", "list")),
        *((name, Verdict(0.0, False, "raised: TypeError")) for name in ("array", "false grades", "false grade")),
        ("unknown", Verdict(0.0, False, "raised: KeyError")),
    ],
)
def test_users_reward_is_a_number_or_a_verdict_or_a_counted_failure(pool, name, verdict):
    assert pool.judge(UserReward(f"{HERE}:by_name"), [name, "one"], [{}] * 2, [""] * 2) == [
        verdict,
        Verdict(1.0, True, "scored"),
    ]


def test_users_reward_stands_beside_others(pool):
    functions = [countdown_verifier.verify, UserReward(f"{HERE}:by_name"), bad_verifiers.length]
    answer = {"numbers": [3, 7, 12], "target": 28}
    ((first, second, third),) = pool.score(functions, ["half"], [answer], [""])
    assert (first.reason, second.reward, third.reward) == ("unparsable", 0.5, 4.0)


def test_users_reward_that_hangs_costs_its_deadline_only(pool):
    start = time.monotonic()
    rows = pool.score([UserReward(f"{HERE}:hang"), bad_verifiers.length], ["a"], [{}], [""])
    assert [verdict.reason for verdict in rows[0]] == ["timeout", "length a"]
    assert time.monotonic() - start < DEADLINE_S + 10.0


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("tests.user_rewards:absent", "AttributeError"),
        ("tests.no_such_module:f", "ModuleNotFoundError"),
        ("tests.user_rewards:two_arguments", r"\(prompt, completion, answer\)"),
        ("tests.user_rewards:not_a_function", "TypeError"),
        ("tests.user_rewards:later", "returns a number or a Verdict, got an async function"),
        ("tests.user_rewards:several", "got a generator"),
        ("tests.user_rewards:Judge", "got a class"),
    ],
)
def test_users_reward_that_cannot_be_loaded_is_an_error_at_the_start(path, words):
    with RewardPool(workers=1) as pool, pytest.raises(ValueError, match=rf"reward\.functions.*{path}.*{words}"):
        pool.load([UserReward(path)])


@pytest.mark.parametrize("path", ["a", "a:", ":a", "a.py:f", "a:f:g", "a b:c", "a:f()", "1a:f", "a..b:f", ""])
def test_users_reward_has_a_path(path):
    with pytest.raises(ValueError, match=r"module:function in reward\.functions"):
        UserReward(path)


def test_users_reward_needs_prompts(pool):
    with pytest.raises(ValueError, match="prompts"):
        pool.judge(UserReward(f"{HERE}:echo"), ["a"], [{}])
    with pytest.raises(ValueError, match="one prompt per completion"):
        pool.judge(UserReward(f"{HERE}:echo"), ["a"], [{}], ["", ""])


def test_users_reward_of_the_current_folder_is_found(tmp_path, monkeypatch):
    """A console script does not have the current folder on its path; workers get it."""
    (tmp_path / "my_reward_here.py").write_text("def length(prompt, completion, answer):\n    return len(completion)\n")
    monkeypatch.chdir(tmp_path)
    with RewardPool(workers=1) as pool:
        assert pool.judge(UserReward("my_reward_here:length"), ["abc"], [{}], [""])[0].reward == 3.0


def test_pool_load_is_done_once_and_may_be_repeated(pool):
    pool.load([math_strict, bad_verifiers.length])
    pool.load([math_strict])
    assert pool.judge(math_strict, [r"\boxed{5}"], [{"answer": "5"}])[0].solved


def test_pool_prepares_a_module_before_any_deadline(tmp_path, monkeypatch):
    """The import takes longer than a completion may; the deadline is told."""
    (tmp_path / "slow_to_load.py").write_text(
        "import time\nfrom hptjax.records import Verdict\nready = []\n"
        "def prepare_worker(deadline_s):\n    time.sleep(0.6)\n    ready.append(deadline_s)\n"
        "def judge(completion, answer):\n    return Verdict(ready[0], len(ready) == 1, 'ready')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import slow_to_load  # ty: ignore[unresolved-import]

    with RewardPool(workers=1, deadline_s=0.3) as pool:
        assert pool.judge(slow_to_load.judge, ["a"] * 3, [{}] * 3) == [Verdict(0.3, True, "ready")] * 3


def test_pool_keeps_a_worker_ready_after_a_kill():
    """The first kill starts a spare; the second one takes it over, with the function imported."""
    with RewardPool(workers=1, deadline_s=0.3) as pool:
        assert pool._reserve is None
        pool.judge(bad_verifiers.by_name, ["hang in python"], [{}])
        spare = pool._reserve
        assert spare is not None
        pool.judge(bad_verifiers.sleep, ["0.2"] * 15, [{}] * 15)  # time to import in
        assert not spare.owed
        pool.judge(bad_verifiers.by_name, ["hard exit", "ok"], [{}] * 2)
        assert pool.process_ids == [spare.process.pid]
        pids = [*pool.process_ids, pool._reserve.process.pid]
    assert _alive(pids) == []


def _alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if pathlib.Path(f"/proc/{pid}").exists()]


def test_pool_carries_grades(pool):
    verdict = pool.judge(math_strict, [r"\boxed{10\text{ cm}}"], [{"answer": "10"}])[0]
    assert (verdict.solved, verdict.reason) == (False, "wrong")
    assert [(grade.policy, grade.correct, grade.reason) for grade in verdict.grades] == [
        ("strict", False, "none"),
        ("lenient", True, "numeric"),
    ]
    assert verdict.solved_by("lenient")
    assert not verdict.solved_by("strict")
    assert verdict == math_strict(r"\boxed{10\text{ cm}}", {"answer": "10"})
    other = pool.judge(math_lenient, [r"\boxed{10\text{ cm}}"], [{"answer": "10"}])[0]
    assert (other.solved, other.grades) == (True, verdict.grades[::-1])


def test_verdict_survives_json():
    plain = Verdict(1.0, True, "correct")
    graded = dataclasses.replace(plain, grades=(*GRADES, Grade("lenient", False, "none", "no_answer")))
    assert verdict_to_json(plain) == [1.0, True, "correct"]
    for verdict in (plain, graded):
        assert verdict_from_json(verdict_to_json(verdict)) == verdict
    for fields in ([], [1.0, True], [1.0, True, "a", [["b"]]], [1.0, True, "a", [], []]):
        with pytest.raises((TypeError, ValueError)):
            verdict_from_json(fields)


def test_rewards_that_fail_on_most_completions_are_said_once():
    told: list[str] = []
    good, bad = Verdict(1.0, True, "scored"), Verdict(0.0, False, "raised: KeyError")
    sample = Sample(SampleId(0, 0, 0), 0, Source.ROLLOUT, *(np.zeros(1, np.int32),) * 2, np.zeros(1, np.float32))
    three = [[good, bad], [good, bad], [bad, good]]
    batches = [[[good, bad], [good, good]], [], [[good, good]], three, three]
    rows = iter(batches)
    watched = watch_rewards(
        lambda samples, _: list(zip(samples, next(rows), strict=True)), ("verify", "mine:f"), told.append
    )
    for batch in batches:
        assert [said for _, said in watched([sample] * len(batch), {})] == batch
    (words,) = told
    assert "mine:f of reward.functions has failed on 2 of 3 completions, most of them with 'raised: KeyError'" in words


def test_rewards_are_found_by_name():
    countdown = build_task(TaskConfig())
    assert reward_functions(["verify", "well_formed"], countdown) == [countdown.verify, countdown.well_formed]
    assert reward_functions(["verify", "well_formed"], None) == [math_strict, math_format]
    assert reward_functions([*FILE_REWARDS], None) == [*FILE_REWARDS.values()]
    for task in (countdown, None):
        assert reward_functions(["my_rewards:f"], task) == [UserReward("my_rewards:f")]
    for name in ("math_strict", "verfy"):  # countdown has no gold answers
        with pytest.raises(ValueError, match=rf"countdown.*module:function.*{name}.*reward\.functions"):
            reward_functions([name], countdown)
    with pytest.raises(ValueError, match=r"data\.files.*math_hpt.*math_stric.*reward\.functions"):
        reward_functions(["math_stric"], None)


@pytest.mark.timed
def test_pool_judges_ordinary_answers_fast(pool):
    """1,000 answers of ten kinds, a tenth of them right: at least 500 a second on two workers, in the best of three."""
    golds = ["5", r"\frac{1}{2}", r"2\sqrt{3}", "x^2-1", "(1,2)", r"[0,\infty)", "B", r"\text{north}", "17", "204"]
    texts = [rf"Some reasoning. So it is \boxed{{{gold}}}." for gold in golds]
    completions, answers = texts * 100, [{"answer": gold} for gold in golds[::-1]] * 100
    pool.judge(math_strict, completions[:20], answers[:20])
    rates = []
    for _ in range(3):
        start = time.monotonic()
        pool.judge(math_strict, completions, answers)
        rates.append(len(completions) / (time.monotonic() - start))
    assert max(rates) > 500.0, rates
