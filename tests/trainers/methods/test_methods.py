"""Requirements on every method: ranks train like one process, and a killed run resumes to the same result."""

import functools
import multiprocessing
import os
import signal

import pytest
import torch
import torch.distributed as dist
from method_parts import Recorder, flat, make_run, timeless, trained, write_data
from torch.distributed.tensor import DTensor

from orbithash.trainers.loop.checkpoint import load_checkpoint
from orbithash.trainers.loop.export import export_models
from orbithash.trainers.loop.loop import train, validate
from orbithash.trainers.methods import METHODS, Fitted, get_method
from orbithash.trainers.methods.memory import Memory

# Relative to the largest gradient: ranks sum losses in another order, and compute features in other batches.
TOLERANCE = 3e-6

# Name of the case -> method and settings. Every method with training steps has at least one case. Most batches are odd,
# so that ranks have different numbers of rows.
CASES = {
    "mhcln": ("mhcln", {"batch_size": 9, "steps_per_epoch": 3, "hidden": (20, 10), "lr": 0.01}),
    "mhcln, bit balance, two pairs": (
        "mhcln",
        {"batch_size": 12, "class_pairs": 2, "steps_per_epoch": 2, "bit_balance_weight": 1.0, "standardise": False},
    ),
    "dhcl": ("dhcl", {"warm_up_epochs": 1, "batch_size": 5}),
    "dhcl, resnet18": ("dhcl", {"backbone": "resnet18", "epochs": 1, "warm_up_epochs": 0}),
    "dhcl, anchor, nested": (
        "dhcl",
        {
            "warm_up_epochs": 0,
            "proxy_loss": "proxy-anchor",
            "nested_bits": (8, 12),
            "images_per_class": 2,
            "batch_size": 5,
        },
    ),
    "duch": ("duch", {"hidden": 12, "batch_size": 5}),
    "duch, extended": (
        "duch",
        {
            "hidden": 12,
            "captions": "all",
            "contrast": "cross-only",
            "batch_size": 5,
            "learn_temperature": True,
            "temperature": 0.3,
            "near_as": "positives",
        },
    ),
    "duch, like the released code": (
        "duch",
        {
            "hidden": 12,
            "captions": "fixed",
            "standardisation": "scalar",
            "bb_axis": "row",
            "batch_norm_critic": True,
            "compat_txt_view": True,
            "compat_adv_text_only": True,
        },
    ),
    "duch, reworded": (
        "duch",
        {
            "hidden": 12,
            "text_augmentation": "rule",
            "original_view": "center-crop",
            "batch_size": 7,
            "accumulate": 2,
        },
    ),
    "cdne, memory bank": ("cdne", {"warm_up_epochs": 1, "memory_momentum": 0.7, "batch_size": 5}),
    "cdne, sharded": (
        "cdne",
        {
            "sharded_memory": True,
            "memory_start": "random",
            "margin": 0.1,
            "head_norm": "none",
            "warm_up_epochs": 0,
            "batch_size": 5,
        },
    ),
    # Larger images and batches than the other cases: batch norm over 4 single pixels amplifies rounding errors.
    "cdne, momentum, batch norm": (
        "cdne",
        {
            "variant": "momentum",
            "norm": "batch",
            "optimizer": "sgd",
            "quantisation_weight": 0,
            "warm_up_epochs": 0,
            "image_size": 64,
            "batch_size": 7,
        },
    ),
    "cdne, momentum, sharded": ("cdne", {"variant": "momentum", "sharded_memory": True, "warm_up_epochs": 0}),
    "cdne, in-batch": (
        "cdne",
        {"variant": "in-batch", "images_per_class": 2, "epochs": 1, "warm_up_epochs": 0, "batch_size": 5},
    ),
    "triplet": ("triplet", {"images_per_class": 2, "epochs": 1, "warm_up_epochs": 0, "batch_size": 5}),
    "triplet, random": (
        "triplet",
        {"mining": "random", "images_per_class": 2, "epochs": 1, "warm_up_epochs": 0, "batch_size": 7, "accumulate": 2},
    ),
    "classifier": ("classifier", {"schedule": "step", "lr_decay_epochs": 1, "warm_up_epochs": 0, "batch_size": 7}),
    "classifier, last blocks, by step": (
        "classifier",
        {
            "backbone": "resnet8",
            "tune": "last",
            "tune_blocks": 1,
            "warm_up_epochs": 0,
            "layer_decay": 0.5,
            "schedule": "cosine-by-step",
            "warm_up_share": 0.3,
            "checkpoint_gradients": True,
        },
    ),
    "dhcl, adapters, accumulate": (
        "dhcl",
        {
            "backbone": "timm:test_vit",
            "tune": "lora",
            "lora_rank": 2,
            "layer_decay": 0.8,
            "warm_up_epochs": 0,
            "batch_size": 7,
            "accumulate": 2,
        },
    ),
    "cdne, momentum, adapters": (
        "cdne",
        {"variant": "momentum", "backbone": "timm:test_vit", "tune": "lora", "warm_up_epochs": 1},
    ),
    "classifier, frozen, several classes": ("classifier", {"tune": "none", "several_classes": True}),
    "dhcl, frozen, several classes": ("dhcl", {"tune": "none", "several_classes": True, "nested_bits": (8,)}),
    "cdne, frozen, memory bank": ("cdne", {"tune": "none", "batch_size": 7, "accumulate": 2}),
    "cdne, frozen, momentum, sharded, several classes": (
        "cdne",
        {"tune": "none", "several_classes": True, "variant": "momentum", "sharded_memory": True, "margin": 0.1},
    ),
    "cdne, frozen, in-batch, several classes": (
        "cdne",
        {"tune": "none", "several_classes": True, "variant": "in-batch", "images_per_class": 2},
    ),
    "csq": ("csq", {"backbone": "resnet8", "warm_up_epochs": 0, "bits": 12, "batch_size": 5}),
    "csq, frozen, several classes": (
        "csq",
        {"tune": "none", "several_classes": True, "batch_size": 7, "accumulate": 2},
    ),
    "triplet, frozen, several classes": (
        "triplet",
        {"tune": "none", "several_classes": True, "images_per_class": 2},
    ),
    "contrastive": ("contrastive", {"num_views": 2, "batch_size": 5}),
    "contrastive, from itq": ("contrastive", {"num_views": 1, "start": "itq", "epochs": 1}),
    "mrhash": (
        "mrhash",
        {
            "num_clusters": 4,
            "num_latents": 5,
            "autoencoder_epochs": 2,
            "hidden": (12,),
            "bit_balance_weight": 1.0,
            "batch_size": 5,
        },
    ),
    "mrhash, like the released code": (
        "mrhash",
        {
            "num_clusters": 4,
            "num_latents": 5,
            "autoencoder_epochs": 2,
            "hidden": (),
            "code_reconstruction_weight": 0,
            "fine_tune": True,
            "standardise": False,
        },
    ),
    "mrhash, features of another network": (
        "mrhash",
        {
            "num_clusters": 4,
            "num_latents": 5,
            "autoencoder_epochs": 2,
            "hidden": (12,),
            "feature_backbone": "resnet18",
            "batch_size": 7,
            "accumulate": 2,
            "second_bands": (1, 1),
        },
    ),
    "mrhash, one source, fixed target": (
        "mrhash",
        {
            "num_clusters": 4,
            "num_latents": 5,
            "autoencoder_epochs": 2,
            "hidden": (12,),
            "sources": "first",
            "target_epochs": 0,
            "latent_divergence": False,
            "reconstruction_weight": 0,
            "quantisation_weight": 0.1,
        },
    ),
}

