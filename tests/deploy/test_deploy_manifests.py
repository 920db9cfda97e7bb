"""The manifests against real readers: Kubernetes' schemas, Ray's autoscaler and the command line.

Not covered, because no package contains the schemas: the fields of PodMonitor and PrometheusRule; those of RayCluster
and RayJob are compared with a list of our own (`kuberay_fields`). Nor is anything that only a running cluster shows.
The API server checks the names: `kubectl apply --dry-run=server`, as docs/operate/deploy.md says.
"""

import copy
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
    all_pods,
    build,
    by_group,
    cluster_spec,
    documents,
    parsed,
    pods_of,
    quantity,
    serve_options,
    spec_of,
)
from kuberay_fields import KINDS, KUBERAY_VERSION, check_fields, kubernetes_parts

from orbithash.cluster import runtime
from orbithash.cluster.encoding import encode

# The first version with sidecars, which restart whatever the pod's restartPolicy is, and the newest known one.
KUBERNETES_VERSIONS = ("1.29", kubernetes_validate.latest_version())
# Kinds of the Prometheus operator, whose schemas no package contains.
UNKNOWN_KINDS = {"PodMonitor", "PrometheusRule"}
# Bytes of a Ray pod's limit that Ray does not give out, besides shared memory: its own processes.
RESERVED = 2**29

SITE_PACKAGES = "/opt/orbithash/lib/python3.11/site-packages/"


# Schemas.


def check_object(each):
    """Check one object and its pods against Kubernetes' schemas and the API server's rules that no schema holds."""
    if each["kind"] in KINDS:
        check_fields(each)
        check_kubernetes(kubernetes_parts(cluster_spec([each])))
    elif each["kind"] not in UNKNOWN_KINDS:
        check_kubernetes(each)
    for pod in pods_of([each]):
        if each["kind"] != "Pod":
            template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "any"}}
            check_kubernetes({**template, "template": pod.template})
        for container in pod.containers:
            names = [mount["name"] for mount in container.get("volumeMounts", ())]
            assert set(names) <= {volume["name"] for volume in pod.spec.get("volumes", ())}
            assert all(len(port["name"]) <= 15 for port in container.get("ports", ()))
            for amounts in container["resources"].values():
                assert all(quantity(value) > 0 for value in amounts.values())
        names = [container["name"] for container in pod.containers]
        assert len(set(names)) == len(names)


def check_kubernetes(each):
    for version in KUBERNETES_VERSIONS:
        kubernetes_validate.validate(each, version, strict=True)


def test_every_object_fits_its_schema(folder):
    objects = build(KUBERNETES / folder)
    for each in objects:
        check_object(each)
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(set(names)) == len(names)


