"""The state of a running service: `status`, metrics and log lines."""

import json
import re
import signal
import urllib.request

import pytest
from cluster_parts import wait_for

from orbithash.cluster.cli.gateway import status as verb
from orbithash.cluster.cli.gateway.status import Status
from orbithash.encoders.archive.archive import Archive
from orbithash.search.client.client import Client
from orbithash.search.protocol.description import Description, ShardStatus
from orbithash.search.protocol.errors import KeyNotFound


def lines_of(process):
    """Return the JSON objects of the complete lines in the log of a process."""
    return [json.loads(line) for line in process.err.read_text().splitlines(keepends=True) if line.endswith("\n")]


def logged(process, pattern):
    """Wait for a log line that matches the pattern and return its first group."""
    found = wait_for(lambda: [m for line in lines_of(process) if (m := re.search(pattern, line["message"]))], process)
    return found[0][1]


def test_status_metrics_and_log_of_a_running_service(start, cli, archive, scenes, model):
    process = start(
        *("serve", archive, "--model", model, "--local", "--shards", "3", "--address", "127.0.0.1:0"),
        *("--metrics", "127.0.0.1:0", "--log-format", "json"),
    )
    address = logged(process, r"ready at (\S+);")
    page = logged(process, r"metrics at (\S+)")
    opened = Archive.open(archive)

    ended = cli("status", "--address", address, "--json")
    assert (ended.code, ended.err) == (0, "")
    fields = json.loads(ended.out)
    assert (fields["rows"], fields["bits"], fields["model_id"]) == (opened.num_rows, opened.bits, opened.model_id)
    assert (fields["archive_version"], fields["index"]) == (opened.version, "exact")
    assert [(shard["replicas"], shard["healthy_replicas"]) for shard in fields["shards"]] == [(1, 1)] * 3
    assert sum(shard["rows"] for shard in fields["shards"]) == opened.num_rows
    assert fields["is_serving"] is fields["is_whole"] is True
    table = cli("status", "--address", address)
    assert table.code == 0
    for words in (opened.model_id, "serving", *(f"{shard['rows']}" for shard in fields["shards"])):
        assert words in table.out

    image = scenes / min(opened.keys())
    with Client(address) as client:
        client.search(image=image.read_bytes())
        with pytest.raises(KeyNotFound) as caught:
            client.search(key="nowhere")
    with urllib.request.urlopen(page, timeout=60) as response:
        metrics = response.read().decode()
    for line in (
        f"orbithash_rows {float(opened.num_rows)}",
        'orbithash_requests_total{outcome="OK",rpc="Search"} 1.0',
        'orbithash_requests_total{outcome="NOT_FOUND",rpc="Search"} 1.0',
        'orbithash_requests_total{outcome="OK",rpc="Describe"} 2.0',
        'orbithash_stage_seconds_count{stage="decode"} 1.0',
        'orbithash_stage_seconds_count{stage="encode"} 1.0',
        'orbithash_stage_seconds_count{stage="scan"} 3.0',
    ):
        assert f"\n{line}\n" in metrics, metrics

    logged(process, "^(Search) of .* NOT_FOUND$")
    # On a slow machine, successful calls are logged too, as slow.
    (failed,) = [line for line in lines_of(process) if line.get("outcome") not in (None, "OK")]
    assert failed["request_id"] == caught.value.request_id
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    for line in lines_of(process):
        assert set(line) >= {"time", "level", "logger", "message"}
    assert lines_of(process)[-1]["message"].startswith("stopping: ")
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(page, timeout=60)


def status_of(*healthy, is_serving=True):
    shards = tuple(ShardStatus(1000 + number, 2, each, 3, 31_500) for number, each in enumerate(healthy))
    about = (sum(shard.rows for shard in shards), 64, "m" * 32, 7, "hnsw", True, shards, "0.1", 1280, None, False, 4)
    return Status(Description(*about), is_serving)


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (status_of(2, 1), 0, "serving"),
        (status_of(2, 0), 1, "answers are partial: no healthy replica of shard 1"),
        (status_of(0, 0, is_serving=False), 1, "answers are partial: no healthy replica of shard 0, 1"),
        (status_of(2, 2, is_serving=False), 1, "not serving"),
    ],
)
def test_exit_code(cli, monkeypatch, status, code, words):
    monkeypatch.setattr(verb, "read_status", lambda client: status)
    ended = cli("status")
    assert (ended.code, ended.err) == (code, "")
    for each in (words, "1,000", "hnsw (approximate)", "31.5", "gateways                4"):
        assert each in ended.out
    ended = cli("status", "--json")
    assert ended.code == code
    assert json.loads(ended.out)["is_whole"] is (code == 0)


def test_no_gateway_at_the_address(cli):
    ended = cli("status", "--address", "127.0.0.1:1")
    assert (ended.code, ended.out) == (2, "")
    assert re.fullmatch(r"error: no gateway at 127.0.0.1:1: .*\n", ended.err)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--metrics", "9464"], ["HOST:PORT", "'9464'"]),
        (["--metrics", "0.0.0.0:0"], ["loopback", "--open-metrics"]),
        (["--log-format", "xml"], ["'xml' is not one of 'text', 'json'"]),
        (["--index", "multi-hash"], ["multi-hash", "exact"]),
        (["--shards", "0"], ["0 shards; from 1 to 1,024"]),
        (["--gateways", "65"], ["65 gateways; from 1 to 64"]),
        (["--gateways", "2"], ["got --local and --gateways", "omit --gateways"]),
        (["--join"], ["got --local and --join", "omit --join"]),
        (["--replicas", "2"], ["got --local and --replicas"]),
    ],
)
def test_wrong_options_of_serve(refused, archive, model, options, words):
    refused("serve", archive, "--model", model, "--local", "--address", "127.0.0.1:0", *options, words=words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["no model was given", "--model"]),
        (["--join", "--gateways", "2"], ["got --join and --gateways"]),
    ],
)
def test_wrong_options_of_gateways(refused, archive, options, words):
    refused("serve", archive, "--address", "127.0.0.1:0", *options, words=words)
