"""Network access to a new Ray cluster: loopback addresses only, and a token."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, re
from pathlib import Path

from orbithash.cluster.runtime import connected


def family(root):
    '''Return the process `root` and its descendants, by the parents in /proc.'''
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    members = {root}
    while grown := {pid for pid, parent in parents.items() if parent in members} - members:
        members |= grown
    return members


def listening(pids):
    '''Return the local addresses that these processes listen on, in the kernel's hexadecimal form.'''
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                if found := re.fullmatch(r"socket:.(\\d+).", os.readlink(link)):
                    inodes.add(found[1])
            except OSError:
                continue
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return sorted(row[1].rpartition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes)


with connected():
    import ray

    ray.get(ray.remote(lambda: None).remote())
    print(json.dumps({"listening": listening(family(os.getpid())), "mode": os.environ["RAY_AUTH_MODE"]}))
"""

LOOPBACK = {
    "0100007F",  # 127.0.0.1
    "0000000000000000FFFF00000100007F",  # the same as an IPv4-mapped IPv6 address
    "00000000000000000000000001000000",  # ::1
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_local_cluster_listens_on_loopback_only(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**environment, "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["mode"] == "token"
    assert len(found["listening"]) > 3
    assert set(found["listening"]) <= LOOPBACK
    assert not (tmp_path / ".ray" / "auth_token").exists(), "only this process and its workers have the token"
