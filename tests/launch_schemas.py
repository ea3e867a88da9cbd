"""JSON schemas of the Kubernetes objects that the launchers write: the fields they use, and nothing else.

Written from the public API descriptions of batch/v1 Job, core/v1 Pod and jobset.x-k8s.io/v1alpha2 JobSet. A field that
is not listed here is refused: a misspelt one would be ignored or refused by a cluster, after the waiting.
"""

from __future__ import annotations

from typing import Any

LABEL = {"type": "string", "pattern": "^[a-z]([a-z0-9-]*[a-z0-9])?$", "maxLength": 63}
COUNT = {"type": "integer", "minimum": 1}
NOT_NEGATIVE = {"type": "integer", "minimum": 0}


def fields(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


def listed(entry: dict[str, Any]) -> dict[str, Any]:
    """A list with at least one entry."""
    return {"type": "array", "items": entry, "minItems": 1}


TPUS = fields({"google.com/tpu": {"enum": [1, 4, 8]}})
CONTAINER = fields(
    {
        "name": LABEL,
        "image": {"type": "string", "minLength": 1},
        "resources": fields({"requests": TPUS, "limits": TPUS}),
    },
    {
        "command": listed({"type": "string"}),
        "ports": listed(fields({"containerPort": {"type": "integer", "minimum": 1, "maximum": 65535}})),
        "volumeMounts": listed(fields({"name": LABEL, "mountPath": {"type": "string", "pattern": "^/[^:]*$"}})),
    },
)
POD_SPEC = fields(
    {"containers": listed(CONTAINER), "restartPolicy": {"const": "Never"}},  # podFailurePolicy allows no other
    {
        "terminationGracePeriodSeconds": COUNT,
        "nodeSelector": {
            "type": "object",
            "propertyNames": {
                "enum": [
                    "cloud.google.com/gke-tpu-accelerator",
                    "cloud.google.com/gke-tpu-topology",
                    "cloud.google.com/gke-spot",
                ]
            },
            "additionalProperties": {"type": "string"},  # a bare true is no label
        },
        "volumes": listed(fields({"name": LABEL, "persistentVolumeClaim": fields({"claimName": LABEL})})),
    },
)
EXIT_CODES = fields(
    {"operator": {"enum": ["In", "NotIn"]}, "values": listed({"type": "integer", "minimum": 1, "maximum": 255})},
    {"containerName": LABEL},
)
POD_CONDITIONS = listed(fields({"type": {"type": "string"}, "status": {"enum": ["True", "False", "Unknown"]}}))
RULE_ACTION = {"enum": ["FailIndex", "FailJob", "Ignore", "Count"]}
JOB_SPEC = fields(
    {"template": fields({"spec": POD_SPEC})},
    {
        "parallelism": NOT_NEGATIVE,
        "completions": NOT_NEGATIVE,
        "completionMode": {"enum": ["NonIndexed", "Indexed"]},
        "backoffLimit": NOT_NEGATIVE,
        "podFailurePolicy": fields(
            {
                "rules": listed(
                    {
                        "oneOf": [
                            fields({"action": RULE_ACTION, "onExitCodes": EXIT_CODES}),
                            fields({"action": RULE_ACTION, "onPodConditions": POD_CONDITIONS}),
                        ]
                    }
                )
            }
        ),
    },
)
JOB_FAILURES = [
    "BackoffLimitExceeded",
    "DeadlineExceeded",
    "FailedIndexes",
    "MaxFailedIndexesExceeded",
    "PodFailurePolicy",
]
FAILURE_RULE = fields(
    {
        "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
        "action": {"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    },
    {"onJobFailureReasons": {"type": "array", "items": {"enum": JOB_FAILURES}, "uniqueItems": True}},
)
JOBSET = fields(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": fields(
            {"name": LABEL},
            {
                "namespace": LABEL,
                "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
            },
        ),
        "spec": fields(
            {
                "replicatedJobs": listed(
                    fields({"name": LABEL, "replicas": COUNT, "template": fields({"spec": JOB_SPEC})}),
                )
            },
            {
                "failurePolicy": fields(
                    {"maxRestarts": NOT_NEGATIVE},
                    {
                        "restartStrategy": {"enum": ["Recreate", "BlockingRecreate"]},
                        "rules": listed(FAILURE_RULE),
                    },
                )
            },
        ),
    }
)
