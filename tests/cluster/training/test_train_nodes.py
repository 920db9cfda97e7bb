"""Training with a varying number of workers: a node is killed in the middle of an epoch."""

import json

import pytest
from cluster_parts import joining, kill_a_node, wait_for

from orbithash.encoders.networks.model import HashModel
from orbithash.trainers.loop.export import best_epoch
from orbithash.trainers.loop.loop import train
from orbithash.trainers.loop.run_folder import open_run

pytestmark = pytest.mark.slow

EPOCHS = 6


class Recorder:
    def on_step(self, epoch, step, num_steps, images_per_s):
        pass

    def on_epoch(self, history, write_checkpoint):
        self.history = history


def history_of(run):
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_training_survives_a_node(start, nodes, labelled, tmp_path):
    """Three nodes have one rank each; after one dies, two resume, and only the unfinished epoch is lost."""
    out = tmp_path / "run"
    settings = ("backbone=mobilenet_v3_small", "image_size=32", "batch_size=6", "bits=16", f"epochs={EPOCHS}")
    # With plain gradient descent and tiny steps, the order of summation changes the result little.
    settings += ("optimizer=sgd", "lr=1e-7", "warm_up_epochs=0")
    options = [word for setting in settings for word in ("--set", setting)]
    process = start(
        "train", "dhcl", "--data", labelled, "--out", out, "--workers", "1:3", *options, before=joining(nodes)
    )
    wait_for(lambda: len(history_of(out)) >= 1, process)
    kill_a_node(nodes)
    before = history_of(out)
    assert process.wait(timeout=300) == 0, process.err.read_text()
    # The output of workers, their errors included, is shown on an existing cluster. The command itself prints none.
    assert not [line for line in process.err.read_text().splitlines() if line.startswith("Traceback")]
    after = history_of(out)
    assert [record["epoch"] for record in after] == list(range(1, EPOCHS + 1))
    # Complete epochs were not trained again, except the one whose checkpoint was being written: records have times.
    assert after[: len(before) - 1] == before[:-1]
    assert HashModel.load(out / "model").card.metrics == best_epoch(after)

    # An uninterrupted training with one rank gives the same result, up to the order of summation.
    recorder = Recorder()
    train(open_run(out), recorder)
    for disturbed, whole in zip(after, recorder.history, strict=True):
        assert disturbed["train/loss"] == pytest.approx(whole["train/loss"], rel=1e-3)
        assert disturbed["score"] == pytest.approx(whole["score"], abs=0.1)