# Every method trains on features in one of these. The batches of most are not divided by the number of ranks.
CASES_OF_THREE_RANKS = [
    "mhcln, bit balance, two pairs",
    "duch",
    "duch, reworded",
    "classifier, frozen, several classes",
    "dhcl, frozen, several classes",
    "cdne, frozen, memory bank",
    "cdne, frozen, momentum, sharded, several classes",
    "cdne, frozen, in-batch, several classes",
    "csq, frozen, several classes",
    "triplet, frozen, several classes",
    "contrastive",
    "mrhash",
]

# Those that train a backbone and can be sharded: convolutions, transformers with adapters, batch norm over ranks,
# recomputed blocks, an encoder that is a moving average, micro-batches, a frozen backbone in the warm-up.
SHARDED_CASES = [
    case
    for case, (method, settings) in CASES.items()
    if "shard" in METHODS[method].Config.model_fields and settings.get("tune") != "none"
]

# The first test that uses `ranks` waits until all ranks have trained every case.
pytestmark = [pytest.mark.timeout(1200), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "first")


def test_every_method_has_a_case():
    # `label_free/test_fitted.py` has those without steps.
    with_steps = {name for name, method in METHODS.items() if not issubclass(method, Fitted)}
    assert {method for method, _ in CASES.values()} == with_steps


@pytest.mark.parametrize("name", METHODS)
def test_a_method_describes_itself_and_its_settings(name):
    method = get_method(name)
    assert method.name == name
    assert method.learns_from
    assert method.paper
    fields = method.Config.model_fields
    assert [key for key, field in fields.items() if not field.description] == []
    assert [key for key, field in fields.items() if field.is_required()] == []


