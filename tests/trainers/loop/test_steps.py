"""The parts of a step: the precision of backbones in training."""

import pytest
import torch
from method_parts import Recorder, make_run, timeless, write_data

from orbithash.encoders.networks.backbones.build import build_backbone
from orbithash.encoders.networks.card import HeadSpec
from orbithash.encoders.networks.devices import exact_float32, tensor_float32
from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.trainers.loop.backbones import train_in_bfloat16
from orbithash.trainers.loop.loop import train


def test_backbones_train_in_bfloat16_throughout():
    torch.manual_seed(0)
    network = HashNetwork(build_backbone("resnet18", norm="frozen-batch"), HeadSpec(16))
    train_in_bfloat16(torch.nn.Sequential(network))
    dtypes = set()
    for module in network.backbone.body.modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    images = torch.randn(2, 3, 32, 32)
    assert network.train()(images).hashes.dtype == torch.float32
    assert dtypes == {torch.bfloat16}
    dtypes.clear()
    network.eval()(images)
    assert dtypes == {torch.float32}


@pytest.fixture
def backends():
    """The settings of products and of convolutions on a GPU, as a caller has set them."""
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [kind.fp32_precision for kind in kinds]
    for kind, value in zip(kinds, ("ieee", "tf32"), strict=True):
        kind.fp32_precision = value
    yield kinds
    for kind, value in zip(kinds, before, strict=True):
        kind.fp32_precision = value


def test_tensor_float32_is_allowed_in_steps_only(tmp_path, backends):
    """On a CPU it changes nothing; the settings that a GPU reads do."""
    data = write_data(tmp_path / "data")
    seen = {"float32": [], "tf32": []}
    histories = []
    for precision, settings in seen.items():

        class Watching(Recorder):
            def on_step(self, *arguments, settings=settings):
                settings.append(tuple(each.fp32_precision for each in backends))

        recorder = Watching()
        train(make_run(data, "dhcl", epochs=1, precision=precision), recorder)
        histories.append(timeless(recorder.history))
        assert tuple(each.fp32_precision for each in backends) == ("ieee", "tf32")
    assert {*seen["float32"]} == {("ieee", "ieee")}
    assert {*seen["tf32"]} == {("tf32", "tf32")}
    assert histories[0] == histories[1]


@pytest.mark.parametrize("is_allowed", [True, False])
def test_exact_float32_overrides_tensor_float32(is_allowed):
    with tensor_float32(is_allowed), exact_float32(torch.device("cpu")):
        assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "ieee"
