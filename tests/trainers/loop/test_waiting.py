"""Ranks wait for one that works longer than a collective of their group may take."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from method_parts import Recorder, make_run, timeless, trained, write_data

from orbithash.trainers.loop.loop import train
from orbithash.trainers.methods import get_method

TIMEOUT_S = 3
LONG_S = 4


class Slow(get_method("mrhash")):
    """The first rank works long before training, for a target and after an epoch, the second one for validation."""

    def begin(self, training):
        time.sleep(LONG_S)
        super().begin(training)

    def start_epoch(self, epoch, training):
        if dist.get_rank() == epoch == 0:
            time.sleep(LONG_S)
        return super().start_epoch(epoch, training)

    def validate(self, *arguments):
        if dist.get_rank() == 1:
            time.sleep(LONG_S)
        return super().validate(*arguments)


class SlowRecorder(Recorder):
    def on_epoch(self, history, write_checkpoint):
        super().on_epoch(history, write_checkpoint)
        if dist.get_rank() == 0 and len(history) == 1:
            time.sleep(LONG_S)


def make_slow_run(root):
    settings = {"num_clusters": 4, "num_latents": 5, "autoencoder_epochs": 1, "hidden": (12,), "sources": "first"}
    return make_run(root, "mrhash", validate_every=2, batch_size=9, **settings)


def work(number, root, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=number, world_size=2)
    # Now, because processes may start at different times.
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT_S))

    recorder = SlowRecorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orbithash.trainers.loop.run.get_method", lambda name: Slow)
        train(make_slow_run(root), recorder)
    torch.save(timeless(recorder.history), folder / f"{number}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_wait_longer_than_the_time_out_of_a_collective(tmp_path, one_thread):
    root = write_data(tmp_path / "data" / "first")
    torch.multiprocessing.spawn(work, (root, tmp_path), nprocs=2)
    expected = timeless(trained(make_slow_run(root)).history)
    for number in range(2):
        for one, other in zip(torch.load(tmp_path / f"{number}.pt"), expected, strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
