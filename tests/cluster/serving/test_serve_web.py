"""`serve --web` and `orbithash web` as processes: the page's process, its end, TLS, and refusals."""

import json
import os
import re
import signal
import socket
import ssl
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from certificates import Authority
from cluster_parts import family, wait_for
from serving_parts import ready_at

TOKEN = "reader-0123456789abcdef"


def page_at(process):
    """Wait until the address of the page is reported, and return it."""
    return wait_for(lambda: re.search(r"page at (https?://[\w.:\[\]]+)", process.err.read_text()), process)[1]


def described(url, token="", context=None):
    request = urllib.request.Request(
        f"{url}/api/archive", headers={"Authorization": f"Bearer {token}"} if token else {}
    )
    with urllib.request.urlopen(request, timeout=120, context=context) as response:
        return json.load(response)


def page_process(process):
    """Return the process of the page: the child of multiprocessing that is no resource tracker."""
    found = []
    for pid in family(process.pid):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if "multiprocessing.spawn" in title and "--multi" in title:
            found.append(pid)
    return found


def is_running(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_the_page_beside_a_gateway(start, archive, model):
    options = ("--local", "--address", "127.0.0.1:0", "--web", "127.0.0.1:0")
    process = start("serve", archive, "--model", model, *options)
    ready_at(process)
    url = page_at(process)
    rows = described(url)["rows"]
    assert int(rows) > 0
    (first,) = page_process(process)
    os.kill(first, signal.SIGKILL)
    # Connections wait while it is started again.
    assert described(url)["rows"] == rows
    assert re.search(r"the page \(process \d+\) ended with exit code -9; it is started again", process.err.read_text())
    (second,) = page_process(process)
    assert second != first
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert not is_running(second)
    assert "Traceback" not in process.err.read_text()


@pytest.mark.slow
def test_tls_and_tokens_and_a_gateway_that_is_killed(start, archive, model, tmp_path, monkeypatch):
    """The certificate is for another name than the loopback address, as a gateway's usually is."""
    monkeypatch.setattr(Authority, "addresses", ("gateway.example",))
    authority = Authority(tmp_path, "authority")
    certificate, key = authority.issue("gateway")
    (tmp_path / "tokens").write_text(f"read {TOKEN} colleague\n")
    (tmp_path / "tokens").chmod(0o600)
    options = ("--local", "--address", "127.0.0.1:0", "--web", "127.0.0.1:0", "--log-format", "json")
    protected = ("--tokens", tmp_path / "tokens", "--tls-cert", certificate, "--tls-key", key)
    process = start("serve", archive, "--model", model, *options, *protected)
    url = page_at(process)
    assert url.startswith("https://127.0.0.1:")
    context = ssl.create_default_context(cafile=authority.path)
    context.check_hostname = False
    assert int(described(url, TOKEN, context)["rows"]) > 0
    with pytest.raises(urllib.error.HTTPError) as caught:
        described(url, context=context)
    assert caught.value.code == 401
    (page,) = page_process(process)
    process.kill()
    process.wait(60)
    wait_for(lambda: not is_running(page))


@pytest.mark.ray
@pytest.mark.slow
def test_the_page_beside_gateways_on_ray(start, archive, model, tmp_path):
    options = (
        "--address",
        "127.0.0.1:0",
        "--web",
        "127.0.0.1:0",
        "--gateways",
        "2",
        "--segments",
        tmp_path / "segments",
    )
    process = start("serve", archive, "--model", model, *options)
    ready_at(process)
    url = page_at(process)
    wait_for(lambda: described(url)["gateways"] == 2, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0


def test_what_is_refused(refused, archive, model, tmp_path):
    certificate, key = Authority(tmp_path, "authority").issue("gateway")
    ca = tmp_path / "authority.pem"
    serve = ("serve", archive, "--model", model, "--local", "--address", "127.0.0.1:0")
    tls = ("--tls-cert", certificate, "--tls-key", key)
    refused(*serve, "--web", "nowhere", words=("HOST:PORT",))
    refused(*serve, "--web", "0.0.0.0:0", words=("no TLS and no tokens", "--insecure-listen"))
    refused(*serve, "--web", "127.0.0.1:0", *tls, "--client-ca", ca, words=("--client-ca", "orbithash web --gateway"))
    refused(*serve, "--base-map", "https://a.example/{z}/{x}/{y}", words=("--web",))
    refused(*serve, "--web", "127.0.0.1:0", "--base-map", "a/{z}", words=("base map", "a/{z}"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused(*serve, "--web", address, words=(address, "in use"))
        refused("web", "--gateway", "127.0.0.1:1", "--listen", address, words=(address, "in use"))
    refused("web", "--gateway", "nowhere", words=("HOST:PORT",))
    refused("web", "--web-host", "https://maps.example.org", words=("--web-host", "https://maps.example.org"))
    refused("web", "--listen", "0.0.0.0:0", words=("no certificate", "--insecure-listen"))
    refused("web", "--listen", "127.0.0.1:0", "--tls-cert", certificate, words=("--tls-key",))
    refused("web", "--listen", "0.0.0.0:0", "--gateway", "127.0.0.1:1", *tls, words=("no gateway at 127.0.0.1:1",))


def test_the_page_starts_before_its_gateway(start):
    process = start("web", "--gateway", "127.0.0.1:1", "--listen", "127.0.0.1:0")
    url = page_at(process)
    with pytest.raises(urllib.error.HTTPError) as caught:
        described(url)
    assert caught.value.code == 503
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert "Traceback" not in process.err.read_text()
