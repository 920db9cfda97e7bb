"""The baselines and their rankings against numpy and loops over sorted lists."""

import faiss
import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes

from orbithash.encoders.codes import pack
from orbithash.encoders.errors import InputError
from orbithash.trainers.evaluation import baselines
from orbithash.trainers.evaluation.baselines import BASELINES, distance_histograms, evaluate_baselines
from orbithash.trainers.metrics.average_precision import average_precision, hits_at, ranked_average_precision
from orbithash.trainers.metrics.metrics import DEFINITIONS
from orbithash.trainers.metrics.rankings import rank_histograms
from orbithash.trainers.metrics.retrieval import Retrieval

CLASSES, WIDTH, BITS = 5, 24, 16
SIZES = {"train": 300, "query": 12, "database": 60}


def data(seed=0, width=WIDTH, sizes=SIZES):
    """Return features of every part, non-negative as after pooling, and labels of queries and database."""
    rng = np.random.default_rng(seed)
    prototypes = rng.random((CLASSES, width)) * 2
    labels = {part: rng.integers(0, CLASSES, size) for part, size in sizes.items()}
    features = {
        part: np.abs(prototypes[of_part] + 0.7 * rng.standard_normal((len(of_part), width))).astype(np.float32)
        for part, of_part in labels.items()
    }
    return features, {part: labels[part] for part in ("query", "database")}


def evaluated(*args, **settings):
    """Return bytes and metrics of each baseline, or the reason why it is not possible."""
    results = evaluate_baselines(*args, **settings)
    return {
        name: {"left_out": result} if isinstance(result, str) else {"bytes": result.bytes, "metrics": result.metrics}
        for name, result in results.items()
    }


def units(features):
    return {
        part: rows.astype(float) / np.linalg.norm(rows.astype(float), axis=1)[:, None]
        for part, rows in features.items()
    }


def centred(features):
    scaled = units(features)
    return {part: rows - scaled["train"].mean(0) for part, rows in scaled.items()}


def naive_scores(distances, relevant, k, definition):
    """Return each row's average precision from its sorted list, without ties; infinitely far items are excluded."""
    scores = []
    for row, hits in zip(distances, relevant, strict=True):
        order = [i for i in sorted(range(len(row)), key=lambda i: row[i]) if np.isfinite(row[i])]
        ranks = np.array([rank for rank, i in enumerate(order, 1) if hits[i]])
        scores.append(ranked_average_precision(ranks, k, definition, len(order)))
    return scores


def same(labels):
    return labels["query"][:, None] == labels["database"][None]


def binary_scores(bits, labels, k=20):
    """Return the mean `ap_min`, expected over ties, of "query" and "database" bits, bool [N, K] with K <= 512."""
    width = bits["query"].shape[1]
    codes = [pack(bits[part]) for part in ("query", "database")]
    histograms = rank_histograms(Retrieval(*codes, labels["query"], labels["database"], width))
    return average_precision(histograms, k).mean()


# Rankings.


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_histograms_of_distances_without_ties(definition):
    rng = np.random.default_rng(0)
    distances, relevant = rng.random((20, 50)), rng.random((20, 50)) < 0.3
    distances[::2, 7] = np.inf
    relevant[::2, 7] = False
    histograms = distance_histograms(distances, relevant)
    assert histograms.num_items.tolist() == [49, 50] * 10
    for k in (1, 10, 100):
        expected = naive_scores(distances, relevant, k, definition)
        assert average_precision(histograms, k, definition) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("policy", ["expected", "optimistic", "pessimistic"])
@pytest.mark.parametrize("definition", DEFINITIONS)
def test_ties_are_handled_as_for_codes(definition, policy):
    rng = np.random.default_rng(1)
    query, database = rng.random((15, 8)) < 0.5, rng.random((80, 8)) < 0.5
    labels = rng.integers(0, 3, 15), rng.integers(0, 3, 80)
    whole = rank_histograms(Retrieval(pack(query), pack(database), *labels, 8))
    distances = (query[:, None] != database[None]).sum(2)
    compact = distance_histograms(distances.astype(np.float32), labels[0][:, None] == labels[1][None])
    for k in (1, 5, 20, None):
        scores = [average_precision(h, k, definition, policy) for h in (whole, compact)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-12)
    assert hits_at(whole, 7) == pytest.approx(hits_at(compact, 7))


