"""Steps copy nothing between CPU and GPU and read nothing from the GPU, which would make one wait for the other.

Without a GPU: tensors of torch's `FakeTensorMode` have shapes and a device, but no numbers. What reads a number fails.
The device "meta" stands for the GPU, because gradients of tensors on "cuda" need a driver.
"""

import pytest
import torch
from method_parts import make_run, write_data
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from orbithash.encoders.networks.reading import Normaliser
from orbithash.trainers.loop.batches import _with_views, steps_on_cpu
from orbithash.trainers.loop.losses import GPU_INTERVAL, LossSums
from orbithash.trainers.loop.parts import load_training_part
from orbithash.trainers.loop.steps import _step
from orbithash.trainers.methods import METHODS, Fitted

SMALL = {"num_clusters": 4, "num_latents": 5, "autoencoder_epochs": 1, "hidden": (12,)}

CASES = {
    "mhcln": ("mhcln", {"batch_size": 9, "steps_per_epoch": 1, "hidden": (20, 10), "bit_balance_weight": 1.0}),
    "dhcl": ("dhcl", {"batch_size": 5, "nested_bits": (8,), "accumulate": 2}),
    "dhcl, anchor, several classes": (
        "dhcl",
        {"proxy_loss": "proxy-anchor", "tune": "none", "several_classes": True, "clip_norm": 1.0},
    ),
    "duch": ("duch", {"hidden": 12, "batch_size": 6, "accumulate": 2}),
    "duch, extended": (
        "duch",
        {
            "hidden": 12,
            "captions": "all",
            "learn_temperature": True,
            "near_as": "positives",
            "batch_norm_critic": True,
            "contrast": "cross-only",
        },
    ),
    "cdne, memory bank": ("cdne", {"batch_size": 5}),
    "cdne, sharded": ("cdne", {"sharded_memory": True, "variant": "momentum", "tune": "none", "several_classes": True}),
    "cdne, in-batch": ("cdne", {"variant": "in-batch", "norm": "batch"}),
    "triplet": ("triplet", {"batch_size": 8, "accumulate": 2}),
    "triplet, random, several classes": ("triplet", {"mining": "random", "several_classes": True}),
    "classifier": ("classifier", {"backbone": "resnet8", "tune": "last", "tune_blocks": 1}),
    "classifier, views on the device": (
        "classifier",
        {"backbone": "resnet8", "augment_on": "device", "colour_jitter": 0.4, "grayscale": 0.2, "accumulate": 2},
    ),
    "csq": ("csq", {"backbone": "resnet8", "bits": 12}),
    "contrastive": ("contrastive", {"num_views": 2}),
    "mrhash": ("mrhash", {**SMALL, "bit_balance_weight": 1.0, "quantisation_weight": 0.1, "accumulate": 2}),
    "mrhash, fine-tuned": ("mrhash", {**SMALL, "fine_tune": True, "sources": "first"}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "first")


class Transfers(TorchDispatchMode):
    """Records the operations with tensors on the CPU and on the GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        # `torch.tensor` with a device copies without another operation.
        is_new = func is torch.ops.aten.lift_fresh.default and devices != {"cpu"}
        if len(devices) > 1 or is_new:
            self.found.append(str(func))
        return result


class Unmoved:
    """An optimizer without steps; torch's counts its steps on the CPU."""

    def zero_grad(self, set_to_none):
        pass

    def step(self):
        pass


class OnGpu:
    """Moves tensors to a GPU without numbers; a tensor that occurs twice stays one."""

    def __init__(self, mode):
        self._mode, self._known = mode, {}

    def tensor(self, given):
        if id(given) not in self._known:
            moved = self._mode.from_tensor(given).detach().to("meta")
            if isinstance(given, torch.nn.Parameter):
                moved = torch.nn.Parameter(moved, given.requires_grad)
            self._known[id(given)] = given, moved
        return self._known[id(given)][1]

    def module(self, module):
        for part in module.modules():
            for owned in (part._parameters, part._buffers, vars(part)):
                owned.update({name: self.tensor(x) for name, x in owned.items() if isinstance(x, torch.Tensor)})

    def tree(self, tree):
        return tree_map(lambda leaf: self.tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf, tree)


@pytest.mark.parametrize(("name", "of_whole"), [("triplet", set()), ("duch", {"shares"})])
def test_a_batch_in_parts_has_draws_of_its_own_where_the_method_uses_them(data, name, of_whole):
    kind, settings = CASES[name]
    run = make_run(data, kind, **settings)
    method = run.build()
    training = load_training_part(run, method)
    method.begin(training)
    step = next(steps_on_cpu(run.config, method, method.order(training.labels, 0), training, 0))
    assert set(step.batch.draws) == of_whole
    assert len(step.draws) == settings["accumulate"]
    assert all(step.draws)


def test_every_method_with_steps_has_a_case():
    assert {method for method, _ in CASES.values()} == {
        n for n, kind in METHODS.items() if not issubclass(kind, Fitted)
    }


@pytest.mark.parametrize("name", CASES)
def test_a_step_copies_nothing_and_reads_nothing(data, name):
    kind, settings = CASES[name]
    run = make_run(data, kind, **settings)
    method = run.build()
    training = load_training_part(run, method)
    method.begin(training)
    method.start_epoch(run.config.epochs - 1, training)
    method.train()
    step = next(steps_on_cpu(run.config, method, method.order(training.labels, 0), training, 0))
    normaliser = Normaliser(run.preprocessing(), torch.device("cpu"))
    with FakeTensorMode() as mode:
        on_gpu = OnGpu(mode)
        on_gpu.module(method)
        step = on_gpu.tree(step)
        vars(normaliser).update(on_gpu.tree(vars(normaliser)))
        sums = LossSums(1, torch.device("meta"))
        sums._interval = GPU_INTERVAL
        with Transfers() as transfers:
            step = _with_views(run.config, step, normaliser)
            losses = _step(run.config, method, method, Unmoved(), step)
            sums.add(1, losses)
    assert {loss.device.type for loss in losses.values()} == {"meta"}
    assert not transfers.found


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x + torch.tensor([1.0, 2.0, 3.0], device="meta"),
        lambda x: x[torch.tensor([0, 2])],
        lambda x: x.cpu(),
        lambda x: x * torch.rand(3).to(x.device),
    ],
)
def test_copies_are_found(work):
    with FakeTensorMode(), Transfers() as transfers:
        work(torch.ones(3, device="meta"))
    assert transfers.found


@pytest.mark.parametrize(
    "work", [lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x[0].item(), lambda x: x.tolist()]
)
def test_reading_fails(work):
    with FakeTensorMode():
        x = torch.ones(3, device="meta")
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            work(x)
