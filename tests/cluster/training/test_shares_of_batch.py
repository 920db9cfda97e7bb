"""What `train` says about the batch of each worker and the learning rate."""

from types import SimpleNamespace

import pytest

from orbithash.cluster.training.train import shares_of_batch


def run(method="dhcl", **settings):
    return SimpleNamespace(method=method, config=SimpleNamespace(**{"batch_size": 48, "accumulate": 1, **settings}))


@pytest.mark.parametrize(
    ("workers", "settings", "shares"),
    [
        ((1, 1), {}, "1 x 48"),
        ((4, 4), {"accumulate": 3}, "4 x 12, in 3 micro-batches"),
        ((1, 4), {}, "1 x 48 to 4 x 12"),
        ((5, 7), {}, "5 x 9-10 to 7 x 6-7"),
    ],
)
def test_shares_of_each_worker(workers, settings, shares):
    assert shares_of_batch(run(**settings), workers) == (
        f"a batch has 48 images, workers x images: {shares}; learning rates are those of the whole batch for any "
        "number of workers"
    )


def test_a_fitted_method_has_no_batches():
    assert shares_of_batch(run("itq"), (1, 1)) is None
