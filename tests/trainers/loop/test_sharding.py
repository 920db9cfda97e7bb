"""Weights, gradients and optimizer state shared out over two ranks.

`methods/test_methods.py` compares the gradients of all methods with those of one process, in double precision.
"""

import pytest
import torch
import torch.distributed as dist
from backbone_models import write_open_clip
from method_parts import flat, make_run, timeless, trained, write_data
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from orbithash.encoders.errors import InputError
from orbithash.trainers.config import load_config
from orbithash.trainers.dealing import deal
from orbithash.trainers.loop.checkpoint import load_checkpoint
from orbithash.trainers.loop.export import export_models
from orbithash.trainers.loop.sharding import gathered, load_shares, shard, whole_weights
from orbithash.trainers.methods import Batch, get_method

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("one_thread")]

SETTINGS = {"backbone": "resnet8", "warm_up_epochs": 1, "batch_size": 7}
# Name -> settings of an epoch after the warm-up.
OTHERS = {
    "clipped norm": {"clip_norm": 0.1},
    "clipped values": {"clip_value": 0.001},
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16, transformer": {"precision": "bfloat16", "backbone": "timm:test_vit", "checkpoint_gradients": True},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "first")


def settings_of(name):
    return {**SETTINGS, "warm_up_epochs": 0, "epochs": 1, **OTHERS[name]}


def work(rank, data, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)

    def train(name, method="classifier", resume_from=None, **settings):
        place = folder / name
        if rank == 0:
            place.mkdir()
        return trained(make_run(data, method, **settings), place if rank == 0 else None, resume_from=resume_from)

    for flag in (True, False):
        train(f"shard={flag}", **SETTINGS, shard=flag)
        for name in OTHERS:
            train(f"{name}, shard={flag}", **settings_of(name), shard=flag)
    dist.barrier()
    for before in (True, False):
        for after in (True, False):
            train(f"{before}-{after}", resume_from=folder / f"shard={before}/epoch1", **SETTINGS, shard=after)
    held = {backbone: hold(data, rank, backbone) for backbone in ("resnet8", "timm:test_vit")}
    torch.save(held | {"tied": tie(data, rank)}, folder / f"held{rank}.pt")
    dist.destroy_process_group()


def num_bytes(tensors):
    """The memory of tensors; of one that ranks share, that of this rank."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    # Gradients of a block are parts of one piece of memory.
    pieces = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in local}
    return sum(pieces.values())


def batch_of(rank):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(rank))
    return Batch(torch.arange(2), torch.tensor([0, 1]), images, {}, 0, deal(4, 1, 1, 2))


def tie(data, rank):
    """Return which blocks are gathered on their own if the first and the second one share a weight."""
    method = make_run(data, "dhcl", **{**SETTINGS, "backbone": "timm:test_vit", "warm_up_epochs": 0}).build()
    blocks = method.network.backbone.blocks()
    blocks[1].mlp.fc1.weight = blocks[0].mlp.fc1.weight
    shard(method, torch.device("cpu"))
    method(batch_of(rank))["loss"].backward()
    assert blocks[1].mlp.fc1.weight is blocks[0].mlp.fc1.weight
    return [isinstance(block, FSDPModule) for block in blocks]


def hold(data, rank, backbone):
    """Train one step, and return what a rank holds, before, within and after the use of whole weights."""
    method = make_run(data, "dhcl", **{**SETTINGS, "backbone": backbone, "warm_up_epochs": 0}).build()
    found = {"weights": num_bytes(method.parameters())}
    shard(method, torch.device("cpu"))
    optimizer = method.build_optimizer()
    batch = batch_of(rank)
    method.train()(batch)["loss"].backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    gradients = [parameter.grad for parameter in method.parameters() if parameter.grad is not None]
    found |= {"own weights": num_bytes(method.parameters()), "own gradients": num_bytes(gradients)}
    found |= {"own moments": num_bytes(moments), "blocks": len(method.network.backbone.blocks())}
    state = gathered(optimizer.state_dict())
    sent = [state]
    dist.broadcast_object_list(sent, src=0)
    again = method.build_optimizer()
    load_shares(again, sent[0])
    found["loaded moments"] = num_bytes(
        value for state in again.state.values() for value in state.values() if value.dim()
    )
    method.eval()
    with whole_weights(method):
        found["whole"] = all(not isinstance(parameter, DTensor) for parameter in method.parameters())
        whole = [parameter.untyped_storage() for parameter in method.parameters()]
        # Only the first rank computes, so a pass that gathers would not return.
        if rank == 0:
            with torch.inference_mode():
                found["hashes"] = [method.network(batch.images).hashes for _ in range(2)]
    found["shared"] = all(isinstance(parameter, DTensor) for parameter in method.parameters())
    found["own weights afterwards"] = num_bytes(method.parameters())
    found["left of whole weights"] = sum(storage.nbytes() for storage in whole)
    # Each rank then gathers the same weights ahead, although they ran the network differently often.
    method.train()(batch)["loss"].backward()
    return found


@pytest.fixture(scope="module")
def ranks(data, tmp_path_factory):
    """The folder with the checkpoints of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (data, folder), nprocs=2)
    return folder


def shapes(checkpoint):
    """The types and shapes of the tensors of a checkpoint."""
    return {path: leaf[:2] for path, leaf in flat(checkpoint).items() if isinstance(leaf, tuple)}


