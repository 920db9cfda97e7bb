"""Environment of Ray workers, and checks of the resources that they need."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from cluster_parts import family, joining, kill, user_environment, wait_for

from orbithash.cluster.runtime import check_resources, device_for, keeping_memory
from orbithash.encoders.errors import InputError

pytestmark = pytest.mark.ray


@pytest.mark.skipif(sys.platform != "linux", reason="Ray ships the allocator for Linux only")
def test_a_worker_that_keeps_memory_uses_jemalloc(ray_cluster, monkeypatch):
    import ray

    @ray.remote(num_cpus=0)
    def allocators():
        maps = Path("/proc/self/maps").read_text().splitlines()
        return {line.rpartition("/")[2] for line in maps if "malloc" in line}

    usual, other = allocators.remote(), allocators.options(runtime_env={"env_vars": keeping_memory()}).remote()
    assert ray.get([usual, other]) == [set(), {"libjemalloc.so"}]

    # Libraries preloaded by the user are kept, before jemalloc.
    monkeypatch.setenv("LD_PRELOAD", "libfirst.so")
    assert keeping_memory()["LD_PRELOAD"].split(":")[0] == "libfirst.so"


def test_a_task_without_gpus_sees_none(ray_cluster):
    """Ray hides the GPUs of a node only from tasks that reserve some."""

    # In a process for each call: the first call changes the variable of its process.
    @ray.remote(num_cpus=0, max_calls=1, runtime_env={"env_vars": {"CUDA_VISIBLE_DEVICES": "0,1"}})
    def device(num_gpus):
        import os

        return device_for(num_gpus), os.environ["CUDA_VISIBLE_DEVICES"]

    assert ray.get([device.remote(0), device.remote(0.25)]) == [("cpu", ""), ("cuda", "0,1")]


@pytest.mark.parametrize("seconds", ["soon", "-1", "nan", "inf", "1e9"])
def test_an_invalid_time_to_wait_for_nodes(ray_cluster, monkeypatch, seconds):
    monkeypatch.setenv("ORBITHASH_WAIT_FOR_NODES_S", seconds)
    with pytest.raises(InputError, match=rf"ORBITHASH_WAIT_FOR_NODES_S is '{seconds}'; seconds from 0 to 86400"):
        check_resources("this", [{"CPU": 1000}])


def test_too_few_nodes_after_the_wait(ray_cluster, monkeypatch):
    monkeypatch.setenv("ORBITHASH_WAIT_FOR_NODES_S", "1")
    with pytest.raises(InputError, match="this needs 1000 CPUs, the cluster has 4 after 1 s; ask for fewer"):
        check_resources("this", [{"CPU": 500, "GPU": 0}] * 2)
    # No resources stay reserved.
    states = ray.util.placement_group_table().values()
    assert {state["state"] for state in states} <= {"REMOVED"}


def growing(address):
    """Return the configuration of an autoscaler: up to three nodes of one CPU, as processes of this machine."""
    lists = ("cluster_synced_files", "initialization_commands", "setup_commands")
    commands = (f"{of}_{what}_commands" for of in ("head", "worker") for what in ("setup", "start_ray"))
    return {
        "cluster_name": "growing",
        "max_workers": 3,
        "idle_timeout_minutes": 5,
        "upscaling_speed": 100.0,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "launch_multiple": True,
            "disable_launch_config_check": True,
            "disable_node_updaters": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "more": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 3},
        },
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in (*lists, *commands)},
    }


@pytest.fixture
def growing_cluster(tmp_path, tmp_path_factory):
    """A process that runs a cluster without CPUs and with an autoscaler; has its `address`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file = tmp_path / "autoscaling.json"
    file.write_text(json.dumps(growing(f"127.0.0.1:{port}")))
    program = Path(sys.executable).with_name("ray")
    options = ["--head", "--num-cpus=0", f"--port={port}", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    options += [
        "--include-dashboard=false",
        f"--autoscaling-config={file}",
        f"--temp-dir={tmp_path_factory.mktemp('ray')}",
        "--block",
    ]
    environment = {"RAY_AUTH_MODE": "disabled", "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    process = subprocess.Popen(
        [program, "start", *options],
        env=user_environment() | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    process.address = f"127.0.0.1:{port}"

    def answers():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for(answers, process)
        yield process
    finally:
        kill(process, *family(process.pid))


@pytest.mark.slow
def test_a_cluster_that_adds_nodes(growing_cluster, start, labelled, model, tmp_path):
    command = ("encode", labelled, "--model", model, "--archive", tmp_path / "archive", "--workers", "1", "--json")
    at_once = start(*command, before=joining(growing_cluster))
    assert at_once.wait(120) == 2
    assert "encoding with 1 workers needs " in at_once.err.read_text()
    assert "the cluster has 0; ask for fewer, or set ORBITHASH_WAIT_FOR_NODES_S if" in at_once.err.read_text()

    patient = f"{joining(growing_cluster)}; os.environ['ORBITHASH_WAIT_FOR_NODES_S'] = '300'"
    process = start(*command, before=patient)
    assert process.wait(400) == 0, process.err.read_text()
    assert "waiting up to 300 s for the cluster to add nodes" in process.err.read_text()
    assert json.loads(process.out.read_text())["rows_in_archive"] == 30
