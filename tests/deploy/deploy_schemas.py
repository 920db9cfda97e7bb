"""JSON schemas of objects that no package has schemas of: the fields that ours use, and no others.

KubeRay's are of its version 1.7 (1.6 has them too); a field that is to be used is looked up there and added here.
"""


def closed(required, **properties):
    """An object that has what is required and nothing that is not named."""
    fields = {"type": "object", "additionalProperties": False, "required": list(required)}
    return {**fields, "properties": {**properties, **{name: required[name] for name in required}}}


def listed(items):
    return {"type": "array", "minItems": 1, "items": items}


def one_of(*values):
    return {"enum": list(values)}


TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
SECONDS = COUNT
BOOLEAN = {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$"}
VERSION = {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"}
QUANTITIES = {"type": "object", "additionalProperties": {"type": ["string", "integer"]}}
# Pod templates and what is in them are checked against Kubernetes' own schemas.
KUBERNETES = {"type": "object"}

METADATA = closed({"name": NAME}, labels=TEXTS)
RESOURCES = closed({"requests": QUANTITIES, "limits": QUANTITIES})


def thing(api_version, kind, spec):
    return closed({"apiVersion": one_of(api_version), "kind": one_of(kind), "metadata": METADATA, "spec": spec})


AUTOSCALER = closed(
    {"version": one_of("v2")}, idleTimeoutSeconds=SECONDS, resources=RESOURCES, securityContext=KUBERNETES
)
HEAD = closed({"template": KUBERNETES, "rayStartParams": TEXTS})
WORKERS = closed(
    {
        "groupName": NAME,
        "replicas": COUNT,
        "minReplicas": COUNT,
        "maxReplicas": COUNT,
        "rayStartParams": TEXTS,
        "template": KUBERNETES,
    }
)
_RAY = {
    "rayVersion": VERSION,
    "authOptions": closed({"mode": one_of("token"), "secretName": NAME}),
    "headGroupSpec": HEAD,
    "workerGroupSpecs": listed(WORKERS),
}
_SCALING = {"enableInTreeAutoscaling": BOOLEAN, "autoscalerOptions": AUTOSCALER}
RAY_CLUSTER = thing(
    "ray.io/v1", "RayCluster", closed(_RAY, **_SCALING, upgradeStrategy=closed({"type": one_of("Recreate", "None")}))
)
# KubeRay refuses an upgradeStrategy in the cluster of a job.
RAY_JOB = thing(
    "ray.io/v1",
    "RayJob",
    closed(
        {"entrypoint": TEXT, "rayClusterSpec": closed(_RAY, **_SCALING), "submitterPodTemplate": KUBERNETES},
        backoffLimit=COUNT,
        # It takes a time to live only together with the shutdown.
        shutdownAfterJobFinishes=one_of(True),
        ttlSecondsAfterFinished=SECONDS,
    ),
)

RELABELING = closed(
    {"action": one_of("replace"), "targetLabel": TEXT}, sourceLabels=listed(TEXT), replacement={"type": "string"}
)
POD_MONITOR = thing(
    "monitoring.coreos.com/v1",
    "PodMonitor",
    closed(
        {
            "selector": closed({"matchLabels": TEXTS}),
            "podMetricsEndpoints": listed(
                closed(
                    {"port": TEXT}, interval={"type": "string", "pattern": r"^\d+s$"}, relabelings=listed(RELABELING)
                )
            ),
        }
    ),
)
RULE = closed({"alert": TEXT, "expr": TEXT, "for": TEXT, "labels": TEXTS, "annotations": TEXTS})
PROMETHEUS_RULE = thing(
    "monitoring.coreos.com/v1",
    "PrometheusRule",
    closed({"groups": listed(closed({"name": TEXT, "rules": listed(RULE)}))}),
)

OWN = {"RayCluster": RAY_CLUSTER, "RayJob": RAY_JOB, "PodMonitor": POD_MONITOR, "PrometheusRule": PROMETHEUS_RULE}

KUSTOMIZATION = closed(
    {
        "apiVersion": one_of("kustomize.config.k8s.io/v1beta1"),
        "kind": one_of("Kustomization"),
        "resources": listed(TEXT),
    },
    images=listed(closed({"name": TEXT, "newTag": TEXT}, newName=TEXT)),
    patches=listed(closed({"target": closed({"kind": TEXT, "name": NAME}), "patch": TEXT})),
)

_PORT = {"type": "string", "pattern": r"^[\d.]+:\d+:\d+$"}
_VOLUME = {"type": "string", "pattern": "^[^:]+(:\\?[^}]*\\})?:/[^:]+(:ro)?$"}
COMPOSE = closed(
    {
        "name": NAME,
        "services": {
            "type": "object",
            "additionalProperties": closed(
                {"image": TEXT},
                build=closed({"context": TEXT, "dockerfile": TEXT}),
                command=listed(TEXT),
                environment=TEXTS,
                ports=listed(_PORT),
                volumes=listed(_VOLUME),
                healthcheck=closed(
                    {"test": listed(TEXT)}, interval=TEXT, timeout=TEXT, retries=COUNT, start_period=TEXT
                ),
                init=BOOLEAN,
                read_only=BOOLEAN,
                tmpfs=listed(TEXT),
                cap_drop=listed(TEXT),
                security_opt=listed(TEXT),
                stop_grace_period=TEXT,
                restart=one_of("no", "always", "on-failure", "unless-stopped"),
            ),
        },
    },
    volumes={"type": "object", "additionalProperties": {"type": "null"}},
)
