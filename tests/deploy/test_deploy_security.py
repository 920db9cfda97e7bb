"""Security of the pods, secrets, network policies, and what Prometheus scrapes."""

import json
import re
from pathlib import Path

import pytest
from deploy_manifests import (
    DEPLOY,
    FOLDERS,
    GATEWAY_PORT,
    JOBS,
    KUBERNETES,
    ROOT,
    WAYS_OUT,
    Pod,
    all_pods,
    build,
    by_group,
    cluster_spec,
    documents,
    pods_of,
    policies_of,
    serve_options,
    spec_of,
)

from orbithash.search.protocol.address import parse_address


@pytest.mark.parametrize("pod", all_pods())
def test_pods_fit_the_restricted_standard(pod):
    """The strictest of Kubernetes' pod security standards, with the user id of the image."""
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


@pytest.mark.parametrize("name", ["base", "jobs/encode"])
def test_the_autoscaler_fits_the_restricted_standard(name):
    context = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert cluster_spec(build(KUBERNETES / name))["autoscalerOptions"]["securityContext"] == context


def test_every_secret_and_claim_is_created():
    """The guide creates each secret with the keys that pods read; the folders create the claims."""
    guide = (ROOT / "docs/operate/deploy.md").read_text()
    created = {
        name: set(re.findall(r"--from-(?:file|literal)=([\w.]+)", options))
        for name, options in re.findall(r"create secret generic (\S+)((?:[^\n]*\\\n)*[^\n]*)", guide)
    }
    read = {}
    claims, created_claims = set(), set()
    for name in FOLDERS:
        objects = build(KUBERNETES / name)
        created_claims |= {each["metadata"]["name"] for each in objects if each["kind"] == "PersistentVolumeClaim"}
        for each in objects:
            if "gcsFaultToleranceOptions" in each.get("spec", {}):
                reference = each["spec"]["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]
                read[reference["name"]] = {reference["key"]}
        for pod in pods_of(objects):
            for volume in pod.spec.get("volumes", ()):
                claims |= {value["claimName"] for key, value in volume.items() if key == "persistentVolumeClaim"}
                if "secret" in volume:
                    keys = {item["key"] for item in volume["secret"].get("items", ())}
                    read.setdefault(volume["secret"]["secretName"], set()).update(keys)
            for container in pod.containers:
                for variable in container.get("env", ()):
                    reference = variable.get("valueFrom", {}).get("secretKeyRef")
                    if reference:
                        read.setdefault(reference["name"], set()).add(reference["key"])
    gateway = by_group(build(KUBERNETES / "base"))["gateway"]
    options = serve_options(gateway)
    read["orbithash-tls"] |= {options["tls_cert"].name, options["tls_key"].name, "ca.crt"}
    read["orbithash-tokens"].add(Path(gateway.container("tokens")["command"][-2]).name)
    assert read == created
    assert claims == created_claims


def test_no_file_contains_a_secret():
    for path in DEPLOY.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert "kind: Secret" not in text, path
            assert not re.search(r"BEGIN [A-Z ]*PRIVATE KEY|(?i:password|token): [\"']?[\w+/=]{16,}", text), path


# The network.


def test_the_default_policy_covers_every_pod(policies):
    closed = policies["orbithash"]
    assert closed["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in closed
    for name in FOLDERS:
        for pod in pods_of(build(KUBERNETES / name)):
            assert pod.is_selected(closed["podSelector"]), pod.name


def allowed(policies, pod, direction):
    """Yield (selectors or None, ports or None) of all rules that apply to a pod."""
    peers = {"ingress": "from", "egress": "to"}[direction]
    for policy in policies.values():
        if pod.is_selected(policy["podSelector"]):
            assert direction.capitalize() in policy["policyTypes"] or direction not in policy
            for rule in policy.get(direction, ()):
                ports = {port["port"] for port in rule["ports"]} if "ports" in rule else None
                yield rule.get(peers), ports


def reaches(policies, source, target, port):
    """Return whether the policies let `source` open a connection to a port of `target`."""

    def allows(pod, direction, other):
        return any(
            (peers is None or any(other.is_selected(peer["podSelector"]) for peer in peers))
            and (ports is None or port in ports)
            for peers, ports in allowed(policies, pod, direction)
        )

    return allows(source, "egress", target) and allows(target, "ingress", source)


def ports_anywhere(policies, pod):
    """Return the ports that a pod may reach at any address, without DNS."""
    rules = [ports for peers, ports in allowed(policies, pod, "egress") if peers is None]
    assert {53} in rules, "DNS"
    return set().union(*rules) - {53}


def test_who_reaches_whom(policies):
    cluster = by_group(build(KUBERNETES / "base"))
    submitter, *_ = pods_of(build(KUBERNETES / "jobs/train"))
    (tools,) = pods_of(build(KUBERNETES / "tools"))
    head, shard, gateway = cluster["headgroup"], cluster["shards"], cluster["gateway"]
    for one, other in ((gateway, shard), (shard, gateway), (gateway, head), (shard, head), (head, shard)):
        assert reaches(policies, one, other, 6379)
        assert reaches(policies, one, other, 34567), "Ray chooses its ports"
    assert reaches(policies, submitter, head, 8265)
    assert not reaches(policies, submitter, head, 6379)
    assert not reaches(policies, submitter, gateway, GATEWAY_PORT)
    assert reaches(policies, tools, gateway, GATEWAY_PORT)
    assert not reaches(policies, tools, head, 8265), "users of the gateway must not be able to run Ray jobs"
    for pod in (submitter, tools):
        assert not reaches(policies, shard, pod, 6379)
    for pod in (shard, gateway, submitter, tools):
        assert ports_anywhere(policies, pod) == set()
    assert ports_anywhere(policies, head) == {443, 6443}, "its autoscaler calls the Kubernetes API"


def opened(policies, pod, target, port):
    """Return whether the policies let a pod open a connection to a port of `target`, a pod of another program."""
    return any(
        (ports is None or port in ports) and any(target.is_selected(peer["podSelector"]) for peer in peers or ())
        for peers, ports in allowed(policies, pod, "egress")
    )


@pytest.mark.parametrize("way", WAYS_OUT)
def test_each_way_out_is_closed_until_its_overlay_is_applied(policies, way):
    own = build(KUBERNETES / way)
    assert {each["kind"] for each in own} == {"NetworkPolicy"}, "it can be applied beside every cluster and job"
    more = {**policies, **policies_of(own)}
    minio, mlflow = (Pod(name, {"app": name}, {}, None) for name in ("minio", "mlflow"))

    def ways(policies, pod):
        return {
            "overlays/object-store/https": 443 in ports_anywhere(policies, pod),
            "overlays/object-store/in-cluster": opened(policies, pod, minio, 9000),
            "overlays/tracker": opened(policies, pod, mlflow, 5000),
        }

    for name in FOLDERS:
        for pod in pods_of(build(KUBERNETES / name)):
            before, after = ways(policies, pod), ways(more, pod)
            component = pod.labels["app.kubernetes.io/component"]
            # The autoscaler of a head calls the Kubernetes API by HTTPS.
            is_head = pod.labels.get("ray.io/node-type") == "head"
            assert before == {**dict.fromkeys(before, False), WAYS_OUT[0]: is_head}
            trains = component in ("head", "job")
            reads = trains or component in ("gateway", "shards", "encoders", "tools")
            assert after == {**before, way: before[way] or (trains if way == "overlays/tracker" else reads)}
            assert ports_anywhere(more, pod) <= ports_anywhere(policies, pod) | {443}


def test_only_the_head_reaches_redis(policies):
    objects = build(KUBERNETES / "overlays/head-fault-tolerance")
    more = policies_of(objects)
    host, port = cluster_spec(objects)["gcsFaultToleranceOptions"]["redisAddress"].split(":")
    redis = Pod(host, {"app": host}, {}, None)
    for pod in by_group(objects).values():
        assert not opened(policies, pod, redis, int(port))
        assert opened(more, pod, redis, int(port)) == (pod.ray["groupName"] == "headgroup")
    # KubeRay makes the pod that removes the state of a deleted cluster of the head's template, with another node type.
    head = by_group(objects)["headgroup"]
    cleaning = head._replace(labels={**head.labels, "ray.io/node-type": "redis-cleanup"})
    assert opened(more, cleaning, redis, int(port))


def test_ports_agree(serving, policies):
    gateway = serving["gateway"]
    options = serve_options(gateway)
    ports = {port["name"]: port["containerPort"] for port in gateway.container("gateway")["ports"]}
    metrics = parse_address(options["metrics"])[1]
    assert ports == {"grpc": parse_address(options["address"])[1], "gateway-metrics": metrics}
    service = spec_of(build(KUBERNETES / "base"), "Service")
    assert [(port["port"], port["targetPort"]) for port in service["ports"]] == [(ports["grpc"], ports["grpc"])]
    gateways = [serving["gateway"], serving["gateways"]]
    for pod in serving.values():
        assert pod.is_selected({"matchLabels": service["selector"]}) == (pod in gateways)
    (rule,) = policies["orbithash-gateway"]["ingress"]
    assert [port["port"] for port in rule["ports"]] == [ports["grpc"]]
    ray_ports = {port["name"]: port["containerPort"] for port in gateway.spec["containers"][0]["ports"]}
    scraped = policies["orbithash-ray"]["ingress"][1]["ports"]
    assert {port["port"] for port in scraped} == {metrics, ray_ports["metrics"]}
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
    ray_pods = [pod for pod in pods if "ray.io/group" in pod.labels]
    assert all(pod.is_selected(by_name["orbithash-ray"]["selector"]) for pod in ray_pods)
    (endpoint,) = by_name["orbithash-gateway"]["podMetricsEndpoints"]
    job = {"action": "replace", "targetLabel": "job", "replacement": "orbithash"}
    assert endpoint["relabelings"] == [job]
    (rules,) = documents(DEPLOY / "prometheus" / "orbithash.rules.yml")
    assert 'job="orbithash"' in json.dumps(rules).replace('\\"', '"')


def test_the_operators_rules_are_those_of_prometheus():
    (rule,) = [each for each in build(KUBERNETES / "monitoring") if each["kind"] == "PrometheusRule"]
    assert rule["spec"] == documents(DEPLOY / "prometheus" / "orbithash.rules.yml")[0]
