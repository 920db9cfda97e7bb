"""The evaluation of codes: the content of metrics.json, the choice of the gallery, and the written files."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from orbithash.encoders.codes import hamming, pack
from orbithash.encoders.errors import ImageError, InputError
from orbithash.trainers.evaluation import report
from orbithash.trainers.evaluation.comparison import BaselineResult
from orbithash.trainers.evaluation.evaluation import (
    Evaluation,
    evaluate,
    metrics_of,
    with_baselines,
    without_baselines,
)
from orbithash.trainers.evaluation.parts import EncodedPart
from orbithash.trainers.evaluation.report import write_evaluation
from orbithash.trainers.methods.base import mean_scores
from orbithash.trainers.metrics.average_precision import average_precision

CLASSES = ("beach", "forest", "harbor", "river")
BITS = 24


def part(count, seed, prefix="", noise=0.2, sentences=False):
    rng = np.random.default_rng(seed)
    prototypes = np.random.default_rng(99).random((len(CLASSES), BITS)) < 0.5
    labels = np.arange(count) % len(CLASSES)
    codes = pack(prototypes[labels] ^ (rng.random((count, BITS)) < noise * (1 + labels[:, None]) / 2))
    names = [f"{prefix}{i}" for i in range(count)]
    return EncodedPart(names, codes, labels, [f"{n}.jpg" for n in names], names if sentences else None)


def run(query=None, database=None, **changes) -> Evaluation:
    settings = {
        "dataset": "made up",
        "protocol": "random",
        "method": "dhcl",
        "bits": BITS,
        "exclude_self": False,
        "classes": CLASSES,
    }
    return evaluate(query or part(30, 1, "q"), database or part(90, 2, "d"), **settings | changes)


@pytest.fixture(autouse=True)
def no_map(monkeypatch):
    """Disable t-SNE, which takes half a second and only one test needs."""
    monkeypatch.setattr(report, "MIN_MAPPED", 10**9)


def test_content_of_metrics_json():
    query, database = part(30, 1, "q"), part(90, 2, "d")
    evaluation = run(query, database, cutoffs=(20, 50))
    metrics = evaluation.metrics
    assert list(metrics)[:6] == ["dataset", "protocol", "method", "model_id", "bits", "queries"]
    assert [metrics[key] for key in ("bits", "queries", "database", "exclude_self")] == [BITS, 30, 90, False]
    assert set(metrics["metrics"]["ap_min@20"]) == {"expected", "index", "optimistic", "pessimistic"}
    assert {"ap_hits@50", "ap_first_k@20", "ap_min@all", "precision@1", "recall@100"} <= metrics["metrics"].keys()
    assert metrics["codes"]["distinct"] == len(np.unique(database.codes, axis=0))
    assert len(metrics["codes"]["bit_balance"]) == BITS
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    (headline,) = mean_scores(query.codes, database.codes, query.labels, database.labels, BITS)
    assert evaluation.headline == metrics["metrics"]["ap_min@20"]["expected"] == headline
    scores = average_precision(evaluation.histograms, 20)
    for label, name in enumerate(CLASSES):
        assert metrics["per_class"][name] == pytest.approx(scores[query.labels == label].mean())


def test_the_headline_metric_is_computed_at_any_cutoffs():
    assert "ap_min@20" in run(cutoffs=(7,)).metrics["metrics"]


def test_exclude_self_excludes_the_query_by_its_id():
    items = part(40, 3)
    # Shuffle: an item has different positions in queries and database.
    order = np.random.default_rng(0).permutation(40)
    shuffled = EncodedPart(
        [items.ids[i] for i in order], items.codes[order], items.labels[order], [items.paths[i] for i in order]
    )
    without = run(items, shuffled, exclude_self=True)
    assert without.metrics["queries_in_database"] == 40
    assert (without.histograms.num_items == 39).all()
    assert all(hit.id != shown.id for shown in without.gallery for hit in shown.hits)
    found = run(items, shuffled, exclude_self=False)
    assert found.metrics["queries_in_database"] == 40
    assert found.headline > without.headline


def test_exclude_self_has_no_effect_on_disjoint_parts():
    assert run(exclude_self=True).metrics["metrics"] == run(exclude_self=False).metrics["metrics"]


def test_gallery_is_chosen_by_rule_and_ordered():
    query, database = part(30, 1, "q"), part(90, 2, "d")
    evaluation = run(query, database)
    assert evaluation.gallery == run(query, database).gallery
    scores = average_precision(evaluation.histograms, 20)
    typical = [shown for shown in evaluation.gallery if shown.reason == "typical"]
    assert sorted(shown.label for shown in typical) == sorted(CLASSES)
    assert [evaluation.metrics["per_class"][s.label] for s in typical] == sorted(
        evaluation.metrics["per_class"].values(), reverse=True
    )
    for shown in typical:
        of_class = sorted(scores[query.labels == CLASSES.index(shown.label)])
        assert shown.average_precision == of_class[len(of_class) // 2]
    worst = [shown.average_precision for shown in evaluation.gallery if shown.reason == "worst"]
    assert worst == sorted(scores)[: len(worst)]
    distances = hamming(query.codes, database.codes)
    for shown in evaluation.gallery:
        row = distances[query.ids.index(shown.id)]
        nearest = sorted((int(d), i) for i, d in enumerate(row))[: len(shown.hits)]
        assert [(hit.distance, database.ids.index(hit.id)) for hit in shown.hits] == nearest
        assert all(hit.relevant == (hit.label == shown.label) for hit in shown.hits)
        assert [hit.path for hit in shown.hits] == [f"{hit.id}.jpg" for hit in shown.hits]


def test_unlabelled_items_are_distractors_in_the_database():
    query, database = part(30, 1, "q"), part(90, 2, "d")
    unlabelled = EncodedPart(database.ids, database.codes, np.full(90, -1), database.paths)
    evaluation = run(query, unlabelled)
    assert evaluation.headline == 0
    assert evaluation.metrics["queries_without_relevant"] == 30
    assert {hit.label for shown in evaluation.gallery for hit in shown.hits} == {"unknown"}
    with pytest.raises(InputError, match="none of the 90 queries has a label"):
        run(unlabelled, query)


def test_queries_without_a_label_are_skipped_and_counted():
    query, database = part(30, 1, "q"), part(90, 2, "d")
    unknown = np.where(np.arange(30) % 3 == 0, -1, query.labels)
    found = run(dataclasses.replace(query, labels=unknown), database)
    kept = run(query.select(np.flatnonzero(unknown >= 0)), database)
    assert (found.metrics["queries"], found.metrics["queries_without_label"]) == (20, 10)
    assert found.metrics | {"queries_without_label": 0} == kept.metrics


def multi_hot(labels, seed):
    """Return bool [N, classes]: each item's own class and sometimes a second one; the last item has none."""
    rng = np.random.default_rng(seed)
    hot = np.eye(len(CLASSES), dtype=bool)[labels]
    hot[np.arange(len(hot)), rng.integers(0, len(CLASSES), len(hot))] = True
    hot[-1] = False
    return hot


