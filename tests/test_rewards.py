"""Reward functions in killable workers, and their combination."""

from __future__ import annotations

import functools
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from hptjax.records import Verdict
from hptjax.rewards.combine import combine
from hptjax.rewards.pool import RewardPool, import_path
from hptjax.tasks import countdown_verifier
from hptjax.tasks.countdown import enumerate_instances, write_examples
from tests import bad_verifiers

DEADLINE_S = 0.5


@pytest.fixture(scope="module")
def pool():
    with RewardPool(workers=2, deadline_s=DEADLINE_S, memory_bytes=2 << 30) as opened:
        yield opened


def _process_is_alive(pid: int) -> bool:
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_rewards_and_tasks_import_no_jax():
    modules = ("rewards.pool", "rewards.worker", "rewards.combine", "tasks.task", "tasks.countdown")
    imports = "; ".join(f"import hptjax.{module}" for module in modules)
    program = (
        f"import sys; {imports}; print(sorted(m for m in sys.modules if m.partition('.')[0] in ('jax', 'jaxlib')))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_pool_keeps_the_order_of_a_thousand_items(pool):
    """Lengths differ, so that replies of the two workers interleave."""
    texts = [f"{index}" * (1 + index % 300) for index in range(1000)]
    answers = [{"index": index} for index in range(1000)]
    rows = pool.score([bad_verifiers.echo_index, bad_verifiers.length], texts, answers)
    assert [row[0].reward for row in rows] == list(range(1000))
    assert [row[1].reward for row in rows] == [len(text) for text in texts]


def test_pool_agrees_with_the_verifier_called_directly(pool):
    examples = write_examples(enumerate_instances(3, 1, 5, 1, 40), seed=3, corrupt=0.5)
    texts, answers = [e.demonstration for e in examples], [e.answer for e in examples]
    direct = [countdown_verifier.verify(text, answer) for text, answer in zip(texts, answers, strict=True)]
    assert pool.judge(countdown_verifier.verify, texts, answers) == direct
    assert {verdict.reason for verdict in direct} == {"correct", "wrong_target"}


def test_pool_passes_any_text_through(pool):
    text = "line\nbreak \x00 \u2028 \ud800 é 🎲 " + "x" * 200_000
    assert pool.judge(bad_verifiers.length, [text, ""], [{}, {}])[0].reward == len(text)


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("raise", "raised: ValueError"),
        ("exit", "raised: SystemExit"),
        ("recurse", "raised: RecursionError"),
        ("eat memory", "raised: OSError"),
        ("nan reward", "raised: ValueError"),
        ("infinite reward", "raised: ValueError"),
        ("huge integer reward", "raised: OverflowError"),
        ("text reward", "raised: TypeError"),
        ("no solved", "raised: TypeError"),
        ("number as reason", "raised: TypeError"),
        ("not a verdict", "raised: TypeError"),
        ("hard exit", "crashed"),
        ("segfault", "crashed"),
        ("close everything", "crashed"),
        ("forge", "crashed"),
        ("hang in python", "timeout"),
        ("hang in a regex", "timeout"),
        ("hang ignoring signals", "timeout"),
    ],
)
def test_pool_counts_a_bad_verifier_and_goes_on(pool, completion, reason):
    completions = ["ok"] * 5 + [completion] + ["ok"] * 90
    start = time.monotonic()
    verdicts = pool.judge(bad_verifiers.by_name, completions, [{}] * len(completions))
    assert verdicts[5] == Verdict(0.0, False, reason)
    assert [v for i, v in enumerate(verdicts) if i != 5] == [bad_verifiers.GOOD] * 95
    assert time.monotonic() - start < 20.0


def test_pool_is_not_disturbed_by_output_or_input(pool):
    completions = ["print", "read input", "ok", "long reason"]
    reasons = [v.reason for v in pool.judge(bad_verifiers.by_name, completions, [{}] * 4)]
    assert reasons == ["good", "read 0", "good", "r" * 200]


