"""The installation without extras: client verbs work; every other verb names the extra that it needs."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from cluster_parts import wait_for

from orbithash.encoders.archive.archive import Archive

# Modules that only the extras install.
EXTRA_MODULES = (
    *("aiohttp", "cql2", "faiss", "grpc_reflection", "huggingface_hub", "jinja2", "lance", "matplotlib", "mlflow"),
    *(
        "numpy",
        "pandas",
        "pebble",
        "PIL",
        "prometheus_client",
        "pyarrow",
        "rasterio",
        "ray",
        "sacremoses",
        "safetensors",
    ),
    *("scipy", "sentencepiece", "shapely", "sklearn", "tensorboardX", "textblob", "torch", "torchvision"),
    *("starlette", "transformers", "uvicorn", "wandb", "yaml"),
    *("open_clip", "peft", "timm", "torchgeo"),
)

# Runs the commands on stdin (JSON lists of words) with hidden modules; prints exit code, stdout and stderr of each.
PROGRAM = """
import contextlib, io, json, sys
from importlib.machinery import PathFinder

hidden = sys.argv[1].split(",")

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
from orbithash.cluster.cli.main import main

ended = []
for words in json.load(sys.stdin):
    sys.argv = ["orbithash", *words]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as exit:
        ended.append([exit.code or 0, out.getvalue(), err.getvalue()])
print(json.dumps(ended))
"""


def run_without(modules, *commands):
    """Return exit code, stdout and stderr of each command in one process that cannot import the modules."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ",".join(modules)],
        input=json.dumps([list(map(str, words)) for words in commands]),
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_verbs_say_which_extra_they_need():
    commands = {
        "train dhcl --data a --out b": "train",
        "train dhcl --help": "train",
        "tune dhcl --data a": "train",
        "methods": "train",
        "evaluate a --data b": "train",
        "reproduce --data a": "train",
        "demo": "all,cpu",
        "scenes a": "train",
        "wald a b": "train",
        "convert a.pt b.safetensors": "train",
        "bench search": "all,cpu",
        "encode a --model b --archive c": "encode",
        "serve a --model b": "serve,cpu",
        "duplicates a": "serve,cpu",
        "upsert a": "encode",
        "web": "web",
    }
    ended = run_without(EXTRA_MODULES, *(words.split() for words in commands))
    for (words, extra), (code, _, err) in zip(commands.items(), ended, strict=True):
        verb = " ".join(words.split()[: 2 if words.startswith("bench") else 1])
        assert code == 2, words
        assert err.startswith(f"error: `orbithash {verb}` needs "), (words, err)
        assert err.endswith(f", which is not installed; run: pip install 'orbithash[{extra}]'\n"), (words, err)


@pytest.mark.parametrize(
    ("module", "words", "extra"),
    [
        ("faiss", ["duplicates"], "cpu"),
        ("ray", ["encode"], "encode"),
        ("torch", ["methods"], "train"),
        ("uvicorn", ["web"], "web"),
    ],
)
def test_one_absent_module_is_named(tmp_path, scenes, model, archive, module, words, extra):
    arguments = {
        "duplicates": [archive, "--radius", "1"],
        "encode": [scenes, "--model", model, "--archive", tmp_path / "archive"],
        "methods": [],
        "web": ["--listen", "127.0.0.1:0"],
    }
    ((code, _, err),) = run_without([module], [*words, *arguments[words[0]]])
    assert code == 2, err
    assert f"`orbithash {words[0]}` needs {module}, which is not installed" in err
    assert f"pip install 'orbithash[{extra}]'" in err


def test_the_library_of_a_backbone_is_named(tmp_path, scenes, tiny_backbones):
    backbone = f"backbone={tiny_backbones['open_clip']['backbone']}"
    words = ["train", "mhcln", "--data", scenes, "--set", backbone, "--out", tmp_path / "run"]
    ((code, _, err),) = run_without(["open_clip"], words)
    assert code == 2, err
    assert err == (
        "error: `orbithash train` needs open_clip, which is not installed; run: pip install 'orbithash[open-clip]'\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("module", "source", "extra"),
    [
        ("timm", "timm", "timm"),
        ("transformers", "hf", "encode"),
        ("transformers", "hf dual", "encode"),
        ("open_clip", "open_clip", "open-clip"),
        ("torchgeo", "torchgeo", "torchgeo"),
        ("timm", "torchgeo", "timm"),
    ],
)
def test_a_model_folder_needs_the_library_that_defines_its_network(monkeypatch, tiny_backbones, module, source, extra):
    from orbithash.cluster.cli.extras import missing_extra
    from orbithash.encoders.networks.backbones.build import build_backbone, rebuild_backbone

    settings = tiny_backbones[source]
    spec = build_backbone(settings["backbone"], settings.get("weights")).spec
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        # As if it was not installed.
        monkeypatch.setitem(sys.modules, name, None)
    builders = [lambda: build_backbone(settings["backbone"], settings.get("weights"))]
    if module != "torchgeo":
        # torchgeo knows weights, and timm the layers.
        builders.append(lambda: rebuild_backbone(spec))
    for build in builders:
        with pytest.raises(ModuleNotFoundError) as caught:
            build()
        assert missing_extra(caught.value, "encode") == (
            f"`orbithash encode` needs {module}, which is not installed; run: pip install 'orbithash[{extra}]'"
        )


def test_a_missing_module_that_no_extra_installs_is_an_internal_error(cli, monkeypatch):
    import orbithash.cluster.cli.gateway.query as verb

    def fail(*_, **__):
        raise ModuleNotFoundError("No module named 'orbithash.gone'", name="orbithash.gone")

    monkeypatch.setattr(verb, "make_query", fail)
    ended = cli("query", "--key", "a")
    assert (ended.code, ended.err.count("pip install")) == (1, 0)


def test_verbs_of_a_client_work_in_a_base_installation(start, tmp_path, archive, scenes, model):
    shutil.copytree(archive, tmp_path / "archive")
    process = start("serve", tmp_path / "archive", "--model", model, "--local", "--address", "127.0.0.1:0")
    line = wait_for(lambda: [s for s in process.err.read_text().splitlines() if "ready at " in s], process)[0]
    address = line.partition("ready at ")[2].partition(";")[0]
    key = min(Archive.open(archive).keys())
    photo = scenes / key
    gateway = ("--address", address)
    ended = run_without(
        EXTRA_MODULES,
        ["--help"],
        ["status", *gateway],
        ["query", "--key", key, *gateway],
        ["query", "--image", photo, "--json", *gateway],
        ["rank", "--random", "1", *gateway],
        ["count", "--by", "label", *gateway],
        ["delete", key, *gateway],
        ["refresh", *gateway],
    )
    assert [code for code, _, _ in ended] == [0] * 8, ended
    helped, stated, found, _, ranked, counted, removed, refreshed = (out for _, out, _ in ended)
    assert "Measure" in helped
    assert "serving" in stated
    assert key in found
    assert "rows in this order" in ranked
    assert "label" in counted
    assert removed == "removed 1 rows\n"
    assert "serving" in refreshed
