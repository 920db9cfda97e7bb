"""`train` and `evaluate` as functions: their examples run, and a run folder is that of the command line."""

import doctest
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from method_parts import write_data

import orbithash.trainers
from orbithash.encoders.errors import InputError
from orbithash.trainers import evaluate, library, train
from orbithash.trainers.loop.run_folder import open_run, read_history

SETTINGS = {"bits": 16, "backbone": "mobilenet_v3_small", "image_size": 32, "batch_size": 4, "epochs": 3}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A current folder with images in it."""
    monkeypatch.chdir(tmp_path)
    return write_data(tmp_path / "images")


def test_the_examples_of_the_documentation_run(data):
    names = {"train": train, "evaluate": evaluate}
    for text in (orbithash.trainers.__doc__, train.__doc__, evaluate.__doc__):
        example = doctest.DocTestParser().get_doctest(text, names, "example", None, None)
        assert example.examples
        assert doctest.DocTestRunner().run(example, clear_globs=False).failed == 0


def test_a_run_is_complete_and_belongs_to_the_command_line_too(data, tmp_path):
    records = []
    model = train("dhcl", data, tmp_path / "run", on_epoch=records.append, label_code="gray", **SETTINGS)
    out = tmp_path / "run"
    assert sorted(path.name for path in out.iterdir()) == ["config.yaml", "manifest.parquet", "metrics.jsonl", "model"]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert read_history(out) == json.loads(json.dumps(records))
    best = max(records, key=lambda record: (record["score"], record["epoch"]))
    assert model.card.metrics == best
    # A second call loads the model.
    again = train("dhcl", str(data), str(out), on_epoch=records.append, label_code="gray", **SETTINGS)
    assert (again.model_id, len(records)) == (model.model_id, 3)
    metrics = evaluate(out)
    assert json.loads((out / "evaluation" / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert metrics["queries"] == len(open_run(out).manifest.part("test"))
    assert (out / "evaluation" / "report.html").is_file()


def test_an_interrupted_run_ends_as_if_it_had_not_been(data, tmp_path):
    whole = train("dhcl", data, tmp_path / "whole", **SETTINGS)

    def stop(record):
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("dhcl", data, tmp_path / "run", on_epoch=stop, **SETTINGS)
    with pytest.raises(InputError, match="has no model yet"):
        evaluate(tmp_path / "run")
    records = []
    resumed = train("dhcl", data, tmp_path / "run", on_epoch=records.append, **SETTINGS)
    assert [record["epoch"] for record in records] == [3]
    files = sorted((data / "beach").iterdir())
    np.testing.assert_array_equal(resumed.encode_files(files), whole.encode_files(files))
    assert resumed.model_id == whole.model_id


def test_a_run_that_another_process_trains_is_left_alone(data, tmp_path):
    held = "import sys\nfrom pathlib import Path\nfrom orbithash.trainers.loop.run_folder import only_process\n"
    held += "with only_process(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    arguments = [sys.executable, "-c", held, str(tmp_path / "run")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(
            InputError, match="run: another process works there; wait until it has ended, or give anoth"
        ):
            train("dhcl", data, tmp_path / "run", **SETTINGS)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
        other.stdin.close()
    assert not (tmp_path / "run").exists(), "nothing was left in it"
    # A lock that a killed process has left.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    train("dhcl", data, tmp_path / "run", **SETTINGS)


def test_wrong_calls_are_refused(data, tmp_path):
    with pytest.raises(InputError, match="did you mean epochs"):
        train("dhcl", data, tmp_path / "run", epoch=3)
    with pytest.raises(InputError, match="device is 'mps'"):
        train("dhcl", data, tmp_path / "run", device="mps", **SETTINGS)
    assert not (tmp_path / "run").exists()
    train("dhcl", data, tmp_path / "run", **{**SETTINGS, "epochs": 1})
    with pytest.raises(InputError, match="bits was 16, is 24"):
        train("dhcl", data, tmp_path / "run", **{**SETTINGS, "epochs": 1, "bits": 24})
    with pytest.raises(InputError, match="no model of 8 bits; there is 16"):
        evaluate(tmp_path / "run", bits=8)
    with pytest.raises(InputError, match="nowhere is not a folder"):
        evaluate(tmp_path / "run", tmp_path / "nowhere")
    (tmp_path / "of ray" / "ray").mkdir(parents=True)
    run = library.make_run("dhcl", data, **SETTINGS)
    library.claim_folder(run, tmp_path / "of ray")
    with pytest.raises(InputError, match="holds a run of the command line"):
        train("dhcl", data, tmp_path / "of ray", **SETTINGS)


def test_the_import_is_quick_and_free_of_ray():
    code = "import sys, orbithash.trainers as t; assert 'torch' not in sys.modules; t.train; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert "torch" in loaded.stdout.split()
    assert not {"ray", "lance", "grpc"} & {*loaded.stdout.split()}
