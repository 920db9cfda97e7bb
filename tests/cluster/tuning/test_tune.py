"""The search for settings: sampling, resuming after a kill, report and best settings, invalid options."""

import json
import re
import signal
from contextlib import suppress
from types import SimpleNamespace

import pytest
import yaml
from cluster_parts import family, kill, wait_for

from orbithash.cluster.tuning.report import write_page
from orbithash.cluster.tuning.sampling import sample_points
from orbithash.cluster.tuning.trials import Outcome, Trial, read_outcomes, write_outcome
from orbithash.cluster.tuning.tune import Tuning, best_config, remaining
from orbithash.cluster.tuning.worker import work
from orbithash.trainers.loop.checkpoint import load_checkpoint
from orbithash.trainers.loop.run import make_run
from orbithash.trainers.loop.run_folder import claim_folder
from orbithash.trainers.search_space import Choice, Linear, Log

TINY = ("--set", "backbone=mobilenet_v3_small", "--set", "image_size=32", "--set", "steps_per_epoch=4")


def command(data, out, *options):
    return ("tune", "mhcln", "--data", data, "--out", out, *TINY, *options)


@pytest.fixture
def small(labelled, tmp_path):
    """Options that fit the small labelled folder."""
    return command(
        labelled, tmp_path / "tune", "--set", "batch_size=6", "--set", "class_pairs=1", "--validation", "0.3"
    )


def test_the_settings_of_trials(labelled):
    run = make_run("mhcln", labelled, settings=["lr=2e-4"])
    space = {"lr": Log(1e-4, 1e-2), "margin": Linear(0.1, 1), "hidden": Choice(((8,), (16, 8))), "epochs": Linear(3, 5)}
    points = sample_points(run.config, space, 40, 0)
    initial = {"lr": 2e-4, "margin": 0.2, "hidden": (1024, 512), "epochs": 20}
    assert points[0] == initial
    assert len(points) == 40
    for point in points[1::2]:
        assert 2e-4 * 0.5**0.25 <= point["lr"] <= 2e-4 * 50**0.25, "a quarter of the way, in orders of magnitude"
        assert 0.175 <= point["margin"] <= 0.4
        assert point["epochs"] in (16, 17)
    assert 2 < sum(point["hidden"] != initial["hidden"] for point in points[1::2]) < 10, "one in four"
    for point in points[2::2]:
        assert 1e-4 <= point["lr"] <= 1e-2
        assert 0.1 <= point["margin"] <= 1
        assert point["hidden"] in ((8,), (16, 8))
        assert point["epochs"] in (3, 4, 5)
    assert points == sample_points(run.config, space, 40, 0)
    assert points[1:] != sample_points(run.config, space, 40, 1)[1:]


def history(folder, number):
    """Return the records of the epochs in the checkpoint of a trial; none while there is no checkpoint."""
    checkpoint = folder / "trials" / f"{number:05}"
    # A checkpoint that is replaced at this moment counts as none.
    with suppress(OSError):
        return load_checkpoint(checkpoint)["history"] if checkpoint.is_dir() else []
    return []


