"""A worker that died is followed by one that has to import first: who works meanwhile, and what if nobody can."""

from __future__ import annotations

import importlib
import os
import pathlib
import signal
from collections.abc import Callable

import pytest

from hptjax.records import Verdict
from hptjax.rewards.pool import RewardPool


def judge_whose_imports(folder: pathlib.Path, name: str, do: str) -> Callable[..., Verdict]:
    """A judge in a module of its own that runs `do` when a worker imports it; `imports` counts the workers so far."""
    (folder / f"{name}.py").write_text(
        "import os, pathlib, time\n"
        "from hptjax.records import Verdict\n"
        "HERE = pathlib.Path(__file__).parent\n"
        "def prepare_worker(deadline_s):\n"
        "    (HERE / f'{os.getpid()}.import').touch()\n"
        "    imports = len([*HERE.glob('*.import')])\n"
        f"    {do}\n"
        "def judge(completion, answer):\n"
        "    return os._exit(3) if completion == 'die' else Verdict(1.0, True, 'good')\n"
    )
    return importlib.import_module(name).judge


def reasons(pool: RewardPool, judge: Callable[..., Verdict], completions: list[str]) -> list[str]:
    return [verdict.reason for verdict in pool.judge(judge, completions, [{}] * len(completions))]


def test_pool_judges_on_while_a_dead_workers_successor_imports(tmp_path, monkeypatch):
    """The successor's import ends only after everything is judged: what waited for it would wait in vain."""
    monkeypatch.syspath_prepend(tmp_path)
    wait = "while imports > 2 and not (HERE / 'go').exists(): time.sleep(0.01)"
    judge = judge_whose_imports(tmp_path, "waits_when_imported_again", wait)
    completions = ["good"] * 200
    completions[5] = "die"
    with RewardPool(workers=2) as pool:
        pool.load([judge])
        first = pool.process_ids
        assert reasons(pool, judge, completions) == ["crashed" if text == "die" else "good" for text in completions]
        assert reasons(pool, judge, ["good"] * 200) == ["good"] * 200  # beside an import that began before
        healthy = [pid for pid in pool.process_ids if pid in first]
        assert len(healthy) == 1
        (tmp_path / "go").touch()
        for pid in healthy:
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # until it is dead, for the pool to find it so
        assert reasons(pool, judge, ["good"] * 200) == ["good"] * 200  # now by the successor


def test_pool_cuts_few_slow_completions_over_its_workers(tmp_path, monkeypatch):
    """Each completion waits for one of another worker: a worker that had them all would wait in vain."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "waits_for_another.py").write_text(
        "import os, pathlib, time\n"
        "from hptjax.records import Verdict\n"
        "HERE = pathlib.Path(__file__).parent\n"
        "def judge(completion, answer):\n"
        "    (HERE / f'{os.getpid()}.judge').touch()\n"
        "    while len([*HERE.glob('*.judge')]) < 3:\n"
        "        time.sleep(0.01)\n"
        "    return Verdict(1.0, True, 'good')\n"
    )
    judge = importlib.import_module("waits_for_another").judge
    with RewardPool(workers=3, deadline_s=60.0) as pool:
        pool.load([judge])
        assert reasons(pool, judge, ["good"] * 12) == ["good"] * 12


@pytest.mark.parametrize("workers", [1, 2])
def test_pool_gives_up_completions_only_where_no_worker_can_import(tmp_path, monkeypatch, workers):
    """No worker after the first ones can import: a healthy one judges everything, without one the run goes on."""
    monkeypatch.syspath_prepend(tmp_path)
    judge = judge_whose_imports(tmp_path, f"imported_{workers}_times", f"imports > {workers} and os._exit(3)")
    with RewardPool(workers=workers) as pool:
        pool.load([judge])
        said = reasons(pool, judge, ["die", *["good"] * 6])
    assert said == ["crashed", *["good" if workers == 2 else "crashed"] * 6]
