"""The gateway's pod: protection, Ray node, probes, restart and stop, and room for its shards."""

import copy
import inspect
import math
from pathlib import PurePosixPath

import pytest
from deploy_manifests import GATEWAY_PORT, KUBERNETES, ROOT, build, by_group, quantity, serve_options, spec_of

from orbithash.cluster import runtime
from orbithash.cluster.serving import encoder_pool, memory, serve, shards
from orbithash.search.protocol.address import is_loopback, parse_address

# Seconds that Ray gives a driver to find the node in its pod.
RAY_NODE_TIMEOUT_S = 60


def test_the_gateway_is_protected(serving):
    options = serve_options(serving["gateway"])
    for address in (options["address"], options["metrics"]):
        assert not is_loopback(parse_address(address)[0])
    assert parse_address(options["address"])[1] == GATEWAY_PORT
    assert not options["local"]
    assert options["tls_cert"]
    assert options["tls_key"]
    assert options["tokens"]
    assert options["open_metrics"]
    assert not options["insecure_listen"], "with it, serve would start without a certificate"


def test_only_the_owner_can_read_the_tokens(serving):
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
    assert gateway.ray["rayStartParams"]["num-cpus"] == "0", "Ray would place shards on this node"
    assert gateway.spec["containers"][0]["name"] == "ray-worker", "KubeRay takes the first container for Ray's"

    def volumes(container):
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        return mounts["/tmp/ray"], mounts["/dev/shm"]

    driver, node = gateway.container("gateway"), gateway.spec["containers"][0]
    assert volumes(driver) == volumes(node)
    assert "runAsUser" not in driver["securityContext"]
    assert "runAsUser" not in node["securityContext"]
    env = {each["name"]: each for each in driver["env"]}
    # KubeRay sets both in the containers of Ray only.
    assert env["RAY_AUTH_MODE"]["value"] == "token"
    cluster = spec_of(build(KUBERNETES / "base"), "RayCluster")
    secret = {"name": cluster["authOptions"]["secretName"], "key": "auth_token"}
    assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == secret
    # The head's service, named after the label that KubeRay sets on every pod. Kubernetes expands only variables that
    # are defined earlier in the list.
    assert env["RAY_CLUSTER"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['ray.io/cluster']"
    assert env["RAY_ADDRESS"]["value"] == "$(RAY_CLUSTER)-head-svc:6379"
    assert list(env).index("RAY_CLUSTER") < list(env).index("RAY_ADDRESS")


def test_further_gateways_join_the_first_and_are_pods_like_it(serving):
    first, further = copy.deepcopy(serving["gateway"]), copy.deepcopy(serving["gateways"])
    for pod in (first, further):
        options = serve_options(pod)
        own = ("join", "model", "shards", "replicas", "segments", "gpus_per_encoder")
        assert options["join"] == (pod is further)
        assert (options["model"] is None) == (pod is further), "a gateway that joins takes the model of the first"
        pod.container("gateway")["command"] = {name: value for name, value in options.items() if name not in own}
    assert first.template == further.template, "one service, one policy and one monitor select both"
    assert first.ray["rayStartParams"] == further.ray["rayStartParams"]
    numbers = {further.ray[name] for name in ("replicas", "minReplicas", "maxReplicas")}
    assert len(numbers) == 1, "the autoscaler must not remove pods of gateways"


def test_shards_keep_their_files_on_their_nodes(serving):
    folder = str(serve_options(serving["gateway"])["segments"])
    (container,) = serving["shards"].spec["containers"]
    (name,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == folder]
    (volume,) = [each for each in serving["shards"].spec["volumes"] if each["name"] == name]
    assert "emptyDir" in volume, "files of shards are not shared between nodes"
    assert volume["emptyDir"].get("medium") != "Memory"


def test_the_gateway_restarts_by_itself(serving):
    # Version 2 of the autoscaler sets every pod's own restartPolicy to Never.
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
    container = serving["gateway"].container("gateway")
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    ready, alive = (container[name]["exec"]["command"] for name in ("readinessProbe", "livenessProbe"))
    # "localhost" is one of the certificate's names in docs/operate/deploy.md; test_deploy_images.py runs the program.
    assert ready == ["orbithash-healthy", f"localhost:{GATEWAY_PORT}", f"--ca={PurePosixPath(mounts['tls'], 'ca.crt')}"]
    assert "DNS:localhost" in (ROOT / "docs/operate/deploy.md").read_text()
    assert alive[: len(ready) + 1] == [*ready, "--alive"]
    assert "startupProbe" not in container, "the pod's Ray node would wait for it, and the gateway waits for the node"


def test_a_gateway_that_hangs_is_restarted_within_a_minute_and_one_that_loads_is_not(serving):
    container = serving["gateway"].container("gateway")
    probe = container["livenessProbe"]
    options = dict(word.split("=", 1) for word in probe["exec"]["command"] if "=" in word)
    # Placing the shards, starting the network and loading the shards each have their own timeout.
    assert int(options["--start-limit"]) > 3 * shards.START_TIMEOUT_S + RAY_NODE_TIMEOUT_S
    # It hangs just after an answer. Kubelet begins a probe in each period, ends the last one at its timeout, and kills
    # what has not ended after the grace period.
    assert probe["timeoutSeconds"] <= probe["periodSeconds"]
    noticed_s = probe["failureThreshold"] * probe["periodSeconds"] + probe["timeoutSeconds"]
    assert noticed_s + probe["terminationGracePeriodSeconds"] < 60
    assert probe["failureThreshold"] >= 3, "one late answer is no reason for a restart"
    # A gateway that only has to stop can end by itself.
    assert probe["terminationGracePeriodSeconds"] > serve.STOP_GRACE_S
    # A file on a volume would outlive the container, and the restarted one would have no time to load.
    file = PurePosixPath(options["--start-file"])
    assert not any(file.is_relative_to(mount["mountPath"]) for mount in container["volumeMounts"])


def test_shards_find_room(serving):
    options = serve_options(serving["gateway"])
    group = serving["shards"].ray
    cpus = float(group["rayStartParams"]["num-cpus"])
    needed = options["shards"] * options["replicas"] * shards.SHARD_CPUS + encoder_pool.ENCODER_CPUS
    # serve does not wait for pods that the autoscaler could add.
    assert group["replicas"] == group["minReplicas"]
    assert needed <= cpus * group["minReplicas"]
    assert 2 * needed <= cpus * group["maxReplicas"], "while the gateway moves, both archives have shards"
    assert options["replicas"] <= group["minReplicas"], "replicas of a shard on one pod fail together"
    # Ray places no shard elsewhere: the other pods have no CPUs for it, or not the memory that it asks for.
    smallest = memory.asked_bytes(0, 64, options["shards"])
    for pod in serving.values():
        if pod.ray["groupName"] != "shards":
            params = pod.ray["rayStartParams"]
            assert params["num-cpus"] == "0" or int(params["memory"]) < smallest
    # The autoscaler must not remove the gateway's pod.
    assert serving["gateway"].ray["minReplicas"] == serving["gateway"].ray["maxReplicas"] == 1


def test_a_pod_of_shards_holds_its_share_of_small_ones(serving):
    """Ray counts the memory of each replica; those of a large archive need larger pods, and `serve` says so."""
    options, group = serve_options(serving["gateway"]), serving["shards"].ray
    each = memory.asked_bytes(10**7, 64, options["shards"])
    of_pod = math.ceil(options["shards"] * options["replicas"] / group["minReplicas"])
    assert of_pod * each <= int(group["rayStartParams"]["memory"])


def test_the_network_of_queries_is_on_a_gpu():
    pods = by_group(build(KUBERNETES / "overlays/gpu/serve"))
    options, group = serve_options(pods["gateway"]), pods["encoders"].ray
    low, _ = runtime.parse_workers(options["encoders"])
    gpus, cpus = (int(group["rayStartParams"][name]) for name in ("num-gpus", "num-cpus"))
    assert options["gpus_per_encoder"] * low <= gpus * group["minReplicas"]
    assert 2 * options["gpus_per_encoder"] * low <= gpus * group["maxReplicas"], "while the gateway moves"
    assert cpus >= encoder_pool.ENCODER_CPUS
    assert all("num-gpus" not in pod.ray["rayStartParams"] for name, pod in pods.items() if name != "encoders")


def test_sizes_differ():
    small, base, large = (by_group(build(KUBERNETES / name)) for name in ("overlays/small", "base", "overlays/large"))

    def size(pods):
        group = pods["shards"].ray
        of_pod = quantity(pods["shards"].spec["containers"][0]["resources"]["limits"]["memory"])
        return of_pod * group["minReplicas"], serve_options(pods["gateway"])["shards"]

    assert size(small)[0] < size(base)[0] < size(large)[0]
    assert size(small)[1] < size(base)[1] < size(large)[1]


def test_ray_does_not_store_an_event_for_each_search(serving):
    for pod in serving.values():
        for container in pod.containers:
            if container["name"] != "tokens":
                env = {each["name"]: each.get("value") for each in container["env"]}
                assert env["RAY_task_events_report_interval_ms"] == "0"
    assert "RAY_task_events_report_interval_ms" in inspect.getsource(runtime.connected), "a local cluster does the same"


@pytest.mark.parametrize(
    ("test", "change"),
    [
        (test_shards_find_room, lambda pods: pods["shards"].ray.update(replicas=1, minReplicas=1)),
        (test_shards_find_room, lambda pods: pods["gateway"].ray["rayStartParams"].update({"num-cpus": "1"})),
        (
            test_further_gateways_join_the_first_and_are_pods_like_it,
            lambda pods: pods["gateways"].container("gateway")["command"].remove("--join"),
        ),
        (
            test_further_gateways_join_the_first_and_are_pods_like_it,
            lambda pods: pods["gateways"].container("gateway")["command"].remove("--tokens=/run/orbithash/tokens"),
        ),
        (
            test_shards_keep_their_files_on_their_nodes,
            lambda pods: command(pods).remove("--segments=/var/orbithash/segments"),
        ),
        (test_the_gateway_is_protected, lambda pods: command(pods).remove("--tokens=/run/orbithash/tokens")),
        (test_the_gateway_is_protected, lambda pods: command(pods).append("--local")),
        (test_the_gateway_has_a_ray_node_in_its_pod, lambda pods: pods["gateway"].spec.pop("shareProcessNamespace")),
        (test_the_gateway_restarts_by_itself, lambda pods: pods["gateway"].container("gateway").pop("restartPolicy")),
        (
            test_the_gateway_stops_before_its_ray_node,
            lambda pods: (
                pods["gateway"].spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"].__setitem__(1, "5")
            ),
        ),
        (test_only_the_owner_can_read_the_tokens, lambda pods: command(pods).append("--tokens=/data/tokens")),
        (test_probes_ask_the_health_service, lambda pods: command(pods, "livenessProbe").remove("--alive")),
        (
            test_a_gateway_that_hangs_is_restarted_within_a_minute_and_one_that_loads_is_not,
            lambda pods: pods["gateway"].container("gateway")["livenessProbe"].update(failureThreshold=6),
        ),
        (test_ray_does_not_store_an_event_for_each_search, lambda pods: pods["shards"].containers[0]["env"].pop(0)),
    ],
)
def test_the_checks_find_errors(test, change):
    pods = copy.deepcopy(by_group(build(KUBERNETES / "base")))
    test(pods)
    change(pods)
    with pytest.raises((AssertionError, KeyError, ValueError)):
        test(pods)


def command(pods, probe=None):
    gateway = pods["gateway"].container("gateway")
    return gateway["command"] if probe is None else gateway[probe]["exec"]["command"]
