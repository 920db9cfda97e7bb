"""The search for settings: sampling, resuming after a kill, report and best settings, invalid options."""

import json

import pytest
import yaml
from cluster_parts import family, kill, wait_for

from orbithash.cluster.tuning.report import write_page
from orbithash.cluster.tuning.sampling import sample_points
from orbithash.cluster.tuning.tune import Trial, Tuning, best_config
from orbithash.trainers.loop.run import make_run
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
    initial = {"lr": 2e-4, "margin": 0.2, "hidden": "[1024, 512]", "epochs": 20}
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
        assert point["hidden"] in ("[8]", "[16, 8]")
        assert point["epochs"] in (3, 4, 5)
    assert points == sample_points(run.config, space, 40, 0)
    assert points[1:] != sample_points(run.config, space, 40, 1)[1:]


@pytest.mark.slow
def test_a_killed_search_resumes(start, small, tmp_path):
    options = ("--trials", "4", "--set", "epochs=3", "--concurrent", "1", "--search", "lr=1e-4:1e-2:log")
    options = (*options, "--search", "hidden=[8],[16, 8]", "--set", "steps_per_epoch=200")
    first = start(*small, *options)
    # The second trial has started.
    wait_for(lambda: (tmp_path / "tune" / "ray" / "trial_00001").is_dir(), first, 180)
    kill(first, *family(first.pid))
    assert not (tmp_path / "tune" / "trials.json").exists()

    second = start(*small, *options, "--json", "--best", tmp_path / "mine.yaml")
    assert second.wait(240) == 0, second.err.read_text()
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
