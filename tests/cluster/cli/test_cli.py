"""The command line as a whole: verbs and options, imports, help, exit codes."""

import json
import re
import subprocess
import sys

import pytest
import typer

from orbithash.cluster.cli import main as command_line
from orbithash.encoders.errors import InputError

CONNECTION = ["--address", "--ca", "--cert", "--cert-key"]

# The public command line. Removing or renaming an entry breaks scripts of users; add new entries here.
SURFACE = {
    "": ["--debug", "--install-completion", "--show-completion", "--version"],
    "demo": ["--captions", "--data", "--no-web", "--out", "--set", "--unlabelled", "--weights"],
    "scenes": ["DIR", "--count", "--seed", "--size"],
    "methods": ["[NAME]", "--json"],
    "train": [
        "METHOD",
        "--bits",
        "--captions",
        "--config",
        "--data",
        "--dataset",
        "--gpus-per-worker",
        "--keep",
        "--loading",
        "--out",
        "--protocol",
        "--set",
        "--split-seed",
        "--storage",
        "--table",
        "--track",
        "--validate-beside",
        "--validation",
        "--weights",
        "--workers",
    ],
    "features": [
        "DATA",
        "--bits",
        "--captions",
        "--config",
        "--dataset",
        "--gpus-per-worker",
        "--json",
        "--method",
        "--protocol",
        "--set",
        "--split-seed",
        "--validation",
        "--weights",
        "--workers",
    ],
    "pack": ["DATA", "--captions", "--dataset", "--json", "--out"],
    "wald": ["SOURCE", "OUT", "--factor"],
    "convert": ["FILE", "OUT"],
    "evaluate": ["RUN", "--baselines", "--bits", "--data", "--gpus-per-worker", "--json", "--protocol", "--workers"],
    "reproduce": [
        "[NAME]...",
        "--bits",
        "--captions",
        "--concurrent",
        "--data",
        "--gpus-per-worker",
        "--json",
        "--out",
        "--seeds",
        "--set",
        "--weights",
        "--workers",
    ],
    "tune": [
        "METHOD",
        "--best",
        "--bits",
        "--captions",
        "--concurrent",
        "--config",
        "--cpus-per-trial",
        "--data",
        "--dataset",
        "--finalists",
        "--gpus-per-trial",
        "--grace",
        "--json",
        "--metric",
        "--out",
        "--protocol",
        "--search",
        "--seed",
        "--seeds",
        "--set",
        "--split-seed",
        "--table",
        "--trials",
        "--validation",
        "--weights",
    ],
    "card": [
        "RUN",
        "--bbox",
        "--bits",
        "--data-licence",
        "--dates",
        "--json",
        "--licence",
        "--name",
        "--no-examples",
        "--provider",
    ],
    "push": ["RUN", "ORG/NAME[@BRANCH]", "--json", "--public"],
    "pull": ["ORG/NAME[@REVISION]", "DIR", "--json"],
    "submit": [
        "[VERB]...",
        "--address",
        "--check",
        "--detach",
        "--env",
        "--id",
        "--json",
        "--python",
        "--stop",
        "--token-file",
        "--wheel",
    ],
    "encode": [
        "SOURCE",
        "--archive",
        "--asset",
        "--captions",
        "--codes",
        "--gpus-per-worker",
        "--json",
        "--model",
        "--prefix",
        "--report",
        "--retry-refused",
        "--table",
        "--tile",
        "--watch",
        "--workers",
    ],
    "serve": [
        "ARCHIVE",
        "--address",
        "--base-map",
        "--client-ca",
        "--encoders",
        "--gateways",
        "--gpus-per-encoder",
        "--images",
        "--index",
        "--insecure-listen",
        "--join",
        "--local",
        "--log-format",
        "--metrics",
        "--model",
        "--open-metrics",
        "--reflection",
        "--replicas",
        "--segments",
        "--shards",
        "--tls-cert",
        "--tls-key",
        "--tokens",
        "--web",
        "--web-host",
    ],
    "web": [
        "--base-map",
        "--ca",
        "--cert",
        "--cert-key",
        "--gateway",
        "--insecure-listen",
        "--listen",
        "--log-format",
        "--tls-cert",
        "--tls-key",
        "--web-host",
    ],
    "refresh": [
        "[ARCHIVE]",
        "--address",
        "--ca",
        "--cert",
        "--cert-key",
        "--json",
        "--model",
        "--shards",
        "--timeout",
        "--token-file",
    ],
    "query": [
        "--address",
        "--after",
        "--ca",
        "--cert",
        "--cert-key",
        "--code",
        "--filter",
        "--image",
        "--include",
        "--json",
        "--key",
        "--like",
        "--min-coverage",
        "--oversampling",
        "--radius",
        "--rescore",
        "--text",
        "--timeout",
        "--token-file",
        "--unlike",
        "--vector",
        "--weight",
        "-k",
    ],
    "rank": [
        "--address",
        "--after",
        "--ca",
        "--cert",
        "--cert-key",
        "--detector",
        "--filter",
        "--include",
        "--json",
        "--least-certain",
        "--max-distance",
        "--min-score",
        "--near",
        "--newest",
        "--oldest",
        "--random",
        "--same-place",
        "--timeout",
        "--token-file",
        "-k",
    ],
    "count": ["--address", "--by", "--ca", "--cert", "--cert-key", "--filter", "--json", "--timeout", "--token-file"],
    "upsert": [
        "SOURCE",
        "--address",
        "--asset",
        "--ca",
        "--cert",
        "--cert-key",
        "--codes",
        "--json",
        "--timeout",
        "--token-file",
    ],
    "status": ["--address", "--ca", "--cert", "--cert-key", "--json", "--timeout", "--token-file"],
    "delete": [
        "[KEY]...",
        "--address",
        "--ca",
        "--cert",
        "--cert-key",
        "--json",
        "--keys",
        "--timeout",
        "--token-file",
    ],
    "refused": ["ARCHIVE", "--json", "--limit"],
    "detect": ["ARCHIVE", "--detector", "--filter", "--json", "--min-score", "--out"],
    "detector": [
        "--address",
        "--bad",
        "--ca",
        "--cert",
        "--cert-key",
        "--good",
        "--json",
        "--out",
        "--seed",
        "--timeout",
        "--token-file",
    ],
    "duplicates": ["ARCHIVE", "--filter", "--json", "--radius"],
    "plan": [
        "--bench",
        "--bits",
        "--codes",
        "--cores",
        "--distinct",
        "--headroom",
        "--json",
        "--memory",
        "--p99",
        "--qps",
        "--read-only",
        "--replicas",
        "--report",
        "--rows",
        "-k",
    ],
    "bench encode": ["--count", "--data", "--json", "--model", "--report"],
    "bench embeddings": ["--dims", "--json", "--report", "--rows"],
    "bench changes": [
        "--archive",
        "--bits",
        "--centres",
        "--codes",
        "--flip",
        "--json",
        "--local",
        "--outlines",
        "--part",
        "--report",
        "--rows",
        "--seconds",
        "--shards",
    ],
    "bench soak": [
        "--archive",
        "--bits",
        "--centres",
        "--codes",
        "--flip",
        "--in-flight",
        "--json",
        "--kill-every",
        "--local",
        "--minutes",
        "--replicas",
        "--report",
        "--rows",
        "--shards",
    ],
    "bench gpu": [
        "--batch-size",
        "--compared",
        "--count",
        "--device",
        "--json",
        "--network",
        "--precision",
        "--report",
    ],
    "bench train": ["--data", "--epochs", "--json", "--report", "--weights", "--workers"],
    "bench search": [
        "--archive",
        "--bits",
        "--centres",
        "--codes",
        "--distinct",
        "--engine",
        "--flip",
        "--json",
        "--k",
        "--out",
        "--queries",
        "--radius",
        "--report",
        "--rows",
        "-k",
    ],
    "bench rank": ["--dims", "--json", "--k", "--out", "--report", "--rounds", "--rows", "-k"],
    "bench fanout": [
        "--actors",
        "--bits",
        "--delay-ms",
        "--down",
        "--json",
        "--out",
        "--queries",
        "--report",
        "--seed",
        "--shards",
        "--slow",
        "--stragglers",
        "--timeout-ms",
        "-k",
    ],
    "bench validation": ["--bits", "--database", "--json", "--out", "--queries", "--report", "--rounds"],
    "bench rescore": [
        "--bits",
        "--dims",
        "--embeddings",
        "--intrinsic",
        "--json",
        "--out",
        "--queries",
        "--report",
        "--rows",
        "--vector-dims",
    ],
    "bench serve": [
        "--archive",
        "--bits",
        "--centres",
        "--codes",
        "--flip",
        "--in-flight",
        "--json",
        "--local",
        "--peer",
        "--peer-python",
        "--report",
        "--requests",
        "--rows",
        "--shards",
    ],
    "export": [
        "ARCHIVE",
        "OUT",
        "--address",
        "--ca",
        "--cert",
        "--cert-key",
        "--columns",
        "--filter",
        "--format",
        "--json",
        "--licence",
        "--model",
        "--source",
        "--timeout",
        "--token-file",
        "--version",
        "--workers",
    ],
    "bench features": ["--count", "--json", "--report", "--workers"],
    "bench loading": ["--count", "--json", "--report", "--rounds"],
    "bench manifest": ["--count", "--file-bytes", "--files", "--json", "--report"],
    "bench export": ["--json", "--report", "--rows", "--thumbnail"],
}

