"""Communication between ranks, in two real processes and in one."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import multiprocessing

from orbithash.encoders.errors import InputError
from orbithash.trainers import distributed
from orbithash.trainers.distributed import (
    broadcast_state,
    from_first_rank,
    gather_flags,
    gather_objects,
    gather_rows,
    gather_with_gradient,
    on_every_rank,
    rank,
    send_rows,
    sum_over_ranks,
    sum_with_gradient,
    synchronise_batch_norm,
    world_size,
)

WORLD_SIZE = 2

# Rows of each rank.
EVEN, ODD = (3, 3), (4, 2)


def numbers():
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def mixed(rows):
    """A scalar to which every pair of rows contributes."""
    return torch.exp(rows @ rows.T).sum()


def maps():
    return torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1)) * 2 + 1


def norms():
    layers = torch.nn.Sequential(
        torch.nn.BatchNorm2d(4),
        torch.nn.Sequential(torch.nn.Conv2d(4, 5, 3), torch.nn.Flatten(), torch.nn.BatchNorm1d(5)),
    )
    torch.nn.init.normal_(layers[0].weight)
    return layers


def dealt(num_rows):
    """Distinct rows of bytes."""
    return np.arange(num_rows * 3, dtype=np.uint8).reshape(num_rows, 3)


def refuse(number):
    raise InputError(f"refused by {number}")


def work(number, folder):
    """What each of the two processes runs."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=number, world_size=WORLD_SIZE)
    found = {"rank": rank(), "world_size": world_size()}

    for counts in (EVEN, ODD):
        rows = numbers().split(counts)[number].clone().requires_grad_()
        gathered = gather_with_gradient(rows, counts)
        # Each rank weights it differently, so that one rank's gradient cannot be mistaken for the sum.
        loss = mixed(gathered) * (number + 1)
        loss.backward()
        found |= {f"gathered {counts}": gathered.detach(), f"gradient {counts}": rows.grad}
    found["labels"] = gather_with_gradient(torch.tensor([number * 10, number * 10 + 1]))

    for num_rows in (0, 1, 5, 8):
        found[f"rows {num_rows}"] = gather_rows(dealt(num_rows)[number::WORLD_SIZE])
    for kind in ("int64", "bool"):
        found[kind] = gather_rows(dealt(5)[number::WORLD_SIZE, 0].astype(kind))

    values = torch.tensor([1.0, 2.0], dtype=torch.float64) * (number + 1)
    found |= {"sum": sum_over_ranks(values), "values": values}
    shares = numbers().chunk(WORLD_SIZE)[number].clone().requires_grad_()
    (sum_with_gradient(shares.square().sum(0)).exp().sum() * (number + 1)).backward()
    found["sum gradient"] = shares.grad

    for counts in (EVEN, ODD):
        torch.manual_seed(number)
        layers = norms()
        broadcast_state(layers)
        found["broadcast"] = {name: value.clone() for name, value in layers.state_dict().items()}
        synchronise_batch_norm(layers, torch.device("cpu"))
        rows = maps().split(counts)[number].clone().requires_grad_()
        (layers(rows).square().sum() / maps().numel()).backward()
        weights = [sum_over_ranks(p.grad) for p in layers.parameters()]
        of_norm = {"gradient": rows.grad, "weights": weights, "state": copy.deepcopy(layers.state_dict())}
        layers.eval()
        found[f"norm {counts}"] = of_norm | {"evaluated": layers(maps()).detach()}
    layers.train()
    wide, narrow = (layers[0](maps().chunk(WORLD_SIZE)[number].to(dtype)) for dtype in (torch.float32, torch.bfloat16))
    found["norm in bfloat16"] = narrow.dtype == torch.bfloat16 and torch.allclose(wide, narrow.float(), atol=0.05)
    with_activation = torch.nn.Sequential(BatchNormAct2d(4))
    expected = with_activation(maps())
    synchronise_batch_norm(with_activation, torch.device("cpu"))
    part = with_activation(maps().chunk(WORLD_SIZE)[number])
    found["norm with activation"] = torch.allclose(part, expected.chunk(WORLD_SIZE)[number], atol=1e-5)
    found["flags"] = gather_flags(np.array([number == 0, True, False]))
    found["sent"] = [send_rows(dealt(3).astype(np.float32) + number, source) for source in range(WORLD_SIZE)]
    found["objects"] = gather_objects({"rank": number})
    found["made"] = from_first_rank(lambda: f"by {number}")
    with pytest.raises(InputError) as caught:
        from_first_rank(lambda: refuse(number))
    found["refused"] = str(caught.value)
    torch.save(found, folder / f"{number}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of each process."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (folder,), nprocs=WORLD_SIZE)
    return [torch.load(folder / f"{number}.pt", weights_only=False) for number in range(WORLD_SIZE)]


def test_ranks_know_their_number(ranks):
    assert [found["rank"] for found in ranks] == [0, 1]
    assert [found["world_size"] for found in ranks] == [2, 2]


@pytest.mark.parametrize("counts", [EVEN, ODD])
def test_every_rank_sees_all_rows_in_rank_order(ranks, counts):
    for found in ranks:
        assert torch.equal(found[f"gathered {counts}"], numbers())
        assert found["labels"].tolist() == [0, 1, 10, 11]


