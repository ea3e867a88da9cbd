"""What `--dry-run` prints is what is run; what cannot work is refused before anything is rented."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import launch.steps
from hptjax.config_load import load_config
from launch.__main__ import COMMANDS, HELP, run
from launch.steps import Command, carry_out
from launch.training import training

RECORDER = '''#!{python} -S
"""Stands for a program: writes down how it was called; `describe` tells of a pod that comes at the second look."""
import json, os, pathlib, sys
log = pathlib.Path({log!r})
name = pathlib.Path(sys.argv[0]).name
reads = sys.stdin.read() if name in ("kubectl", "sbatch") else None
entry = [name, sys.argv[1:], reads, os.environ.get("JAX_PLATFORMS") if name == "hptjax" else None]
if name != "sleep":
    with log.open("a") as file:
        file.write(json.dumps(entry) + "\\n")
if "describe" in sys.argv:
    print("ACTIVE" if log.read_text().count("describe") > 1 else "WAITING_FOR_RESOURCES")
sys.exit(9 if {failing!r} in sys.argv[1:] else 0)
'''
POD = (
    "pod configs/quickstart.toml --project lab --zone us-west4-a --image us-docker.pkg.dev/lab/r/h:1 --nfs 10.0.0.2:/s"
)
GKE = "gke configs/quickstart.toml --project lab --cluster c --location us-west4 --image h:1 --claim shared"
LAUNCHES = {
    "laptop": "laptop configs/quickstart.toml -- --name 'it''s'",
    "node": "node configs/quickstart.toml --gpus 4 -- --mesh.data 4",
    "node in a container": "node configs/quickstart.toml --gpus 1 --image hptjax-gpu --shared /data",
    "slurm": "slurm configs/quickstart.toml --nodes 2 --gpus-per-node 4 --partition a100 -- --mesh.data 8",
    "pod": f"{POD} --spot --replace -- --mesh.data 16",
    "pod of two slices": f"{POD} --topology v5e:2x4 --slices 2 --name two -- --mesh.data 8 --mesh.replica 2",
    "pod that is there": f"{POD} --existing -- --mesh.data 16",
    "gke": f"{GKE} -- --mesh.data 16 --name run-1",
}


@pytest.fixture(autouse=True)
def in_repository(repository, monkeypatch):
    monkeypatch.chdir(repository)


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A function: how the stand-ins were called since it was last asked. `fail(word)`: calls with that word fail."""
    log = tmp_path / "log"

    def write(failing: str = "") -> None:
        for name in ("hptjax", "docker", "gcloud", "kubectl", "sbatch", "sleep"):
            path = tmp_path / name
            path.write_text(RECORDER.format(python=sys.executable, log=str(log), failing=failing), encoding="utf-8")
            path.chmod(0o755)

    def since() -> list:
        entries = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        log.unlink(missing_ok=True)
        return entries

    write()
    since.fail = write
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("JAX_PLATFORMS")
    sleeps = iter(range(20))  # nothing here waits for more than two looks
    monkeypatch.setattr(launch.steps.time, "sleep", lambda seconds: next(sleeps))
    return since


@pytest.mark.parametrize("line", LAUNCHES.values(), ids=LAUNCHES.keys())
def test_launch_dry_run_prints_exactly_what_is_run(recorded, capsys, line):
    words = shlex.split(line)
    assert run([words[0], "--dry-run", *words[1:]]) == 0
    printed = capsys.readouterr().out
    assert recorded() == []  # nothing was run
    subprocess.run(["sh"], input=printed, text=True, check=True, cwd=Path.cwd())
    by_script = recorded()
    assert run(words) == 0
    assert recorded() == by_script
    assert by_script


def test_launch_pod_asks_waits_starts_and_follows(recorded):
    assert run(shlex.split(LAUNCHES["pod"])) == 0
    calls = [arguments for name, arguments, *_ in recorded() if name == "gcloud"]
    assert [call[3] for call in calls] == ["delete", "create", "describe", "describe", "ssh", "ssh"]
    create = " ".join(calls[1])
    assert "--accelerator-type v5litepod-16" in create
    assert "--zone us-west4-a --project lab" in create
    assert create.endswith("--node-id hptjax --spot --quiet")
    everywhere, first = calls[4], calls[5]
    assert everywhere[everywhere.index("--worker") + 1] == everywhere[everywhere.index("--node") + 1] == "all"
    assert first[first.index("--worker") + 1] == first[first.index("--node") + 1] == "0"
    remote = everywhere[-1]
    assert remote.endswith(
        "us-docker.pkg.dev/lab/r/h:1 python -m launch.until_done hptjax train configs/quickstart.toml "
        "--distributed.mode tpu --runs_dir /shared/runs --mesh.data 16"
    )
    assert subprocess.run(["bash", "-n"], input=remote, text=True, check=False).returncode == 0


