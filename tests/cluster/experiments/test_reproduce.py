"""The verb `reproduce`: rows of the table, settings per method, and validation before training."""

import json
import statistics
from contextlib import nullcontext

import numpy as np
import pyarrow as pa
import pytest
import torch
import torchvision
from cluster_parts import write_image
from safetensors.torch import save_file

from orbithash.cluster.experiments import reproduce as module
from orbithash.cluster.experiments.reproduce import smallest_class
from orbithash.cluster.experiments.reproduction_table import COLUMNS, cells_of, rows_of, with_learned_baselines
from orbithash.cluster.runtime import cpus_per_worker
from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.model import HashModel
from orbithash.trainers.datasets import Image, Manifest, make_manifest
from orbithash.trainers.evaluation.evaluation import HEADLINE
from orbithash.trainers.evaluation.published import PUBLISHED, REPRODUCTIONS
from orbithash.trainers.features.store import store_folder
from orbithash.trainers.library import train
from orbithash.trainers.loop.run import Run
from orbithash.trainers.loop.run_folder import open_run
from orbithash.trainers.methods import METHODS, get_method
from orbithash.trainers.metrics.metrics import DEFINITIONS

SOURCES = {"paper", "issue", "readme", "secondary"}
POLICIES = {"expected", "index"}
TINY = ("backbone=mobilenet_v3_small", "image_size=32", "batch_size=6", "epochs=1", "steps_per_epoch=2")


def settings(*pairs):
    return [word for pair in pairs for word in ("--set", pair)]


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.safetensors"
    torch.manual_seed(0)
    save_file(torchvision.models.get_model("mobilenet_v3_small").state_dict(), path)
    return path


# Whole runs.


