"""Verbs submitted as jobs to a real cluster with a token: submission, following, stopping, refusal."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cluster_parts import TINY, family, kill, user_environment, wait_for

from orbithash.cluster.cli.main import app
from orbithash.cluster.submit import check_words
from orbithash.encoders.errors import InputError

TOKEN = "0123456789abcdef" * 4


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a cluster that requires TOKEN."""
    ray, ports = Path(sys.executable).with_name("ray"), [free_port() for _ in range(3)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "HOME": str(tmp_path_factory.mktemp("home"))}
    options = ["--head", "--num-cpus=2", f"--port={ports[0]}", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    options += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={ports[1]}", "--block"]
    options += [f"--dashboard-agent-listen-port={ports[2]}", f"--temp-dir={tmp_path_factory.mktemp('ray')}"]
    process = subprocess.Popen([ray, "start", *options], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def answers():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", ports[1])) == 0

    try:
        wait_for(answers, process)
        yield f"http://127.0.0.1:{ports[1]}"
    finally:
        kill(process, *family(process.pid))


class Line:
    """A TCP proxy to the cluster that can be cut."""

    def __init__(self, address):
        self._target = ("127.0.0.1", int(address.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._open = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self):
        """Stop listening and close all connections."""
        # close() alone is not enough: a thread that waits in accept() keeps the socket open.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open = []

    def mend(self):
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        listener = self._listener
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(self._target)
                self._open += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    @staticmethod
    def _copy(one, other):
        with contextlib.suppress(OSError):
            while piece := one.recv(65536):
                other.sendall(piece)
            other.shutdown(socket.SHUT_WR)


FOLLOWING = """
import sys
from orbithash.cluster.submit import Cluster, follow, _client
address, line, program = sys.argv[1:]
with _client(Cluster(address)) as client:
    sent = client.submit_job(entrypoint=f"{sys.executable} {program}")
job = follow(Cluster(line), sent, lambda text: print(text, end="", flush=True))
print("ended", job.status)
"""


@pytest.mark.slow
def test_following_survives_a_lost_connection(cluster, tmp_path):
    """No line is printed twice and none is lost."""
    go_on, program = tmp_path / "go_on", tmp_path / "job.py"
    program.write_text(
        "import pathlib, time\n"
        "for number in range(200):\n"
        "    print('line', number, flush=True)\n"
        f"    while number == 99 and not pathlib.Path({str(go_on)!r}).exists(): time.sleep(0.05)\n"
    )
    line = Line(cluster)
    # A separate process: Ray looks for tokens once per process.
    words = [sys.executable, "-c", FOLLOWING, cluster, line.address, program]
    env = user_environment() | {"RAY_AUTH_TOKEN": TOKEN, "HOME": str(tmp_path)}
    printed = []
    with (tmp_path / "err").open("w") as err, subprocess.Popen(words, env=env, stdout=-1, stderr=err, text=True) as own:
        for text in own.stdout:
            printed.append(text)
            if text == "line 99\n":
                line.cut()
                # The job continues while nothing is connected.
                go_on.touch()
                threading.Timer(3, line.mend).start()
    line.cut()
    assert printed[-1] == "ended SUCCEEDED\n", (tmp_path / "err").read_text()
    assert [text for text in printed if text.startswith("line ")] == [f"line {number}\n" for number in range(200)]
    assert "the cluster does not answer" in (tmp_path / "err").read_text()


@pytest.fixture
def submit(cluster, tmp_path):
    """`orbithash submit` in a process of its own."""
    token = tmp_path / "token"
    token.write_text(TOKEN)

    def call(*words, token_file=token):
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        env |= {"HOME": str(tmp_path)}
        token_options = () if token_file is None else ("--token-file", token_file)
        options = ("--address", cluster, "--python", sys.executable, *token_options)
        words = [sys.executable, "-m", "orbithash.cluster.cli.main", "submit", *map(str, (*options, *words))]
        return subprocess.run(words, env=env, capture_output=True, text=True, timeout=120, check=False)

    return call


def processes_with(word):
    """Return the ids of the processes with this word in their command line."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in line.read_bytes().split(b"\0"):
                found.append(int(line.parent.name))
    return found


@pytest.mark.slow
def test_a_job_runs_once_and_its_output_comes_back(submit, tmp_path):
    scenes = ("--id", "first", "--", "scenes", tmp_path / "scenes", "--count", "4")
    ended = submit(*scenes)
    assert ended.returncode == 0, ended.stderr
    assert "drawing: 4/4 scenes" in ended.stdout
    assert len(list((tmp_path / "scenes").rglob("*.tif"))) >= 4
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "scenes").rglob("*")}
    again = submit("--json", *scenes)
    assert again.returncode == 0
    assert "exists already (succeeded); not sent again" in again.stderr
    assert "drawing: 4/4 scenes" in again.stderr
    assert json.loads(again.stdout)["status"] == "SUCCEEDED"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "scenes").rglob("*")} == made
    other = submit("--id", "first", "--", "scenes", tmp_path / "others")
    assert other.returncode == 2
    assert "the cluster has another job named first" in other.stderr

    # A job with wrong input passes on its message and its exit code.
    failed = submit("--", "scenes", tmp_path / "scenes", "--count", "2")
    assert failed.returncode == 2, failed.stderr
    assert "holds 4 scenes, more than 2" in failed.stdout

    sent = submit("--detach", "--id", "long", "--", "scenes", tmp_path / "many", "--count", "100000")
    assert sent.returncode == 0
    # Ray stops the processes that the job has at that moment: one that is only being started would live on.
    wait_for((tmp_path / "many" / "images").exists)
    stopped = submit("--stop", "long")
    assert stopped.returncode == 0
    assert "job long stopped" in stopped.stderr
    wait_for(lambda: not processes_with(str(tmp_path / "many")))
    assert submit("--stop", "nobody").returncode == 2


@pytest.mark.slow
def test_a_training_with_variables(submit, labelled, tmp_path):
    train = ("--", "train", "dhcl", "--data", labelled, *TINY, "--workers", "1", "--out", tmp_path / "run")
    refused = submit("--env", "ORBITHASH_WAIT_FOR_NODES_S=soon", *train)
    assert refused.returncode == 2, refused.stderr
    assert "ORBITHASH_WAIT_FOR_NODES_S is 'soon'" in refused.stdout
    ended = submit("--env", f"ORBITHASH_CACHE={tmp_path / 'cache'}", "--env", "HOME", *train)
    assert ended.returncode == 0, ended.stderr
    assert "the model is in" in ended.stdout
    assert (tmp_path / "run/model/model.json").exists()


@pytest.mark.slow
def test_without_a_valid_token_no_job_runs(submit, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.write_text("f" * 64)
    for token_file in (None, wrong):
        ended = submit("--", "scenes", tmp_path / "scenes", token_file=token_file)
        assert ended.returncode == 2
        assert "requires a valid token" in ended.stderr
    ended = submit("--", "scenes", tmp_path / "scenes", token_file=tmp_path / "nowhere")
    assert ended.returncode == 2
    assert "no such file" in ended.stderr
    assert not (tmp_path / "scenes").exists()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "no verb to run"),
        (["--debug", "train"], "no verb to run"),
        (["scenes", "here"], "directory is 'here': give an absolute path"),
        (["encode", "tiles", "--model", "/m", "--archive", "/a"], "source is 'tiles'"),
        (["encode", "s3://tiles", "--model", "m", "--archive", "a"], "found 2 problems"),
        (["tune", "mhcln", "--data", "/data"], "out is 'runs/tune'"),
    ],
)
def test_arguments_that_are_invalid_on_another_machine(words, problem):
    import typer

    with pytest.raises(InputError) as error:
        check_words(typer.main.get_command(app), words)
    assert problem in str(error.value)


def test_arguments_that_are_valid_on_another_machine(tmp_path, monkeypatch):
    import typer

    # The word `dhcl` is the method, although a folder has the same name.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dhcl").mkdir()
    check_words(typer.main.get_command(app), ["train", "dhcl", "--data", "/data", "--out", "/run"])
    for words in (["scenes", "/here"], ["encode", "s3://b/tiles", "--model", "/m", "--archive", "gs://b/a"]):
        check_words(typer.main.get_command(app), words)
    with pytest.raises(Exception, match="--rowz"):
        check_words(typer.main.get_command(app), ["bench", "serve", "--rowz", "3"])


def test_a_command_line_is_checked_without_a_cluster(cli, refused):
    """No cluster listens at the address, so an answer means that none was asked."""
    nowhere = ("submit", "--address", "http://127.0.0.1:1", "--check")
    ended = cli(*nowhere, "--", "train", "dhcl", "--data", "/data", "--out", "/run")
    assert (ended.code, ended.out) == (0, "")
    assert "the command line is valid" in ended.err
    refused(*nowhere, "--", "train", "dhcl", "--data", "data", "--out", "/run", words=["data", "absolute path"])
    assert cli(*nowhere, "--", "train", "dhcl", "--dat", "/data", "--out", "/run").code == 2
    refused(*nowhere, "--stop", "first", words=["got --check and --stop first; give one of them"])


def test_an_address_without_a_cluster(refused):
    refused(
        *("submit", "--address", f"http://127.0.0.1:{free_port()}", "--", "scenes", "/here"),
        words=["no cluster answers at", "give --address http://HOST:PORT of its dashboard"],
    )
    refused(
        *("submit", "--address", "ftp://x", "--", "scenes", "/here"),
        words=["give http://HOST:PORT of the cluster's dashboard"],
    )


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("", "the value of --env is empty"),
        ("=1", "give NAME=VALUE, or the NAME of a variable that is set here"),
        ("A B=1", "give NAME=VALUE, or the NAME"),
        ("NOBODY_SET_THIS", "which is not set here; set it, or give NOBODY_SET_THIS=VALUE"),
    ],
)
def test_an_invalid_variable(refused, variable, message):
    refused("submit", "--env", variable, "--", "scenes", "/here", words=[message])
