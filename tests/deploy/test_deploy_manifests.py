"""Each manifest fits its schema, and what it names is what the code, the image and the other manifests have.

No Kubernetes runs here: what is checked is what can be read.
"""

import copy
import inspect
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from importlib import metadata, resources
from pathlib import Path, PurePosixPath

import jsonschema
import kubernetes_validate
import pytest
import yaml
from deploy_manifests import (
    DEPLOY,
    FOLDERS,
    JOBS,
    KUBERNETES,
    ROOT,
    SERVING,
    VERSION,
    build,
    documents,
    parsed,
    pods_of,
    quantity,
)
from deploy_schemas import KUSTOMIZATION, OWN

from orbithash.cluster import runtime
from orbithash.cluster.cli.options import DEFAULT_ADDRESS
from orbithash.cluster.encoding import encode
from orbithash.cluster.serving import encoder_pool, serve, shards
from orbithash.search.protocol.address import is_loopback, parse_address

# The first with sidecars, which start again whatever the pod's restartPolicy, and the newest there is.
KUBERNETES_VERSIONS = ("1.29", kubernetes_validate.latest_version())

SITE_PACKAGES = "/opt/orbithash/lib/python3.11/site-packages/"
# Of Ray, for a driver to find the node in its pod.
RAY_NODE_TIMEOUT_S = 60

GATEWAY_PORT = parse_address(DEFAULT_ADDRESS)[1]


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request):
    return request.param


@pytest.fixture(params=SERVING)
def serving(request):
    """The pods of a serving cluster by their group."""
    return by_group(build(KUBERNETES / request.param))


@pytest.fixture
def policies():
    objects = build(KUBERNETES / "base")
    return {each["metadata"]["name"]: each["spec"] for each in objects if each["kind"] == "NetworkPolicy"}


def by_group(objects):
    """The pods of Ray's nodes."""
    return {pod.ray["groupName"]: pod for pod in pods_of(objects) if pod.ray is not None}


def all_pods():
    return [
        pytest.param(pod, id=f"{name}: {pod.name}") for name in FOLDERS for pod in pods_of(build(KUBERNETES / name))
    ]


def serve_options(gateway):
    return parsed(gateway.container("gateway")["command"])


# Schemas.


def check_schema(each):
    if each["kind"] in OWN:
        jsonschema.validate(each, OWN[each["kind"]])
    else:
        check_kubernetes(each)
    for pod in pods_of([each]):
        if each["kind"] != "Pod":
            template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "any"}}
            check_kubernetes({**template, "template": pod.template})
        # What the API server refuses, but no schema knows.
        for container in pod.containers:
            names = [mount["name"] for mount in container.get("volumeMounts", ())]
            assert set(names) <= {volume["name"] for volume in pod.spec.get("volumes", ())}
            assert all(len(port["name"]) <= 15 for port in container.get("ports", ()))
            for place in container["resources"].values():
                assert all(quantity(value) > 0 for value in place.values())
        names = [container["name"] for container in pod.containers]
        assert len(set(names)) == len(names)


def check_kubernetes(each):
    for version in KUBERNETES_VERSIONS:
        kubernetes_validate.validate(each, version, strict=True)


def test_every_object_fits_its_schema(folder):
    objects = build(KUBERNETES / folder)
    for each in objects:
        check_schema(each)
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(set(names)) == len(names)


def test_every_kustomization_fits_its_schema(folder):
    jsonschema.validate(documents(KUBERNETES / folder / "kustomization.yaml")[0], KUSTOMIZATION)


def test_every_file_is_used():
    used = {KUBERNETES / name / "kustomization.yaml" for name in FOLDERS}
    for name in FOLDERS:
        (wanted,) = documents(KUBERNETES / name / "kustomization.yaml")
        used |= {KUBERNETES / name / resource for resource in wanted["resources"]}
    assert {path for path in KUBERNETES.rglob("*") if path.is_file()} <= used