@pytest.mark.ray
@pytest.mark.slow
def test_two_seeds_of_a_method(ray_cluster, cli, labelled, tmp_path, weights):
    out = tmp_path / "out"
    command = ("reproduce", "mhcln", "--data", labelled, "--out", out, "--bits", 16, "--seeds", 2, "--weights", weights)
    kinds = set(store_folder().glob("*"))
    ended = cli(*command, *settings(*TINY, "hidden=[8]"), "--json")
    assert ended.code == 0, ended.err
    # Side by side, with the same weights: each row is computed once, by one of them.
    new = set(store_folder().glob("*")) - kinds
    assert new
    for kind in new:
        parts = [pa.ipc.open_file(part).read_all()["hash"].to_pylist() for part in kind.glob("*.arrow")]
        hashes = [of_row for of_part in parts for of_row in of_part]
        assert len(set(hashes)) == len(hashes)
    assert "run 2 of 2: mhcln, 16 bits, seed 1" in ended.err
    # Before it, Ray may print how many processes it has started.
    (row,) = json.loads(ended.out.splitlines()[-1])
    assert [row] == json.loads((out / "reproduce.json").read_text())
    assert (row["method"], row["dataset"], row["bits"], row["metric"]) == ("mhcln", "folder", 16, "ap_hits@20")
    assert (row["published"], row["source"]) == (None, "")

    # Each value is the paper's metric, with the paper's order of ties, in the evaluation of that seed's run.
    runs = [out / "mhcln" / "mhcln" / f"16-{seed}" for seed in range(2)]
    evaluated = [json.loads((run / "evaluation" / "metrics.json").read_text()) for run in runs]
    assert row["ours"] == [metrics["metrics"]["ap_hits@20"]["index"] for metrics in evaluated]
    assert row["clean"] == [metrics["metrics"][HEADLINE]["expected"] for metrics in evaluated]
    splits = [open_run(run).manifest for run in runs]
    assert [(split.protocol, split.seed, split.validation) for split in splits] == [("mhcln", 0, 0), ("mhcln", 1, 0)]
    assert [open_run(run).config.seed for run in runs] == [0, 1]
    assert row["network"] == "mobilenet_v3_small, 32 px, 1 epochs"
    for name, values in {**row["baselines"], "cosine": row["cosine"]}.items():
        assert values == [metrics["baselines"][name]["metrics"][HEADLINE] for metrics in evaluated]
    name = max(row["baselines"], key=lambda name: sum(row["baselines"][name]))

    ours = f"{np.mean(row['ours']):.3f} ± {statistics.stdev(row['ours']):.3f}"
    page = (out / "report.html").read_text()
    for text in ((out / "results.md").read_text(), page):
        assert all(cell in text for cell in ("mhcln on folder", "ap_hits@20", ours, "not known", f"({name})"))

    # The two runs were side by side; alone and without Ray, the second one gives the same model.
    own = dict(pair.split("=") for pair in TINY) | {"hidden": [8], "bits": 16, "weights": str(weights), "seed": 1}
    threads = torch.get_num_threads()
    # Sums differ by rounding with the number of threads.
    torch.set_num_threads(cpus_per_worker(2, 0))
    try:
        model = train("mhcln", labelled, tmp_path / "alone", protocol="mhcln", split_seed=1, validation=0, **own)
    finally:
        torch.set_num_threads(threads)
    assert HashModel.load(runs[1] / "model").model_id == model.model_id

    # A second call trains and evaluates nothing, and prints the same rows, now as a table.
    before = {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*")}
    again = cli(*command, *settings(*TINY, "hidden=[8]"))
    assert again.code == 0, again.err
    assert again.err.count("is complete already; nothing to train") == 2
    assert {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*")} == before
    assert json.loads((out / "reproduce.json").read_text()) == [row]
    assert "mhcln" in again.out
    assert f"table: {out / 'results.md'}, report: {out / 'report.html'}" in again.out.replace("\n", " ")

    # A run with other settings cannot use the same folders.
    other = cli(*command, *settings(*TINY, "hidden=[8]", "mhcln.margin=0.3"))
    assert other.code == 2
    assert "holds another run (margin was 0.2, is 0.3); give another --out" in other.err


# Rows of finished runs.


def metrics_of(value=0.5, clean=0.4, *, dataset="ucmd", size=17, baselines=None, directions=()):
    """Return the metrics that `reproduce` reads of a run, for every definition of average precision."""
    values = {
        f"{definition}@{k}": {"expected": value / 2, "index": value}
        for definition in DEFINITIONS
        for k in (20, 100, size)
    }
    values |= {"success@20": {"expected": value / 2, "index": value}, HEADLINE: {"expected": clean, "index": 0.0}}
    return {
        "dataset": dataset,
        "metrics": dict.fromkeys(directions, values) or values,
        "codes": {"bytes_per_code": 4},
        "baselines": baselines or {},
        "smallest_class": size,
    }


def rows(method, *runs, bits=32, rule=None, **settings):
    config = get_method(method).Config(bits=bits, **settings)
    return list(rows_of(rule or REPRODUCTIONS[method], Run(method, config, None, None), runs))


def cells(row):
    return dict(zip(COLUMNS, cells_of(row), strict=True))


def test_mean_and_spread_over_seeds():
    (row,) = rows("mhcln", metrics_of(0.8, 0.3), metrics_of(0.9, 0.5), metrics_of(0.7, 0.4))
    assert row.ours == [0.8, 0.9, 0.7]
    shown = cells(row)
    assert (shown["ours"], shown[f"{HEADLINE}, expected"], shown["runs"]) == ("0.800 ± 0.100", "0.400 ± 0.100", "3")
    (row,) = rows("mhcln", metrics_of(0.8, 0.3))
    assert (cells(row)["ours"], cells(row)["runs"]) == ("0.800", "1")


def test_ties_are_ordered_as_the_paper_does():
    (by_index,) = rows("mhcln", metrics_of(0.8))
    (expected,) = rows("cdne", metrics_of(0.8))
    assert (by_index.metric, by_index.ours, expected.metric, expected.ours) == (
        "ap_hits@20",
        [0.8],
        "ap_min@100",
        [0.4],
    )


def test_ours_and_clean_come_from_different_searches():
    (row,) = rows("dhcl", {**metrics_of(0.6, 0.5), "searched": metrics_of(0.99, 0.98)})
    assert (row.metric, row.ours, row.clean) == ("success@20", [0.99], [0.5])


@pytest.mark.parametrize(
    ("method", "dataset", "bits", "published"),
    [
        ("mhcln", "ucmd", 32, "0.904 (issue)"),
        ("dhcl", "aid", 16, "0.948 (readme)"),
        ("cdne", "eurosat", 16, "0.999 (paper)"),
        ("mhcln", "ucmd", 64, "not known"),
        ("mhcln", "aid", 32, "not known"),
        ("classifier", "ucmd", 32, "not known"),
    ],
)
def test_the_published_value_depends_on_method_dataset_and_bits(method, dataset, bits, published):
    (row,) = rows(method, metrics_of(dataset=dataset), bits=bits)
    assert cells(row)["published"] == published


def test_each_direction_has_its_own_row():
    directions = ("image->image", "image->text", "text->image", "text->text")
    found = rows("duch", metrics_of(dataset="rsicd", directions=directions), bits=64)
    assert [row.direction for row in found] == ["image->text", "text->image"]
    assert [cells(row)["published"] for row in found] == ["0.836 (secondary)", "0.824 (secondary)"]
    assert cells(found[0])["method"] == "duch image->text on rsicd"
    assert [(row.baselines, row.cosine) for row in found] == [({}, []), ({}, [])], "baselines rank images for images"


def test_the_published_value_depends_on_the_variant():
    metrics = metrics_of(dataset="nwpu-resisc45")
    (bank,), (momentum,) = (rows("cdne", metrics, bits=16, variant=name) for name in ("memory-bank", "momentum"))
    assert [cells(row)["published"] for row in (bank, momentum)] == ["0.997 (paper)", "0.992 (paper)"]
    assert cells(momentum)["method"] == "cdne (momentum) on nwpu-resisc45"


def test_the_network_is_described():
    (row,) = rows("mhcln", metrics_of(), image_size=64, epochs=3)
    assert cells(row)["network"] == "mobilenet_v2, random weights, 64 px, 3 epochs"
    (row,) = rows("mhcln", metrics_of(), weights="IMAGENET1K_V2", epochs=3)
    assert cells(row)["network"] == "mobilenet_v2, 160 px, 3 epochs"


BEST = "best baseline of no more bytes"


def baselines(itq, cosine=0.9):
    values = {"cosine": (5000, cosine), "lsh": (4, 0.3), "itq": (4, itq)}
    results = {name: {"bytes": size, "metrics": {HEADLINE: value}} for name, (size, value) in values.items()}
    return results | {"pq": {"left_out": "too few images"}}


def test_a_baseline_better_than_the_method_is_marked():
    (row,) = rows("mhcln", metrics_of(clean=0.4, baselines=baselines(0.45)))
    assert cells(row)[BEST] == "0.450 (itq), better than the method"
    (row,) = rows("mhcln", metrics_of(clean=0.5, baselines=baselines(0.45)))
    assert (cells(row)[BEST], cells(row)["float cosine"]) == ("0.450 (itq)", "0.900")
    (row,) = rows("mhcln", metrics_of(clean=0.1))
    assert (cells(row)[BEST], cells(row)["float cosine"]) == ("none", "none")


def test_baselines_are_means_over_the_same_seeds():
    runs = [metrics_of(clean=0.44, baselines=baselines(itq, cosine)) for itq, cosine in ((0.5, 0.8), (0.4, 0.9))]
    (row,) = rows("mhcln", *runs)
    assert (row.baselines, row.cosine) == ({"lsh": [0.3, 0.3], "itq": [0.5, 0.4]}, [0.8, 0.9])
    assert cells(row)[BEST] == "0.450 ± 0.071 (itq), better than the method"


def test_a_method_is_not_its_own_baseline():
    (row,) = rows("itq", metrics_of(clean=0.44, baselines=baselines(0.5)), rule=REPRODUCTIONS["cdne"])
    assert cells(row)[BEST] == "0.300 (lsh)"


def test_learned_baselines_are_compared_with_methods_of_the_same_split():
    def one(method, clean, bits=32, rule=None):
        return rows(method, metrics_of(clean=clean, baselines=baselines(0.1)), bits=bits, rule=rule)[0]

    by_mhcln = REPRODUCTIONS["mhcln"]
    found = with_learned_baselines(
        [
            *(one("mhcln", 0.6), one("cdne", 0.7), one("mrhash", 0.2), one("mhcln", 0.5, bits=64)),
            *(one("classifier", 0.65, rule=by_mhcln), one("classifier", 0.4), one("triplet", 0.8)),
        ]
    )
    assert [cells(row)[BEST] for row in found] == [
        "0.650 (classifier), better than the method",
        "0.800 (triplet), better than the method",
        "0.300 (lsh), better than the method",
        "0.300 (lsh)",
        *["0.300 (lsh)"] * 3,
    ]


def test_the_cutoff_smallest_is_the_smallest_class_of_each_database():
    (row,) = rows("mrhash", metrics_of(0.7, size=17), metrics_of(0.8, size=17))
    assert (row.metric, row.ours) == ("ap_hits@17", [0.7, 0.8])
    (row,) = rows("mrhash", metrics_of(0.7, size=17), metrics_of(0.8, size=16))
    assert (row.metric, row.ours) == ("ap_hits@17, ap_hits@16", [0.7, 0.8])


def test_the_smallest_class_is_counted_in_the_database_alone():
    splits = [((0,), "train")] * 5 + [((1,), "validation")] * 3 + [((1,), "test")] * 9 + [((0, 3), "train")] * 4
    images = tuple(Image(str(i), str(i), labels, split, f"{i:064}") for i, (labels, split) in enumerate(splits))
    manifest = Manifest("folder", "mrhash", 0, 0.1, ("a", "b", "absent", "d"), images)
    assert smallest_class(manifest) == 3


# Settings.


def test_settings_are_passed_to_the_methods_that_have_them():
    given = ["epochs=3", "mhcln.lr=0.1", "hidden=[8]", "dhcl.epochs=4", "warm_up_epochs=0", "mrhash.lr=0.2"]
    assert module._settings_of("mhcln", given) == ["epochs=3", "lr=0.1", "hidden=[8]"]
    assert module._settings_of("dhcl", given) == ["epochs=3", "epochs=4", "warm_up_epochs=0"]
    assert module._settings_of("classifier", given) == ["epochs=3", "warm_up_epochs=0"]


@pytest.fixture
def untrained(refused, monkeypatch, tmp_path):
    """Return a function that asserts that `reproduce` fails before any training."""

    def no_training(*arguments):
        raise AssertionError("something would be trained")

    monkeypatch.setattr(module, "train_on_ray", no_training)

    def check(*args, words, problems=1):
        lines = 1 if problems == 1 else problems + 1
        refused("reproduce", "--out", tmp_path / "out", *args, words=words, lines=lines)

    return check


def test_all_invalid_settings_are_reported_together(untrained, labelled):
    untrained(
        *("mhcln", "dhcl", "--data", labelled),
        *settings(
            "mhlcn.lr=1", "bathc_size=3", "num_clusters=4", "bits=16", "dhcl.seed=1", "mhcln.lrr=1", "dhcl.lr=abc"
        ),
        words=[
            "nothing was trained: found 7 problems",
            "'mhlcn.lr=1': unknown method 'mhlcn'; there are mhcln, dhcl, cdne",
            "'bathc_size=3': no setting of mhcln or dhcl; did you mean batch_size?",
            "'num_clusters=4': no setting of mhcln or dhcl",
            "'bits=16': use the option --bits instead",
            "'dhcl.seed=1': use the option --seeds instead",
            "mhcln: settings: unknown key 'lrr'; did you mean lr?",
            "dhcl: settings: lr is 'abc'",
        ],
        problems=7,
    )


def test_the_problems_of_all_methods_are_reported_together(untrained, labelled, tmp_path, weights):
    taken = tmp_path / "out" / "cdne" / "cdne" / "16-1"
    taken.mkdir(parents=True)
    (taken / "notes.txt").touch()
    untrained(
        *("mhcln", "dhcl", "cdne", "duch", "mrhash", "--data", labelled, "--bits", 16, "--seeds", 2),
        *("--weights", weights, *settings(*TINY, "dhcl.backbone=resnet18", "mrhash.num_clusters=4")),
        words=[
            "nothing was trained",
            f"dhcl: dhcl cannot train on {labelled}: {weights}: not the weights of backbone resnet18",
            f"cdne: {taken} is not empty and holds no run; give another --out",
            "duch: duch cannot train on",
            "text_encoder is not set",
            "images have no captions",
            "mrhash: mrhash cannot train on",
            "images have no second source",
        ],
        problems=6,
    )


@pytest.mark.parametrize("seeds", [0, -1])
def test_too_few_seeds_are_refused(untrained, labelled, seeds):
    untrained("mhcln", "--data", labelled, "--seeds", seeds, words=[f"seeds is {seeds}; at least 1 is needed"])


def test_an_unknown_method_is_refused(untrained, labelled):
    words = ["unknown method or recipe 'dhlc'; there are mhcln, dhcl", "and the recipes duch-plus, from-scratch"]
    untrained("mhcln", "dhlc", "--data", labelled, words=words)
    untrained("ucmd-dhcl-46", "--data", labelled, words=["unknown method or recipe 'ucmd-dhcl-46'"])


def test_images_without_a_class_are_refused(untrained, tmp_path):
    rng = np.random.default_rng(0)
    for source in ("first", "second"):
        (tmp_path / "data" / source).mkdir(parents=True)
        for i in range(6):
            write_image(tmp_path / "data" / source / f"{i}.png", rng)
    command = ("mrhash", "--data", tmp_path / "data", *settings(*TINY[:3], "num_clusters=4"))
    untrained(*command, words=["mrhash: no image of the test part", "has a class, which all metrics need"])


def test_data_that_no_method_can_use_are_refused(untrained, tmp_path):
    problems = [f"{name}: {tmp_path / 'nope'} does not exist" for name in REPRODUCTIONS]
    untrained("--data", tmp_path / "nope", words=problems, problems=len(REPRODUCTIONS))
    untrained("itq", "--data", tmp_path, words=["itq: no published evaluation to reproduce; there are mhcln, "])


# Without METHOD: every method that the data allow.


@pytest.fixture
def trained(monkeypatch):
    """Return the list of runs that would be trained and evaluated, each as (protocol, method, bits, seed)."""
    runs = []

    def note(run, folder, workers, gpus_per_worker, *, side_by_side):
        assert side_by_side == 1
        runs.append((run.manifest.protocol, run.method, run.config.bits, run.config.seed))
        assert folder.parts[-3] == run.manifest.protocol
        assert run.method in folder.parts[-2]
        assert folder.parts[-1] == f"{run.config.bits}-{run.config.seed}"

    monkeypatch.setattr(module, "connected", nullcontext)
    monkeypatch.setattr(module, "num_that_fit", lambda workers, gpus_per_worker: 1)
    monkeypatch.setattr(module, "train_on_ray", note)
    monkeypatch.setattr(module, "_evaluate", lambda folder, run, rule: metrics_of(dataset=run.manifest.dataset))
    return runs


def test_runs_that_fail_are_named_and_the_others_are_measured(cli, trained, labelled, tmp_path, monkeypatch):
    train = module.train_on_ray

    def fail(run, *arguments, **options):
        if run.config.seed == 1:
            raise InputError("the loss is nan")
        train(run, *arguments, **options)

    monkeypatch.setattr(module, "train_on_ray", fail)
    command = ("reproduce", "mhcln", "--data", labelled, "--out", tmp_path, "--bits", 16, "--seeds", 3)
    ended = cli(*command, *settings(*TINY[:4]))
    assert ended.code == 2
    assert (
        "2 of 3 runs are complete; the same command repeats the others: run 2 of 3: mhcln, 16 bits, seed 1: the loss"
        in (ended.err)
    )
    assert [seed for _, _, _, seed in trained] == [0, 2]
    assert not (tmp_path / "results.md").exists()


@pytest.mark.parametrize("number", [0, -2])
def test_too_few_runs_at_a_time_are_refused(untrained, labelled, number):
    untrained("mhcln", "--data", labelled, "--concurrent", number, words=[f"--concurrent is {number}; at least 1"])


def test_methods_that_the_data_do_not_allow_are_skipped_and_reported(cli, trained, labelled, tmp_path):
    command = ("reproduce", "--data", labelled, "--out", tmp_path, "--bits", 16, "--bits", 32, "--bits", 16)
    ended = cli(*command, *settings(*TINY, "num_clusters=4"), "--json")
    assert ended.code == 0, ended.err
    # The learned baselines are trained with each method's protocol.
    protocols_and_methods = [(name, name) for name in ("mhcln", "dhcl", "cdne")]
    protocols_and_methods += [
        (name, method) for method in ("csq", "triplet", "classifier") for name in ("mhcln", "dhcl", "cdne")
    ]
    assert trained == [(*pair, bits, 0) for pair in protocols_and_methods for bits in (16, 32)]
    found = json.loads(ended.out)
    assert [(row["protocol"], row["method"], row["bits"]) for row in found] == [run[:3] for run in trained]
    assert "skipped: duch: duch cannot train on" in ended.err
    assert "images have no captions" in ended.err
    assert "skipped: mrhash: mrhash cannot train on" in ended.err
    assert ended.err.count("skipped: ") == 2
    assert ended.err.count("no --weights") == 1
    notes = (tmp_path / "results.md").read_text()
    assert REPRODUCTIONS["dhcl"].note in notes
    assert REPRODUCTIONS["mrhash"].note not in notes


def test_paired_images_allow_mrhash(cli, trained, tmp_path):
    rng = np.random.default_rng(0)
    for source in ("first", "second"):
        for name in ("beach", "river"):
            (tmp_path / "data" / source / name).mkdir(parents=True)
            for i in range(6):
                write_image(tmp_path / "data" / source / name / f"{i}.png", rng)
    command = ("reproduce", "mrhash", "mrhash", "--data", tmp_path / "data", "--out", tmp_path / "out", "--bits", 16)
    ended = cli(*command, *settings(*TINY[:4], "num_clusters=4"))
    assert ended.code == 0, ended.err
    assert trained == [("mrhash", "mrhash", 16, 0)]


def test_a_learned_baseline_alone_uses_its_own_protocol(cli, trained, labelled, tmp_path):
    command = ("reproduce", "triplet", "--data", labelled, "--out", tmp_path, "--bits", 16)
    ended = cli(*command, *settings(*TINY[:4]))
    assert ended.code == 0, ended.err
    assert trained == [("cdne", "triplet", 16, 0)]


# Recipes.


def test_recipes_set_settings_split_lengths_and_seeds(cli, trained, labelled, tmp_path):
    command = ("reproduce", "ucmd-mhcln-32", "ucmd-cdne-64", "ucmd-triplet-64", "--data", labelled, "--out", tmp_path)
    ended = cli(*command, *settings(*TINY[:4]), "--json")
    assert ended.code == 0, ended.err
    by_mhcln = [("mhcln", "mhcln", 32, seed) for seed in range(5)]
    assert trained == [*by_mhcln, ("cdne", "cdne", 64, 0), ("cdne", "triplet", 64, 0)]
    rows = json.loads(ended.out)
    assert [row["method"] for row in rows] == ["mhcln", "cdne", "triplet"]
    assert "triplet" in rows[1]["baselines"]


def test_options_of_reproduce_override_those_of_recipes(cli, trained, labelled, tmp_path):
    command = ("reproduce", "ucmd-mhcln-32", "mhcln", "--data", labelled, "--out", tmp_path, "--bits", 16)
    ended = cli(*command, "--seeds", 2, *settings(*TINY[:4], "mhcln.lr=0.1"))
    assert ended.code == 0, ended.err
    # The runs of the recipe and of the method with its defaults are in folders of their own.
    assert trained == [("mhcln", "mhcln", 16, seed) for seed in (0, 1)] * 2


def test_two_recipes_of_a_method(cli, trained, labelled, tmp_path):
    command = ("reproduce", "ucmd-cdne-64", "ucmd-cdne-momentum-64", "--data", labelled, "--out", tmp_path, "--json")
    ended = cli(*command, *settings(*TINY[:4]))
    assert ended.code == 0, ended.err
    assert [row["variant"] for row in json.loads(ended.out)] == ["memory-bank", "momentum"]


def test_a_recipe_of_a_method_without_a_published_evaluation(cli, trained, labelled, tmp_path):
    ended = cli("reproduce", "ucmd-itq-64", "--data", labelled, "--out", tmp_path, *settings(*TINY[:2]), "--json")
    assert ended.code == 0, ended.err
    assert trained == [("dhcl", "itq", 64, 0)]
    (row,) = json.loads(ended.out)
    assert (row["metric"], row["published"]) == (HEADLINE, None)


# Published values.


def test_every_method_has_a_reproduction():
    assert set(REPRODUCTIONS) <= set(METHODS)
    assert {rule.policy for rule in REPRODUCTIONS.values()} <= POLICIES


def test_published_values_are_valid():
    assert PUBLISHED
    for published in PUBLISHED:
        assert 0 < published.value <= 1, published
        assert published.source in SOURCES, published
        assert published.direction in REPRODUCTIONS[published.method].directions, published
    keys = [(p.method, p.dataset, p.bits, p.direction, p.variant) for p in PUBLISHED]
    assert len(set(keys)) == len(keys), "a published value is listed twice"


@pytest.mark.parametrize("method", REPRODUCTIONS)
def test_the_split_of_every_paper_can_be_made(labelled, method):
    rule = REPRODUCTIONS[method]
    manifest = make_manifest(labelled, protocol=rule.protocol, validation=rule.validation)
    assert bool(manifest.part("validation")) == bool(rule.validation)