def test_consecutive_items_of_equal_relevance_share_a_column():
    distances = np.array([[0.1, 0.2, 0.3, 0.4, 0.4, 0.5, 0.6]])
    histograms = distance_histograms(distances, np.array([[1, 1, 0, 1, 0, 0, 0]], bool))
    assert histograms.items.tolist() == [[2, 1, 2, 2]]
    assert histograms.relevant.tolist() == [[2, 0, 1, 0]]


def test_histograms_without_items_to_rank():
    histograms = distance_histograms(np.full((2, 1), np.inf), np.zeros((2, 1), bool))
    assert average_precision(histograms, 5).tolist() == [0, 0]


def test_rows_without_items_to_rank_beside_others():
    distances = np.array([[np.inf, np.inf, np.inf], [2, 1, 1], [np.inf, np.inf, np.inf], [np.inf, 4, 3]])
    histograms = distance_histograms(distances, np.array([[1, 1, 0], [1, 1, 0], [0, 1, 1], [1, 0, 1]], bool))
    assert histograms.items.tolist() == [[0, 0], [2, 1], [0, 0], [1, 1]]
    assert histograms.relevant.tolist() == [[0, 0], [1, 1], [0, 0], [1, 0]]


# Each baseline.


@pytest.mark.parametrize("exclude", [False, True])
def test_cosine_baseline(exclude):
    features, labels = data()
    own_rows = np.where(np.arange(12) % 3 == 0, -1, np.arange(12)) if exclude else None
    scaled = units(features)
    distances, relevant = 1 - scaled["query"] @ scaled["database"].T, same(labels)
    if exclude:
        rows = np.flatnonzero(own_rows >= 0)
        distances[rows, own_rows[rows]] = np.inf
        relevant[rows, own_rows[rows]] = False
    found = evaluated(features, labels, BITS, own_rows, cutoffs=(5, 20))["cosine"]
    assert found["bytes"] == 4 * WIDTH
    for k in (5, 20):
        for definition in DEFINITIONS:
            expected = np.mean(naive_scores(distances, relevant, k, definition))
            assert found["metrics"][f"{definition}@{k}"] == pytest.approx(expected)
    nearest = distances.argmin(1)
    assert found["metrics"]["precision@1"] == pytest.approx(relevant[np.arange(12), nearest].mean())


def test_sign_baselines():
    features, labels = data()
    found = evaluated(features, labels, BITS)
    bits = {part: rows >= 0 for part, rows in centred(features).items()}
    assert (found["sign"]["bytes"], found["sign_truncated"]["bytes"]) == (3, 2)
    assert found["sign"]["metrics"]["ap_min@20"] == pytest.approx(binary_scores(bits, labels))
    first = {part: rows[:, :BITS] for part, rows in bits.items()}
    assert found["sign_truncated"]["metrics"]["ap_min@20"] == pytest.approx(binary_scores(first, labels))


def test_signs_of_more_features_than_the_longest_code_has_bits():
    features, labels = data(width=600)
    distances = np.stack(
        [(row != (centred(features)["database"] >= 0)).sum(1) for row in centred(features)["query"] >= 0]
    )
    expected = average_precision(distance_histograms(distances, same(labels)), 20).mean()
    found = evaluated(features, labels, BITS)["sign"]
    assert found["bytes"] == 75
    assert found["metrics"]["ap_min@20"] == pytest.approx(expected)


def components(features, count):
    rows = centred(features)
    _, _, axes = np.linalg.svd(rows["train"], full_matrices=False)
    return {part: of_part @ axes[:count].T for part, of_part in rows.items()}