@pytest.mark.slow
def test_a_killed_search_resumes(start, small, tmp_path):
    folder = tmp_path / "tune"
    options = ("--trials", "4", "--set", "epochs=3", "--concurrent", "1", "--search", "lr=1e-4:1e-2:log")
    options = (*options, "--search", "hidden=[8],[16, 8]", "--set", "steps_per_epoch=40")
    interrupted = start(*small, *options)
    wait_for(lambda: history(folder, 0), interrupted, 180)
    interrupted.send_signal(signal.SIGINT)
    assert interrupted.wait(120) == 130
    assert re.search(r"interrupted; \d trials are complete, and the same command resumes", interrupted.err.read_text())

    first_epochs, outcomes = {0: history(folder, 0)[0]}, {}
    # All epochs of trial 0 are trained; then the first one of trial 1, and of trial 2.
    for number, num_epochs in ((0, 3), (1, 1), (2, 1)):
        killed = start(*small, *options)
        wait_for(lambda: len(history(folder, number)) >= num_epochs, killed, 180)  # noqa: B023
        kill(killed, *family(killed.pid))
        assert not (folder / "trials.json").exists()
        first_epochs.setdefault(number, history(folder, number)[0])
        outcomes |= {path: path.stat().st_mtime_ns for path in (folder / "trials").glob("*.json")}

    second = start(*small, *options, "--json", "--best", tmp_path / "mine.yaml")
    assert second.wait(240) == 0, second.err.read_text()
    assert len(outcomes) >= 2
    assert outcomes == {path: path.stat().st_mtime_ns for path in outcomes}, "a trial that ended does not run again"
    for number, record in first_epochs.items():
        # The records have the duration of the epoch: it was not trained again.
        assert history(folder, number)[0] == record
    trials = json.loads((tmp_path / "tune" / "trials.json").read_text())
    assert json.loads(second.out.read_text())["trials"] == trials
    assert sorted(trial["number"] for trial in trials) == [0, 1, 2, 3]
    scores = [trial["score"] for trial in trials]
    assert scores == sorted(scores, reverse=True)
    initial = next(trial for trial in trials if trial["number"] == 0)
    assert initial["settings"] == {"lr": 1e-4, "hidden": [1024, 512]}
    assert initial["epochs"] == 3, "the first one is trained to its end"
    assert all(1e-4 <= trial["settings"]["lr"] <= 1e-2 for trial in trials)
    best = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    assert best == yaml.safe_load((tmp_path / "tune" / "best.yaml").read_text())
    assert best["lr"] == trials[0]["settings"]["lr"]
    assert (
        "<svg" in (tmp_path / "tune" / "report.html").read_text()
        or "data:image/svg" in (tmp_path / "tune" / "report.html").read_text()
    )

    # Repeating the command does nothing; another search is refused in this folder.
    third = start(*small, *options)
    assert third.wait(120) == 0
    assert "is complete already; nothing to search" in third.err.read_text()
    other = start(*small, *options, "--seed", "1")
    assert other.wait(60) == 2
    assert "holds another search (seed was 0, is 1); give another --out" in other.err.read_text()


def test_a_trial_killed_after_its_last_epoch(labelled, tmp_path, monkeypatch):
    reported = []
    monkeypatch.setattr("ray.tune.report", reported.append)
    settings = ["backbone=mobilenet_v3_small", "image_size=32", "batch_size=6", "class_pairs=1", "steps_per_epoch=1"]
    run = make_run("mhcln", labelled, settings=[*settings, "epochs=2"], validation=0.3)
    claim_folder(run, tmp_path / "base")
    search = {"folder": str(tmp_path), "points": [{}, {"hidden": (8,)}], "metric": "ap_min@20", "num_gpus": 0}
    work({"number": 1}, **search)
    assert [(result["epoch"], len(result["scores"])) for result in reported] == [(1, 1), (2, 2)]
    work({"number": 1}, **search)
    assert reported[2:] == reported[1:2], "all epochs are reported, none is trained"


