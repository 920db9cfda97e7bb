"""One machine with Docker, machines with Ray's launcher, and the commands of docs/operate/deploy.md.

No package contains the schema of Compose: its field names are not checked here. `docker compose config` checks them.
"""

import json
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml
from deploy_manifests import DEPLOY, PROJECT, ROOT, VERSION, documents, parsed

from orbithash.cluster.cli.options import TOKEN_VARIABLE
from orbithash.search.protocol.address import is_loopback, parse_address

GUIDE = (ROOT / "docs/operate/deploy.md").read_text()


@pytest.fixture
def services():
    (compose,) = documents(DEPLOY / "compose.yaml")
    return compose["services"]


@pytest.fixture
def launcher():
    (config,) = documents(DEPLOY / "ray-cluster.yaml")
    return config


# Docker.


def test_ports_are_published_on_the_loopback_interface_only(services):
    published = {name: [port.rsplit(":", 2) for port in service["ports"]] for name, service in services.items()}
    assert all(is_loopback(host) for ports in published.values() for host, _, _ in ports)
    options = parsed(services["gateway"]["command"])
    ports = [str(parse_address(options[name])[1]) for name in ("address", "web")]
    assert published["gateway"] == [["127.0.0.1", port, port] for port in ports]
    assert options["local"]
    assert options["open_metrics"]
    assert options["insecure_listen"], "inside the container it must listen on all interfaces"


def test_the_gateway_of_compose_runs_the_image(services):
    gateway = services["gateway"]
    assert gateway["image"] == f"orbithash:{VERSION}"
    build = gateway["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "images" / "Dockerfile"
    options = parsed(gateway["command"])
    (volume,) = gateway["volumes"]
    for path in (options["archive"], options["model"]):
        assert str(path).startswith(volume.rpartition(":")[2] + "/")
    port = parse_address(options["address"])[1]
    assert gateway["healthcheck"]["test"] == ["CMD", "orbithash-healthy", f"127.0.0.1:{port}"]


def test_prometheus_and_grafana_find_their_files(services):
    for name in ("prometheus", "grafana"):
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", services[name]["image"])
        for volume in services[name]["volumes"]:
            source, _, _ = volume.partition(":")
            assert not source.startswith(".") or (DEPLOY / source).exists(), volume
    options = parsed(services["gateway"]["command"])
    (scraped,) = documents(DEPLOY / "prometheus" / "compose.yml")
    (alone,) = documents(DEPLOY / "prometheus" / "prometheus.yml")
    target = f"gateway:{parse_address(options['metrics'])[1]}"
    assert [job["static_configs"] for job in scraped["scrape_configs"]] == [[{"targets": [target]}]]
    # The two files differ in nothing else.
    assert {**scraped, "scrape_configs": []} == {**alone, "scrape_configs": []}
    assert [job["job_name"] for job in scraped["scrape_configs"]] == ["orbithash"]
    mounted = dict(reversed(volume.split(":")[:2]) for volume in services["prometheus"]["volumes"])
    for name in scraped["rule_files"]:
        assert f"/etc/prometheus/{name}" in mounted
    provisioning = DEPLOY / "grafana" / "provisioning"
    ((source,),) = [each["datasources"] for each in documents(provisioning / "datasources" / "prometheus.yml")]
    assert source["url"] == f"http://prometheus:{services['prometheus']['ports'][0].rpartition(':')[2]}"
    board = json.loads((DEPLOY / "grafana" / "orbithash.json").read_text())
    (variable,) = [each for each in board["templating"]["list"] if each["name"] == "datasource"]
    assert variable["query"] == source["type"]
    assert source["isDefault"] is True
    ((provider,),) = [each["providers"] for each in documents(provisioning / "dashboards" / "orbithash.yml")]
    mounted = dict(reversed(volume.split(":")[:2]) for volume in services["grafana"]["volumes"])
    assert mounted[f"{provider['options']['path']}/orbithash.json"] == "./grafana/orbithash.json"


# Ray's launcher.


def test_the_launcher_file_fits_rays_schema(launcher):
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(launcher, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**launcher, "head_start_ray_command": []}, schema)


def test_ray_up_reads_one_machine_per_address(launcher):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(launcher)
    validate_config(prepared)
    (node,) = prepared["available_node_types"].values()
    assert node["min_workers"] == node["max_workers"] == len(launcher["provider"]["worker_ips"])


def test_the_launcher_commands_are_valid(launcher):
    import ray.scripts.scripts

    known = {name for option in ray.scripts.scripts.start.params for name in option.opts}
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        stop, start = launcher[name]
        assert stop == "~/orbithash/bin/ray stop"
        words = shlex.split(start)
        assert "RAY_AUTH_MODE=token" in words
        assert "RAY_task_events_report_interval_ms=0" in words
        program = words.index("~/orbithash/bin/ray")
        assert words[program + 1] == "start"
        assert {word.partition("=")[0] for word in words[program + 2 :]} <= known
    assert "--num-cpus=0" in shlex.split(launcher["head_start_ray_commands"][1])
    (install,) = [each for each in launcher["setup_commands"] if "pip install" in each]
    assert f"/{PROJECT['name']}-{VERSION}-*.whl" in install
    extras = re.search(r"orbithash\[([\w,]+)\]", install)[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    assert {"train", "serve"} <= set(extras)
    folder = re.search(r"--constraint (\S+)/constraints.txt", install)[1]
    assert launcher["file_mounts"][folder] == "dist"
    assert launcher["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


# The guide.


def typed():
    """Yield the command lines of the guide's blocks, without those of a here document."""
    for block in re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL):
        block = re.sub(r"<<'END'\n.*?\nEND\n", "\n", block, flags=re.DOTALL).replace("\\\n", " ")
        for line in block.splitlines():
            for command in re.split(r" && | \| ", line.split("  #")[0]):
                yield command.strip()


def test_the_commands_in_the_guide_are_valid():
    found = []
    for command in typed():
        words = shlex.split(command)
        words = words[words.index("--") + 1 :] if "--" in words else words
        if words and words[0] == "orbithash":
            found.append(words)
    assert {words[1] for words in found} == {"scenes", "status", "query", "encode", "refresh"}
    for words in found:
        parsed(words)


def test_files_that_the_guide_names_exist():
    named = set(re.findall(r"\bdeploy/[\w./-]*[\w]", GUIDE))
    assert len(named) > 8
    for name in named:
        assert (ROOT / name).exists(), name
    in_table = re.findall(r"^\| `([\w./-]+)`(?:, `(\w+)`)? \|", GUIDE, re.MULTILINE)
    assert len(in_table) > 6
    for name, beside in in_table:
        assert (DEPLOY / name).exists(), name
        assert not beside or (DEPLOY / name).with_name(beside).exists(), beside


def test_versions_in_the_guide():
    assert set(re.findall(r"orbithash:([\d.]+\w)", GUIDE)) == {VERSION}
    constraints = (ROOT / "constraints.txt").read_text()
    assert "ray==2.60" in constraints


def test_the_tools_pod_sets_address_and_token():
    (env,) = [each["env"] for each in documents(DEPLOY / "kubernetes/tools/pod.yaml")[0]["spec"]["containers"]]
    assert {each["name"] for each in env} == {"ORBITHASH_ADDRESS", TOKEN_VARIABLE}


def test_every_yaml_file_can_be_read():
    for path in DEPLOY.rglob("*.y*ml"):
        assert list(yaml.safe_load_all(path.read_text())), path