def test_pool_survives_many_failures_at_once(pool):
    completions = ["hard exit", "ok", "raise", "hang in python", "ok", "segfault"] + ["ok"] * 100
    reasons = [v.reason for v in pool.judge(bad_verifiers.by_name, completions, [{}] * len(completions))]
    assert reasons == ["crashed", "good", "raised: ValueError", "timeout", "good", "crashed"] + ["good"] * 100


def test_pool_deadline_counts_from_the_items_own_start():
    """Forty items of 30 ms behind one worker take 1.2 s, more than the deadline of each: none times out."""
    with RewardPool(workers=1, deadline_s=1.0) as pool:
        verdicts = pool.judge(bad_verifiers.sleep, ["0.03"] * 40, [{}] * 40)
    assert {verdict.reason for verdict in verdicts} == {"slept"}


def test_pool_replaces_a_worker_killed_in_the_middle():
    """At most the one item that each killed worker was at is lost; items are long, so that a kill meets one."""
    with RewardPool(workers=2, deadline_s=20.0) as pool:
        pool.load([bad_verifiers.sleep])
        done = []
        for index, row in pool.stream([bad_verifiers.sleep], ["0.05"] * 60, [{}] * 60):
            done.append((index, row[0].reason))
            if len(done) in (10, 30):
                os.kill(pool.process_ids[0], signal.SIGKILL)
    assert sorted(index for index, _ in done) == list(range(60))
    reasons = [reason for _, reason in done]
    assert reasons.count("slept") + reasons.count("crashed") == 60
    assert 1 <= reasons.count("crashed") <= 2  # a kill may meet a worker that is still starting


def test_pool_blames_no_completion_for_a_worker_that_died_idle(pool):
    pool.judge(bad_verifiers.by_name, ["ok"], [{}])
    for pid in pool.process_ids:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.05)
    assert pool.judge(bad_verifiers.by_name, ["ok"] * 10, [{}] * 10) == [bad_verifiers.GOOD] * 10


def test_pool_stream_left_half_way_leaves_no_stale_answers(pool):
    answers = [{"index": index} for index in range(100)]
    for _ in pool.stream([bad_verifiers.echo_index], ["a"] * 100, answers):
        break
    rewards = [v.reward for v in pool.judge(bad_verifiers.echo_index, ["b"] * 100, answers)]
    assert rewards == list(range(100))


@pytest.mark.timed
def test_pool_judges_cheap_completions_fast(pool):
    """1500 countdown completions, as one step has them: 0.04 s on an idle machine.

    Other processes slow the clock but not the processor time of the parent, which is what the run loses.
    """
    answer = {"numbers": [3, 7, 12], "target": 28}
    texts, answers = ["12/3=4,7*4=28"] * 1500, [answer] * 1500
    pool.judge(countdown_verifier.verify, texts[:50], answers[:50])
    seconds = []
    for _ in range(3):
        start = time.process_time()
        assert all(verdict.solved for verdict in pool.judge(countdown_verifier.verify, texts, answers))
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.3


def test_pool_refuses_what_a_worker_cannot_import(pool, tmp_path):
    def closure(completion, answer):
        return bad_verifiers.GOOD

    unreachable = [lambda c, a: None, closure, functools.partial(bad_verifiers.length), pool.judge, len.__call__]
    for function in unreachable:
        with pytest.raises(ValueError, match=r"reward\.functions.*top level of an importable module"):
            pool.judge(function, ["a"], [{}])
    assert import_path(bad_verifiers.length) == "tests.bad_verifiers:length"