def test_principal_components():
    features, labels = data()
    bits = {part: rows >= 0 for part, rows in components(features, BITS).items()}
    found = evaluated(features, labels, BITS)["pca_sign"]
    assert found["bytes"] == 2
    # The sign of a component is arbitrary: it flips the same bit of queries and database.
    assert found["metrics"]["ap_min@20"] == pytest.approx(binary_scores(bits, labels))


def test_itq():
    features, labels = data()
    fitted = faiss.PCAMatrix(WIDTH, BITS)
    fitted.train(centred(features)["train"].astype(np.float32))
    # Components are unique up to their signs, which the rotation depends on: here, their largest weight is positive.
    axes = faiss.vector_to_array(fitted.A).reshape(BITS, WIDTH)
    axes = axes * np.sign(axes[np.arange(BITS), np.abs(axes).argmax(1)])[:, None]
    projected = {part: rows @ axes.T for part, rows in centred(features).items()}
    rotation = np.linalg.qr(np.random.default_rng(4).standard_normal((BITS, BITS)))[0]
    for _ in range(50):
        rotation, _ = orthogonal_procrustes(projected["train"], np.where(projected["train"] @ rotation >= 0, 1.0, -1.0))
    bits = {part: rows @ rotation >= 0 for part, rows in projected.items()}
    found = evaluated(features, labels, BITS, seed=4)["itq"]
    assert found["bytes"] == 2
    assert found["metrics"]["ap_min@20"] == pytest.approx(binary_scores(bits, labels), abs=0.02)


def test_lsh_projects_without_offset_and_is_seeded():
    features, labels = data()
    scores = [evaluated(features, labels, BITS, seed=s)["lsh"]["metrics"]["ap_min@20"] for s in (1, 1, 2)]
    assert scores[0] == scores[1] != scores[2]
    directions = np.random.default_rng(1).standard_normal((BITS, WIDTH))
    bits = {part: rows @ directions.T >= 0 for part, rows in centred(features).items()}
    assert scores[0] == pytest.approx(binary_scores(bits, labels))


@pytest.mark.parametrize("width", [WIDTH, 25])
def test_product_quantisation_is_asymmetric(monkeypatch, width):
    features, labels = data(width=width)
    made = []
    quantizer = faiss.ProductQuantizer
    monkeypatch.setattr(faiss, "ProductQuantizer", lambda *a: made.append(quantizer(*a)) or made[-1])
    found = evaluated(features, labels, BITS)["pq"]
    assert found["bytes"] == 2
    (pq,) = made
    rows = centred(features)
    padded = {part: np.pad(of_part, ((0, 0), (0, pq.d - width))) for part, of_part in rows.items()}
    centroids = faiss.vector_to_array(pq.centroids).reshape(2, 256, -1)
    pieces = np.split(padded["database"], 2, axis=1)
    nearest = [((p[:, None] - c[None]) ** 2).sum(2).argmin(1) for p, c in zip(pieces, centroids, strict=True)]
    restored = np.concatenate([c[i] for c, i in zip(centroids, nearest, strict=True)], axis=1)
    distances = ((padded["query"][:, None] - restored[None]) ** 2).sum(2).round(6)
    expected = average_precision(distance_histograms(distances, same(labels)), 20).mean()
    assert found["metrics"]["ap_min@20"] == pytest.approx(expected)


def test_equal_product_quantisation_codes_tie():
    features, labels = data()
    features["database"] = np.repeat(features["database"][:1], 60, axis=0)
    found = evaluated(features, labels, BITS)["pq"]["metrics"]["ap_min@20"]
    all_tied = average_precision(distance_histograms(np.zeros((12, 60)), same(labels)), 20).mean()
    assert found == pytest.approx(all_tied)


def test_chunk_sizes_do_not_change_metrics(monkeypatch):
    features, labels = data()
    whole = evaluated(features, labels, BITS)
    monkeypatch.setattr(baselines, "CHUNK_PAIRS", 100)
    monkeypatch.setattr(baselines, "_CHUNK_ROWS", 7)
    parts = evaluated(features, labels, BITS)
    for name in BASELINES:
        assert parts[name]["metrics"] == pytest.approx(whole[name]["metrics"])


