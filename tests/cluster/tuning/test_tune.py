"""The search for settings: resuming after a kill, finals, report and best settings, invalid options."""

import json
import re
import signal
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import pytest
import yaml
from cluster_parts import family, kill, wait_for

from orbithash.cluster.tuning.options import Tuning
from orbithash.cluster.tuning.report import finish, write_page
from orbithash.cluster.tuning.running import remaining
from orbithash.cluster.tuning.trials import Record, Trial, read_records, write_record
from orbithash.cluster.tuning.tune import Result, best_config, tune
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
    options = ("--trials", "3", "--set", "epochs=2", "--concurrent", "1", "--search", "lr=1e-4:1e-2:log")
    options = (*options, "--search", "hidden=[8],[16, 8]", "--set", "steps_per_epoch=20")
    options = (*options, "--finalists", "1", "--seeds", "1")
    interrupted = start(*small, *options)
    wait_for(lambda: history(folder, 0), interrupted, 180)
    interrupted.send_signal(signal.SIGINT)
    assert interrupted.wait(120) == 130
    assert re.search(r"interrupted; \d trials are complete, and the same command resumes", interrupted.err.read_text())

    # The first epoch of trial 1 is trained; then that of the finalist.
    first_epochs = {(folder, 0): history(folder, 0)[0]}
    for place, number in ((folder, 1), (folder / "finals", 1)):
        killed = start(*small, *options)
        wait_for(lambda: history(place, number), killed, 180)  # noqa: B023
        kill(killed, *family(killed.pid))
        assert not (folder / "result.json").exists()
        first_epochs[place, number] = history(place, number)[0]
    ended = {
        path: path.stat().st_mtime_ns
        for path in folder.glob("**/trials/*.json")
        if '"is_ended": true' in path.read_text()
    }

    second = start(*small, *options, "--json", "--best", tmp_path / "mine.yaml")
    assert second.wait(240) == 0, second.err.read_text()
    assert len(ended) >= 3
    assert ended == {path: path.stat().st_mtime_ns for path in ended}, "a trial that ended does not run again"
    for (place, number), record in first_epochs.items():
        # The records have the duration of the epoch: it was not trained again.
        assert history(place, number)[0] == record
    printed = json.loads(second.out.read_text())
    trials = json.loads((folder / "trials.json").read_text())
    assert printed.pop("trials") == trials
    assert printed == json.loads((folder / "result.json").read_text())
    assert sorted(trial["number"] for trial in trials) == [0, 1, 2]
    scores = [trial["score"] for trial in trials]
    assert scores == sorted(scores, reverse=True)
    initial = next(trial for trial in trials if trial["number"] == 0)
    assert initial["settings"] == {"lr": 1e-4, "hidden": [1024, 512]}
    assert initial["epochs"] == 2, "the first one is trained to its end"
    assert all(1e-4 <= trial["settings"]["lr"] <= 1e-2 for trial in trials)
    finals = printed["finals"]
    assert finals["seeds"] == [1]
    assert sorted(each["number"] for each in finals["candidates"])[0] == 0
    for number in (0, 1):
        assert load_checkpoint(folder / "finals" / "trials" / f"{number:05}")["history"][-1]["epoch"] == 2
    best = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    assert best == yaml.safe_load((folder / "best.yaml").read_text())
    assert (best["lr"], best["seed"]) == (printed["chosen"]["settings"]["lr"], 0)
    assert "is within the noise" in finals["verdict"] or "one seed does not show the noise" in finals["verdict"]
    assert "Finals" in (folder / "report.html").read_text()

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
    write_record(tmp_path, Record(1, {"hidden": (8,)}))
    search = {"folder": str(tmp_path), "base": str(tmp_path / "base"), "metric": "ap_min@20", "num_gpus": 0}
    work({"number": 1}, **search)
    assert [(result["epoch"], len(result["scores"])) for result in reported] == [(1, 1), (2, 2)]
    work({"number": 1}, **search)
    assert reported[2:] == reported[1:2], "all epochs are reported, none is trained"