@pytest.mark.parametrize("counts", [EVEN, ODD])
def test_the_gradient_is_the_sum_of_what_all_ranks_derive(ranks, counts):
    rows = numbers().requires_grad_()
    (mixed(rows) * 1 + mixed(rows) * 2).backward()
    found = torch.cat([found[f"gradient {counts}"] for found in ranks])
    assert torch.allclose(found, rows.grad, rtol=1e-5)


@pytest.mark.parametrize("num_rows", [0, 1, 5, 8])
def test_rows_dealt_round_robin_come_back_in_order(ranks, num_rows):
    for found in ranks:
        assert found[f"rows {num_rows}"].dtype == np.uint8
        assert found[f"rows {num_rows}"].tolist() == dealt(num_rows).tolist()


@pytest.mark.parametrize("kind", ["int64", "bool"])
def test_gathered_rows_may_be_single_values_of_any_type(ranks, kind):
    for found in ranks:
        assert found[kind].dtype == kind
        assert (found[kind] == dealt(5)[:, 0].astype(kind)).all()


def test_the_sum_is_of_all_ranks_and_leaves_the_values_alone(ranks):
    for number, found in enumerate(ranks):
        assert found["sum"].tolist() == [3.0, 6.0]
        assert found["values"].tolist() == [1.0 * (number + 1), 2.0 * (number + 1)]


def test_what_the_first_rank_makes_or_refuses_is_everyones(ranks):
    assert [found["made"] for found in ranks] == ["by 0", "by 0"]
    assert [found["refused"] for found in ranks] == ["refused by 0", "refused by 0"]


def test_one_process_is_one_rank():
    assert (rank(), world_size()) == (0, 1)
    rows = numbers().requires_grad_()
    gather_with_gradient(rows).sum().backward()
    assert (rows.grad == 1).all()
    assert gather_rows(dealt(4)).tolist() == dealt(4).tolist()
    assert sum_over_ranks(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert gather_objects(3) == [3]
    assert gather_flags(np.array([True, False])).tolist() == [[True, False]]
    assert send_rows(np.ones((1, 2), np.float32), 0).tolist() == [[1, 1]]
    assert from_first_rank(lambda: 3) == 3
    assert sum_with_gradient(torch.ones(2)).tolist() == [1, 1]


def test_a_sum_carries_the_gradients_of_all_ranks(ranks):
    rows = numbers().requires_grad_()
    (rows.square().sum(0).exp().sum() * 3).backward()
    found = torch.cat([found["sum gradient"] for found in ranks])
    assert torch.allclose(found, rows.grad, rtol=1e-5)


def test_broadcast_gives_everyone_the_first_ranks_state(ranks):
    torch.manual_seed(0)
    expected = norms().state_dict()
    for found in ranks:
        assert found["broadcast"].keys() == expected.keys()
        assert all(torch.equal(found["broadcast"][name], value) for name, value in expected.items())


@pytest.mark.parametrize("counts", [EVEN, ODD])
def test_synchronised_batch_norm_is_torchs_over_the_whole_batch(ranks, counts):
    torch.manual_seed(0)
    layers, rows = norms(), maps().requires_grad_()
    (layers(rows).square().sum() / rows.numel()).backward()
    norm = [found[f"norm {counts}"] for found in ranks]
    assert torch.allclose(torch.cat([found["gradient"] for found in norm]), rows.grad, atol=1e-6)
    for found in norm:
        for parameter, other in zip(layers.parameters(), found["weights"], strict=True):
            assert torch.allclose(parameter.grad, other, atol=1e-6)
        assert found["state"].keys() == layers.state_dict().keys()
        for name, value in layers.state_dict().items():
            assert torch.allclose(value, found["state"][name], atol=1e-6), name
        assert torch.allclose(layers.eval()(maps()), found["evaluated"], atol=1e-5)


def test_synchronised_batch_norm_keeps_bfloat16_and_activations(ranks):
    for found in ranks:
        assert found["norm in bfloat16"]
        assert found["norm with activation"]


def test_on_a_gpu_batch_norm_is_torchs_own(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    layers = torch.nn.Sequential(norms(), BatchNormAct2d(4))
    # Statistics unlike those of new layers.
    layers[0](maps())
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    synchronise_batch_norm(layers, torch.device("cuda"))
    kinds = [type(module).__name__ for module in layers.modules() if "Norm" in type(module).__name__]
    assert kinds == ["SyncBatchNorm", "SyncBatchNorm", "SyncBatchNormAct"]
    assert layers.state_dict().keys() == before.keys()
    for name, value in layers.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_objects_come_in_rank_order(ranks):
    assert all(found["objects"] == [{"rank": 0}, {"rank": 1}] for found in ranks)


def test_flags_and_sent_rows_are_those_of_each_rank(ranks):
    for found in ranks:
        assert found["flags"].tolist() == [[True, True, False], [False, True, False]]
        assert [rows.tolist() for rows in found["sent"]] == [(dealt(3) + source).tolist() for source in range(2)]


def refuse_on_one(number, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=number, world_size=2)
    with pytest.raises(InputError, match="refused by 1"):
        on_every_rank(lambda: refuse(number) if number == 1 else None)
    assert on_every_rank(lambda: number) == number
    dist.destroy_process_group()


def test_an_error_of_one_rank_is_raised_on_all(tmp_path):
    multiprocessing.spawn(refuse_on_one, (tmp_path,), nprocs=2)


def test_one_process_works_alone():
    assert on_every_rank(lambda: 5) == 5
    with pytest.raises(InputError, match="refused by 0"):
        on_every_rank(lambda: refuse(0))