def compare(one, other, tolerance):
    """Assert that two checkpoints have the same parts, and tensors that differ by rounding."""
    assert shapes(one) == shapes(other)
    assert one.keys() == other.keys()
    for name, tensor in one["method"].items():
        torch.testing.assert_close(other["method"][name], tensor, rtol=tolerance, atol=tolerance)
    groups = [each["optimizer"]["param_groups"] for each in (one, other)]
    assert groups[0] == groups[1]
    states = [each["optimizer"]["state"] for each in (one, other)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        assert state.keys() == states[1][number].keys()
        for name, value in state.items():
            scale = float(value.abs().max()) + 1e-12
            torch.testing.assert_close(states[1][number][name] / scale, value / scale, rtol=0, atol=100 * tolerance)
    for record, expected in zip(timeless(other["history"]), timeless(one["history"]), strict=True):
        assert record == pytest.approx(expected, rel=10 * tolerance)


@pytest.mark.parametrize("epoch", ["epoch1", "epoch2"])
def test_a_sharded_run_writes_the_checkpoints_of_a_run_of_one_process(data, ranks, tmp_path, epoch):
    trained(make_run(data, "classifier", **SETTINGS), tmp_path)
    compare(load_checkpoint(tmp_path / epoch), load_checkpoint(ranks / "shard=True" / epoch), 1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_clipping_and_bfloat16_are_those_of_ranks_that_hold_everything(ranks, name):
    one, other = (load_checkpoint(ranks / f"{name}, shard={flag}" / "epoch1") for flag in (False, True))
    compare(one, other, 2e-3 if "bfloat16" in name else 1e-4)


def test_a_run_resumes_with_and_without_shares(ranks):
    """Bit for bit as it would have gone on, and up to rounding where the setting changes."""
    for flag in (True, False):
        whole, resumed = (load_checkpoint(ranks / name / "epoch2") for name in (f"shard={flag}", f"{flag}-{flag}"))
        for each in (whole, resumed):
            each["history"] = timeless(each["history"])
        assert flat(whole) == flat(resumed)
        changed = load_checkpoint(ranks / f"{flag}-{not flag}" / "epoch2")
        compare(whole, changed, 1e-4)


def test_one_process_resumes_a_sharded_run_and_exports_it(data, ranks, tmp_path):
    run = make_run(data, "classifier", **SETTINGS, shard=True)
    trained(run, tmp_path, resume_from=ranks / "shard=True" / "epoch1")
    compare(load_checkpoint(ranks / "shard=True" / "epoch2"), load_checkpoint(tmp_path / "epoch2"), 1e-4)
    model, _ = export_models(run, ranks / "shard=True" / "epoch2")
    assert model.encode_prepared(torch.zeros(2, 32, 32, 3, dtype=torch.uint8).numpy()).shape == (2, 2)


def test_a_rank_holds_half_of_everything_between_steps(ranks):
    for backbone in ("resnet8", "timm:test_vit"):
        of_ranks = [torch.load(ranks / f"held{rank}.pt")[backbone] for rank in range(2)]
        for found in of_ranks:
            assert found["blocks"] > 1
            # FSDP rounds the first dimension of a parameter up to a multiple of the ranks.
            most = 0.55 * found["weights"]
            for name in ("own weights", "own gradients", "own weights afterwards"):
                assert found[name] <= most, name
            assert found["left of whole weights"] == 0
            assert found["own moments"] <= 2 * most
            assert found["loaded moments"] <= 2 * most
        assert sum(found["own weights"] for found in of_ranks) >= of_ranks[0]["weights"]


def test_a_rank_computes_alone_with_whole_weights(ranks):
    for backbone in ("resnet8", "timm:test_vit"):
        of_ranks = [torch.load(ranks / f"held{rank}.pt")[backbone] for rank in range(2)]
        assert all(found["whole"] and found["shared"] for found in of_ranks)
        one, other = of_ranks[0]["hashes"]
        assert torch.equal(one, other)


def test_blocks_that_share_a_weight_are_gathered_with_the_rest(ranks):
    gathered_alone = torch.load(ranks / "held0.pt")["tied"]
    assert len(gathered_alone) > 2
    assert gathered_alone == [False, False] + [True] * (len(gathered_alone) - 2)


def test_in_one_process_nothing_is_shared(data, tmp_path):
    for flag in (True, False):
        trained(make_run(data, "classifier", **{**SETTINGS, "epochs": 1}, shard=flag), tmp_path / str(flag))
    states = [load_checkpoint(tmp_path / str(flag) / "epoch1") for flag in (True, False)]
    assert flat(states[0]["method"]) == flat(states[1]["method"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tune": "none"}, "shard is true, and tune is none: no backbone runs in training; omit shard"),
        ({"compile": True}, "shard and compile are true: a sharded backbone is not compiled; omit one of them"),
    ],
)
def test_settings_without_shares_are_refused(settings, message):
    with pytest.raises(InputError, match=message) as caught:
        load_config(get_method("dhcl").Config, shard=True, **settings)
    assert "\n" not in str(caught.value)


def test_adapters_that_cannot_be_shared_out_are_refused(data, tmp_path):
    run = make_run(data, "classifier", backbone=f"open_clip:{write_open_clip(tmp_path)}", tune="lora", shard=True)
    with pytest.raises(InputError, match="has torch's attention layer, whose adapters cannot be sharded") as caught:
        run.build()
    assert "\n" not in str(caught.value)