def test_a_resumed_search_runs_the_trials_that_have_not_ended(tmp_path):
    for number, score in ((0, 0.5), (3, 0.9)):
        write_record(tmp_path, Record(number, {"lr": 1e-3}, [(1, score), (2, score / 2)], "", True))
    # The process of a trial was killed in its second epoch; the search while it wrote a record.
    write_record(tmp_path, Record(1, {"lr": 5e-3}))
    (tmp_path / "trials" / "00001").mkdir()
    (tmp_path / "trials" / ".00002.json.0a1b2c3d.part").write_text('{"numb')
    records = read_records(tmp_path)
    assert [record.trial() for record in records if record.is_ended] == [
        Trial(0, {"lr": 1e-3}, 0.5, 1, 2, ""),
        Trial(3, {"lr": 1e-3}, 0.9, 1, 2, ""),
    ]
    numbers = remaining(5, records)
    assert numbers == [1, 2, 4]

    from orbithash.cluster.tuning.scheduling import Halving, Proposer

    proposer = Proposer(tmp_path, numbers, lambda number, records: {"lr": [number, *(each.number for each in records)]})
    assert [proposer.suggest("") for _ in range(4)] == [*({"number": number} for number in numbers), "FINISHED"]
    settings = [record.settings["lr"] for record in read_records(tmp_path)]
    assert settings == [1e-3, 5e-3, [2, 0, 1, 3], 1e-3, [4, 0, 1, 2, 3]], "started trials keep their settings"

    halving = Halving(epochs=9, grace=1, records=records)
    for number, score, decision in ((0, 0.1, "CONTINUE"), (1, 0.1, "STOP"), (2, 0.95, "CONTINUE")):
        trial = SimpleNamespace(trial_id=f"{number}", config={"number": number})
        halving.on_trial_add(None, trial)
        assert halving.on_trial_result(None, trial, {"epoch": 1, "objective": score}) == decision, number


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--trials", "1"), "--trials is 1; at least 2 are needed"),
        (("--validation", "0"), "no validation part to score the trials on"),
        (("--finalists", "16"), "--finalists is 16; from 0 (no finals) to 15 are allowed"),
        (("--finalists", "-1"), "--finalists is -1; from 0"),
        (("--seeds", "0"), "--seeds is 0; a number of runs of each finalist, 1 or more, is needed"),
        (("--seed", "-1"), "--seed is -1; a seed of the sampled settings, 0 or more, is needed"),
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
    best = yaml.safe_load(best_config(run, trials[0]))
    assert (best["lr"], best["margin"], best["hidden"], best["image_size"]) == (1e-3, 0.3, [8], 32)
    (tmp_path / "best.yaml").write_text(best_config(run, trials[0]))
    again = make_run("mhcln", labelled, config=tmp_path / "best.yaml")
    assert again.config.model_dump(mode="json") == best
    write_page(tmp_path / "report.html", run, tuning, Result("ap_min@20", trials, None))
    page = (tmp_path / "report.html").read_text()
    assert "0.7500" in page
    assert "the loss is &lt;nan&gt;" in page
    assert "settings as given: 0.5000" in page
    assert "Failed trials" in page
    assert "without early stopping: 9" in page
    write_page(tmp_path / "report.html", run, tuning, Result("ap_min@20", trials[1:2], None))
    page = (tmp_path / "report.html").read_text()
    assert "Failed trials" not in page
    assert "Finals" not in page


def test_the_finals_decide(labelled, tmp_path, monkeypatch, capsys):
    """A run scores its learning rate, plus a part of its seed; a run of the best trial fails."""
    settings = ["backbone=mobilenet_v3_small", "image_size=32", "batch_size=6", "class_pairs=1", "lr=0.1"]
    run = make_run("mhcln", labelled, settings=settings, validation=0.3)
    tuning = Tuning({"lr": Log(1e-3, 0.5)}, 9, "ap_min@20", num_finalists=2, num_seeds=3)
    proposed = []

    def run_trials(what, base, folder, tuning, num_trials, propose, epochs=None):
        records = []
        for number in range(num_trials):
            settings = propose(number, records)
            proposed.append(settings)
            fails = settings["lr"] == max(each["lr"] for each in proposed[:9]) and settings.get("seed") == 2
            scores = [(1, settings["lr"] + settings.get("seed", 0) / 100)]
            records.append(Record(number, settings, scores, "the loss is <nan>" if fails else "", True))
        return [record.trial() for record in records]

    monkeypatch.setattr("orbithash.cluster.tuning.tune.connected", nullcontext)
    monkeypatch.setattr("orbithash.cluster.tuning.tune.check_resources", lambda what, bundles: None)
    monkeypatch.setattr("orbithash.cluster.tuning.tune.run_trials", run_trials)
    result = tune(run, tuning, tmp_path / "tune")
    searched, finals = proposed[:9], proposed[9:]
    ranked = sorted((each for each in searched[1:]), key=lambda each: -each["lr"])
    lrs = [each["lr"] for each in (searched[0], *ranked[:2])]
    assert finals == [{"lr": lr, "seed": seed} for lr in lrs for seed in (1, 2, 3)], "the same seeds for all"
    assert result.finals.candidates[-1].problem == "the loss is <nan>"
    assert result.chosen.settings["lr"] == max(lrs[0], lrs[2])
    rival = next(each for each in result.finals.candidates if each.number == result.finals.rival)
    assert rival.scores == pytest.approx([lrs[2] + seed / 100 for seed in (1, 2, 3)])
    assert (rival.mean, rival.deviation) == pytest.approx((lrs[2] + 0.02, 0.01))
    assert (result.finals.difference, result.finals.margin) == pytest.approx((lrs[2] - lrs[0], 0), abs=1e-12)

    capsys.readouterr()
    finish(run, tuning, result, tmp_path / "tune", None, as_json=False)
    printed = capsys.readouterr().out
    assert f"finals: settings as given, ap_min@20 {lrs[0] + 0.02:.4f} ± 0.0100" in printed
    assert result.finals.verdict in printed
    page = (tmp_path / "tune" / "report.html").read_text()
    assert result.finals.verdict[1:] in page
    assert "seed 3" in page
    assert "the loss is &lt;nan&gt;" in page
    assert yaml.safe_load((tmp_path / "tune" / "best.yaml").read_text())["lr"] == result.chosen.settings["lr"]
    assert tune(run, tuning, tmp_path / "tune") == result, "a complete search is read again"
    assert len(proposed) == 18