def test_kustomize_agrees(folder):
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("needs kubectl")
    done = subprocess.run([kubectl, "kustomize", KUBERNETES / folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

    def sort(objects):
        return sorted(objects, key=lambda each: (each["kind"], each["metadata"]["name"]))

    assert sort(yaml.safe_load_all(done.stdout)) == sort(build(KUBERNETES / folder))


def spec_of(objects, kind):
    return next(each["spec"] for each in objects if each["kind"] == kind)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("RayCluster", lambda spec: spec.update(rayVersions="2.60.0")),
        ("RayCluster", lambda spec: spec.pop("authOptions")),
        ("RayCluster", lambda spec: spec["autoscalerOptions"].update(version=2)),
        ("RayCluster", lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0})),
        ("RayCluster", lambda spec: spec["workerGroupSpecs"][0].update(minReplicas="2")),
        ("RayCluster", lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"].update(container=[])),
        ("RayCluster", lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"]["volumes"].pop()),
        ("NetworkPolicy", lambda spec: spec.update(policyType=["Ingress"])),
        ("Service", lambda spec: spec["ports"][0].update(port="50051")),
        ("PersistentVolumeClaim", lambda spec: spec.update(accessModes="ReadWriteMany")),
    ],
)
def test_the_schemas_find_what_is_wrong(kind, change):
    objects = build(KUBERNETES / "base")
    change(spec_of(objects, kind))

    def check():
        for each in objects:
            check_schema(each)

    with pytest.raises((jsonschema.ValidationError, AssertionError)):
        check()


# Versions and images.


def test_versions_of_ray_agree():
    constraints = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert constraints["ray"] == metadata.version("ray")
    found = re.findall(r"rayVersion: (\S+)", "".join(path.read_text() for path in KUBERNETES.rglob("*.yaml")))
    assert set(found) == {constraints["ray"]}
    assert len(found) == 3


def test_every_image_is_of_this_version(folder):
    expected = f"orbithash:{VERSION}-cuda" if "gpu" in folder else f"orbithash:{VERSION}"
    for pod in pods_of(build(KUBERNETES / folder)):
        assert {container["image"] for container in pod.containers} == {expected}


def test_one_python_in_the_image_and_in_the_paths():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    minor = settings["tool"]["mypy"]["python_version"]
    assert f"ARG PYTHON={minor}." in (DEPLOY / "images" / "Dockerfile").read_text()
    assert f"/python{minor}/" in SITE_PACKAGES


# Command lines.


