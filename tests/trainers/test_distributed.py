"""What ranks say to each other, in two real processes and in one."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from orbithash.trainers.distributed import gather_rows, gather_with_gradient, rank, sum_over_ranks, world_size

WORLD_SIZE = 2


def numbers():
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def mixed(rows):
    """A scalar to which every pair of rows contributes."""
    return torch.exp(rows @ rows.T).sum()


def dealt(num_rows):
    """Distinct rows of bytes."""
    return np.arange(num_rows * 3, dtype=np.uint8).reshape(num_rows, 3)


def work(number, folder):
    """What each of the two processes runs."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=number, world_size=WORLD_SIZE)
    found = {"rank": rank(), "world_size": world_size()}

    rows = numbers().chunk(WORLD_SIZE)[number].clone().requires_grad_()
    gathered = gather_with_gradient(rows)
    # Each rank weighs it differently, so that a copy of one rank's gradient cannot pass for the sum.
    loss = mixed(gathered) * (number + 1)
    loss.backward()
    found |= {"gathered": gathered.detach(), "gradient": rows.grad}
    found["labels"] = gather_with_gradient(torch.tensor([number * 10, number * 10 + 1]))

    for num_rows in (0, 1, 5, 8):
        found[f"rows {num_rows}"] = gather_rows(dealt(num_rows)[number::WORLD_SIZE])

    values = torch.tensor([1.0, 2.0], dtype=torch.float64) * (number + 1)
    found |= {"sum": sum_over_ranks(values), "values": values}
    torch.save(found, folder / f"{number}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each process found."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (folder,), nprocs=WORLD_SIZE)
    return [torch.load(folder / f"{number}.pt", weights_only=False) for number in range(WORLD_SIZE)]


def test_ranks_know_their_number(ranks):
    assert [found["rank"] for found in ranks] == [0, 1]
    assert [found["world_size"] for found in ranks] == [2, 2]


def test_every_rank_sees_all_rows_in_rank_order(ranks):
    for found in ranks:
        assert torch.equal(found["gathered"], numbers())
        assert found["labels"].tolist() == [0, 1, 10, 11]


def test_the_gradient_is_the_sum_of_what_all_ranks_derive(ranks):
    rows = numbers().requires_grad_()
    (mixed(rows) * 1 + mixed(rows) * 2).backward()
    found = torch.cat([found["gradient"] for found in ranks])
    assert torch.allclose(found, rows.grad, rtol=1e-5)


@pytest.mark.parametrize("num_rows", [0, 1, 5, 8])
def test_rows_dealt_round_robin_come_back_in_order(ranks, num_rows):
    for found in ranks:
        assert found[f"rows {num_rows}"].dtype == np.uint8
        assert found[f"rows {num_rows}"].tolist() == dealt(num_rows).tolist()


def test_the_sum_is_of_all_ranks_and_leaves_the_values_alone(ranks):
    for number, found in enumerate(ranks):
        assert found["sum"].tolist() == [3.0, 6.0]
        assert found["values"].tolist() == [1.0 * (number + 1), 2.0 * (number + 1)]


def test_one_process_is_one_rank():
    assert (rank(), world_size()) == (0, 1)
    rows = numbers().requires_grad_()
    gather_with_gradient(rows).sum().backward()
    assert (rows.grad == 1).all()
    assert gather_rows(dealt(4)).tolist() == dealt(4).tolist()
    assert sum_over_ranks(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
