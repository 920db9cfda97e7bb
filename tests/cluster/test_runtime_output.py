"""Output of Ray workers in a command, and processes left after the cluster that it started."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster_parts import family, kill, user_environment, wait_for

from orbithash.cluster import runtime
from orbithash.encoders.errors import InputError

# A task writes to stdout and stderr; the process stays connected until a file appears.
TALKING = """
import sys
from pathlib import Path
from orbithash.cluster.output import set_debug
from orbithash.cluster.runtime import connected

set_debug("--debug" in sys.argv)

def talk():
    print("stdout of a worker", flush=True)
    print("stderr of a worker", file=sys.stderr, flush=True)

def stay():
    import ray
    ray.get(ray.remote(num_cpus=0)(talk).remote())
    Path(sys.argv[1], "talked").touch()
    while not Path(sys.argv[1], "go_on").exists():
        import time
        time.sleep(0.02)

if "--existing" in sys.argv:
    import os
    from ray.cluster_utils import Cluster
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    os.environ["RAY_ADDRESS"] = cluster.address
with connected():
    stay()
print("result")
"""

# A process of the cluster that does not end with it, here one that ignores SIGTERM and has a child in a session of its
# own. Ray itself leaves such a worker behind only by chance, on a busy machine.
STUBBORN = (
    """
import json, os, subprocess, sys
from orbithash.cluster import runtime
from orbithash.encoders.errors import InputError

runtime.EXIT_TIMEOUT_S = 1.0

HANGING = """
    + repr("""
import signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(subprocess.Popen(["sleep", "600"], start_new_session=True).pid, flush=True)
time.sleep(600)
""")
    + """

def worker():
    print("of a worker", flush=True)
    print("of a worker", file=sys.stderr, flush=True)
    return os.getpid()

with runtime.connected():
    import ray
    words = [sys.executable, "-c", HANGING, ray.get_runtime_context().get_session_name()]
    hanging = subprocess.Popen(words, stdout=subprocess.PIPE)
    pids = [ray.get(ray.remote(worker).remote()), hanging.pid, int(hanging.stdout.readline())]
print(json.dumps(pids))
"""
)


@pytest.fixture
def talking(tmp_path):
    """Start TALKING with an option; end it with all that it started."""
    started = []

    def call(option):
        out, err = tmp_path / "out", tmp_path / "err"
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-c", TALKING, tmp_path, option],
                env=user_environment() | {"RAY_AUTH_MODE": "disabled"},
                stdout=stdout,
                stderr=stderr,
            )
        process.out, process.err = out, err
        started.append(process)
        return process

    yield call
    for process in started:
        kill(process, *family(process.pid))


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--debug", "--existing"])
def test_the_output_of_workers_is_shown_on_stderr(talking, tmp_path, option):
    process = talking(option)
    for stream in ("stdout", "stderr"):
        wait_for(lambda stream=stream: f"{stream} of a worker" in process.err.read_text(), process)
    (tmp_path / "go_on").touch()
    assert process.wait(60) == 0, process.err.read_text()
    assert process.out.read_text() == "result\n"


@pytest.mark.parametrize(
    ("variable", "is_existing", "is_shown"),
    [("", False, False), ("", True, True), ("1", False, True), ("0", True, False)],
)
def test_ray_log_to_driver_overrides_the_default(monkeypatch, variable, is_existing, is_shown):
    monkeypatch.setenv("RAY_LOG_TO_DRIVER", variable)
    assert runtime._shows_logs(is_existing) is is_shown


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_cluster_leaves_no_process_and_its_workers_print_nothing():
    done = subprocess.run(
        [sys.executable, "-c", STUBBORN], env=user_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    # Neither stream contains a line of a worker.
    assert done.stderr == ""
    pids = json.loads(done.stdout)
    left = [pid for pid in pids if is_running(pid)]
    for pid in left:
        os.kill(pid, 9)
    assert left == []


def test_a_long_folder_for_temporary_files(tmp_path):
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    program = "from orbithash.cluster.runtime import connected\nwith connected(): pass"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=user_environment() | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "InputError: the folder for temporary files is" in done.stderr
    assert "set RAY_TMPDIR to a shorter one" in done.stderr


def test_a_machine_on_which_ray_does_not_start_in_time(monkeypatch):
    import ray

    def init(*args, **options):
        # As ray._private.node does.
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(InputError, match="Ray did not start within 30 s, 2 times: this machine is busy"):
        runtime._start(1, {})


def test_a_second_start_leaves_nothing_of_the_first():
    program = """
from orbithash.cluster import runtime
has_started, servers = runtime._has_started, []
def start_late(*arguments):
    from ray._private import services
    get_node = services.get_node
    def late(*address):
        services.get_node = get_node
        servers.extend(runtime._processes_of("session_"))
        raise Exception("The current node timed out during startup.")
    services.get_node = late
    runtime._has_started = has_started
    return has_started(*arguments)
runtime._has_started = start_late
with runtime.connected():
    import ray
    assert ray.get(ray.remote(lambda: 7).remote()) == 7
    print(len(servers), sum(server.is_running() and server.status() != "zombie" for server in servers))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=user_environment(), capture_output=True, text=True, timeout=250
    )
    started, left = map(int, done.stdout.split()[-2:] or (0, 0))
    assert (started > 0, left) == (True, 0), done.stderr
