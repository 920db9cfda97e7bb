"""The image: its Dockerfile as text, since no image is built here, and the two programs that it adds."""

import asyncio
import fnmatch
import os
import re
import runpy
import sys
import threading
import time
import tomllib
import types
from importlib import metadata
from pathlib import PurePosixPath

import numpy as np
import pytest
from certificates import Authority
from deploy_manifests import DEPLOY, KUBERNETES, PROJECT, ROOT, VERSION, build, documents, parsed, pods_of

from orbithash.cluster.cli.options import DEFAULT_ADDRESS
from orbithash.encoders.archive.archive import Archive
from orbithash.search.gateway.gateway import start_gateway
from orbithash.search.gateway.protection import Protection
from orbithash.search.observer import Observer
from orbithash.search.protocol.address import parse_address

IMAGES = DEPLOY / "images"
DOCKERFILE = (IMAGES / "Dockerfile").read_text()
TOKEN = "a-token-of-some-length"


def instructions(text=DOCKERFILE):
    """Return (word, rest) of each instruction, without comments and line continuations."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def is_sent(path):
    """Return whether .dockerignore sends a path to the builder: the last rule that matches it or its folder decides."""
    candidates = [PurePosixPath(path), *PurePosixPath(path).parents][:-1]
    sent = True
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = rule.removeprefix("!")
        if pattern.startswith("**/"):
            matches = any(fnmatch.fnmatchcase(each.name, pattern.removeprefix("**/")) for each in candidates)
        else:
            parts = PurePosixPath(pattern).parts
            matches = any(
                len(each.parts) == len(parts) and fnmatch.fnmatchcase(str(each), pattern) for each in candidates
            )
        if matches and not rule.startswith("#"):
            sent = rule.startswith("!")
    return sent


def test_the_base_is_pinned_and_the_user_is_not_root():
    assert re.search(r"^ARG PYTHON=\d+\.\d+\.\d+-slim-\w+$", DOCKERFILE, re.MULTILINE)
    bases = [rest for word, rest in instructions() if word == "FROM"]
    assert bases == ["python:${PYTHON} AS wheel", "python:${PYTHON}"]
    last = bases[-1]
    after = [word for word, _ in instructions()][[rest for _, rest in instructions()].index(last) :]
    assert after.index("USER") > max(number for number, word in enumerate(after) if word in ("RUN", "COPY"))
    assert ("USER", "1000:1000") in instructions()


def test_the_image_names_no_registry():
    for path in IMAGES.iterdir():
        assert not re.search(r"https?://", path.read_text()), path


def test_copied_files_are_sent_to_the_builder():
    copied = [word for word, rest in instructions() if word == "COPY" for word in rest.split()[:-1] if word[0] != "-"]
    copied += re.findall(r"--mount=type=bind,source=([\w./-]+)", DOCKERFILE)
    assert "deploy/images/requirements.py" in copied
    for path in copied:
        if path != ".":
            assert (ROOT / path).is_file(), path
            assert is_sent(path), path


def test_the_files_of_the_wheel_are_sent_and_few_others():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for folder in settings["package-dir"].values():
        assert any((ROOT / folder).glob("*.py"))
        assert is_sent(f"{folder}/__init__.py"), folder
    for path in (
        "README.md",
        "trainers/recipes/from-scratch.yaml",
        "proto/orbithash/v1/search.proto",
        "search/web/templates/base.html",
        "search/web/package-lock.json",
        ".ci/vendor.py",
    ):
        assert is_sent(path), path
    for path in (
        ".git/config",
        ".venv/bin/python",
        "tests/conftest.py",
        "runs/demo/x",
        "cluster/__pycache__/serve.pyc",
    ):
        assert not is_sent(path), path


@pytest.mark.parametrize(("device", "faiss"), [("cpu", "faiss-cpu"), ("cuda", "faiss-gpu")])
def test_requirements_are_those_of_the_project(device, faiss):
    requirements = runpy.run_path(str(IMAGES / "requirements.py"))["requirements"]
    found = requirements(ROOT / "pyproject.toml", device)
    assert [each for each in found if each.startswith("faiss")] == PROJECT["optional-dependencies"][
        {"cpu": "cpu", "cuda": "gpu"}[device]
    ]
    assert found[-1].startswith(faiss)
    installed = {re.split(r"[\[>;]", each)[0].strip().lower() for each in metadata.requires("orbithash")}
    assert {re.split(r"[\[>]", each)[0].lower() for each in found} - {"faiss-gpu"} <= installed


def test_the_exposed_ports_are_those_of_serve():
    ports = [int(port) for word, rest in instructions() if word == "EXPOSE" for port in rest.split()]
    (compose,) = documents(DEPLOY / "compose.yaml")
    options = parsed(compose["services"]["gateway"]["command"])
    (web,) = pods_of(build(KUBERNETES / "web"))
    listen = parsed(web.container("web")["command"])["listen"]
    addresses = (DEFAULT_ADDRESS, options["metrics"], options["web"], listen)
    assert ports == [parse_address(address)[1] for address in addresses]


def test_the_image_installs_its_programs():
    copies = dict(reversed(rest.split()[-2:]) for word, rest in instructions() if word == "COPY" and "deploy" in rest)
    assert copies == {
        "/usr/local/bin/orbithash-healthy": "deploy/images/healthy.py",
        "/usr/local/bin/orbithash-copy": "deploy/images/copy_archive.py",
    }
    for path in copies.values():
        assert (ROOT / path).read_text().startswith("#!/usr/bin/env python3\n")
    assert f"orbithash:{VERSION} " in DOCKERFILE


# The probe.


@pytest.fixture
def secrets(tmp_path):
    authority, other = Authority(tmp_path, "own"), Authority(tmp_path, "other")
    certificate, key = authority.issue("gateway")
    tokens = tmp_path / "tokens"
    tokens.touch(0o600)
    tokens.write_text(f"read {TOKEN} probe\n")
    return types.SimpleNamespace(
        protection=Protection.from_files(certificate, key, None, tokens), ca=authority.path, wrong=other.path
    )


# Seconds that an answer may take here: the default suits a probe that kubelet repeats.
PATIENT = ("--timeout", "60")


async def probe(*words):
    """Run the probe; return its exit code and stderr."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(IMAGES / "healthy.py"), *map(str, words), stderr=asyncio.subprocess.PIPE
    )
    _, err = await asyncio.wait_for(process.communicate(), 120)
    return process.returncode, err.decode()


