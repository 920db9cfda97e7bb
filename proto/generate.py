"""Generate the Python code beside each .proto file, and the description of the JSON door.

    python proto/generate.py            write it
    python proto/generate.py --check    print one line and exit with 1 if the files in the tree are stale

Needs the packages grpcio-tools and mypy-protobuf. Their versions are part of the generated code; `constraints.txt`
pins them.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from google.rpc import status_pb2

ROOT = Path(__file__).resolve().parent
PACKAGE = Path("orbithash/v1")
DOOR = "openapi.json"


def generate(out: Path) -> None:
    """Write the generated code of all .proto files, and `openapi.json`, to the folder `out`/orbithash/v1."""
    scripts = Path(sys.executable).parent
    # googleapis-common-protos has the .proto files of google.rpc beside their code.
    google_rpc = Path(status_pb2.__file__).parents[2]
    with tempfile.NamedTemporaryFile() as descriptors:
        _run_protoc(out, google_rpc, scripts, descriptors.name)
        command = [sys.executable, ROOT / "openapi.py", descriptors.name, out / PACKAGE / DOOR]
        subprocess.run([str(word) for word in command], check=True)


def _run_protoc(out: Path, google_rpc: Path, scripts: Path, descriptors: str) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={ROOT}", f"--proto_path={google_rpc}"),
            *(f"--plugin={name}={scripts / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")),
            *(f"--{kind}_out={out}" for kind in ("python", "grpc_python")),
            *(f"--{kind}_out=quiet:{out}" for kind in ("mypy", "mypy_grpc")),
            *(f"--descriptor_set_out={descriptors}", "--include_source_info"),
            *(str(path) for path in sorted((ROOT / PACKAGE).glob("*.proto"))),
        ],
        check=True,
    )


def generated(root: Path) -> dict[str, bytes]:
    """Return the generated files under `root`/orbithash/v1 by name."""
    folder = root / PACKAGE
    files = [*folder.glob("*_pb2*.py*"), folder / DOOR]
    return {path.name: path.read_bytes() for path in files if path.is_file()}


def stale(root: Path = ROOT) -> list[str]:
    """Return the names of generated files under `root` that are missing, superfluous or out of date."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh, present = generated(Path(folder)), generated(root)
    return sorted(name for name in fresh.keys() | present.keys() if fresh.get(name) != present.get(name))


def main() -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description="generate the Python code of proto/")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if files are stale")
    if not parser.parse_args().check:
        generate(ROOT)
        return 0
    if names := stale():
        print(f"generated code is stale: {', '.join(names)}; run `python proto/generate.py`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
