"""The hash network against its description, layer by layer."""

import pytest
import torch

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.backbones.build import build_backbone
from orbithash.encoders.networks.card import HeadSpec
from orbithash.encoders.networks.hash_network import HashHead, HashNetwork, Standardise, UnitLength


def network(pooling="avg+max", bits=16, num_classes=5):
    torch.manual_seed(0)
    return HashNetwork(build_backbone("mobilenet_v3_small", pooling=pooling), HeadSpec(bits), num_classes)


@pytest.mark.parametrize("pooling", ["avg", "max", "avg+max"])
def test_forward_is_backbone_pooling_norm_linear_tanh_linear(pooling):
    net = network(pooling)
    torch.nn.init.normal_(net.head.norm.weight)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = net(x)
        for i in range(2):
            maps = net.backbone.body(x[i : i + 1])[0].double()
            means = torch.stack([channel.flatten().sum() / channel.numel() for channel in maps])
            largest = torch.stack([channel.flatten().max() for channel in maps])
            pooled = {"avg": means, "max": largest, "avg+max": means + largest}[pooling]
            spread = ((pooled - pooled.mean()) ** 2).mean()
            normed = (pooled - pooled.mean()) / (spread + net.head.norm.eps).sqrt() * net.head.norm.weight.double()
            hashes = torch.tanh(net.head.output.weight.double() @ (normed + net.head.norm.bias.double()))
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
    """Pooled features are large and positive; the inputs of tanh must be neither."""
    before_tanh = torch.atanh(network(bits=256)(torch.randn(8, 3, 64, 64)).hashes)
    assert 0.5 < float(before_tanh.detach().std()) < 2


def test_a_negative_number_of_classes_is_refused():
    with pytest.raises(InputError, match="num_classes is -1"):
        HashNetwork(build_backbone("resnet8"), HeadSpec(16), -1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 7}, "bits is 7"),
        ({"bits": 513}, "bits is 513"),
        ({"bits": True}, "bits is True"),
        ({"norm": "batch"}, "the norm of the head is 'batch'; none, layer, standardise, unit are allowed"),
        ({"hidden_activation": "gelu"}, "the hidden activation of the head is 'gelu'"),
        ({"activation": "sign"}, "the activation of the head is 'sign'; tanh, sigmoid, none are allowed"),
        ({"hidden": (64, 0)}, r"widths of the hidden layers are \[64, 0\]"),
    ],
)
def test_a_wrong_head_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        HeadSpec(**{"bits": 16, **changes})


@pytest.mark.parametrize(("activation", "threshold"), [("tanh", 0.0), ("sigmoid", 0.5), ("none", 0.0)])
def test_an_mlp_head_is_its_layers_one_by_one(activation, threshold):
    torch.manual_seed(0)
    spec = HeadSpec(8, norm="standardise", hidden=(7, 6), hidden_activation="leaky-relu", activation=activation)
    head = HashHead(5, spec)
    features = torch.randn(9, 5) * 3 + 1
    head.norm.fit(features)
    with torch.no_grad():
        found = head(features)
        x = (features.double() - features.double().mean(0)) / features.double().std(0, correction=0)
        for layer in (head.hidden[0], head.hidden[2]):
            x = x @ layer.weight.double().T + layer.bias.double()
            x = torch.where(x > 0, x, 0.2 * x)
        x = x @ head.output.weight.double().T + head.output.bias.double()
        x = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "none": lambda y: y}[activation](x)
    assert torch.allclose(found.double(), x, atol=1e-5)
    assert spec.threshold == threshold


def test_standardising_by_one_pair_of_moments_and_a_constant_dimension():
    features = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    norm = Standardise(2)
    norm.fit(features)
    assert norm(features).tolist() == [[-1, 0], [1, 0]]
    norm.fit(features, per_dimension=False)
    spread = torch.tensor([1.0, 5, 3, 5]).std(correction=0)
    assert torch.allclose(norm(features), (features - 3.5) / spread)


def test_batch_norm_stands_between_linear_and_relu():
    head = HashHead(5, HeadSpec(8, hidden=(7,), batch_norm=True))
    assert [type(layer).__name__ for layer in head.hidden] == ["Linear", "BatchNorm1d", "ReLU"]


def test_unit_norm_keeps_a_row_of_zeros():
    assert UnitLength()(torch.tensor([[3.0, 4.0], [0, 0]])).tolist() == [
        [pytest.approx(0.6), pytest.approx(0.8)],
        [0, 0],
    ]


@pytest.mark.parametrize("norm", ["none", "layer", "standardise", "unit"])
def test_the_error_scale_bounds_the_effect_of_rounding(norm):
    """Features that change by a relative error change no output by more than that share of its scale."""
    torch.manual_seed(0)
    head = HashHead(50, HeadSpec(8, norm=norm, activation="none")).double()
    features = torch.rand(200, 50, dtype=torch.float64) + 20
    if norm == "standardise":
        head.norm.fit(features)
    error = 1e-6
    with torch.no_grad():
        changed = head(features * (1 + error * (2 * torch.rand_like(features) - 1)))
        shares = (changed - head(features)).abs() / head.error_scale(features)
    assert shares.max() < error
    # The bound is not far above the real error.
    assert shares.max() > error / 100


def test_the_error_scale_grows_with_the_outputs():
    torch.manual_seed(0)
    head, features = HashHead(50, HeadSpec(8, activation="none")), torch.randn(3, 50)
    with torch.no_grad():
        before = head.error_scale(features)
        head.output.weight *= 1000
        torch.testing.assert_close(head.error_scale(features), 1000 * before)
