"""Training with views made on the device is training with views made by Pillow, bit for bit on a CPU."""

import pytest
import torch
from method_parts import flat, make_run, timeless, trained, write_data

from orbithash.trainers.loop import batches
from orbithash.trainers.loop.batches import batches_of_epoch
from orbithash.trainers.loop.checkpoint import load_checkpoint
from orbithash.trainers.loop.parts import load_training_part

# Odd shares: micro-batches of 4 and 3 images.
SETTINGS = {"backbone": "resnet8", "warm_up_epochs": 0, "batch_size": 7, "accumulate": 2, "colour_jitter": 0.2}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "first")


class Pixels:
    """In place of a network: images as they are given, to compare them in levels."""

    device = torch.device("cpu")

    def normalise(self, images):
        return images.float()


def steps_of(run, epoch, loading="memory"):
    method = run.build()
    training = load_training_part(run, method, loading=loading)
    order = method.order(training.labels, epoch)
    return list(batches_of_epoch(run.config, method, order, Pixels(), training, epoch))


@pytest.mark.parametrize("loading", ["memory", "stream"])
def test_batches_are_those_of_views_made_on_cpus(data, loading):
    for epoch in (0, 1):
        expected = steps_of(make_run(data, "dhcl", **SETTINGS), epoch)
        found = steps_of(make_run(data, "dhcl", augment_on="device", **SETTINGS), epoch, loading)
        for one, other in zip(found, expected, strict=True):
            assert one.batch.rows.equal(other.batch.rows)
            assert one.batch.labels.equal(other.batch.labels)
            assert one.batch.seed == other.batch.seed
            assert one.views is None
            assert one.batch.images.equal(other.batch.images)


def test_ranks_share_the_views_of_one_process(data, monkeypatch):
    run = make_run(data, "dhcl", augment_on="device", **SETTINGS)
    whole = steps_of(run, 0)
    monkeypatch.setattr(batches, "world_size", lambda: 2)
    shares = []
    for number in range(2):
        monkeypatch.setattr(batches, "rank", lambda number=number: number)
        shares.append(steps_of(run, 0))
    for step, *parts in zip(whole, *shares, strict=True):
        rows = torch.cat([part.batch.rows for part in parts])
        images = torch.cat([part.batch.images for part in parts])
        assert sorted(rows.tolist()) == sorted(step.batch.rows.tolist())
        assert {len(part.batch.rows) for part in parts} == {3, 4}
        assert images[rows.argsort()].equal(step.batch.images[step.batch.rows.argsort()])


def test_a_run_and_a_resumed_run_are_those_with_views_made_on_cpus(data, tmp_path):
    run = make_run(data, "dhcl", augment_on="device", **SETTINGS)
    whole = trained(run, tmp_path / "whole").history
    expected = trained(make_run(data, "dhcl", **SETTINGS)).history
    assert timeless(whole) == timeless(expected)
    (tmp_path / "rest").mkdir()
    rest = trained(run, tmp_path / "rest", resume_from=tmp_path / "whole" / "epoch1").history
    assert timeless(rest) == timeless(whole)
    one, other = (flat(load_checkpoint(tmp_path / name / "epoch2")["method"]) for name in ("whole", "rest"))
    assert one == other