def test_launch_pod_host_mounts_the_shared_folder_and_starts_the_container(recorded, tmp_path):
    line = f"{POD} --name run-7 -- --mesh.data 16 --model.path /shared/models/a"
    assert run(shlex.split(line)) == 0
    remote = recorded()[-2][1][-1]
    host = tmp_path / "host"
    host.mkdir()
    for name, body in {
        "sudo": f'printf "%s|" "$@" >> {host}/log; echo >> {host}/log',
        "mountpoint": "exit 1",
        "mount.nfs": "",
    }.items():
        (host / name).write_text(f"#!/bin/sh\n{body}\n")
        (host / name).chmod(0o755)
    subprocess.run(["bash", "-c", remote], env={"PATH": f"{host}:/usr/bin:/bin"}, check=True)
    mkdir, mount, login, remove, start = [call.split("|")[:-1] for call in (host / "log").read_text().splitlines()]
    assert mkdir == ["mkdir", "-p", "/mnt/shared"]
    assert mount == ["mount", "-t", "nfs", "10.0.0.2:/s", "/mnt/shared"]
    assert login == ["gcloud", "auth", "configure-docker", "us-docker.pkg.dev", "--quiet"]
    assert remove == ["docker", "rm", "--force", "run-7"]
    assert start[:5] == ["docker", "run", "--detach", "--name", "run-7"]
    assert start[start.index("--volume") + 1] == "/mnt/shared:/shared"
    assert start[start.index("us-docker.pkg.dev/lab/r/h:1") + 1 :] == [
        *["python", "-m", "launch.until_done", "hptjax", "train", "configs/quickstart.toml"],
        *["--distributed.mode", "tpu", "--runs_dir", "/shared/runs", "--mesh.data", "16"],
        *["--model.path", "/shared/models/a"],
    ]


@pytest.mark.parametrize("mode", [None, "slurm", "tpu"])
def test_launch_training_command_is_one_that_hptjax_understands(mode):
    arguments = training("configs/quickstart.toml", ["--train.steps", "3"], mode=mode, runs_dir="/shared/runs")
    assert arguments[:2] == ("hptjax", "train")
    config = load_config(arguments[2], arguments[3:])
    assert (config.distributed.mode, config.runs_dir, config.train.steps) == (mode or "none", "/shared/runs", 3)


@pytest.mark.parametrize(("failing", "calls"), [("create", 2), ("describe", 3), ("ssh", 5)])
def test_launch_stops_at_the_first_step_that_fails(recorded, failing, calls):
    recorded.fail(failing)
    assert run(shlex.split(LAUNCHES["pod"])) == 9
    assert len(recorded()) == calls


def test_launch_pod_that_was_taken_away_is_not_waited_for(recorded, capsys, monkeypatch, tmp_path):
    program = (tmp_path / "gcloud").read_text().replace("ACTIVE", "SUSPENDED")
    (tmp_path / "gcloud").write_text(program)
    assert run(shlex.split(LAUNCHES["pod"])) == 1
    assert "says SUSPENDED" in capsys.readouterr().out
    assert [arguments[3] for _, arguments, *_ in recorded()] == ["delete", "create", "describe", "describe"]