HEAVY = {"torch", "torchvision", "ray", "faiss", "lance", "pyarrow", "rasterio", "matplotlib"}


def verbs(command, name=""):
    """Return every command that a user can call, by its full name."""
    commands = getattr(command, "commands", {})
    if not commands:
        return {name: command}
    inner = [verbs(child, f"{name} {word}".strip()) for word, child in commands.items()]
    return {full: child for one in inner for full, child in one.items()}


def words(command):
    """Return the metavars of the arguments, then the names of the options."""
    arguments = [p.metavar for p in command.params if p.param_type_name == "argument"]
    options = [name for p in command.params if p.param_type_name == "option" for name in p.opts]
    return [*arguments, *sorted(set(options) - {"--help", "-h"})]


def test_the_verbs_and_options_are_the_listed_ones():
    app = typer.main.get_command(command_line.app)
    assert {"": words(app), **{name: words(command) for name, command in verbs(app).items()}} == SURFACE


@pytest.mark.parametrize("verb", [name for name in SURFACE if name])
def test_each_verb_has_help_with_an_example(cli, verb):
    ended = cli(*verb.split(), "--help")
    assert (ended.code, ended.err) == (0, "")
    assert f"Example: orbithash {verb} " in " ".join(ended.out.split())


def run(program, *args):
    return subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, timeout=60)