def test_items_with_several_classes(tmp_path: Path):
    query, database = part(30, 1, "q"), part(90, 2, "d")
    query, database = (dataclasses.replace(p, labels=multi_hot(p.labels, i)) for i, p in enumerate((query, database)))
    evaluation = run(query, database)
    metrics = evaluation.metrics
    assert (metrics["queries"], metrics["queries_without_label"]) == (29, 1)
    assert {"ndcg@20", "ndcg@100"} <= metrics["metrics"].keys()
    assert evaluation.nearest_classes is None
    scores = average_precision(evaluation.histograms, 20)
    for label, name in enumerate(CLASSES):
        assert metrics["per_class"][name] == pytest.approx(scores[query.labels[:-1, label]].mean())
    for shown in evaluation.gallery:
        assert set(shown.label.split(", ")) <= set(CLASSES)
        assert all(
            hit.relevant == bool(set(hit.label.split(", ")) & set(shown.label.split(", "))) for hit in shown.hits
        )
    assert len({shown.id for shown in evaluation.gallery if shown.reason == "typical"}) == sum(
        shown.reason == "typical" for shown in evaluation.gallery
    )
    assert "shares a class with the query" in write_evaluation(tmp_path, evaluation).read_text()
    assert not (tmp_path / "plots" / "confusion.svg").exists()


