"""Training on TPUs of a GKE cluster: a JobSet, one job per slice, one pod per host."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import yaml

from launch.machine import Config
from launch.steps import Command, Step
from launch.tpu import Slice, tpu_slice
from launch.training import GRACE_S, SHARED, check_config, check_name, check_words, in_container, required, training
from launch.until_done import COME_BACK


@dataclasses.dataclass(frozen=True)
class Gke:
    """On TPUs of a GKE cluster, as a JobSet. What follows -- goes to `hptjax train`."""

    config: Config
    project: str = ""  # the Google Cloud project of the cluster
    cluster: str = ""
    location: str = ""  # zone or region of the cluster
    topology: str = "v5e:4x4"  # of a node pool that the cluster has
    slices: int = 1  # node pools of that topology
    image: str = ""  # the container made from launch/container/Dockerfile.tpu
    claim: str = ""  # name of a ReadWriteMany persistent volume claim; /shared in the container
    namespace: str = "default"
    name: str = "hptjax"  # of the JobSet
    max_restarts: int = 3  # after failures; being evicted does not count
    grace_s: int = GRACE_S  # between SIGTERM and SIGKILL
    spot: bool = False  # on spot nodes
    dry_run: bool = False  # print what would be run


def gke_steps(options: Gke, overrides: Sequence[str]) -> list[Step]:
    """Access to the cluster, then the JobSet handed to kubectl."""
    manifest = yaml.safe_dump(jobset(options, overrides), sort_keys=False, width=1000)
    place = ("--location", options.location, "--project", options.project)
    context = f"gke_{options.project}_{options.location}_{options.cluster}"
    return [
        Command(("gcloud", "container", "clusters", "get-credentials", options.cluster, *place)),
        Command(("kubectl", "--context", context, "apply", "--filename", "-"), stdin=manifest),
    ]


def jobset(options: Gke, overrides: Sequence[str]) -> dict[str, Any]:
    """The manifest. A pod that was told to go away ends its job with a reason that does not count as a failure.

    Raises ValueError for what is missing or clashes.
    """
    slice_ = check_gke(options, overrides)
    told_to_go = [
        {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": [COME_BACK]}},
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    job = {
        "parallelism": slice_.hosts,
        "completions": slice_.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": told_to_go},
        "template": {"spec": pod_spec(options, overrides, slice_)},
    }
    uncounted = {
        "name": "told_to_go",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": options.name,
            "namespace": options.namespace,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": options.max_restarts,
                "restartStrategy": "BlockingRecreate",  # the next run may not start beside one that still saves
                "rules": [uncounted],
            },
            "replicatedJobs": [{"name": "slice", "replicas": options.slices, "template": {"spec": job}}],
        },
    }


def pod_spec(options: Gke, overrides: Sequence[str], slice_: Slice) -> dict[str, Any]:
    """One host: its TPU chips, the container, the shared folder."""
    nodes = {
        "cloud.google.com/gke-tpu-accelerator": slice_.gke,
        "cloud.google.com/gke-tpu-topology": slice_.topology,
        **({"cloud.google.com/gke-spot": "true"} if options.spot else {}),
    }
    container = {
        "name": "train",
        "image": options.image,
        "command": list(in_container(training(options.config, overrides, mode="tpu", runs_dir=f"{SHARED}/runs"))),
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],  # libtpu's own, between hosts and slices
        "resources": {
            "requests": {"google.com/tpu": slice_.chips_per_host},
            "limits": {"google.com/tpu": slice_.chips_per_host},
        },
        "volumeMounts": [{"name": "shared", "mountPath": SHARED}],
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace_s,
        "nodeSelector": nodes,
        "containers": [container],
        "volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": options.claim}}],
    }


def check_gke(options: Gke, overrides: Sequence[str]) -> Slice:
    """The slice that is asked for. Raises ValueError for what is missing or clashes."""
    required(
        project=options.project,
        cluster=options.cluster,
        location=options.location,
        image=options.image,
        claim=options.claim,
        namespace=options.namespace,
    )
    check_name(options.name)
    check_words(
        project=options.project,
        cluster=options.cluster,
        location=options.location,
        image=options.image,
        claim=options.claim,
        namespace=options.namespace,
    )
    slice_ = tpu_slice(options.topology)
    if options.slices < 1 or options.max_restarts < 0 or options.grace_s < 1:
        raise ValueError(
            f"expected --slices and --grace-s of at least 1 and --max-restarts of at least 0, got {options.slices}, "
            f"{options.grace_s} and {options.max_restarts}"
        )
    if options.slices > 1 and slice_.hosts == 1:
        raise ValueError(
            f"expected slices of several hosts where GKE joins {options.slices} of them, got {slice_.name} with one "
            "host; change --topology or --slices"
        )
    where = f"{options.slices} x {slice_.name}"
    check_config(options.config, overrides, devices=options.slices * slice_.chips, where=where, slices=options.slices)
    return slice_
