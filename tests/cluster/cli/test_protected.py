"""`serve` and `query` with certificates and tokens."""

import json
import re

import pytest
from certificates import Authority
from cluster_parts import wait_for

from orbithash.encoders.archive.archive import Archive

READER, WRITER = "reader-of-the-archive", "writer-of-the-archive"


@pytest.fixture
def secrets(tmp_path):
    """Paths of the files of a gateway and its clients, readable by their owner only (except `open`)."""
    folder = tmp_path / "secrets"
    folder.mkdir()
    ours = Authority(folder, "ours")
    certificate, key = ours.issue("gateway")
    own, own_key = ours.issue("client")
    made = {"ca": ours.path, "cert": certificate, "key": key, "own": own, "own_key": own_key}
    for name, text in (
        ("tokens", f"read {READER} alice\nwrite {WRITER} bob\n"),
        ("reader", f"{READER}\n"),
        ("stranger", "somebody-elses-token\n"),
        ("open", f"{READER}\n"),
    ):
        made[name] = folder / name
        made[name].touch(0o644 if name == "open" else 0o600)
        made[name].write_text(text)
    return made


def test_queries_with_certificates_and_tokens(start, cli, archive, model, secrets, monkeypatch):
    process = start(
        *("serve", archive, "--model", model, "--local", "--address", "127.0.0.1:0", "--tokens", secrets["tokens"]),
        *("--tls-cert", secrets["cert"], "--tls-key", secrets["key"], "--client-ca", secrets["ca"]),
    )
    address = wait_for(lambda: re.search(r"ready at (\S+);", process.err.read_text()), process)[1]
    key = min(Archive.open(archive).keys())
    ask = ("query", "--key", key, "-k", "1", "--json")
    tls = ("--ca", secrets["ca"], "--cert", secrets["own"], "--cert-key", secrets["own_key"])

    ended = cli(*ask, "--address", address, *tls, "--token-file", secrets["reader"])
    assert (ended.code, ended.err) == (0, "")
    assert json.loads(ended.out)["hits"][0]["distance"] == 0
    monkeypatch.setenv("ORBITHASH_ADDRESS", address)
    for options, words in (
        ((*tls, "--token-file", secrets["stranger"]), "this gateway does not know the token"),
        (tls, "requires a token"),
        ((*tls, "--token-file", secrets["open"]), "chmod 600"),
        (("--ca", secrets["ca"], "--token-file", secrets["reader"]), "no gateway at"),
        (("--token-file", secrets["reader"]), "no gateway at"),
        (("--ca", secrets["ca"], "--cert", secrets["own"]), "come together"),
    ):
        ended = cli(*ask, "--timeout", "5", *options)
        assert ended.code == 2, ended
        assert re.fullmatch(r"error: .*\n", ended.err), ended
        assert words in ended.err
        assert READER not in ended.err
    monkeypatch.setenv("ORBITHASH_TOKEN", READER)
    assert cli(*ask, *tls).code == 0
    ended = cli("delete", key, *tls)
    assert ended.code == 2
    assert "the token of 'alice' has the role read, and Delete needs write" in ended.err


def test_invalid_options_of_serve(refused, archive, model, secrets):
    serve = ("serve", archive, "--model", model, "--local")
    for options, words in (
        (("--address", "0.0.0.0:0"), ["no TLS and no tokens", "--insecure-listen", "loopback"]),
        (("--tls-cert", secrets["cert"]), ["--tls-cert and --tls-key"]),
        (("--client-ca", secrets["ca"]), ["--tls-cert and --tls-key"]),
        (("--tokens", secrets["open"]), ["chmod 600"]),
        (("--tokens", secrets["reader"]), ["line 1", "ROLE TOKEN NAME"]),
        (("--tls-cert", secrets["ca"], "--tls-key", secrets["key"]), ["are not a certificate and its unencrypted key"]),
    ):
        refused(*serve, *options, words=words)