def node_types(objects):
    """Return the node types of the Ray cluster as Ray's autoscaler reads them from KubeRay's object."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = {"metadata": {"name": "any", "namespace": "any"}, "spec": cluster_spec(objects)}
    return _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]


@pytest.mark.parametrize("name", [*SERVING, *JOBS, "jobs/cluster"])
def test_rays_autoscaler_reads_the_cluster(name):
    objects = build(KUBERNETES / name)
    pods = by_group(objects)
    found = node_types(objects)
    assert found.keys() == pods.keys()
    for group, node_type in found.items():
        pod, resources_ = pods[group], node_type["resources"]
        limits = pod.spec["containers"][0]["resources"]["limits"]
        assert resources_["memory"] == int(pod.ray["rayStartParams"]["memory"])
        assert resources_.get("GPU", 0) == int(limits.get("nvidia.com/gpu", 0))
        assert resources_["CPU"] == int(pod.ray["rayStartParams"]["num-cpus"])
        if group != "headgroup":
            limits = node_type["min_workers"], node_type["max_workers"]
            assert limits == (pod.ray["minReplicas"], pod.ray["maxReplicas"])


def test_every_file_is_used():
    used = {KUBERNETES / name / "kustomization.yaml" for name in FOLDERS}
    for name in FOLDERS:
        (kustomization,) = documents(KUBERNETES / name / "kustomization.yaml")
        used |= {KUBERNETES / name / resource for resource in kustomization["resources"]}
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


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("RayCluster", lambda spec: spec.pop("headGroupSpec")),
        ("RayCluster", lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": "none"})),
        ("RayCluster", lambda spec: spec["workerGroupSpecs"][0].update(minReplicas="2")),
        ("RayCluster", lambda spec: spec["workerGroupSpecs"][0].update(minReplicas=9)),
        ("RayCluster", lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"].update(container=[])),
        ("RayCluster", lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"]["volumes"].pop()),
        ("RayCluster", lambda spec: spec["workerGroupSpecs"][0]["rayStartParams"].update(memory=2**30)),
        ("RayCluster", lambda spec: spec["workerGroupSpecs"][0].update(replica=2)),
        ("RayCluster", lambda spec: spec.update(upgradeStrategy="Recreate")),
        ("RayCluster", lambda spec: spec["autoscalerOptions"]["resources"].update(limit={})),
        ("NetworkPolicy", lambda spec: spec.update(policyType=["Ingress"])),
        ("Service", lambda spec: spec["ports"][0].update(port="50051")),
        ("PersistentVolumeClaim", lambda spec: spec.update(accessModes="ReadWriteMany")),
    ],
)
def test_the_readers_refuse_errors(kind, change):
    objects = copy.deepcopy(build(KUBERNETES / "base"))
    change(spec_of(objects, kind))

    def check():
        node_types(objects)
        for each in objects:
            check_object(each)

    with pytest.raises((jsonschema.ValidationError, AssertionError, KeyError, ValueError)):
        check()


# Versions and images.


def test_versions_of_ray_agree():
    constraints = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert constraints["ray"] == metadata.version("ray")
    found = re.findall(r"rayVersion: (\S+)", "".join(path.read_text() for path in KUBERNETES.rglob("*.yaml")))
    assert set(found) == {constraints["ray"]}
    assert len(found) == 4


def test_every_image_is_of_this_version(folder):
    expected = f"orbithash:{VERSION}-cuda" if "gpu" in folder else f"orbithash:{VERSION}"
    for pod in pods_of(build(KUBERNETES / folder)):
        assert {container["image"] for container in pod.containers} == {expected}


def test_the_image_and_the_paths_have_the_same_python():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    minor = settings["tool"]["mypy"]["python_version"]
    assert f"ARG PYTHON={minor}." in (DEPLOY / "images" / "Dockerfile").read_text()
    assert f"/python{minor}/" in SITE_PACKAGES


# Command lines.


def commands(folder):
    """Yield the words of each orbithash command in the manifests, with the container that runs it."""
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
def test_command_lines_are_valid_and_their_paths_are_mounted(name):
    found = list(commands(name))
    assert found
    for words, container in found:
        for name, value in parsed(words).items():
            path = str(value)
            # The folder of segments is mounted into the pods of shards; see test_deploy_gateway.py.
            if not path.startswith("/") or name == "segments":
                continue
            if path.startswith(SITE_PACKAGES):
                package, *rest = PurePosixPath(path.removeprefix(SITE_PACKAGES)).parts[1:]
                assert resources.files(f"orbithash.{package}").joinpath(*rest).is_file(), path
            else:
                mounts = [mount["mountPath"] + "/" for mount in container["volumeMounts"]]
                assert any(path.startswith(mount) for mount in mounts), path


def test_the_guide_names_the_version_whose_fields_are_used():
    guide = (ROOT / "docs/operate/deploy.md").read_text()
    assert re.search(r"manifests were written\s+for (\d+\.\d+)", guide)[1] == KUBERAY_VERSION


def test_an_unknown_option_is_found():
    (words, _), *_ = commands("base")
    parsed(words)
    with pytest.raises(Exception, match="No such option"):
        parsed([*words, "--shard=3"])


def test_the_jobs_lead_from_one_to_the_next():
    train, encoding = (parsed(shlex.split(build(KUBERNETES / name)[0]["spec"]["entrypoint"])) for name in JOBS[:2])
    assert encoding["model"] == train["out"] / "model"
    served = serve_options(by_group(build(KUBERNETES / "base"))["gateway"])
    # `current` is a link to one of the folders beside it; a gateway moves only to those (`serve._check_beside`).
    assert Path(served["archive"]).parent == Path(encoding["archive"]).parent
    assert served["model"].parents[1] == encoding["model"].parents[1]
    assert Path(served["archive"]).name == served["model"].parent.name == "current"


# Resources.


@pytest.mark.parametrize("pod", all_pods())
def test_ray_counts_what_kubernetes_gives(pod):
    for container in pod.containers:
        memory = container["resources"]["requests"]["memory"]
        assert container["resources"]["limits"]["memory"] == memory, (
            "memory above the request can cost the pod its life"
        )
    if pod.ray is None:
        return
    import ray.scripts.scripts

    known = {name for option in ray.scripts.scripts.start.params for name in option.opts}
    assert {f"--{name}" for name in pod.ray["rayStartParams"]} <= known
    options, given = pod.ray["rayStartParams"], pod.spec["containers"][0]["resources"]
    assert float(options["num-cpus"]) <= quantity(given["requests"]["cpu"])
    assert options.get("num-gpus", "0") == str(given["limits"].get("nvidia.com/gpu", 0))
    (shm,) = [volume["emptyDir"] for volume in pod.spec["volumes"] if volume["name"] == "shm"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in pod.spec["containers"][0]["volumeMounts"]
    shared = quantity(shm["sizeLimit"])
    assert int(options["object-store-memory"]) <= shared
    # Shared memory counts against the limit. By default Ray would give out all of the limit.
    assert int(options["memory"]) + shared + RESERVED <= quantity(given["limits"]["memory"])


@pytest.mark.parametrize("name", JOBS)
def test_jobs_find_room(name):
    (job,) = [each for each in build(KUBERNETES / name) if each["kind"] == "RayJob"]
    pods = by_group([job])
    group, container = pods["workers"].ray, pods["workers"].spec["containers"][0]
    assert pods["headgroup"].ray["rayStartParams"]["num-cpus"] == "0"
    cpus = int(group["rayStartParams"]["num-cpus"])
    gpus = int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
    words = shlex.split(job["spec"]["entrypoint"])
    options = parsed(words)
    assert ("gpu" in name) == (gpus > 0)
    assert group["replicas"] == group["minReplicas"]
    low, high = runtime.parse_workers(options["workers"])
    if words[1] == "train":
        assert low == high
        # As cluster/training/train.py divides the CPUs; a worker must fit into a pod.
        per_worker = max(1, cpus * group["replicas"] // high)
        assert (cpus // per_worker) * group["replicas"] >= high
        assert options["gpus_per_worker"] * high == gpus * group["replicas"]
        assert group["replicas"] == group["maxReplicas"]
        assert "enableInTreeAutoscaling" not in job["spec"]["rayClusterSpec"]
    else:
        assert low * encode.ENCODE_CPUS + encode.DECODE_CPUS <= cpus * group["minReplicas"]
        assert high * (encode.ENCODE_CPUS + encode.DECODE_CPUS) <= cpus * group["maxReplicas"]
        if gpus:
            assert low <= gpus * group["minReplicas"]
            assert high == gpus * group["maxReplicas"]
        assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is True


@pytest.mark.parametrize("name", JOBS)
def test_a_job_that_fails_builds_no_second_cluster(name):
    """KubeRay cannot tell a wrong option from a lost head, and each retry is a new cluster."""
    job = spec_of(build(KUBERNETES / name), "RayJob")
    assert job["backoffLimit"] == 0
    assert job["shutdownAfterJobFinishes"] is True
    assert job["ttlSecondsAfterFinished"] <= 600, "the nodes of a finished job cost money"


def test_the_cluster_for_submit_grows_for_jobs_and_has_what_they_need(monkeypatch):
    """Its pods are like those of the jobs with clusters of their own, but there are none until a job waits for them."""
    objects = build(KUBERNETES / "jobs/cluster")
    pods, of_job = by_group(objects), by_group(build(KUBERNETES / "jobs/encode"))
    for name, pod in pods.items():
        (container,), (like,) = pod.spec["containers"], of_job[name].spec["containers"]
        assert {"name": "data", "mountPath": "/data"} in container["volumeMounts"]
        assert container["resources"] == like["resources"]
        assert pod.ray["rayStartParams"] == of_job[name].ray["rayStartParams"]
    assert cluster_spec(objects)["enableInTreeAutoscaling"] is True
    assert pods["workers"].ray["minReplicas"] == 0 < pods["workers"].ray["maxReplicas"]
    (variable,) = pods["headgroup"].spec["containers"][0]["env"]
    monkeypatch.setenv(variable["name"], variable["value"])
    assert runtime._patience_s() >= 600, "a new node with a new image takes minutes"


def test_the_cache_is_shared_by_all_pods_of_a_training():
    objects = build(KUBERNETES / "overlays/cache/train")
    (claim,) = [each for each in objects if each["kind"] == "PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in by_group(objects).values():
        container = pod.spec["containers"][0]
        env = {each["name"]: each["value"] for each in container["env"]}
        (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "cache"]
        (volume,) = [volume for volume in pod.spec["volumes"] if volume["name"] == "cache"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert env["ORBITHASH_CACHE"] == mount["mountPath"]
        assert PurePosixPath(env["ORBITHASH_FEATURES"]).is_relative_to(mount["mountPath"])


def test_a_lost_head_is_replaced_alone():
    objects = build(KUBERNETES / "overlays/head-fault-tolerance")
    spec = cluster_spec(objects)
    password = spec["gcsFaultToleranceOptions"]["redisPassword"]
    assert password.keys() == {"valueFrom"}, "no password in a manifest"
    assert password["valueFrom"].keys() == {"secretKeyRef"}
    pods = by_group(objects)
    for name in ("gateway", "gateways"):
        env = {each["name"]: each.get("value") for each in pods[name].container("gateway")["env"]}
        # A driver ends by itself when it has not reached the head for this long; a pod takes minutes to start.
        assert int(env["RAY_gcs_rpc_server_reconnect_timeout_s"]) >= 300


@pytest.mark.parametrize("name", SERVING)
def test_a_driver_that_submit_sends_can_run_on_the_head(name):
    """Ray starts the driver of a submitted job on the head: it needs the volume and the memory of a job's head."""
    head = by_group(build(KUBERNETES / name))["headgroup"].spec["containers"][0]
    (job_head,) = by_group(build(KUBERNETES / "jobs/encode"))["headgroup"].spec["containers"]
    assert {"name": "data", "mountPath": "/data"} in head["volumeMounts"]
    memory, needed = (quantity(each["resources"]["limits"]["memory"]) for each in (head, job_head))
    assert memory >= needed