def test_launch_gke_speaks_to_the_named_cluster(recorded):
    assert run(shlex.split(LAUNCHES["gke"])) == 0
    credentials, apply = recorded()
    assert credentials[1] == shlex.split("container clusters get-credentials c --location us-west4 --project lab")
    assert apply[1][:2] == ["--context", "gke_lab_us-west4_c"]
    assert "kind: JobSet" in apply[2]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("fly configs/quickstart.toml", ["unknown command 'fly'", "gke"]),
        ("laptop configs/absent.toml", ["no config file", "configs/quickstart.toml"]),
        ("laptop configs/quickstart.toml -- --mesh.data 2", ["mesh of the 1 devices", "which is 2"]),
        ("node configs/quickstart.toml --gpus 8", ["the 8 devices", "which is 1", "8"]),
        ("node configs/quickstart.toml --gpus 0", ["at least 1 GPU", "--gpus"]),
        ("node configs/quickstart.toml --gpus 1 --image h", ["absolute path", "--shared"]),
        ("node configs/quickstart.toml --gpus 1 --shared /data", ["--image", "/data"]),
        ("slurm configs/quickstart.toml --nodes 0", ["--nodes", "at least 1"]),
        ("slurm configs/quickstart.toml --nodes 3 --gpus-per-node 1 -- --mesh.data 2", ["3 devices", "3 nodes"]),
        ("pod configs/quickstart.toml", ["--project", "gcloud projects list", "--zone", "--image", "--nfs"]),
        (f"{POD} --topology v5e:3x3", ["v5e:4x4", "v5e:3x3", "--topology"]),
        (f"{POD} --topology v9:4x4", ["v5e, v5p, v6e", "v9:4x4"]),
        (f"{POD} --accelerator-type v5litepod-32", ["v5litepod-16", "16 chips", "v5litepod-32"]),
        (f"{POD} --name My_Pod -- --mesh.data 16", ["My_Pod", "--name"]),
        (f"{POD} --replace --existing -- --mesh.data 16", ["--replace", "--existing"]),
        (f"{POD} -- --mesh.data 8", ["16 devices of 1 x v5e:4x4", "which is 8", "mesh.fsdp 2"]),
        (f"{POD} --slices 2 -- --mesh.data 32 --batch.rows 32", ["mesh.replica", "2 slices"]),
        (POD.replace("10.0.0.2:/s", "share"), ["SERVER:/PATH", "share"]),
        (GKE.replace("--claim shared", ""), ["--claim", "ReadWriteMany"]),
        ("node configs/quickstart.toml --gpus 8 -- --mesh.fsdp 8 --mesh.devices 4", ["mesh.devices", "got 4"]),
        (f"{POD} -- --mesh.data 16 --batch.rows 24", ["batch.rows", "multiple of mesh.data (16)", "16 or 32"]),
        (POD.replace("us-docker.pkg.dev/", "'x;touch y;gcr.io/'"), ["one word", "x;touch y;gcr.io", "--image"]),
        (POD.replace("--project lab", "--project=--quiet"), ["'--quiet'", "change --project"]),
        ("slurm configs/quickstart.toml --time '1:00\ntouch y'", ["touch y", "--time"]),
        (f"{GKE} --namespace ''", ["--namespace"]),
        (f"laptop {'x' * 5000}", ["no config file"]),
        (f"{GKE} --max-restarts -1", ["--max-restarts", "-1"]),
        (f"{GKE} --topology v5e:2x4 --slices 2", ["several hosts", "v5e:2x4"]),
    ],
)
def test_launch_refuses_what_cannot_work_and_says_what_would(recorded, capsys, line, said):
    assert run(shlex.split(line)) == 2
    error = capsys.readouterr().err
    assert [words for words in said if words not in error] == []
    assert recorded() == []


def test_launch_refuses_a_program_that_is_not_there_before_anything_runs(recorded, capsys, tmp_path, monkeypatch):
    (tmp_path / "kubectl").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(shlex.split(LAUNCHES["gke"])) == 2
    assert "expected the program 'kubectl'" in capsys.readouterr().err
    assert recorded() == []


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGTERM, 7), (signal.SIGINT, 5)])
def test_launch_program_that_is_told_to_stop_ends_by_itself(number, ends):
    """SIGTERM is passed on, Ctrl-C has come from the terminal already; nobody is killed while it saves."""
    code = (
        f"import os, signal, sys, time; signal.signal({int(signal.SIGTERM)}, lambda *_: sys.exit(7)); "
        f"os.kill(os.getppid(), {int(number)}); time.sleep(1); sys.exit(5)"
    )
    never = Command((sys.executable, "-c", "raise SystemExit(9)"))
    assert carry_out([Command((sys.executable, "-c", code)), never]) == ends
    stopped = code.replace("sys.exit(7)", "sys.exit(0)").replace("sys.exit(5)", "sys.exit(0)")
    assert carry_out([Command((sys.executable, "-c", stopped)), never]) == 128 + number


def test_launch_refuses_a_bad_field_of_the_config(recorded, capsys):
    with pytest.raises(SystemExit) as ended:
        run(shlex.split("laptop configs/quickstart.toml -- --train.stepz 3"))
    assert ended.value.code == 2
    assert "stepz" in capsys.readouterr().err
    assert recorded() == []


def test_launch_help_lists_every_command(capsys):
    assert run(["--help"]) == 0
    assert capsys.readouterr().out == HELP
    assert [command for command in COMMANDS if f"\n  {command} " not in HELP] == []