def commands(folder):
    objects = build(KUBERNETES / folder)
    for pod in pods_of(objects):
        for container in pod.containers:
            if container.get("command", [""])[0] == "orbithash":
                yield container["command"], container
    for each in objects:
        if each["kind"] == "RayJob":
            head = each["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
            yield shlex.split(each["spec"]["entrypoint"]), head


@pytest.mark.parametrize("name", [*SERVING, *JOBS])
def test_command_lines_are_ours_and_their_paths_are_there(name):
    found = list(commands(name))
    assert found, "each of these runs something of ours"
    for words, container in found:
        for value in parsed(words).values():
            path = str(value)
            if not path.startswith("/"):
                continue
            if path.startswith(SITE_PACKAGES):
                package, *rest = PurePosixPath(path.removeprefix(SITE_PACKAGES)).parts[1:]
                assert resources.files(f"orbithash.{package}").joinpath(*rest).is_file(), path
            else:
                mounts = [mount["mountPath"] + "/" for mount in container["volumeMounts"]]
                assert any(path.startswith(mount) for mount in mounts), path


def test_the_command_lines_would_show_an_option_that_is_gone():
    (words, _), *_ = commands("base")
    parsed(words)
    with pytest.raises(Exception, match="No such option"):
        parsed([*words, "--shard=3"])


# The gateway.


def test_the_gateway_is_protected(serving):
    options = serve_options(serving["gateway"])
    for place in (options["address"], options["metrics"]):
        assert not is_loopback(parse_address(place)[0])
    assert parse_address(options["address"])[1] == GATEWAY_PORT
    assert not options["local"]
    assert options["tls_cert"]
    assert options["tls_key"]
    assert options["tokens"]
    assert options["open_metrics"]
    assert not options["insecure_listen"], "it would not miss a certificate"


def test_the_tokens_are_only_the_owners_to_read(serving):
    """Kubernetes lets the group read what it mounts into a pod with an fsGroup, and `serve` refuses such a file."""
    gateway = serving["gateway"]
    program, _, mode, source, target = gateway.container("tokens")["command"]
    assert (program, mode) == ("install", "600")
    assert target == str(serve_options(gateway)["tokens"])
    (volume,) = [each for each in gateway.spec["volumes"] if each["name"] == "tokens"]
    assert source.startswith(gateway.container("tokens")["volumeMounts"][0]["mountPath"] + "/")
    assert volume["secret"]["secretName"] == "orbithash-tokens"
    names = [container["name"] for container in gateway.spec["initContainers"]]
    assert names.index("tokens") < names.index("gateway")


def test_the_gateway_has_a_ray_node_in_its_pod(serving):
    gateway = serving["gateway"]
    assert gateway.spec["shareProcessNamespace"] is True, "a driver looks for the process of its node"
    assert gateway.ray["rayStartParams"]["num-cpus"] == "0", "shards would be put beside it first"
    assert gateway.spec["containers"][0]["name"] == "ray-worker", "KubeRay takes the first for Ray's"

    def shared(container):
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        return mounts["/tmp/ray"], mounts["/dev/shm"]

    ours, rays = gateway.container("gateway"), gateway.spec["containers"][0]
    assert shared(ours) == shared(rays)
    assert "runAsUser" not in ours["securityContext"]
    assert "runAsUser" not in rays["securityContext"]
    env = {each["name"]: each for each in ours["env"]}
    # KubeRay gives both to the containers of Ray only.
    assert env["RAY_AUTH_MODE"]["value"] == "token"
    cluster = spec_of(build(KUBERNETES / "base"), "RayCluster")
    secret = {"name": cluster["authOptions"]["secretName"], "key": "auth_token"}
    assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == secret
    # The service that KubeRay makes for the head, by the label that it gives every pod. Kubernetes expands what stands
    # before in the list.
    assert env["RAY_CLUSTER"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['ray.io/cluster']"
    assert env["RAY_ADDRESS"]["value"] == "$(RAY_CLUSTER)-head-svc:6379"
    assert list(env).index("RAY_CLUSTER") < list(env).index("RAY_ADDRESS")


def test_the_gateway_starts_again_by_itself(serving):
    # The autoscaler's version 2 makes every pod's own restartPolicy Never.
    assert serving["gateway"].container("gateway")["restartPolicy"] == "Always"
    assert all("restartPolicy" not in pod.spec for pod in serving.values())


def test_the_gateway_stops_before_its_ray_node(serving):
    gateway = serving["gateway"]
    stop = gateway.container("gateway")["lifecycle"]["preStop"]["exec"]["command"]
    assert stop[:-1] == ["pkill", "-TERM", "-o", "-f"]
    assert stop[-1] in " ".join(gateway.container("gateway")["command"])
    program, seconds = gateway.spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    assert serve.STOP_GRACE_S < int(seconds) < gateway.spec["terminationGracePeriodSeconds"]


def test_probes_ask_the_health_service(serving):
    gateway = serving["gateway"]
    ours = gateway.container("gateway")
    ca = [str(PurePosixPath(mount["mountPath"], "ca.crt")) for mount in ours["volumeMounts"] if mount["name"] == "tls"]
    ready, alive = ours["readinessProbe"], ours["livenessProbe"]
    # The name is one of the certificate that docs/deploy.md makes; a test of healthy.py asks a gateway.
    expected = ["orbithash-healthy", f"localhost:{GATEWAY_PORT}", f"--ca={ca[0]}"]
    assert ready["exec"]["command"] == expected
    assert alive["exec"]["command"] == [*expected, "--alive"]
    assert "DNS:localhost" in (ROOT / "docs" / "deploy.md").read_text()
    # It does not listen before the network, places for the shards, and the shards are there, each within its own time.
    assert alive["initialDelaySeconds"] > 3 * shards.START_TIMEOUT_S + RAY_NODE_TIMEOUT_S
    assert "startupProbe" not in ours, "the pod's Ray node would wait for it"


# Resources.


def test_shards_find_room(serving):
    options = serve_options(serving["gateway"])
    group = serving["shards"].ray
    cpus = float(group["rayStartParams"]["num-cpus"])
    needed = options["shards"] * options["replicas"] * shards.SHARD_CPUS + encoder_pool.ENCODER_CPUS
    # serve does not wait for pods that the autoscaler could add.
    assert group["replicas"] == group["minReplicas"]
    assert needed <= cpus * group["minReplicas"]
    assert 2 * needed <= cpus * group["maxReplicas"], "while it moves to another archive both have their shards"
    assert options["replicas"] <= group["minReplicas"], "copies of a shard are worth little on one pod"
    for pod in serving.values():
        if pod.ray["groupName"] != "shards":
            assert pod.ray["rayStartParams"]["num-cpus"] == "0"
    # On fewer pods the autoscaler would end the gateway's.
    assert serving["gateway"].ray["minReplicas"] == serving["gateway"].ray["maxReplicas"] == 1


def test_sizes_differ():
    small, base, large = (by_group(build(KUBERNETES / name)) for name in ("overlays/small", "base", "overlays/large"))

    def size(pods):
        group = pods["shards"].ray
        memory = quantity(pods["shards"].spec["containers"][0]["resources"]["limits"]["memory"])
        return memory * group["minReplicas"], serve_options(pods["gateway"])["shards"]

    assert size(small)[0] < size(base)[0] < size(large)[0]
    assert size(small)[1] < size(base)[1] < size(large)[1]


@pytest.mark.parametrize("pod", all_pods())
def test_ray_counts_what_kubernetes_gives(pod):
    for container in pod.containers:
        memory = container["resources"]["requests"]["memory"]
        assert container["resources"]["limits"]["memory"] == memory, "what is only borrowed is taken back by killing"
    if pod.ray is None:
        return
    import ray.scripts.scripts

    known = {name for option in ray.scripts.scripts.start.params for name in option.opts}
    assert {f"--{name}" for name in pod.ray["rayStartParams"]} <= known
    num_cpus = float(pod.ray["rayStartParams"]["num-cpus"])
    if num_cpus:
        assert num_cpus == quantity(pod.spec["containers"][0]["resources"]["requests"]["cpu"])
    object_store = pod.ray["rayStartParams"].get("object-store-memory")
    (shm,) = [volume for volume in pod.spec.get("volumes", ()) if volume["name"] == "shm"] or [None]
    assert (object_store is None) == (shm is None)
    if shm is not None:
        assert int(object_store) <= quantity(shm["emptyDir"]["sizeLimit"])


@pytest.mark.parametrize("name", JOBS)
def test_jobs_find_room(name):
    (job,) = build(KUBERNETES / name)
    pods = by_group([job])
    group, container = pods["workers"].ray, pods["workers"].spec["containers"][0]
    assert pods["headgroup"].ray["rayStartParams"]["num-cpus"] == "0"
    cpus, gpus = (
        int(group["rayStartParams"]["num-cpus"]),
        int(container["resources"]["limits"].get("nvidia.com/gpu", 0)),
    )
    words = shlex.split(job["spec"]["entrypoint"])
    options = parsed(words)
    assert ("gpu" in name) == (gpus > 0)
    assert group["replicas"] == group["minReplicas"]
    if words[1] == "train":
        low, workers = runtime.parse_workers(options["workers"])
        assert low == workers
        # As cluster/training/train.py shares them out; a worker has to fit into a pod.
        each = max(1, cpus * group["replicas"] // workers)
        assert (cpus // each) * group["replicas"] >= workers
        assert options["gpus_per_worker"] * workers == gpus * group["replicas"]
        assert group["replicas"] == group["maxReplicas"]
        assert "enableInTreeAutoscaling" not in job["spec"]["rayClusterSpec"]
    else:
        low, high = runtime.parse_workers(options["workers"])
        assert low * encode.ENCODE_CPUS + encode.DECODE_CPUS <= cpus * group["minReplicas"]
        assert high * (encode.ENCODE_CPUS + encode.DECODE_CPUS) <= cpus * group["maxReplicas"]
        if gpus:
            assert low <= gpus * group["minReplicas"]
            assert high == gpus * group["maxReplicas"]
        assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is True


def test_the_jobs_lead_from_one_to_the_next():
    train, encoding = (parsed(shlex.split(build(KUBERNETES / name)[0]["spec"]["entrypoint"])) for name in JOBS[:2])
    assert encoding["model"] == train["out"] / "model"
    served = serve_options(by_group(build(KUBERNETES / "base"))["gateway"])
    # `current` is a link to one of the folders beside it; a gateway moves to no other (`serve._check_beside`).
    assert Path(served["archive"]).parent == Path(encoding["archive"]).parent
    assert served["model"].parents[1] == encoding["model"].parents[1]
    assert Path(served["archive"]).name == served["model"].parent.name == "current"


# Security.


@pytest.mark.parametrize("pod", all_pods())
def test_pods_fit_the_restricted_standard(pod):
    """The strictest of Kubernetes' pod security standards, with the numbers of the image's user."""
    of_pod = pod.spec["securityContext"]
    assert of_pod["runAsNonRoot"] is True
    assert (of_pod["runAsUser"], of_pod["runAsGroup"]) == (1000, 1000)
    assert "USER 1000:1000" in (DEPLOY / "images" / "Dockerfile").read_text()
    assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod.containers:
        context = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["securityContext"] == context
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys()
    kinds = {kind for volume in pod.spec.get("volumes", ()) for kind in volume.keys() - {"name"}}
    assert kinds <= {"emptyDir", "secret", "persistentVolumeClaim"}
    if pod.ray is None or pod.labels["ray.io/node-type"] == "worker":
        assert pod.spec["automountServiceAccountToken"] is False


def test_the_autoscaler_fits_it_too():
    for name in ("base", "jobs/encode"):
        spec = build(KUBERNETES / name)
        spec = next(each for each in spec if each["kind"].startswith("Ray"))["spec"]
        spec = spec.get("rayClusterSpec", spec)
        context = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert spec["autoscalerOptions"]["securityContext"] == context


def test_secrets_and_claims_are_made_by_somebody():
    """A secret by the guide, with the keys that are asked for; a claim by the base."""
    guide = (ROOT / "docs" / "deploy.md").read_text()
    made = {
        name: set(re.findall(r"--from-(?:file|literal)=([\w.]+)", options))
        for name, options in re.findall(r"create secret generic (\S+)((?:[^\n]*\\\n)*[^\n]*)", guide)
    }
    asked = {}
    claims = set()
    for name in FOLDERS:
        for pod in pods_of(build(KUBERNETES / name)):
            for volume in pod.spec.get("volumes", ()):
                claims |= {value["claimName"] for key, value in volume.items() if key == "persistentVolumeClaim"}
                if "secret" in volume:
                    keys = {item["key"] for item in volume["secret"].get("items", ())}
                    asked.setdefault(volume["secret"]["secretName"], set()).update(keys)
            for container in pod.containers:
                for variable in container.get("env", ()):
                    reference = variable.get("valueFrom", {}).get("secretKeyRef")
                    if reference:
                        asked.setdefault(reference["name"], set()).add(reference["key"])
    gateway = by_group(build(KUBERNETES / "base"))["gateway"]
    options = serve_options(gateway)
    asked["orbithash-tls"] |= {options["tls_cert"].name, options["tls_key"].name, "ca.crt"}
    asked["orbithash-tokens"].add(Path(gateway.container("tokens")["command"][-2]).name)
    assert asked.keys() == made.keys()
    for name, keys in asked.items():
        assert keys == made[name], name
    claim = next(each for each in build(KUBERNETES / "base") if each["kind"] == "PersistentVolumeClaim")
    assert claims == {claim["metadata"]["name"]}


def test_no_secret_is_in_a_file():
    for path in DEPLOY.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert "kind: Secret" not in text, path
            assert not re.search(r"BEGIN [A-Z ]*PRIVATE KEY|(?i:password|token): [\"']?[\w+/=]{16,}", text), path


# The network.


def test_every_pod_is_behind_the_policy(policies):
    closed = policies["orbithash"]
    assert closed["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in closed
    for name in FOLDERS:
        for pod in pods_of(build(KUBERNETES / name)):
            assert pod.is_selected(closed["podSelector"]), pod.name


def allowed(policies, pod, direction):
    """(selectors or None, ports or None) of all rules that hold for a pod."""
    word = {"ingress": "from", "egress": "to"}[direction]
    for policy in policies.values():
        if pod.is_selected(policy["podSelector"]):
            assert direction.capitalize() in policy["policyTypes"] or direction not in policy
            for rule in policy.get(direction, ()):
                ports = {port["port"] for port in rule["ports"]} if "ports" in rule else None
                yield rule.get(word), ports


def reaches(policies, source, target, port):
    def lets(pod, direction, other):
        return any(
            (peers is None or any(other.is_selected(peer["podSelector"]) for peer in peers))
            and (ports is None or port in ports)
            for peers, ports in allowed(policies, pod, direction)
        )

    return lets(source, "egress", target) and lets(target, "ingress", source)


def test_who_reaches_whom(policies):
    cluster = by_group(build(KUBERNETES / "base"))
    submitter, *_ = pods_of(build(KUBERNETES / "jobs/train"))
    (tools,) = pods_of(build(KUBERNETES / "tools"))
    head, shard, gateway = cluster["headgroup"], cluster["shards"], cluster["gateway"]
    for one, other in ((gateway, shard), (shard, gateway), (gateway, head), (shard, head), (head, shard)):
        assert reaches(policies, one, other, 6379)
        assert reaches(policies, one, other, 34567), "Ray takes ports as it needs them"
    assert reaches(policies, submitter, head, 8265)
    assert not reaches(policies, submitter, head, 6379)
    assert not reaches(policies, submitter, gateway, GATEWAY_PORT)
    assert reaches(policies, tools, gateway, GATEWAY_PORT)
    assert not reaches(policies, tools, head, 8265), "the command line of the gateway's users is no way into Ray"
    for pod in (submitter, tools):
        assert not reaches(policies, shard, pod, 6379)
    for pod in (head, shard, gateway, submitter, tools):
        assert any(peers is None and ports == {53} for peers, ports in allowed(policies, pod, "egress")), "DNS"
    anywhere = {
        name
        for name, pod in cluster.items()
        for peers, ports in allowed(policies, pod, "egress")
        if peers is None and ports != {53}
    }
    assert anywhere == {"headgroup"}, "its autoscaler asks the Kubernetes API"


def test_ports_agree(serving, policies):
    gateway = serving["gateway"]
    options = serve_options(gateway)
    ports = {port["name"]: port["containerPort"] for port in gateway.container("gateway")["ports"]}
    metrics = parse_address(options["metrics"])[1]
    assert ports == {"grpc": parse_address(options["address"])[1], "gateway-metrics": metrics}
    service = spec_of(build(KUBERNETES / "base"), "Service")
    assert [(port["port"], port["targetPort"]) for port in service["ports"]] == [(ports["grpc"], ports["grpc"])]
    assert gateway.is_selected({"matchLabels": service["selector"]})
    assert not any(pod.is_selected({"matchLabels": service["selector"]}) for pod in serving.values() if pod != gateway)
    (rule,) = policies["orbithash-gateway"]["ingress"]
    assert [port["port"] for port in rule["ports"]] == [ports["grpc"]]
    rays = {port["name"]: port["containerPort"] for port in gateway.spec["containers"][0]["ports"]}
    scraped = policies["orbithash-ray"]["ingress"][1]["ports"]
    assert {port["port"] for port in scraped} == {metrics, rays["metrics"]}
    (tools,) = pods_of(build(KUBERNETES / "tools"))
    env = {each["name"]: each.get("value") for each in tools.spec["containers"][0]["env"]}
    name = next(each for each in build(KUBERNETES / "base") if each["kind"] == "Service")["metadata"]["name"]
    assert env["ORBITHASH_ADDRESS"] == f"{name}:{ports['grpc']}"


# Monitoring.


def test_monitors_find_their_ports():
    monitors = [each for each in build(KUBERNETES / "monitoring") if each["kind"] == "PodMonitor"]
    pods = [pod for name in ("base", *JOBS[:2]) for pod in pods_of(build(KUBERNETES / name))]
    for monitor in monitors:
        found = [pod for pod in pods if pod.is_selected(monitor["spec"]["selector"])]
        assert found
        for pod in found:
            names = {port["name"] for container in pod.containers for port in container.get("ports", ())}
            assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= names, pod.name
    by_name = {monitor["metadata"]["name"]: monitor["spec"] for monitor in monitors}
    rays = [pod for pod in pods if "ray.io/group" in pod.labels]
    assert all(pod.is_selected(by_name["orbithash-ray"]["selector"]) for pod in rays)
    (endpoint,) = by_name["orbithash-gateway"]["podMetricsEndpoints"]
    job = {"action": "replace", "targetLabel": "job", "replacement": "orbithash"}
    assert endpoint["relabelings"] == [job]
    (rules,) = documents(DEPLOY / "prometheus" / "orbithash.rules.yml")
    assert 'job="orbithash"' in json.dumps(rules).replace('\\"', '"')


def test_the_rules_are_those_of_prometheus():
    (rule,) = [each for each in build(KUBERNETES / "monitoring") if each["kind"] == "PrometheusRule"]
    assert rule["spec"] == documents(DEPLOY / "prometheus" / "orbithash.rules.yml")[0]


def test_ray_is_not_told_to_remember_each_search(serving):
    for pod in serving.values():
        for container in pod.containers:
            if container["name"] != "tokens":
                env = {each["name"]: each.get("value") for each in container["env"]}
                assert env["RAY_task_events_report_interval_ms"] == "0"
    assert "RAY_task_events_report_interval_ms" in inspect.getsource(runtime.connected), "as a cluster of our own is"


@pytest.mark.parametrize(
    ("test", "change"),
    [
        (test_shards_find_room, lambda pods: pods["shards"].ray.update(replicas=1, minReplicas=1)),
        (test_shards_find_room, lambda pods: pods["gateway"].ray["rayStartParams"].update({"num-cpus": "1"})),
        (test_the_gateway_is_protected, lambda pods: words(pods).remove("--tokens=/run/orbithash/tokens")),
        (test_the_gateway_is_protected, lambda pods: words(pods).append("--local")),
        (test_the_gateway_has_a_ray_node_in_its_pod, lambda pods: pods["gateway"].spec.pop("shareProcessNamespace")),
        (
            test_the_gateway_starts_again_by_itself,
            lambda pods: pods["gateway"].container("gateway").pop("restartPolicy"),
        ),
        (
            test_the_gateway_stops_before_its_ray_node,
            lambda pods: (
                pods["gateway"].spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"].__setitem__(1, "5")
            ),
        ),
        (test_the_tokens_are_only_the_owners_to_read, lambda pods: words(pods).append("--tokens=/data/tokens")),
        (test_probes_ask_the_health_service, lambda pods: words(pods, "livenessProbe").pop()),
        (test_ray_is_not_told_to_remember_each_search, lambda pods: pods["shards"].containers[0]["env"].pop(0)),
    ],
)
def test_the_checks_find_what_is_wrong(test, change):
    pods = copy.deepcopy(by_group(build(KUBERNETES / "base")))
    test(pods)
    change(pods)
    with pytest.raises((AssertionError, KeyError, ValueError)):
        test(pods)


def words(pods, probe=None):
    gateway = pods["gateway"].container("gateway")
    return gateway["command"] if probe is None else gateway[probe]["exec"]["command"]
