import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orbithash.v1 import search_pb2

ROOT = Path(__file__).resolve().parents[3] / "proto"
PROTO = (ROOT / "orbithash/v1/search.proto").read_text()
FILE = search_pb2.DESCRIPTOR


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("proto_generate", ROOT / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_code_is_fresh(generate):
    assert generate.stale() == []


def test_stale_code_is_seen(generate, tmp_path):
    shutil.copytree(ROOT, tmp_path / "proto", ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path / "proto/orbithash/v1"
    (folder / "search_pb2.pyi").write_text("outdated")
    (folder / "search_pb2_grpc.py").unlink()
    (folder / "gone_pb2.py").write_text("")
    assert generate.stale(tmp_path / "proto") == ["gone_pb2.py", "search_pb2.pyi", "search_pb2_grpc.py"]


def test_check_prints_one_line_and_fails_when_stale(tmp_path):
    shutil.copytree(ROOT, tmp_path / "proto", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, str(tmp_path / "proto/generate.py"), "--check"]
    fresh = subprocess.run(command, capture_output=True, text=True)
    assert (fresh.returncode, fresh.stdout, fresh.stderr) == (0, "", "")
    (tmp_path / "proto/orbithash/v1/search_pb2.py").write_text("outdated")
    stale = subprocess.run(command, capture_output=True, text=True)
    assert stale.returncode == 1
    assert stale.stderr.strip().splitlines() == [
        "generated code is stale: search_pb2.py; run `python proto/generate.py`"
    ]


def test_names_follow_the_standard_rules():
    assert FILE.name == "orbithash/v1/search.proto"
    assert FILE.package == "orbithash.v1"
    for name, enum in FILE.enum_types_by_name.items():
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper()
        assert enum.values_by_number[0].name == f"{prefix}_UNSPECIFIED"
        assert all(re.fullmatch(rf"{prefix}(_[A-Z0-9]+)+", value.name) for value in enum.values)
    for name, service in FILE.services_by_name.items():
        assert name.endswith("Service")
        for method in service.methods:
            assert (method.input_type.name, method.output_type.name) == (
                f"{method.name}Request",
                f"{method.name}Response",
            )
    for message in FILE.message_types_by_name.values():
        assert re.fullmatch(r"([A-Z][a-z0-9]*)+", message.name)
        for item in [*message.fields, *message.oneofs]:
            assert re.fullmatch(r"_?[a-z][a-z0-9]*(_[a-z0-9]+)*", item.name)


def test_every_message_field_and_rpc_has_a_comment():
    lines = [line.strip() for line in PROTO.splitlines()]
    declares = re.compile(r"(message|service|rpc|oneof) \w+|(optional |repeated )?[\w.]+ \w+ = \d+;")
    bare = [line for before, line in itertools.pairwise(lines) if declares.match(line) and before[:2] != "//"]
    assert bare == []