# Ranks.


class Watcher(Recorder):
    """Records the gradients of every step and the state after the last epoch."""

    def __init__(self, methods):
        super().__init__()
        self.methods, self.gradients, self.state = methods, [], {}

    def on_step(self, *arguments):
        super().on_step(*arguments)
        (method,) = self.methods
        gradients = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
        self.gradients.append({name: whole_tensor(gradient) for name, gradient in gradients.items()})

    def on_epoch(self, history, write_checkpoint):
        super().on_epoch(history, write_checkpoint)
        (method,) = self.methods
        self.state = {name: whole_tensor(tensor) for name, tensor in method.state_dict().items()}


def whole_tensor(tensor):
    """Return a copy of a tensor; of one that ranks share, all of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def doubled(batch):
    images = None if batch.images is None else batch.images.double()
    return batch._replace(images=images, features={name: table.double() for name, table in batch.features.items()})


def watch(run):
    """Train in double precision and return gradients, state and history.

    On images this small, group norm and ReLU amplify the rounding errors of single precision.
    """
    methods = []

    class Watched(get_method(run.method)):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.double()
            for network in (self.network, self.network.head, self.network.backbone, self.text_head):
                if network is not None:
                    network.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
            # Called as a method, which does not run the forward hooks.
            for network in (self.network, self.text_head):
                if network is not None:
                    of_double = network.error_scale
                    network.error_scale = lambda features, of_double=of_double: of_double(features.double())
            methods[:] = [self]

        def before_step(self, batch, optimizer):
            return super().before_step(doubled(batch), optimizer)

        def forward(self, batch):
            return super().forward(doubled(batch))

        def after_step(self, batch):
            super().after_step(doubled(batch))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orbithash.trainers.loop.run.get_method", lambda name: Watched)
        watcher = Watcher(methods)
        train(run, watcher)
    return {"gradients": watcher.gradients, "state": watcher.state, "history": watcher.history}


def work(rank, root, folder, world_size):
    """Train the cases in one of the processes and save the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world_size)
    for case in CASES if world_size == 2 else CASES_OF_THREE_RANKS:
        method, settings = CASES[case]
        torch.save(watch(make_run(root, method, **settings)), folder / f"{case} {rank}.pt")
    if world_size == 2:
        for case in SHARDED_CASES:
            method, settings = CASES[case]
            run = make_run(root, method, **settings, shard=True)
            torch.save(watch(run), folder / f"{case}, shard {rank}.pt")
        closed = [close_memories(*rows) for rows in (((0, 1), (0, 1)), ((0, 1), (1, 0)))]
        torch.save(closed, folder / f"memories {rank}.pt")
    dist.destroy_process_group()


def close_memories(*rows_of_ranks):
    """Return the error message, or "", after each rank has written the same embeddings to its own rows."""
    memory = Memory(3, 2, sharded=False)
    memory.open()
    memory.share[list(rows_of_ranks[dist.get_rank()])] = torch.eye(2)
    try:
        memory.close()
    except RuntimeError as err:
        return str(err)
    return ""


def train_ranks(data, folder, world_size):
    torch.multiprocessing.spawn(work, (data, folder, world_size), nprocs=world_size)
    return folder


@pytest.fixture(scope="module")
def ranks(data, tmp_path_factory):
    """Return the folder with the results of two processes."""
    return train_ranks(data, tmp_path_factory.mktemp("ranks"), 2)


@pytest.fixture(scope="module")
def three_ranks(data, tmp_path_factory):
    """Return the folder with the results of three processes."""
    return train_ranks(data, tmp_path_factory.mktemp("ranks"), 3)


@pytest.fixture(scope="module")
def alone(data):
    """Return a function: case -> result of one process. Each case trains once."""

    @functools.cache
    def watched(case):
        method, settings = CASES[case]
        return watch(make_run(data, method, **settings))

    return watched


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_like_one_process(alone, ranks, case):
    check_ranks(alone(case), ranks, case, 2)


@pytest.mark.parametrize("case", SHARDED_CASES)
def test_two_ranks_with_shares_train_like_one_process(alone, ranks, case):
    check_ranks(alone(case), ranks, f"{case}, shard", 2)


def test_every_method_has_a_case_of_three_ranks():
    assert {CASES[case][0] for case in CASES_OF_THREE_RANKS} == {method for method, _ in CASES.values()}


@pytest.mark.parametrize("case", CASES_OF_THREE_RANKS)
def test_three_ranks_train_like_one_process(alone, three_ranks, case):
    check_ranks(alone(case), three_ranks, case, 3)


