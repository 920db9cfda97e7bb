"""The parts of a step: the precision of backbones in training."""

import torch

from orbithash.encoders.networks.backbones.build import build_backbone
from orbithash.encoders.networks.card import HeadSpec
from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.trainers.loop.steps import train_in_bfloat16


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
