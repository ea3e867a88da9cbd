"""What the launchers hand to Kubernetes fits its schema; the container files install what pyproject.toml declares."""

from __future__ import annotations

import copy
import re
import shlex
import tomllib
from typing import Any

import jsonschema
import pytest
import yaml

from hptjax.plan.chips import CHIPS, parse_topology
from launch.gke import Gke, gke_steps, jobset
from launch.tpu import GENERATIONS, tpu_slice
from launch.until_done import COME_BACK
from tests.launch_schemas import JOBSET

CONFIG = "configs/quickstart.toml"


def gke(**changes: Any) -> Gke:
    return Gke(
        **{
            "config": CONFIG,
            "project": "lab",
            "cluster": "west",
            "location": "us-west4",
            "image": "us-docker.pkg.dev/lab/r/hptjax:1",
            "claim": "shared",
            **changes,
        }
    )


@pytest.fixture(autouse=True)
def in_repository(repository, monkeypatch):
    monkeypatch.chdir(repository)


def overrides(slice_name: str, slices: int = 1) -> list[str]:
    """A mesh of all the chips; the batch is made to divide."""
    chips = tpu_slice(slice_name).chips
    rows = max(32, chips * slices)
    return shlex.split(
        f"--mesh.replica {slices} --mesh.data {chips} --batch.rows {rows} --rollout.slots {rows} "
        f"--rollout.prefill_rows {rows}"
    )


def manifest(slice_name: str, slices: int = 1, **changes: Any) -> dict[str, Any]:
    return jobset(gke(topology=slice_name, slices=slices, **changes), overrides(slice_name, slices))


@pytest.mark.parametrize(
    ("slice_name", "slices"),
    [
        ("v5e:2x2", 1),
        ("v5e:2x4", 1),
        ("v5e:4x4", 1),
        ("v5e:16x16", 1),
        ("v6e:4x8", 2),
        ("v5p:2x2x1", 1),
        ("v5p:4x4x4", 4),
    ],
)
def test_launch_jobset_fits_its_schema_and_holds_every_chip(slice_name, slices):
    made = manifest(slice_name, slices, spot=slices > 1)
    jsonschema.validate(made, JOBSET)
    job = made["spec"]["replicatedJobs"][0]
    spec = job["template"]["spec"]
    container = spec["template"]["spec"]["containers"][0]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["replicas"] * spec["parallelism"] * chips == slices * tpu_slice(slice_name).chips
    assert spec["completions"] == spec["parallelism"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in spec["template"]["spec"]["volumes"]
    }
    assert {
        rule["onExitCodes"]["containerName"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule
    } == {container["name"]}


def test_launch_jobset_that_was_told_to_go_starts_again_uncounted():
    made = manifest("v5e:4x4")
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    codes, conditions = job["podFailurePolicy"]["rules"]
    assert codes["onExitCodes"] == {"containerName": "train", "operator": "In", "values": [COME_BACK]}
    assert conditions["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert {codes["action"], conditions["action"]} == {"FailJob"}  # the reason is then PodFailurePolicy
    (rule,) = made["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert job["backoffLimit"] == 0  # any other failure is one of maxRestarts
    container = job["template"]["spec"]["containers"][0]
    assert container["command"][:3] == ["python", "-m", "launch.until_done"]  # or the code would never be 75


def test_launch_jobset_that_kubectl_reads_is_the_manifest():
    options = gke(topology="v5e:4x4")
    text = gke_steps(options, overrides("v5e:4x4"))[-1].stdin
    assert yaml.safe_load(text) == jobset(options, overrides("v5e:4x4"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "failurePolicy", "maxRestart"), 3),  # misspelt
        (("spec", "failurePolicy", "restartStrategy"), "Blocking"),
        (("spec", "replicatedJobs", 0, "template", "spec", "parallelism"), "4"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "restartPolicy"), "OnFailure"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "terminationGracePeriodSeconds"), 0),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "nodeSelector", "tpu"), "v5e"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "args"), ["x"]),
        (("metadata", "name"), "My_Run"),
        (("apiVersion",), "batch/v1"),
    ],
)
def test_launch_schema_refuses_a_broken_manifest(path, value):
    broken = copy.deepcopy(manifest("v5e:4x4"))
    place: Any = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, JOBSET)


@pytest.mark.parametrize(
    ("name", "accelerator_type", "chips", "hosts"),
    [  # rows of the public tables
        ("v5e:1x1", "v5litepod-1", 1, 1),
        ("v5e:2x4", "v5litepod-8", 8, 1),
        ("v5e:4x4", "v5litepod-16", 16, 4),
        ("v5e:16x16", "v5litepod-256", 256, 64),
        ("v5p:2x2x1", "v5p-8", 4, 1),
        ("v5p:2x2x2", "v5p-16", 8, 2),
        ("v5p:4x4x4", "v5p-128", 64, 16),
        ("v6e:4x8", "v6e-32", 32, 8),
    ],
)
def test_launch_slices_are_those_of_the_public_tables(name, accelerator_type, chips, hosts):
    slice_ = tpu_slice(name)
    assert (slice_.accelerator_type, slice_.chips, slice_.hosts) == (accelerator_type, chips, hosts)


def test_launch_slices_have_whole_hosts():
    for generation, facts in GENERATIONS.items():
        for topology in facts.topologies:
            slice_ = tpu_slice(f"{generation}:{topology}")
            assert slice_.chips_per_host * slice_.hosts == slice_.chips
            assert slice_.chips_per_host in (1, 4, 8)


def test_launch_knows_every_slice_that_can_be_planned():
    for chip in CHIPS.values():
        for topology in chip.topologies:
            planned = parse_topology(f"{chip.name}:{topology}")
            assert tpu_slice(planned.name).chips == planned.chips


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_launch_container_installs_a_declared_extra_with_pinned_versions(repository, kind):
    text = (repository / "launch" / "container" / f"Dockerfile.{kind}").read_text(encoding="utf-8")
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (install,) = [line for line in lines if "pip install" in line]
    (wanted,) = re.findall(r"'\.\[([\w,-]+)\]'", install)
    assert set(wanted.split(",")) <= extras.keys()
    assert {"gpu": "cuda13", "tpu": "tpu"}[kind] in wanted.split(",")
    assert "-c constraints.txt" in install
    assert lines[0].startswith("ARG BASE=")
    assert lines[1] == "FROM ${BASE}"
    assert [line for line in lines if line.startswith("USER")] == ["USER trainer"]
    assert "--uid 0" not in text
    assert not re.search(r"(?i)(token|secret|password|credential|_key)", text)
    for line in lines:
        if line.startswith("COPY"):
            *sources, _ = line.split()[1:]
            assert [source for source in sources if not (repository / source).exists()] == []
    copied = {source for line in lines if line.startswith("COPY") for source in line.split()[1:-1]}
    assert {"pyproject.toml", "constraints.txt", "hptjax", "configs", "launch"} <= copied  # what a launcher asks for
