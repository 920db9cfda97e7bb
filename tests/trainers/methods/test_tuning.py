"""What of a backbone trains: blocks, adapters, rates; schedules by step; recomputed activations."""

import math
import sys

import pytest
import torch
from torch import nn

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.backbones.backbone import Backbone
from orbithash.encoders.networks.backbones.build import build_backbone
from orbithash.trainers.config import load_config
from orbithash.trainers.data.loading import Part
from orbithash.trainers.methods import Batch
from orbithash.trainers.methods.classifier import Classifier, ClassifierConfig
from orbithash.trainers.methods.tuning import add_adapters, merge_adapters, rates


class Block(nn.Module):
    """Attention over the rows of an image, then a linear layer."""

    def __init__(self, is_torch):
        super().__init__()
        self.is_torch = is_torch
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True) if is_torch else nn.Linear(6, 6)
        self.linear = nn.Linear(6, 6)

    def forward(self, tokens):
        if self.is_torch:
            tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        else:
            tokens = tokens + torch.softmax(self.attention(tokens) @ tokens.transpose(1, 2), dim=2) @ tokens
        return tokens + torch.tanh(self.linear(tokens))


class Transformer(Backbone):
    """A stem, three blocks and a last normalisation; the second block has torch's own attention layer."""

    def __init__(self):
        super().__init__()
        self.spec = build_backbone("resnet8").spec
        self.stem = nn.Linear(3 * 32, 6)
        self.all_blocks = nn.ModuleList(Block(is_torch=number == 1) for number in range(3))
        self.norm = nn.LayerNorm(6)

    def forward(self, images):
        tokens = self.stem(images.flatten(1, 2).transpose(1, 2))
        for block in self.all_blocks:
            tokens = block(tokens)
        return self.norm(tokens).mean(dim=1)

    def blocks(self):
        return list(self.all_blocks)

    @property
    def attention_linears(self):
        return tuple(f"all_blocks.{number}.attention" for number in range(3))


def make(**settings):
    torch.manual_seed(0)
    given = {"backbone": "resnet8", "image_size": 32, "bits": 16, "batch_size": 4, **settings}
    return Classifier(load_config(ClassifierConfig, **given), 3, 40)


def make_batch(num=4):
    images = torch.randn(num, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Batch(torch.arange(num), torch.arange(num) % 3, images, {}, 0)


EMPTY_PART = Part(None, torch.empty(0, dtype=torch.int64).numpy(), [])


def named(backbone, found):
    names = {parameter: name for name, parameter in backbone.named_parameters()}
    return {names[parameter]: factor for parameter, factor in found}


def test_rates_fall_from_the_last_block_to_the_stem():
    backbone = Transformer()
    found = named(backbone, rates(backbone, None, 0.5))
    assert found.keys() == dict(backbone.named_parameters()).keys()
    level = {"norm": 1, "all_blocks.2": 1, "all_blocks.1": 0.5, "all_blocks.0": 0.25, "stem": 0.125}
    for name, factor in found.items():
        assert factor == next(value for prefix, value in level.items() if name.startswith(prefix)), name


def test_the_last_blocks_and_what_follows_them_train():
    backbone = Transformer()
    found = named(backbone, rates(backbone, 2, 1.0))
    assert {name.rpartition(".")[0].partition(".attention")[0] for name in found} == {
        "all_blocks.1", "all_blocks.1.linear", "all_blocks.2", "all_blocks.2.linear", "norm",
    }  # fmt: skip
    with pytest.raises(InputError, match="tune_blocks is 40; resnet8 has"):
        make(tune="last", tune_blocks=40)


def test_adapters_change_nothing_before_training_and_are_merged_after_it():
    backbone = Transformer().eval()
    keys = set(backbone.state_dict())
    images = torch.randn(2, 3, 32, 32)
    before = backbone(images)
    add_adapters(backbone, 2, 4.0)
    assert torch.allclose(backbone(images), before, atol=1e-6)
    found = named(backbone, rates(backbone, None, 0.5))
    assert found
    assert all("lora_" in name for name in found)
    assert {factor for name, factor in found.items() if name.startswith("all_blocks.0")} == {0.25}
    with torch.no_grad():
        for parameter, _ in rates(backbone, None, 1.0):
            parameter.add_(torch.randn_like(parameter))
        trained = backbone(images)
    assert not torch.allclose(trained, before, atol=1e-2)
    merge_adapters(backbone)
    assert set(backbone.state_dict()) == keys
    assert torch.allclose(backbone(images), trained, atol=1e-5)


def test_adapters_need_attention_and_peft(monkeypatch):
    with pytest.raises(InputError, match="tune=lora adapts attention layers, and resnet8 has none; use tune=last"):
        make(tune="lora")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"tune=lora needs the library peft; install orbithash\[train\]"):
        add_adapters(Transformer(), 2, 4.0)


