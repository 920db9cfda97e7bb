"""The liveness probe of the manifest against a gateway that hangs."""

import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from certificates import Authority
from cluster_parts import BITS, kill, save_vector_model, user_environment, wait_for
from deploy_manifests import DEPLOY, GATEWAY_PORT, KUBERNETES, build, by_group

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.networks.model import HashModel


@pytest.fixture
def gateway(tmp_path):
    """A gateway with TLS, as a process; it has its `address` and the certificate `ca` of its authority."""
    authority = Authority(tmp_path, "own")
    certificate, key = authority.issue("gateway")
    model = save_vector_model(tmp_path / "model")
    archive = Archive.create(tmp_path / "archive", BITS, HashModel.load(model).model_id)
    keys = [f"row {number}" for number in range(10)]
    codes = np.random.default_rng(0).integers(0, 256, (len(keys), BITS // 8), np.uint8)
    archive.commit(Archive.write_fragments(archive.path, Archive.table(codes, BITS, key=keys, uri=keys)))
    words = ["serve", archive.path, f"--model={model}", "--local", "--address=localhost:0"]
    words += [f"--tls-cert={certificate}", f"--tls-key={key}"]
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "orbithash.cluster.cli.main", *words], stderr=stderr, env=user_environment()
        )
    process.err, process.ca = log, authority.path
    try:
        port = wait_for(lambda: re.search(r"ready at \S+:(\d+);", log.read_text()), process)[1]
        process.address = f"localhost:{port}"
        yield process
    finally:
        os.kill(process.pid, signal.SIGCONT)
        kill(process)


def test_the_probe_notices_a_gateway_that_hangs_and_one_that_goes_on(gateway, tmp_path):
    probe = by_group(build(KUBERNETES / "base"))["gateway"].container("gateway")["livenessProbe"]
    # The words of the manifest, with this gateway's address and files in place of those in a pod.
    here = {
        "orbithash-healthy": DEPLOY / "images" / "healthy.py",
        f"localhost:{GATEWAY_PORT}": gateway.address,
        "--ca=/etc/orbithash/tls/ca.crt": f"--ca={gateway.ca}",
        "--start-file=/tmp/orbithash-healthy": f"--start-file={tmp_path / 'answered'}",
    }
    words = [str(here.pop(word, word)) for word in probe["exec"]["command"]]
    assert not here, "the manifest has other words"

    def exit_code():
        """Return the exit code; kubelet ends a probe at this limit and takes it for a failure."""
        try:
            return subprocess.run([sys.executable, *words], timeout=probe["timeoutSeconds"], check=False).returncode
        except subprocess.TimeoutExpired:
            return 1

    # Kubelet repeats a probe, too: a busy machine may be late once.
    wait_for(lambda: exit_code() == 0, gateway)
    os.kill(gateway.pid, signal.SIGSTOP)
    assert exit_code() == 1
    os.kill(gateway.pid, signal.SIGCONT)
    wait_for(lambda: exit_code() == 0, gateway)
