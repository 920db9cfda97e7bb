"""The head of a report: command without secrets, versions, machine."""

import datetime as dt
import os
import socket

import pytest

from orbithash.trainers.reports.provenance import Provenance, command_line, machine, package_versions


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/x/bin/orbithash", "evaluate", "runs/a b", "--data", "tiles"], "orbithash evaluate 'runs/a b' --data tiles"),
        (["orbithash", "encode", "s3://KEY:SECRET@bucket/x"], "orbithash encode 's3://***@bucket/x'"),
        (["orbithash", "encode", "https://h/a?sig=hush&x=1"], "orbithash encode 'https://h/a?***'"),
        (["orbithash", "encode", "gs://b/a#hush"], "orbithash encode 'gs://b/a?***'"),
        (["orbithash", "encode", "what?.tif"], "orbithash encode 'what?.tif'"),
        (["orbithash", "x", "--token", "hush", "-k", "3"], "orbithash x --token *** -k 3"),
        (["orbithash", "x", "--api-token=hush\nhush", "y"], "orbithash x --api-token=*** y"),
        (["orbithash", "x", "--password-file", "hush"], "orbithash x --password-file ***"),
        (["/usr/bin/pytest", "--token", "hush"], ""),
        ([], ""),
    ],
)
def test_the_command_has_no_secrets(arguments, expected):
    assert command_line(arguments) == expected


def test_the_machine_is_described_and_not_named():
    described = machine()
    assert "cores" in described
    assert "GiB of memory" in described
    assert socket.gethostname() not in described.split()
    assert str(len(os.sched_getaffinity(0))) in described


def test_versions():
    assert package_versions("numpy")[0].startswith("orbithash ")
    assert any(name.startswith("numpy ") for name in package_versions("numpy", "no-such-package"))
    assert not any("no-such" in name for name in package_versions("no-such-package"))


def test_entries_of_the_head():
    when = dt.datetime(2026, 11, 29, 0, 50, 59, tzinfo=dt.UTC)
    origin = Provenance("Evaluation", "tiles", {"Model": "dhcl", "Index": ""}, when, "", "orbithash 1", "2 cores")
    assert dict(origin.entries) == {
        "Data": "tiles",
        "Model": "dhcl",
        "Date": "2026-11-29 00:50 UTC",
        "Command": "called from Python",
        "Version": "orbithash 1",
        "Machine": "2 cores",
    }
    assert Provenance("Plan", "").command == ""


def test_no_entry_has_secrets():
    addresses = ["s3://KEY:hush@bucket/x", "https://host/x?sig=hush"]
    origin = Provenance("Encoding", addresses[0], {"Archive": addresses[1]})
    assert dict(origin.entries)["Data"] == "s3://***@bucket/x"
    assert dict(origin.entries)["Archive"] == "https://host/x?***"