def test_the_probe_follows_the_health_of_a_gateway(secrets):
    async def scenario():
        service = types.SimpleNamespace(observer=Observer(), can_answer=True)
        gateway = await start_gateway(service, "127.0.0.1:0", protection=secrets.protection)
        address = f"localhost:{gateway.port}"
        try:
            assert await probe(address, "--ca", secrets.ca, *PATIENT) == (0, "")
            assert await probe(address, f"--ca={secrets.ca}", "--alive", *PATIENT) == (0, "")
            for words in ((address, "--ca", secrets.wrong), (address,)):
                code, said = await probe(*words, *PATIENT)
                assert code == 1
                # gRPC may log lines of its own before.
                assert said.splitlines()[-1].startswith(f"{address}: UNAVAILABLE")
            service.can_answer = False
            # The gateway updates its health periodically.
            while (outcome := await probe(address, "--ca", secrets.ca, *PATIENT)) == (0, ""):
                pass
            assert outcome == (1, f"{address}: NOT_SERVING\n")
            assert await probe(address, "--ca", secrets.ca, "--alive", *PATIENT) == (0, "")
        finally:
            await gateway.stop(0)
        for words in ((), ("--alive",)):
            assert (await probe(address, "--ca", secrets.ca, "--timeout", "1", *words))[0] == 1

    asyncio.run(scenario())


def test_the_probe_without_encryption():
    async def scenario():
        service = types.SimpleNamespace(observer=Observer(), can_answer=True)
        gateway = await start_gateway(service, "127.0.0.1:0")
        try:
            assert await probe(gateway.address, *PATIENT) == (0, "")
        finally:
            await gateway.stop(0)

    asyncio.run(scenario())