def check_ranks(expected, folder, case, world_size):
    """Compare the results of ranks in `folder` with those of one process."""
    assert expected["gradients"]
    for rank in range(world_size):
        found = torch.load(folder / f"{case} {rank}.pt", weights_only=True)
        for one, other in zip(expected["gradients"], found["gradients"], strict=True):
            assert one.keys() == other.keys()
            for name, gradient in one.items():
                scale = max(1.0, float(gradient.abs().max()))
                assert float((gradient - other[name]).abs().max()) <= TOLERANCE * scale, name
        for name, tensor in expected["state"].items():
            difference = (tensor.double() - found["state"][name].double()).abs()
            assert float(difference.max() if difference.numel() else 0) <= 1e-5, name
        for one, other in zip(timeless(expected["history"]), timeless(found["history"]), strict=True):
            assert one.keys() == other.keys()
            assert all(one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6) for key in one)


def test_diverged_memories_are_reported(ranks):
    for rank in range(2):
        same, swapped = torch.load(ranks / f"memories {rank}.pt")
        assert same == ""
        assert "the ranks' memories have diverged" in swapped


# Resuming.


class Interrupted(Exception):
    """Raised to interrupt a run."""


class Interrupting(Recorder):
    """Interrupts the run in the middle of the second epoch."""

    def on_step(self, epoch, step, num_steps, images_per_s):
        if (epoch, step) == (2, 2):
            self.interrupt()

    def interrupt(self):
        raise Interrupted


class Killing(Interrupting):
    """Like `Interrupting`, but kills the process, so that no clean-up code runs."""

    def interrupt(self):
        os.kill(os.getpid(), signal.SIGKILL)


def run_until_killed(root, case, folder):
    torch.set_num_threads(1)
    train(run_of(root, case), Killing(folder))


def run_of(root, case):
    method, settings = CASES[case]
    return make_run(root, method, **{**settings, "epochs": 2})


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Return a function: case -> folder of checkpoints and history of its uninterrupted run. Each case trains once."""

    @functools.cache
    def trained_case(case):
        folder = tmp_path_factory.mktemp("whole")
        return folder, trained(run_of(data, case), folder).history

    return trained_case


def check_resumed(data, case, whole, folder):
    """Resume the run that was interrupted in `folder`; assert that it ends like the uninterrupted one."""
    whole_folder, history = whole(case)
    assert [path.name for path in folder.iterdir()] == ["epoch1"]
    # The resumed run must not depend on the random state of the process.
    torch.manual_seed(99)
    recorder = trained(run_of(data, case), folder, resume_from=folder / "epoch1")
    assert recorder.steps[0][:2] == (2, 1)
    assert timeless(recorder.history) == timeless(history)
    one, other = (load_checkpoint(path / "epoch2") for path in (whole_folder, folder))
    one["history"], other["history"] = timeless(one["history"]), timeless(other["history"])
    assert flat(one) == flat(other)


@pytest.mark.parametrize("case", CASES)
def test_a_run_interrupted_within_an_epoch_resumes_to_the_same_result(data, whole, tmp_path, case):
    with pytest.raises(Interrupted):
        train(run_of(data, case), Interrupting(tmp_path))
    check_resumed(data, case, whole, tmp_path)


# One case trains on images, with a memory and a momentum encoder; one on feature tables, with a discriminator.
@pytest.mark.parametrize("case", ["cdne, momentum, sharded", "duch"])
def test_a_run_killed_within_an_epoch_resumes_to_the_same_result(data, whole, tmp_path, case):
    process = multiprocessing.get_context("spawn").Process(target=run_until_killed, args=(data, case, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    check_resumed(data, case, whole, tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_is_validated_on_its_own_and_exported(data, whole, tmp_path, case):
    folder, history = whole(case)
    run, record = run_of(data, case), history[-1]
    logged = {name: record[name] for name in record if name in ("epoch", "score") or name.startswith("validation/")}
    assert len(logged) > 2
    assert validate(run, folder / "epoch2") == logged

    model, shorter = export_models(run, folder / "epoch2")
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model")
    rng = torch.Generator().manual_seed(0)
    images = list(torch.randint(0, 256, (3, 40, 50, 3), dtype=torch.uint8, generator=rng).numpy())
    codes = loaded.encode(images)
    assert codes.shape == (3, 2)
    assert (codes == model.encode(images)).all()
    for short in shorter:
        assert (short.encode(images)[:, : short.bits // 8] == codes[:, : short.bits // 8]).all()
    if loaded.text_head is not None:
        sentences = ["a beach", "the dense forest", "a river"]
        assert (loaded.encode_texts(sentences) == model.encode_texts(sentences)).all()