def test_baselines_are_fitted_on_the_training_part_only():
    features, labels = data()
    others = data(seed=5)[0]
    one = evaluated(features, labels, BITS)
    moved = evaluated({**features, "train": others["train"]}, labels, BITS)
    assert moved["cosine"] == one["cosine"]
    assert moved["itq"] != one["itq"]


def test_items_of_several_classes():
    features, labels = data()
    hot = {part: np.eye(CLASSES, dtype=bool)[of_part] for part, of_part in labels.items()}
    assert evaluated(features, hot, BITS) == evaluated(features, labels, BITS)


# Skipped baselines and invalid inputs.


@pytest.mark.parametrize(
    ("bits", "num_train", "skipped"),
    [
        (BITS, 300, set()),
        (12, 300, {"pq"}),
        (BITS, 255, {"pq"}),
        (32, 300, {"sign_truncated", "pca_sign", "itq"}),
        (256, 300, {"sign_truncated", "pca_sign", "itq", "pq"}),
        (BITS, BITS, {"pca_sign", "itq", "pq"}),
        (BITS, BITS + 1, {"pq"}),
    ],
)
def test_impossible_baselines_are_skipped_with_a_reason(bits, num_train, skipped):
    features, labels = data(sizes={**SIZES, "train": num_train})
    found = evaluated(features, labels, bits)
    assert list(found) == list(BASELINES)
    assert {name for name, result in found.items() if result.keys() == {"left_out"}} == skipped
    assert all(result["bytes"] == -(-bits // 8) for name, result in found.items() if name in {"lsh", "itq"} - skipped)


def test_a_row_of_zeros_gives_no_nan():
    features, labels = data()
    features["query"][0], features["database"][0] = 0, 0
    for result in evaluated(features, labels, BITS).values():
        assert all(0 <= value <= 1 for value in result["metrics"].values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, la: f.update(query=f["query"][:, 1:]), "with the same D for every part"),
        (lambda f, la: f.update(train=f["train"].astype(float)), "float32"),
        (lambda f, la: f.update(train=f["train"][:0]), r"train float32 \(0, 24\)"),
        (lambda f, la: f["database"].__setitem__((0, 0), np.nan), "features of database contain values"),
        (lambda f, la: la.update(query=la["query"][1:]), "query labels are 12 integers"),
        (lambda f, la: la.update(query=la["query"] - 1), "every query needs a label"),
    ],
)
def test_invalid_features_and_labels_are_refused(change, message):
    features, labels = data()
    change(features, labels)
    with pytest.raises(InputError, match=message):
        evaluated(features, labels, BITS)


def test_results_of_each_query():
    """The scores average to the headline, and the nearest items are those of the ranking."""
    features, labels = data()
    labels["database"] = np.random.default_rng(5).permutation(labels["database"])
    results = evaluate_baselines(features, labels, BITS)
    cosine = results["cosine"]
    assert cosine.scores.mean() == pytest.approx(cosine.metrics["ap_min@20"])
    assert cosine.scores.shape == labels["query"].shape
    rows = units(features)
    similarities = rows["query"] @ rows["database"].T
    expected = np.zeros_like(cosine.nearest)
    for label, nearest in zip(labels["query"], labels["database"][similarities.argmax(1)], strict=True):
        if nearest >= 0:
            expected[label, nearest] += 1
    assert cosine.nearest == pytest.approx(expected)
    assert results["itq"].codes.count == len(features["database"])
    assert cosine.codes is None
    hot = {name: np.arange(max(map(max, labels.values())) + 1) == values[:, None] for name, values in labels.items()}
    several = evaluate_baselines(features, hot, BITS)["cosine"].nearest
    assert several == pytest.approx(expected * (1 - np.eye(len(expected))))