def test_pool_reports_a_function_whose_module_fails_in_the_worker(pool, tmp_path, monkeypatch):
    """The module imports here and not there: it looks for a variable that the worker does not have."""
    (tmp_path / "only_here.py").write_text(
        "import os\nassert os.environ.get('JAX_PLATFORMS') is None\ndef judge(completion, answer):\n    return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    import only_here  # ty: ignore[unresolved-import]

    with pytest.raises(ValueError, match=r"only_here:judge: AssertionError"):
        pool.judge(only_here.judge, ["a"], [{}])
    assert pool.judge(bad_verifiers.by_name, ["ok"], [{}]) == [bad_verifiers.GOOD]


def test_pool_counts_an_answer_that_does_not_travel(pool):
    verdicts = pool.judge(bad_verifiers.by_name, ["ok", "ok"], [{"set": {1}}, {}])
    assert [v.reason for v in verdicts] == ["raised: TypeError", "good"]


def test_pool_refuses_bad_settings_and_use(pool):
    with pytest.raises(ValueError, match=r"reward\.workers"):
        RewardPool(workers=0)
    with pytest.raises(ValueError, match=r"reward\.deadline_s"):
        RewardPool(deadline_s=0.0)
    with pytest.raises(ValueError, match="one answer per completion"):
        pool.score([bad_verifiers.length], ["a"], [])
    with pytest.raises(ValueError, match=r"reward\.functions"):
        pool.score([], ["a"], [{}])
    assert pool.score([bad_verifiers.length], [], []) == []


def test_pool_close_ends_workers_and_may_be_repeated():
    pool = RewardPool(workers=2)
    pids = pool.process_ids
    assert all(_process_is_alive(pid) for pid in pids)
    pool.close()
    pool.close()
    assert not any(_process_is_alive(pid) for pid in pids)
    with pytest.raises(ValueError, match="closed"):
        pool.judge(bad_verifiers.length, ["a"], [{}])


def test_pool_workers_die_with_a_killed_parent(tmp_path):
    """The parent is killed with SIGKILL while one worker hangs and the other is idle."""
    program = (
        "import sys; from tests import bad_verifiers; from hptjax.rewards.pool import RewardPool\n"
        "pool = RewardPool(workers=2, deadline_s=60.0)\n"
        "print(*pool.process_ids, flush=True)\n"
        "pool.judge(bad_verifiers.spawn_and_hang, ['a'], [{'file': sys.argv[1]}])\n"
    )
    file = tmp_path / "pid"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(file)], stdout=subprocess.PIPE, env=environment
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        _wait_until(lambda: file.exists() and file.read_text() != "", seconds=20.0)
        assert int(file.read_text()) in pids
        assert all(_process_is_alive(pid) for pid in pids)
        parent.kill()
    _wait_until(lambda: not any(_process_is_alive(pid) for pid in pids), seconds=5.0)


def _wait_until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so within {seconds} s"
        time.sleep(0.02)


def test_combine_adds_weighted_rewards_and_is_gated_by_the_first():
    """By hand: 1.0 x 1 + 0.25 x 1 = 1.25; 1.0 x 0 + 0.25 x 1 = 0.25; 1.0 x 0 + 0.25 x 0 = 0."""
    formed, ill = Verdict(1.0, True, "well_formed"), Verdict(0.0, False, "ill_formed")
    rows = [
        [Verdict(1.0, True, "correct"), formed],
        [Verdict(0.0, False, "raised: KeyError"), formed],
        [Verdict(0.0, False, "timeout"), ill],
        [Verdict(0.0, False, "wrong_target"), Verdict(0.0, False, "crashed")],
    ]
    rewards = combine(rows, [1.0, 0.25])
    assert rewards.total.tolist() == [1.25, 0.25, 0.0, 0.0]
    assert rewards.solved.tolist() == [True, False, False, False]
    assert rewards.reasons == ["correct", "raised: KeyError", "timeout", "wrong_target"]
    assert rewards.failures == {"timeout": 1, "crashed": 1, "raised": 1}
    assert rewards.by_function.tolist() == [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    slow = [math.fsum(w * v.reward for w, v in zip((1.0, 0.25), row, strict=True)) for row in rows]
    np.testing.assert_array_equal(rewards.total, slow)


def test_combine_refuses_weights_that_do_not_fit():
    row = [Verdict(1.0, True, "correct")]
    for weights in ([], [1.0, 1.0], [math.nan]):
        with pytest.raises(ValueError, match=r"weight.*reward\.functions"):
            combine([row], weights)
    assert combine([], [1.0]).total.shape == (0,)
