"""The verb `convert`: pickled weights become safetensors, and nothing in a pickle is run."""

import os
import pickle
import signal

import pytest
import torch
from safetensors.torch import load_file

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.backbones import pickles
from orbithash.encoders.networks.backbones.pickles import Refused, convert_here, convert_pickle


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def trap(tmp_path):
    return Trap(tmp_path / "sprung")


def layers():
    shared, half = torch.arange(6.0).reshape(2, 3), torch.ones(2, dtype=torch.bfloat16)
    return {"a.weight": shared, "b.weight": shared, "c.weight": shared.T, "d.weight": half}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"epoch": 3, "optimizer": {"lr": 0.1}, "state_dict": state},
        lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"teacher": None, "model": {"state_dict": state}},
        lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
        lambda state: {f"backbone.{name}": tensor for name, tensor in state.items()} | {"head.bias": torch.ones(1)},
        lambda state: {"state_dict": {f"module.backbone.{name}": tensor for name, tensor in state.items()}},
        lambda state: torch.nn.ParameterDict({}).state_dict() | state,
    ],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_weights_are_found_as_training_programs_save_them(tmp_path, wrap, is_zip):
    """Tensors that share memory are written as tensors of their own."""
    torch.save(wrap(layers()), tmp_path / "w.pth", _use_new_zipfile_serialization=is_zip)
    assert convert_here(tmp_path / "w.pth", tmp_path / "w.safetensors").num_tensors == 4
    assert same(load_file(tmp_path / "w.safetensors"), layers())


def test_what_is_left_out_is_named(cli, tmp_path):
    state = {"module.backbone.a": torch.ones(2), "module.head.w": torch.ones(1)}
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    ended = cli("convert", tmp_path / "w.pt", tmp_path / "w.safetensors")
    assert ended.code == 0, ended.err
    said = ended.out + ended.err
    assert "took the weights under the key state_dict" in said
    assert "removed the prefix module.backbone. from their names" in said
    assert "left out 1 tensors beside the backbone (first: head.w)" in said
    assert same(load_file(tmp_path / "w.safetensors"), {"a": torch.ones(2)})


def refused_files(trap, folder):
    """Files that are refused, with a part of the reason."""
    torch.save({"state_dict": layers(), "note": trap}, folder / "nested.pth")
    torch.save(trap, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    with (folder / "plain.pt").open("wb") as file:
        pickle.dump(trap, file)
    torch.save(torch.nn.Linear(2, 2), folder / "module.bin")
    traced = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    traced.save(str(folder / "script.pt"))
    (folder / "text.pt").write_text("hello")
    (folder / "empty.pt").write_bytes(b"")
    torch.save({"epoch": 3}, folder / "nothing.pt")
    torch.save({"a": torch.eye(2).to_sparse()}, folder / "sparse.pt")
    return {
        "nested.pth": "holds more than weights, such as code, which is not run",
        "legacy.pt": "holds more than weights",
        "plain.pt": "holds more than weights",
        "module.bin": "holds more than weights",
        "script.pt": "a TorchScript archive holds code",
        "text.pt": "",
        "empty.pt": "not a file of torch.save",
        "nothing.pt": "holds no tensors by name",
        "sparse.pt": "is sparse",
    }


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_files_that_hold_anything_else_are_refused_in_one_line(trap, tmp_path):
    for name, reason in refused_files(trap, tmp_path).items():
        with pytest.raises(Refused) as caught:
            convert_here(tmp_path / name, tmp_path / "out.safetensors")
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"nested.pth: holds more than weights, such as code"):
        convert_pickle(tmp_path / "nested.pth", tmp_path / "out.safetensors")
    assert not trap.path.exists(), "code of a pickle was run"
    assert not list(tmp_path.glob("*out.safetensors*")), "something half-written is left"


def test_the_trap_works(trap, tmp_path):
    """The test above can fail: a reader that runs code springs the trap."""
    torch.save(trap, tmp_path / "w.pt")
    torch.load(tmp_path / "w.pt", weights_only=False)
    assert trap.path.exists()


def test_an_existing_file_is_kept(cli, tmp_path):
    torch.save(layers(), tmp_path / "w.pt")
    (tmp_path / "w.safetensors").write_text("mine")
    ended = cli("convert", tmp_path / "w.pt", tmp_path / "w.safetensors")
    assert ended.code == 2
    assert "exists; choose another path" in ended.err
    assert (tmp_path / "w.safetensors").read_text() == "mine"
    assert cli("convert", tmp_path / "w.pt", tmp_path / "w.pth").code == 2
    assert "no such file" in cli("convert", tmp_path / "absent.pt", tmp_path / "new.safetensors").err


def test_a_reader_that_runs_too_long_is_ended(tmp_path):
    torch.save(layers(), tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"not read within 0.01 s"):
        convert_pickle(tmp_path / "w.pt", tmp_path / "w.safetensors", timeout_s=0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


@pytest.mark.parametrize("way", ["limit", "killed"])
def test_a_reader_that_takes_too_much_memory_is_ended(tmp_path, monkeypatch, way):
    """A tensor of 16 GiB in a file of a few hundred bytes: all its rows are one row."""
    if way == "limit":
        torch.save({"a": torch.zeros(1).expand(2**32)}, tmp_path / "w.pt")
        reason = "too much memory|more than"
    else:
        torch.save(layers(), tmp_path / "w.pt")
        program = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
        run = pickles.subprocess.run
        monkeypatch.setattr(
            pickles.subprocess,
            "run",
            lambda command, **options: run([command[0], "-c", program], **options),
        )
        reason = f"its reader ended with -{int(signal.SIGKILL)}"
    with pytest.raises(InputError, match=reason):
        convert_pickle(tmp_path / "w.pt", tmp_path / "w.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]