def test_the_probe_waits_for_a_gateway_that_starts_and_for_no_other(tmp_path):
    async def scenario():
        file = tmp_path / "started"
        service = types.SimpleNamespace(observer=Observer(), can_answer=False)
        gateway = await start_gateway(service, "127.0.0.1:0")
        address = gateway.address
        words = (address, "--alive", "--start-file", file, "--start-limit", "1000", *PATIENT)
        await gateway.stop(0)
        assert await probe(*words) == (0, ""), "it may still be loading its shards"
        os.utime(file, (0, time.time() - 1001))
        code, said = await probe(*words)
        assert (code, "UNAVAILABLE" in said) == (1, True), "it has had its time"
        file.unlink()
        gateway = await start_gateway(service, address)
        try:
            assert await probe(*words) == (0, ""), "it answers, if only that no shard can be searched"
        finally:
            await gateway.stop(0)
        assert (await probe(*words))[0] == 1, "it has answered before, so it is not starting"

    asyncio.run(scenario())


# Copies of an archive.

BITS = 32


def rows(rng, keys):
    codes = rng.integers(0, 256, (len(keys), BITS // 8), dtype=np.uint8)
    return Archive.table(codes, BITS, key=keys, uri=keys)


@pytest.fixture
def archive(tmp_path):
    rng = np.random.default_rng(0)
    made = Archive.create(tmp_path / "archive", BITS, "a" * 32)
    made.commit(Archive.write_fragments(made.path, rows(rng, [f"row {i}" for i in range(500)])))
    made.optimize()
    made.refuse([("bad.tif", "no image")])
    return made


def copy_archive(source, target):
    return runpy.run_path(str(IMAGES / "copy_archive.py"))["copy"](source, target)


def test_a_copy_is_one_complete_version_while_rows_change(archive, tmp_path):
    rng = np.random.default_rng(1)
    versions, ended, failures = {archive.version: archive.codes()}, threading.Event(), []

    def write():
        try:
            while not ended.is_set():
                keys = [f"row {i}" for i in rng.choice(600, 20, replace=False)]
                with archive.writing():
                    archive.upsert(rows(rng, keys))
                    versions[archive.version] = archive.codes()
                    archive.delete(keys[:2])
                    versions[archive.version] = archive.codes()
        except BaseException as error:
            failures.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    copies = []
    try:
        for number in range(4):
            before = len(versions)
            copies.append(copy_archive(tmp_path / "archive", tmp_path / "copies" / str(number)))
            # Wait for another commit, so that each copy meets a change.
            while len(versions) == before and writer.is_alive():
                time.sleep(0.01)
    finally:
        ended.set()
        writer.join()
    assert not failures
    for made in copies:
        ids, codes = made.codes()
        expected_ids, expected_codes = versions[made.version]
        assert np.array_equal(ids, expected_ids)
        assert np.array_equal(codes, expected_codes)
        assert made.refused() == {"bad.tif": "no image"}
        assert (made.bits, made.model_id) == (BITS, "a" * 32)


def test_a_copy_can_be_restored_and_changed(archive, tmp_path):
    """Its rows keep their ids, and changes do not touch the original."""
    copy_archive(tmp_path / "archive", tmp_path / "copy")
    (tmp_path / "copy").rename(tmp_path / "restored")
    archive_files = sorted((tmp_path / "archive").rglob("*"))
    restored = Archive.open(tmp_path / "restored")
    before = restored.find(["row 1", "row 2"])
    assert before == archive.find(["row 1", "row 2"])
    with restored.writing():
        restored.upsert(rows(np.random.default_rng(2), ["row 1", "new"]))
        restored.optimize()
    assert restored.find(["row 1", "row 2"]) == before
    assert restored.num_rows == archive.num_rows + 1
    assert sorted((tmp_path / "archive").rglob("*")) == archive_files


def test_a_copy_refuses_an_existing_folder(archive, tmp_path, monkeypatch, capsys):
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(sys, "argv", ["orbithash-copy", str(tmp_path / "archive"), str(tmp_path / "there")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(IMAGES / "copy_archive.py"), run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'there'} exists; choose a new folder\n"
    assert not any((tmp_path / "there").iterdir())
