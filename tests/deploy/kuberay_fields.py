"""The fields of KubeRay that deploy/ uses, as JSON schemas: a field that is not here fails the tests.

They are those of the API `ray.io/v1` of KubeRay 1.7, the version that the manifests were written for, as its
documentation names them; no package contains the schemas of its operator. Add a further field here when you use it,
after reading in which version it came: `gcsFaultToleranceOptions` needs KubeRay 1.3.

The parts that are Kubernetes' own types are any object here, and are checked against Kubernetes' schemas:
`kubernetes_parts` returns them as a template of a pod.
"""

import copy

import jsonschema

KUBERAY_VERSION = "1.7"

_STRING, _INTEGER, _BOOLEAN, _KUBERNETES = (
    {"type": "string"},
    {"type": "integer"},
    {"type": "boolean"},
    {"type": "object"},
)
_COUNT = {"type": "integer", "minimum": 0}
# Go's map[string]string: numbers are refused by the API server.
_STRINGS = {"type": "object", "additionalProperties": _STRING}


def _fields(required=(), **fields):
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


_CREDENTIAL = _fields(valueFrom=_KUBERNETES)
_HEAD = _fields(("rayStartParams", "template"), rayStartParams=_STRINGS, template=_KUBERNETES)
_GROUP = _fields(
    ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    groupName=_STRING,
    replicas=_COUNT,
    minReplicas=_COUNT,
    maxReplicas=_COUNT,
    rayStartParams=_STRINGS,
    template=_KUBERNETES,
)
_CLUSTER = _fields(
    ("headGroupSpec",),
    rayVersion=_STRING,
    upgradeStrategy=_fields(type={"enum": ["Recreate", "None"]}),
    authOptions=_fields(mode={"enum": ["token", "disabled"]}, secretName=_STRING),
    enableInTreeAutoscaling=_BOOLEAN,
    autoscalerOptions=_fields(
        version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=_COUNT, resources=_KUBERNETES, securityContext=_KUBERNETES
    ),
    gcsFaultToleranceOptions=_fields(("redisAddress",), redisAddress=_STRING, redisPassword=_CREDENTIAL),
    headGroupSpec=_HEAD,
    workerGroupSpecs={"type": "array", "items": _GROUP},
)
_JOB = _fields(
    ("rayClusterSpec",),
    entrypoint=_STRING,
    backoffLimit=_COUNT,
    shutdownAfterJobFinishes=_BOOLEAN,
    ttlSecondsAfterFinished=_COUNT,
    submitterPodTemplate=_KUBERNETES,
    rayClusterSpec=_CLUSTER,
)
_SPECS = {"RayCluster": _CLUSTER, "RayJob": _JOB}
KINDS = set(_SPECS)


def check_fields(each):
    """Check the fields of a RayCluster or RayJob; raise `jsonschema.ValidationError` for one that is not listed."""
    schema = _fields(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind=_STRING,
        metadata=_KUBERNETES,
        spec=_SPECS[each["kind"]],
    )
    jsonschema.validate(each, schema)


def kubernetes_parts(spec):
    """Return a PodTemplate with the parts of a cluster's spec that are Kubernetes' types, but for templates of pods."""
    options = spec.get("autoscalerOptions", {})
    container = {
        "name": "parts",
        **{name: options[name] for name in ("resources", "securityContext") if name in options},
    }
    credential = spec.get("gcsFaultToleranceOptions", {}).get("redisPassword")
    container["env"] = [{"name": "PASSWORD", **credential}] if credential else []
    template = {"spec": {"containers": [copy.deepcopy(container)]}}
    return {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "any"}, "template": template}