@pytest.mark.parametrize(
    ("tune", "is_first_trained", "is_last_trained"), [("all", 1, 1), ("last", 0, 1), ("none", 0, 0)]
)
def test_only_tuned_parameters_train_and_are_in_the_optimizer(tune, is_first_trained, is_last_trained):
    method = make(tune=tune, tune_blocks=1, warm_up_epochs=1)
    assert method.trains_on_images == (tune != "none")
    optimizer = method.build_optimizer()
    grouped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    first, *_, last = method.network.backbone.parameters()
    head = method.network.head.output.weight
    assert [p in grouped for p in (first, last, head)] == [is_first_trained, is_last_trained, True]
    method.start_epoch(0, EMPTY_PART)
    assert [p.requires_grad for p in (first, last, head)] == [False, False, True]
    method.start_epoch(1, EMPTY_PART)
    assert {p for p in method.parameters() if p.requires_grad} == grouped


def test_frozen_blocks_keep_the_statistics_of_batch_norm():
    method = make(tune="last", tune_blocks=1, norm="batch")
    method.train()
    before = {name: tensor.clone() for name, tensor in method.network.backbone.named_buffers()}
    method(make_batch())
    changed = {n for n, tensor in method.network.backbone.named_buffers() if not torch.equal(tensor, before[n])}
    last = method.network.backbone.blocks()[-1]
    own = {id(tensor) for tensor in last.buffers()}
    assert changed
    assert changed == {n for n, tensor in method.network.backbone.named_buffers() if id(tensor) in own}


def test_rates_of_the_optimizer_with_layer_decay():
    method = make(lr=0.001, head_lr_factor=10, layer_decay=0.5)
    found = [group["lr"] for group in method.build_optimizer().param_groups]
    num = len({factor for _, factor in rates(method.network.backbone, None, 0.5)})
    assert num > 2
    assert found == pytest.approx([0.001 * 0.5**level for level in range(num)] + [0.01])


def test_the_rate_rises_linearly_and_falls_as_a_cosine_of_steps():
    method = make(schedule="cosine-by-step", warm_up_share=0.2)
    found = [method.step_factor(step, 20) for step in range(20)]
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert found[4:] == pytest.approx([(1 + math.cos(math.pi * step / 16)) / 2 for step in range(16)])
    assert [method.start_epoch(epoch, EMPTY_PART) for epoch in (0, 7)] == [1, 1]
    by_epoch = make(warm_up_share=0.1)
    assert [by_epoch.step_factor(step, 20) for step in range(4)] == pytest.approx([0.5, 1, 1, 1])
    assert by_epoch.start_epoch(5, EMPTY_PART) == pytest.approx((1 + math.cos(math.pi / 3)) / 2)
    assert {make().step_factor(step, 20) for step in range(20)} == {1}


@pytest.mark.parametrize("backbone", ["resnet8", "mobilenet_v3_small", "resnet18"])
def test_recomputed_activations_give_the_same_gradients(backbone):
    gradients = []
    for checkpoint_gradients in (False, True):
        method = make(backbone=backbone, checkpoint_gradients=checkpoint_gradients).train()
        method(make_batch())["loss"].backward()
        gradients.append([parameter.grad for parameter in method.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", ["Dinov2", "DINOv3ViT", "Siglip", "timm"])
@pytest.mark.parametrize("tune", ["all", "last", "lora"])
def test_transformers_train_without_random_numbers_and_without_unused_parameters(kind, tune, tmp_path):
    """As DDP requires; position embeddings, masks and dropout of pretraining are switched off."""
    backbone = "timm:test_vit" if kind == "timm" else write_transformer(kind, tmp_path)
    method = make(backbone=backbone, tune=tune, tune_blocks=1, warm_up_epochs=0, checkpoint_gradients=True)
    method.start_epoch(0, EMPTY_PART)
    method.train()
    one, other = (method(make_batch())["loss"] for _ in range(2))
    assert torch.equal(one, other)
    one.backward()
    trained = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in method.named_parameters() if parameter.grad is not None}
    before = method.eval().outputs(make_batch()).hashes
    keys = set(method.network.state_dict())
    method.finish()
    assert torch.allclose(method.outputs(make_batch()).hashes, before, atol=1e-5)
    assert (set(method.network.state_dict()) == keys) == (tune != "lora")
    assert not any(type(module).__module__.startswith("peft") for module in method.modules())


def write_transformer(kind, folder):
    import transformers

    name = "SiglipVision" if kind == "Siglip" else kind
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = getattr(transformers, f"{name}Config")(**sizes, image_size=32, patch_size=8)
    getattr(transformers, f"{name}Model")(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return f"hf:{folder}"