def test_a_resumed_search_runs_the_trials_without_an_outcome(tmp_path):
    tuning = Tuning({"lr": Log(1e-4, 1e-2)}, 5, "ap_min@20")
    for number, score in ((0, 0.5), (3, 0.9)):
        write_outcome(tmp_path, Outcome(number, {"lr": 1e-3}, [(1, score), (2, score / 2)], ""))
    # The process of a trial was killed in its second epoch; the search while it wrote an outcome.
    (tmp_path / "trials" / "00001").mkdir()
    (tmp_path / "trials" / ".00002.json.0a1b2c3d.part").write_text('{"numb')
    outcomes = read_outcomes(tmp_path)
    assert [outcome.trial() for outcome in outcomes] == [
        Trial(0, {"lr": 1e-3}, 0.5, 1, 2, ""),
        Trial(3, {"lr": 1e-3}, 0.9, 1, 2, ""),
    ]
    assert remaining(tuning, outcomes) == [1, 2, 4]

    from orbithash.cluster.tuning.scheduling import Halving

    halving = Halving(epochs=9, grace=1, outcomes=outcomes)
    for number, score, decision in ((0, 0.1, "CONTINUE"), (1, 0.1, "STOP"), (2, 0.95, "CONTINUE")):
        trial = SimpleNamespace(trial_id=f"{number}", config={"number": number})
        halving.on_trial_add(None, trial)
        assert halving.on_trial_result(None, trial, {"epoch": 1, "objective": score}) == decision, number


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--trials", "1"), "--trials is 1; at least 2 are needed"),
        (("--validation", "0"), "no validation part to score the trials on"),
        (("--search", "lrr"), "'lrr' is not a setting"),
        (("--search", "lr=0.1:7"), "lr is 7.0: input should be less than or equal to 1"),
        (("--grace", "99"), "--grace is 99; from 1 to epochs=20 are allowed"),
        (("--cpus-per-trial", "0"), "0 CPUs and 0 GPUs per trial; one of them must be above 0"),
        (("--cpus-per-trial", "nan"), "nan CPUs and 0 GPUs per trial"),
        (("--gpus-per-trial", "1.5"), "--gpus-per-trial is 1.5; a whole number, or a part of one GPU such as 0.25"),
        (("--gpus-per-trial", "nan"), "--gpus-per-trial is nan; a number of GPUs, 0 or more"),
        (("--concurrent", "-1"), "--concurrent is -1; a number of trials, or 0 for no limit"),
    ],
)
def test_invalid_options_are_refused(refused, small, options, words):
    refused(*small, *options, words=[words])


@pytest.mark.ray
def test_more_resources_than_the_cluster_has(ray_cluster, refused, small):
    refused(*small, "--cpus-per-trial", "9", words=["a trial needs 9 CPUs, the cluster has 4"])
    refused(*small, "--gpus-per-trial", "2", words=["a trial needs 2 GPUs, the cluster has 0"])


def test_a_folder_with_other_files(refused, small, tmp_path):
    (tmp_path / "tune").mkdir()
    (tmp_path / "tune" / "notes.txt").touch()
    refused(*small, words=["is not empty and not the folder of a search; give another --out"])


def test_the_page_and_the_best_settings(labelled, tmp_path):
    run = make_run("mhcln", labelled, settings=["backbone=mobilenet_v3_small", "image_size=32"])
    space = {"lr": Log(1e-4, 1e-2), "margin": Linear(0.1, 0.5), "hidden": Choice(((8,), (16, 8)))}
    tuning = Tuning(space, 3, "ap_min@20")
    trials = [
        Trial(2, {"lr": 1e-3, "margin": 0.3, "hidden": (8,)}, 0.75, 2, 3, ""),
        Trial(0, {"lr": 1e-4, "margin": 0.2, "hidden": (16, 8)}, 0.5, 3, 3, ""),
        Trial(1, {"lr": 1e-2, "margin": 0.1, "hidden": (8,)}, None, 0, 0, "the loss is <nan>"),
    ]
    best = yaml.safe_load(best_config(run, trials))
    assert (best["lr"], best["margin"], best["hidden"], best["image_size"]) == (1e-3, 0.3, [8], 32)
    (tmp_path / "best.yaml").write_text(best_config(run, trials))
    again = make_run("mhcln", labelled, config=tmp_path / "best.yaml")
    assert again.config.model_dump(mode="json") == best
    write_page(tmp_path / "report.html", run, tuning, trials)
    page = (tmp_path / "report.html").read_text()
    assert "0.7500" in page
    assert "the loss is &lt;nan&gt;" in page
    assert "settings as given: 0.5000" in page
    assert "Failed trials" in page
    assert "without early stopping: 9" in page
    write_page(tmp_path / "report.html", run, tuning, trials[1:2])
    assert "Failed trials" not in (tmp_path / "report.html").read_text()