def test_integer_and_one_hot_labels_give_the_same_metrics():
    query, database = part(30, 1, "q"), part(90, 2, "d")
    one_hot = [dataclasses.replace(p, labels=np.eye(len(CLASSES), dtype=bool)[p.labels]) for p in (query, database)]
    plain, several = run(query, database).metrics, run(*one_hot).metrics
    assert {name: several["metrics"][name] for name in plain["metrics"]} == plain["metrics"]
    assert several["per_class"] == plain["per_class"]
    assert not any(name.startswith("ndcg") for name in plain["metrics"])


def baselines(**headlines):
    sizes = {"cosine": 400, "sign": 13, "itq": 3, "pq": 3}
    names = ("ap_hits@20", "ap_first_k@20", "ap_min@100", "ap_min@all")
    return {
        **{
            name: BaselineResult(
                sizes[name],
                {"ap_min@20": headline, "precision@1": headline, **dict.fromkeys(names, 0.5)},
                np.full(30, headline),
                np.full((len(CLASSES), len(CLASSES)), 2.0),
            )
            for name, headline in headlines.items()
        },
        "lsh": "of a reason",
    }


@pytest.mark.parametrize(
    ("headlines", "fair", "larger", "words"),
    [
        (
            {"cosine": 1.01, "itq": 1.01, "pq": 1.01},
            ["itq", "pq"],
            ["cosine"],
            "worse than ITQ and product quantisation,",
        ),
        (
            {"cosine": 1.01, "sign": 1.01, "itq": 0.01},
            [],
            ["cosine", "sign"],
            "float cosine and signs of all features are",
        ),
        ({"cosine": 0.01, "itq": 0.01}, [], [], "no simple method of at most as many bytes an item is better"),
    ],
)
def test_baselines_better_than_the_method_are_named(tmp_path: Path, headlines, fair, larger, words):
    evaluation = run()
    judged = with_baselines(evaluation, baselines(**headlines))
    assert (judged.metrics["beaten_by"], judged.metrics["beaten_by_larger"]) == (fair, larger)
    assert judged.metrics["metrics"] == evaluation.metrics["metrics"]
    assert "baselines" not in evaluation.metrics
    page = write_evaluation(tmp_path, judged).read_text()
    assert words in page
    assert "random projections (LSH) (of a reason)" in page


def test_an_equally_good_baseline_is_not_named():
    evaluation = run()
    judged = with_baselines(evaluation, baselines(itq=evaluation.headline, cosine=evaluation.headline))
    assert judged.metrics["beaten_by"] == judged.metrics["beaten_by_larger"] == []


def test_the_reason_for_missing_baselines_is_reported(tmp_path: Path):
    evaluation = without_baselines(run(), "switched <off>")
    assert evaluation.metrics["baselines_left_out"] == "switched <off>"
    assert "switched &lt;off&gt;" in write_evaluation(tmp_path, evaluation).read_text()


def test_recall_of_own_pairs_is_computed_on_request(tmp_path: Path):
    images = part(30, 1)
    sentences = dataclasses.replace(part(30, 5), sentences=list(images.ids))
    across = run(images, sentences, pairs=True)
    distances = hamming(images.codes, sentences.codes)
    expected = []
    for i, row in enumerate(distances):
        before, tied = int((row < row[i]).sum()), int((row == row[i]).sum())
        expected.append(sum(rank <= 5 for rank in range(before + 1, before + tied + 1)) / tied)
    assert across.metrics["pair_recall"]["recall@5"] == pytest.approx(np.mean(expected))
    assert "pair_recall" not in run(images, sentences).metrics
    evaluations = {"image->image": run(images, images), "image->text": across, "text->image": across}
    metrics = metrics_of(evaluations)
    assert metrics["mean_recall"] == pytest.approx(np.mean(list(across.metrics["pair_recall"].values())))
    assert metrics["pair_recall"].keys() == {"image->text", "text->image"}
    assert "Own pair in the first 10" in write_evaluation(tmp_path, evaluations).read_text()


def test_invalid_parts_are_refused():
    with pytest.raises(InputError, match="label 3 has no name; there are 3 classes"):
        run(classes=CLASSES[:3])
    items = part(4, 0)
    with pytest.raises(InputError, match="'labels': 3"):
        EncodedPart(items.ids, items.codes, items.labels[:3], items.paths)
    with pytest.raises(InputError, match="'a' occurs 3 times"):
        EncodedPart(["a", "b", "a", "a"], items.codes, items.labels, items.paths)


