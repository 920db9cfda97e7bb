"""The hash network against its description, layer by layer."""

import pytest
import torch

from orbithash.encoders.card import NetworkSpec
from orbithash.encoders.errors import InputError
from orbithash.encoders.networks import HashNetwork


def network(pooling="avg+max", bits=16, num_classes=5):
    torch.manual_seed(0)
    return HashNetwork(NetworkSpec("mobilenet_v3_small", "group", pooling, bits, num_classes))


@pytest.mark.parametrize("pooling", ["avg", "max", "avg+max"])
def test_forward_is_backbone_pooling_norm_linear_tanh_linear(pooling):
    net = network(pooling)
    torch.nn.init.normal_(net.norm.weight)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = net(x)
        for i in range(2):
            maps = net.backbone(x[i : i + 1])[0].double()
            means = torch.stack([channel.flatten().sum() / channel.numel() for channel in maps])
            largest = torch.stack([channel.flatten().max() for channel in maps])
            pooled = {"avg": means, "max": largest, "avg+max": means + largest}[pooling]
            spread = ((pooled - pooled.mean()) ** 2).mean()
            normed = (pooled - pooled.mean()) / (spread + net.norm.eps).sqrt() * net.norm.weight.double()
            hashes = torch.tanh(net.hash_layer.weight.double() @ (normed + net.norm.bias.double()))
            logits = net.classifier.weight.double() @ hashes + net.classifier.bias.double()
            assert torch.allclose(found.hashes[i].double(), hashes, atol=1e-4)
            assert torch.allclose(found.logits[i].double(), logits, atol=1e-4)


def test_shapes_and_range():
    found = network(bits=24)(torch.randn(3, 3, 32, 40))
    assert found.hashes.shape == (3, 24)
    assert found.logits.shape == (3, 5)
    assert (found.hashes.abs() < 1).all()


def test_without_classes_there_are_no_logits():
    net = network(num_classes=0)
    assert net.classifier is None
    assert net(torch.randn(1, 3, 32, 32)).logits is None


def test_a_fresh_network_does_not_saturate():
    """Pooled features are large and of one sign; tanh must see neither."""
    before_tanh = torch.atanh(network(bits=256)(torch.randn(8, 3, 64, 64)).hashes)
    assert 0.5 < float(before_tanh.detach().std()) < 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 7}, "bits is 7"),
        ({"bits": 513}, "bits is 513"),
        ({"bits": True}, "bits is True"),
        ({"pooling": "median"}, r"'median'; there are avg, max, avg\+max"),
        ({"num_classes": -1}, "num_classes is -1"),
    ],
)
def test_a_wrong_spec_is_refused(changes, message):
    fields = {"backbone": "resnet18", "norm": "group", "pooling": "avg", "bits": 16, "num_classes": 2}
    with pytest.raises(InputError, match=message):
        NetworkSpec(**{**fields, **changes})
