"""Compiled backbones: training as without up to rounding, the same checkpoints, codes of the network as it is."""

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from method_parts import flat, make_run, timeless, trained, write_data
from torch._dynamo.backends.common import aot_autograd

from orbithash.encoders.errors import InputError
from orbithash.trainers.config import load_config
from orbithash.trainers.loop import backbones
from orbithash.trainers.loop.checkpoint import load_checkpoint
from orbithash.trainers.loop.export import export_models
from orbithash.trainers.methods.dhcl import DhclConfig

# Odd shares: micro-batches of 4 and 3 images.
SETTINGS = {"backbone": "resnet8", "warm_up_epochs": 1, "batch_size": 7, "accumulate": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "first")


class Graphs:
    """A compiler of torch, "eager" runs graphs as they are; it counts the graphs and their calls."""

    def __init__(self, backend="eager"):
        self._compile = torch._dynamo.lookup_backend(backend)
        self.num_compiled = self.num_calls = 0

    def __call__(self, graph, inputs):
        self.num_compiled += 1
        compiled = self._compile(graph, inputs)

        def run(*arguments):
            self.num_calls += 1
            return compiled(*arguments)

        return run


@pytest.fixture
def graphs(monkeypatch, one_thread):
    torch._dynamo.reset()
    compiler = Graphs()
    monkeypatch.setattr(backbones, "BACKEND", compiler)
    yield compiler
    torch._dynamo.reset()


def test_a_compiled_run_is_the_run_up_to_rounding(data, tmp_path, graphs):
    plain, compiled = (make_run(data, "dhcl", compile=flag, **SETTINGS) for flag in (False, True))
    expected = trained(plain, tmp_path / "plain").history
    assert graphs.num_compiled == 0
    found = trained(compiled, tmp_path / "compiled").history
    for one, other in zip(timeless(found), timeless(expected), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    # Two sizes of micro-batches, in the warm-up and after it. Validation calls no graph.
    assert graphs.num_compiled == 4
    num_steps = len(compiled.images("train")) // 7
    assert graphs.num_calls == 2 * 2 * num_steps
    states = [load_checkpoint(tmp_path / name / "epoch2") for name in ("plain", "compiled")]
    assert list(states[0]["method"]) == list(states[1]["method"])
    # Codes do not depend on the setting.
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3)).astype(np.uint8)
    models = [export_models(run, tmp_path / "compiled" / "epoch2")[0] for run in (plain, compiled)]
    np.testing.assert_array_equal(*(model.encode_prepared(images) for model in models))


def test_a_compiled_run_resumes_to_the_same_weights(data, tmp_path, graphs):
    run = make_run(data, "dhcl", compile=True, **SETTINGS)
    trained(run, tmp_path / "whole")
    torch._dynamo.reset()
    (tmp_path / "rest").mkdir()
    trained(run, tmp_path / "rest", resume_from=tmp_path / "whole" / "epoch1")
    one, other = (flat(load_checkpoint(tmp_path / name / "epoch2")["method"]) for name in ("whole", "rest"))
    assert one == other


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bfloat16"},
        {"tune": "last", "tune_blocks": 1, "checkpoint_gradients": True},
        {"backbone": "timm:test_vit", "tune": "lora", "lora_rank": 2},
    ],
)
def test_compiled_with_other_settings(data, graphs, settings):
    given = {**SETTINGS, "epochs": 1, "warm_up_epochs": 0, **settings}
    losses = [trained(make_run(data, "classifier", compile=flag, **given)).history[0] for flag in (False, True)]
    assert graphs.num_calls
    assert losses[1]["train/loss"] == pytest.approx(losses[0]["train/loss"], rel=1e-4)


OF_RANKS = {"backbone": "resnet8", "warm_up_epochs": 0, "epochs": 1, "batch_size": 8}


def work(rank, data, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    backbones.BACKEND = graphs = Graphs("aot_eager")
    trained(make_run(data, "dhcl", compile=True, **OF_RANKS), folder if rank == 0 else None)
    dist.destroy_process_group()
    (folder / f"graphs{rank}.json").write_text(json.dumps([graphs.num_compiled, graphs.num_calls]))


def test_two_compiled_ranks_train_as_one_process(data, tmp_path, one_thread):
    torch.multiprocessing.spawn(work, (data, tmp_path), nprocs=2)
    run = make_run(data, "dhcl", **OF_RANKS)
    num_steps = len(run.images("train")) // OF_RANKS["batch_size"]
    for rank in range(2):
        # torch compiles the graph in pieces, for the groups of gradients that DDP sums; each step calls all of them.
        num_compiled, num_calls = json.loads((tmp_path / f"graphs{rank}.json").read_text())
        assert num_compiled
        assert num_calls >= num_compiled * num_steps
    trained(run, tmp_path / "one")
    two, one = (load_checkpoint(tmp_path / name / "epoch1")["method"] for name in ("", "one"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_missing_compiler_is_one_line(data, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(InputError, match="compile=true needs a compiler, and there is no /nowhere/g\\+\\+") as caught:
        trained(make_run(data, "dhcl", compile=True, **SETTINGS))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("of", ["outputs", "gradients"])
def test_a_backbone_that_cannot_be_compiled_is_one_line(data, monkeypatch, graphs, of):
    def refuse(graph, inputs):
        raise RuntimeError("no such\nkernel")

    of_gradients = aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=refuse)
    monkeypatch.setattr(backbones, "BACKEND", refuse if of == "outputs" else of_gradients)
    with pytest.raises(InputError, match=r"compile=true: resnet8 cannot be compiled .*no such kernel") as caught:
        trained(make_run(data, "dhcl", compile=True, **SETTINGS))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tune": "none"}, "no backbone runs in training"),
        ({"norm": "batch"}, "batch norm over workers is not compiled"),
    ],
)
def test_settings_that_cannot_be_compiled_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        load_config(DhclConfig, backbone="resnet8", compile=True, **settings)


@pytest.mark.slow
def test_torchs_own_compiler(data):
    torch._dynamo.reset()
    given = {"backbone": "resnet8", "warm_up_epochs": 0, "epochs": 1, "batch_size": 8}
    losses = [trained(make_run(data, "dhcl", compile=flag, **given)).history[0] for flag in (False, True)]
    assert losses[1]["train/loss"] == pytest.approx(losses[0]["train/loss"], rel=1e-3)
