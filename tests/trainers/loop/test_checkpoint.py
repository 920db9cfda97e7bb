"""Checkpoints: the content is read back unchanged, and damage is refused."""

import json
import pickle

import pytest
import torch

from orbithash.encoders.errors import InputError
from orbithash.trainers.loop.checkpoint import load_checkpoint, save_checkpoint


def equal(one, other):
    """Deep equality with tensors of the same type; tuples equal lists."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and list(one) == list(other)
            and all(type(a) is type(b) for a, b in zip(one, other, strict=True))
            and all(equal(value, other[key]) for key, value in one.items())
        )
    if isinstance(one, list | tuple):
        return isinstance(other, list) and len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


def round_trip(folder, **parts):
    save_checkpoint(folder, **parts)
    return load_checkpoint(folder)


def test_nested_values_come_back(tmp_path):
    parts = {
        "method": {"a.weight": torch.randn(3, 4), "count": torch.tensor(7), "empty": torch.zeros(0, 2)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 11: {}}, "betas": (0.9, 0.999), "none": None},
        "history": [{"epoch": 1, "loss": 0.1, "name": "ü", "flag": True}, {}],
        "number": 5,
    }
    found = round_trip(tmp_path / "new" / "folder", **parts)
    assert equal(parts, found)
    assert found["optimizer"]["betas"] == [0.9, 0.999]
    assert list(found["optimizer"]["state"]) == [0, 11]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int64", "bool"])
def test_every_type_of_tensor_comes_back(tmp_path, dtype):
    value = torch.tensor([[0, 1], [1, 0]]).to(getattr(torch, dtype))
    assert equal({"value": value}, round_trip(tmp_path, value=value))


def test_floats_come_back_to_the_last_digit(tmp_path):
    values = [0.1, 1 / 3, 1e-300, -2.5e17, float("inf")]
    assert round_trip(tmp_path, values=values)["values"] == values


def test_tensors_in_any_layout_come_back(tmp_path):
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    parts = {"image": image, "turned": torch.randn(3, 4).T, "slice": torch.randn(6)[::2]}
    assert equal(parts, round_trip(tmp_path, **parts))


def test_names_that_look_alike_do_not_collide(tmp_path):
    parts = {
        "a/b": {"c": torch.tensor(1)},
        "a": {"b/c": torch.tensor(2), "b": {"c": torch.tensor(3)}, 0: torch.tensor(4), "0": torch.tensor(5)},
        "tensor": "a",
        "items": {"tensor": torch.tensor(6), "items": [torch.tensor(7)]},
    }
    assert equal(parts, round_trip(tmp_path, **parts))


def test_an_optimizer_goes_on_as_if_nothing_had_happened(tmp_path):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 9, 2))
        model = model.to(memory_format=torch.channels_last)
        head = {"params": model[2].parameters(), "lr": 0.05}
        return model, torch.optim.AdamW([{"params": model[0].parameters()}, head], lr=0.01)

    def steps(model, optimizer, first, last):
        for step in range(first, last):
            x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    whole = make()
    steps(*whole, 0, 6)
    before = make()
    steps(*before, 0, 3)
    save_checkpoint(tmp_path, model=before[0].state_dict(), optimizer=before[1].state_dict())
    after = make()
    state = load_checkpoint(tmp_path)
    after[0].load_state_dict(state["model"])
    after[1].load_state_dict(state["optimizer"])
    assert len(state["optimizer"]["state"]) == 4
    steps(*after, 3, 6)
    assert equal(whole[0].state_dict(), after[0].state_dict())


def test_what_was_loaded_outlives_its_files(tmp_path):
    found = round_trip(tmp_path, value=torch.arange(1000.0))
    save_checkpoint(tmp_path, value=torch.zeros(10))
    assert torch.equal(found["value"], torch.arange(1000.0))


# Damage.


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path, method={"a": torch.randn(50), "b": torch.randn(50)}, history=[{"epoch": 1}])
    return tmp_path


def refused(folder):
    with pytest.raises(InputError, match="the checkpoint is damaged") as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
def test_a_truncated_file(folder, name, share):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    refused(folder)


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    refused(folder)


@pytest.mark.parametrize(
    "tree",
    [
        5,
        [],
        None,
        "text",
        {},
        {"items": 5},
        {"items": [1]},
        {"items": [["a"]]},
        {"items": [[["a"], 1]]},
        {"items": [["a", {"tensor": "99"}]]},
        {"items": [["a", {"tensor": ["b"]}]]},
    ],
)
def test_json_of_another_form(folder, tree):
    (folder / "state.json").write_text(json.dumps(tree))
    refused(folder)


def test_a_pickle_is_not_opened(folder):
    (folder / "tensors.safetensors").write_bytes(pickle.dumps({"0": [1, 2, 3]}))
    refused(folder)
