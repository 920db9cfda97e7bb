"""Readers of the files in deploy/, as Kubernetes, KubeRay and kustomize read them."""

import copy
import functools
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
import yaml

from orbithash.cluster.cli.main import app
from orbithash.cluster.cli.options import DEFAULT_ADDRESS
from orbithash.search.protocol.address import parse_address

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]

FOLDERS = sorted(str(path.parent.relative_to(KUBERNETES)) for path in KUBERNETES.rglob("kustomization.yaml"))
SERVING = ("base", "overlays/small", "overlays/large", "overlays/gpu/serve", "overlays/head-fault-tolerance")
JOBS = ("jobs/train", "jobs/encode", "overlays/gpu/train", "overlays/gpu/encode", "overlays/cache/train")
# Policies that are applied beside a cluster, each of which opens one way out.
WAYS_OUT = ("overlays/object-store/https", "overlays/object-store/in-cluster", "overlays/tracker")

GATEWAY_PORT = parse_address(DEFAULT_ADDRESS)[1]


def documents(path):
    """Return the YAML documents of a file; the caller may change them."""
    return copy.deepcopy(_load(path))


@functools.cache
def _load(path):
    return list(yaml.safe_load_all(path.read_text()))


def build(folder):
    """Return the objects of a kustomization. Only the features that deploy/ uses; `test_kustomize_agrees` compares."""
    (kustomization,) = documents(folder / "kustomization.yaml")
    assert kustomization["apiVersion"] == "kustomize.config.k8s.io/v1beta1"
    assert kustomization["kind"] == "Kustomization"
    unknown = kustomization.keys() - {"apiVersion", "kind", "resources", "patches", "images"}
    assert not unknown, unknown
    objects = []
    for name in kustomization["resources"]:
        path = folder / name
        objects += build(path) if path.is_dir() else documents(path)
    for patch in kustomization.get("patches", ()):
        kind, name = patch["target"]["kind"], patch["target"]["name"]
        (target,) = [each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name)]
        for operation in yaml.safe_load(patch["patch"]):
            _apply(target, **operation)
    for image in kustomization.get("images", ()):
        assert image.keys() == {"name", "newTag"}
        for container in all_containers(objects):
            name, _, _ = container["image"].partition(":")
            if name == image["name"]:
                container["image"] = f"{name}:{image['newTag']}"
    return objects


def _apply(target, op, path, value):
    """Apply one operation of a JSON patch in place."""
    *parents, last = (part.replace("~1", "/") for part in path.split("/")[1:])
    for part in parents:
        target = target[int(part) if isinstance(target, list) else part]
    if last == "-":
        assert op == "add", path
        target.append(copy.deepcopy(value))
        return
    last = int(last) if isinstance(target, list) else last
    if op == "test":
        assert target[last] == value, path
        return
    assert op == "add" or (last in target if isinstance(target, dict) else last < len(target)), path
    assert op in ("add", "replace")
    target[last] = copy.deepcopy(value)


def all_containers(tree):
    """Yield every container anywhere in a tree of dicts and lists."""
    if isinstance(tree, list):
        for each in tree:
            yield from all_containers(each)
    elif isinstance(tree, dict):
        for name, value in tree.items():
            if name in ("containers", "initContainers"):
                yield from value
            elif name != "securityContext":
                yield from all_containers(value)


class Pod(NamedTuple):
    """One kind of pod: its labels when it runs (KubeRay's included), and its group in the cluster if it runs Ray."""

    name: str
    labels: dict
    template: dict
    ray: dict | None

    @property
    def spec(self):
        return self.template["spec"]

    @property
    def containers(self):
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    def container(self, name):
        (found,) = [each for each in self.containers if each["name"] == name]
        return found

    def is_selected(self, selector):
        """Return whether matchLabels and matchExpressions (operator In only) select the pod."""
        expressions = selector.get("matchExpressions", ())
        assert all(each["operator"] == "In" for each in expressions)
        return all(self.labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
            self.labels.get(each["key"]) in each["values"] for each in expressions
        )


def pods_of(objects):
    """Return the pods that these objects create."""
    pods = []
    for each in objects:
        kind, name = each["kind"], each["metadata"]["name"]
        if kind == "Pod":
            pods.append(Pod(name, each["metadata"]["labels"], each, None))
        elif kind == "Deployment":
            template = each["spec"]["template"]
            pods.append(Pod(name, template["metadata"]["labels"], template, None))
        elif kind == "RayCluster":
            pods += _ray_pods(name, each["spec"])
        elif kind == "RayJob":
            template = each["spec"]["submitterPodTemplate"]
            pods.append(Pod(f"{name} submitter", template["metadata"]["labels"], template, None))
            pods += _ray_pods(name, each["spec"]["rayClusterSpec"])
    return pods


def _ray_pods(name, spec):
    head = {"groupName": "headgroup", "replicas": 1, "minReplicas": 1, "maxReplicas": 1, **spec["headGroupSpec"]}
    for group in (head, *spec["workerGroupSpecs"]):
        labels = {
            **group["template"]["metadata"]["labels"],
            "ray.io/is-ray-node": "yes",
            "ray.io/node-type": "head" if group is head else "worker",
            "ray.io/group": group["groupName"],
        }
        yield Pod(f"{name} {group['groupName']}", labels, group["template"], group)


def by_group(objects):
    """Return the pods that are Ray nodes by the name of their group."""
    return {pod.ray["groupName"]: pod for pod in pods_of(objects) if pod.ray is not None}


def all_pods():
    """Return a pytest parameter for each pod of each kustomization."""
    return [
        pytest.param(pod, id=f"{name}: {pod.name}") for name in FOLDERS for pod in pods_of(build(KUBERNETES / name))
    ]


def spec_of(objects, kind):
    """Return the spec of the first object of a kind."""
    return next(each["spec"] for each in objects if each["kind"] == kind)


def cluster_spec(objects):
    """Return the spec of the Ray cluster, that of a job included."""
    spec = next(each["spec"] for each in objects if each["kind"] in ("RayCluster", "RayJob"))
    return spec.get("rayClusterSpec", spec)


def policies_of(objects):
    """Return the specs of the network policies by name."""
    return {each["metadata"]["name"]: each["spec"] for each in objects if each["kind"] == "NetworkPolicy"}


def parsed(words):
    """Return the options of an orbithash command line; an invalid one raises the error that the user would see."""
    assert words[0] == "orbithash"
    group = typer.main.get_command(app)
    context = group.make_context("orbithash", [words[1]], resilient_parsing=True)
    command = group.get_command(context, words[1])
    assert command is not None, words[1]
    return command.make_context(words[1], list(words[2:]), parent=context).params


def serve_options(gateway):
    """Return the options of `serve` in the pod of the gateway."""
    return parsed(gateway.container("gateway")["command"])


def quantity(text):
    """Return a quantity of Kubernetes as a number of cores, bytes or units."""
    text = str(text)
    for suffix, factor in (("m", 1e-3), ("Ki", 2**10), ("Mi", 2**20), ("Gi", 2**30), ("Ti", 2**40)):
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text)