TOP = "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})), file=sys.stderr)"


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["query", "--help"]])
def test_help_imports_nothing_heavy(args):
    done = run(
        "import json, sys\nfrom orbithash.cluster.cli.main import main\ntry:\n    main()\nfinally:\n    " + TOP, *args
    )
    assert "Usage: " in done.stdout
    imported = set(json.loads(done.stderr))
    assert "typer" in imported
    assert not imported & (HEAVY | {"numpy", "grpc", "PIL", "yaml"})


def test_the_client_imports_nothing_heavy():
    done = run(
        "import json, sys\nfrom orbithash.search.client.client import Client\nClient('127.0.0.1:1').close()\n" + TOP
    )
    imported = set(json.loads(done.stderr))
    assert "grpc" in imported
    assert not imported & (HEAVY | {"numpy", "PIL", "typer"})


@pytest.mark.parametrize("args", [["--debug", "query"], ["query", "--debug"], ["query"]])
def test_a_traceback_is_printed_with_debug_only(cli, args):
    ended = cli(*args)
    assert ended.code == 2
    assert ("Traceback" in ended.err) == ("--debug" in args)
    assert "give at least one of --image, --text, --vector, --key, --code and --like, got none" in ended.err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("a is 1; 2 is allowed"), 2, "error: a is 1; 2 is allowed\n"),
        (ValueError("first\nsecond"), 1, "error: ValueError: first (orbithash --debug VERB … shows where)\n"),
        (AssertionError(), 1, "error: AssertionError: no message (orbithash --debug VERB … shows where)\n"),
    ],
)
def test_message_and_exit_code_of_an_error(cli, monkeypatch, error, code, message):
    import orbithash.cluster.cli.gateway.query as verb

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(verb, "make_query", fail)
    ended = cli("query", "--key", "a")
    assert (ended.code, ended.out, ended.err) == (code, "", message)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["qery"], "No such command 'qery'. Did you mean 'query'?; see orbithash --help"),
        (["query", "--imgae", "a"], "No such option: --imgae (Possible options: --image, --like, --timeout); see"),
        (["train", "dhcl"], "Missing option '--data'; see orbithash train --help"),
        (["query", "-k", "abc"], "Invalid value for '-k': Input should be a valid integer, unable to"),
        (["query", "-k", "abc"], "got 'abc'; see orbithash query --help"),
    ],
)
def test_invalid_commands_are_one_line(cli, args, message):
    ended = cli(*args)
    assert (ended.code, ended.out) == (2, "")
    assert re.fullmatch(r"error: .*\n", ended.err)
    assert message in ended.err


@pytest.mark.parametrize("args", [[], ["bench"]])
def test_no_arguments_print_the_help(cli, args):
    ended = cli(*args)
    assert (ended.code, ended.err) == (2, "")
    assert "Usage: " in ended.out


def test_scenes_into_a_folder_with_other_files(cli, tmp_path):
    (tmp_path / "notes.txt").touch()
    ended = cli("scenes", tmp_path, "--count", "3")
    assert ended.code == 2
    assert ended.err.startswith(f"error: {tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    ended = cli("scenes", tmp_path / "scenes", "--count", "0")
    assert ended.code == 2
    assert not (tmp_path / "scenes").exists()


def test_scenes_are_the_same_for_the_same_seed(cli, tmp_path):
    for name in ("one", "two"):
        assert cli("scenes", tmp_path / name, "--count", "3", "--size", "64", "--seed", "4").code == 0
    one, two = (
        {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two
    assert len([name for name in one if name.startswith("images/")]) == 3
