"""Told to go away: SIGTERM becomes a checkpoint, the scheduler hears "not finished", and the next start goes on."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from launch.slurm import Slurm, batch_script
from launch.until_done import COME_BACK
from launch.until_done import run as until_done
from tests import child, tiny
from tests.test_resume import finish, same_run, wait_for_training

ROOT = Path(__file__).resolve().parent.parent


def status_of(code: str, *, stop: bool = False) -> int:
    """What the wrapper says of a Python program; `stop`: SIGTERM once that has printed `ready`."""
    with subprocess.Popen(
        [sys.executable, "-m", "launch.until_done", sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        if stop:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGTERM)
        try:
            return process.wait(timeout=30)
        finally:
            process.kill()


@pytest.mark.parametrize(("code", "status"), [("pass", 0), ("raise SystemExit(3)", 3)])
def test_launch_until_done_keeps_the_status_of_a_run_that_ends_by_itself(code, status):
    assert status_of(code) == status


@pytest.mark.parametrize(
    ("on_sigterm", "status"),
    [
        ("signal.signal(15, lambda *_: sys.exit(0))", COME_BACK),  # saved and ended well
        ("signal.signal(15, lambda *_: sys.exit(4))", 4),  # could not save
        ("signal.signal(15, lambda *_: sys.exit(143))", COME_BACK),  # as a shell, or Ctrl-C in `hptjax`, ends
        ("pass", COME_BACK),  # not yet far enough to have anything to save
    ],
)
def test_launch_until_done_says_come_back_after_sigterm(on_sigterm, status):
    code = f"import signal, sys, time; {on_sigterm}; print('ready', flush=True); time.sleep(60)"
    assert status_of(code, stop=True) == status


def test_launch_until_done_of_an_absent_program_is_no_traceback(capfd):
    assert until_done(["/nowhere/hptjax"]) == 127
    assert "expected a program to run" in capfd.readouterr().err


def test_launch_until_done_needs_the_standard_library_only():
    """It is the first process of a container, before anything of the run is imported."""
    code = "import sys, launch.until_done; print({'jax', 'numpy', 'hptjax', 'tyro', 'yaml'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text("#!/bin/bash\n" + textwrap.dedent(body), encoding="utf-8")
    path.chmod(0o755)


def slurm_job(folder: Path, srun: str) -> subprocess.Popen[bytes]:
    """The batch script as Slurm would start it, with stand-ins for Slurm's own programs."""
    program(folder, "srun", f"cd {shlex.quote(str(folder))}\necho $$ > step\n{srun}")
    program(folder, "scancel", f'[ "$*" = "--signal=TERM 77" ] && kill -TERM $(cat {folder}/step)')
    program(folder, "scontrol", f'echo "$*" >> {folder}/asked')
    script = folder / "batch.sh"
    script.write_text(batch_script(Slurm(config="c.toml"), ["--name", "a b"]), encoding="utf-8")
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    return subprocess.Popen(["bash", str(script)], env=environment, start_new_session=True)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


TAKES_A_WHILE = "while :; do sleep 0.05; done"


@pytest.mark.parametrize(
    ("srun", "status", "asked"),
    [
        (f"trap 'sleep 0.3; exit 0' TERM; touch ready; {TAKES_A_WHILE}", 0, "requeue 77\n"),  # saves, then ends
        (f"trap 'exit 2' TERM; touch ready; {TAKES_A_WHILE}", 2, None),  # could not save: a person must look
    ],
)
def test_launch_slurm_job_is_requeued_where_sigterm_ended_it_well(tmp_path, srun, status, asked):
    job = slurm_job(tmp_path, srun)
    wait_for(tmp_path / "ready")
    job.send_signal(signal.SIGTERM)  # to the shell alone, as --signal=B:TERM does
    assert job.wait(timeout=30) == status
    assert ((tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else None) == asked


@pytest.mark.parametrize("status", [0, 3])
def test_launch_slurm_job_that_ends_by_itself_is_not_requeued(tmp_path, status):
    job = slurm_job(tmp_path, f'printf "%s|" "$@" > arguments; exit {status}')
    assert job.wait(timeout=30) == status
    assert not (tmp_path / "asked").exists()
    arguments = (tmp_path / "arguments").read_text().split("|")[:-1]
    assert arguments == [
        *["--kill-on-bad-exit=1", "--cpus-per-task=16", ".venv/bin/hptjax", "train", "c.toml"],
        *["--distributed.mode", "slurm", "--name", "a b"],
    ]


@pytest.mark.slow
def test_launch_preempted_training_goes_on_to_the_same_end(tmp_path):
    """SIGTERM, status 75, the same command again, status 0: state, metrics and ledger of a run that nobody stopped."""
    whole = tmp_path / "whole"
    whole.mkdir()
    finish(whole)
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    arguments = [sys.executable, "-m", "launch.until_done", sys.executable, "-m", "tests.tiny", str(stopped)]
    environment = child.with_devices(1)
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    wait_for_training(process, stopped)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == COME_BACK
    saved = [path for path in (stopped / "runs" / "tiny" / "checkpoints").iterdir() if path.name[0].isdigit()]
    assert saved
    assert not (stopped / "runs" / "tiny" / "summary.json").exists()
    assert subprocess.run(arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=False).returncode == 0
    same_run(tiny.killed_config(whole), tiny.killed_config(stopped))