def read_image(path: str) -> np.ndarray:
    if path.startswith("d7"):
        raise ImageError(f"{path}: damaged")
    return np.full((32, 48, 3), 99, np.uint8)


def test_write_evaluation(tmp_path: Path):
    folder = tmp_path / "run" / "evaluation"
    history = [{"epoch": 1, "train/loss": 1.0, "validation/ap_min@20": 0.4}]
    evaluation = run()
    path = write_evaluation(folder, evaluation, read_image=read_image, history=history)
    assert path == folder / "report.html"
    assert json.loads((folder / "metrics.json").read_text()) == evaluation.metrics
    assert sorted(p.name for p in folder.iterdir()) == ["failures.json", "metrics.json", "plots", "report.html"]
    names = {p.stem for p in (folder / "plots").iterdir()}
    assert {"losses", "validation", "precision_recall", "precision_at_k", "per_class", "confusion"} <= names
    page = path.read_text()
    assert "Worst answers" in page
    assert f"{evaluation.headline:.3f}" in page
    assert page.count("data:image/jpeg") > 20
    assert page.count("cannot be read") == sum(
        hit.path.startswith("d7") for shown in evaluation.gallery for hit in shown.hits
    )


def test_the_map_keeps_equal_codes_together(tmp_path: Path, monkeypatch):
    monkeypatch.undo()
    items = part(60, 2, noise=0.0)
    evaluation = run(database=items)
    write_evaluation(tmp_path, evaluation)
    assert (tmp_path / "plots" / "code_map.svg").exists()
    points = report._map(evaluation.sample, BITS)
    centres = np.stack([points[evaluation.sample.labels == label].mean(0) for label in range(4)])
    nearest = ((points[:, None] - centres[None]) ** 2).sum(2).argmin(1)
    assert (nearest == evaluation.sample.labels).all()
    assert run(database=part(5, 2)).sample is not None
    assert report._map(run(database=part(5, 2)).sample, BITS) is None


def test_the_code_map_samples_a_large_database():
    labels = np.where(np.arange(2500) < 100, -1, part(2500, 2).labels)
    database = dataclasses.replace(part(2500, 2), labels=labels)
    sample = run(database=database).sample
    assert len(sample.codes) == 1000
    assert (sample.labels >= 0).all()
    assert (sample.codes == run(database=database).sample.codes).all()


def test_a_second_evaluation_replaces_the_first(tmp_path: Path):
    write_evaluation(tmp_path, run())
    again = run(part(30, 5, "q"))
    write_evaluation(tmp_path, again)
    assert json.loads((tmp_path / "metrics.json").read_text()) == again.metrics


def test_several_directions_are_nested(tmp_path: Path):
    images, sentences = part(30, 1, "i"), part(60, 2, "<b>sentence ", sentences=True)
    evaluations = {"image->text": run(images, sentences), "text->image": run(sentences, images)}
    metrics = metrics_of(evaluations)
    assert [metrics[key] for key in ("dataset", "protocol", "method", "bits")] == ["made up", "random", "dhcl", BITS]
    assert metrics["queries"] == {"image->text": 30, "text->image": 60}
    assert metrics["metrics"]["text->image"] == evaluations["text->image"].metrics["metrics"]
    path = write_evaluation(tmp_path, evaluations, read_image=read_image)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert (tmp_path / "plots" / "confusion_image_to_text.svg").exists()
    page = path.read_text()
    assert "&lt;b&gt;sentence 1" in page
    assert "<b>sentence" not in page


def test_hostile_class_names_reach_the_page_as_text(tmp_path: Path):
    names = ("<script>alert(1)</script>", "$x$", "a\x00b", "\udcff")
    page = write_evaluation(tmp_path, run(classes=names)).read_text()
    assert "<script" not in page
    assert json.loads((tmp_path / "metrics.json").read_text())["per_class"].keys() == set(names)


def test_a_single_query_against_a_single_item(tmp_path: Path):
    alone = part(1, 0)
    evaluation = run(alone, alone, exclude_self=True)
    assert evaluation.headline == 0
    assert evaluation.gallery[0].hits == ()
    assert write_evaluation(tmp_path, evaluation).exists()
    assert run(alone, alone).headline == 1


def test_importing_the_evaluation_loads_no_plotting():
    code = "import sys, orbithash.trainers.evaluation.evaluation as _\n"
    code += "print({'matplotlib', 'jinja2', 'torch'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
