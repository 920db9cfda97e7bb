"""Reads what is in deploy/ as Kubernetes and KubeRay would."""

import copy
import tomllib
from pathlib import Path
from typing import NamedTuple

import typer
import yaml

from orbithash.cluster.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]

FOLDERS = sorted(str(path.parent.relative_to(KUBERNETES)) for path in KUBERNETES.rglob("kustomization.yaml"))
SERVING = ("base", "overlays/small", "overlays/large")
JOBS = ("jobs/train", "jobs/encode", "overlays/gpu/train", "overlays/gpu/encode")


def documents(path):
    return list(yaml.safe_load_all(path.read_text()))


def build(folder):
    """The objects of a kustomization, by as much of kustomize as ours use; `test_kustomize_agrees` compares."""
    known = {"apiVersion", "kind", "resources", "patches", "images"}
    (wanted,) = documents(folder / "kustomization.yaml")
    assert wanted.keys() <= known, wanted.keys() - known
    objects = []
    for name in wanted["resources"]:
        place = folder / name
        objects += build(place) if place.is_dir() else documents(place)
    for patch in wanted.get("patches", ()):
        kind, name = patch["target"]["kind"], patch["target"]["name"]
        (target,) = [each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name)]
        for change in yaml.safe_load(patch["patch"]):
            _change(target, **change)
    for image in wanted.get("images", ()):
        for container in all_containers(objects):
            name, _, _ = container["image"].partition(":")
            if name == image["name"]:
                container["image"] = f"{name}:{image['newTag']}"
    return objects


def _change(target, op, path, value):
    *parents, last = (part.replace("~1", "/") for part in path.split("/")[1:])
    for part in parents:
        target = target[int(part) if isinstance(target, list) else part]
    last = int(last) if isinstance(target, list) else last
    if op == "test":
        assert target[last] == value, path
        return
    assert op == "add" or (last in target if isinstance(target, dict) else last < len(target)), path
    assert op in ("add", "replace")
    target[last] = copy.deepcopy(value)


def all_containers(place):
    """Every container anywhere in it."""
    if isinstance(place, list):
        for each in place:
            yield from all_containers(each)
    elif isinstance(place, dict):
        for name, value in place.items():
            if name in ("containers", "initContainers"):
                yield from value
            elif name != "securityContext":
                yield from all_containers(value)


class Pod(NamedTuple):
    """One kind of pod. `labels` are those that it has when it runs, KubeRay's included; `ray` is its group's part."""

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
        """By matchLabels and by matchExpressions, of which ours use the operator In only."""
        expressions = selector.get("matchExpressions", ())
        assert all(each["operator"] == "In" for each in expressions)
        return all(self.labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
            self.labels.get(each["key"]) in each["values"] for each in expressions
        )


def pods_of(objects):
    pods = []
    for each in objects:
        kind, name = each["kind"], each["metadata"]["name"]
        if kind == "Pod":
            pods.append(Pod(name, each["metadata"]["labels"], each, None))
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


def parsed(words):
    """The options of a command line, or the error that the user would get."""
    assert words[0] == "orbithash"
    group = typer.main.get_command(app)
    context = group.make_context("orbithash", [words[1]], resilient_parsing=True)
    command = group.get_command(context, words[1])
    assert command is not None, words[1]
    return command.make_context(words[1], list(words[2:]), parent=context).params


def quantity(text):
    """Cores, bytes or pieces."""
    text = str(text)
    for suffix, factor in (("m", 1e-3), ("Ki", 2**10), ("Mi", 2**20), ("Gi", 2**30), ("Ti", 2**40)):
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text)
