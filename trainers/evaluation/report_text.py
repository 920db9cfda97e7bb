"""The report's words: title, headline numbers, tables and explanations."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orbithash.trainers.evaluation.comparison import HEADLINE, main_baseline
from orbithash.trainers.evaluation.evaluation import Evaluation
from orbithash.trainers.metrics.code_statistics import CORRELATION_LIMIT
from orbithash.trainers.metrics.metrics import LOOKUP_RADIUS, radius_curve
from orbithash.trainers.reports.page import Fact, Facts, Table
from orbithash.trainers.reports.provenance import Provenance

__all__ = [
    "BASELINE_NAMES",
    "Evaluations",
    "arrow",
    "baseline_table",
    "explanations",
    "headline_facts",
    "metrics_table",
    "report_provenance",
    "report_title",
    "rescored_table",
]

# One evaluation per direction, or one named "".
Evaluations = Mapping[str, Evaluation]

BASELINE_NAMES = {
    "cosine": "float cosine",
    "sign": "signs of all features",
    "sign_truncated": "signs of the first features",
    "lsh": "random projections (LSH)",
    "pca_sign": "PCA and sign",
    "itq": "ITQ",
    "pq": "product quantisation",
}
_BASELINE_METRICS = (HEADLINE, "ap_hits@20", "ap_first_k@20", "ap_min@100", "ap_min@all", "precision@1")


def report_title(evaluations: Evaluations) -> tuple[str, str]:
    """Return title and subtitle of the page."""
    first = next(iter(evaluations.values())).metrics
    bits, size = first["bits"], first["codes"]["bytes_per_code"]
    return (
        f"{first['method']} on {first['dataset']}",
        f"Retrieval of items of the same class by {bits}-bit codes ({size} bytes an item). "
        f"Protocol {first['protocol']}, {first['queries']:,} queries in a database of {first['database']:,}.",
    )


def report_provenance(evaluations: Evaluations, source: str) -> Provenance:
    """Return the head of the page; `source` is the folder or table of the items, "" if it is not known."""
    first = next(iter(evaluations.values())).metrics
    data = (
        f"{first['dataset']}, protocol {first['protocol']}: {first['queries']:,} queries, {first['database']:,} items"
    )
    model = f"{first['method']}, {first['bits']} bits"
    return Provenance(
        "Evaluation",
        f"{data}, in {source}" if source else data,
        {"Model": f"{model}, model_id {first['model_id']}" if first["model_id"] else model},
    )


def arrow(name: str) -> str:
    """Return the name of a direction with a typographic arrow."""
    return name.replace("->", " → ")


def headline_facts(evaluations: Evaluations) -> Facts:
    """Return the page's headline numbers, each beside the best baseline of no more bytes, or beside chance."""
    if len(evaluations) > 1:
        facts = [_headline(f"mAP@20, {arrow(name)}", e) for name, e in evaluations.items()]
        facts += [_pair_fact(name, e) for name, e in evaluations.items() if "pair_recall" in e.metrics]
        return Facts("Summary", facts)
    (evaluation,) = evaluations.values()
    metrics, chance, codes = (evaluation.metrics[key] for key in ("metrics", "chance", "codes"))
    empty = radius_curve(evaluation.histograms).empty[LOOKUP_RADIUS]
    num_dead, num_correlated = len(codes["dead_bits"]), codes["num_correlated"]
    return Facts(
        "Summary",
        [
            _headline("mAP@20", evaluation),
            Fact(
                "Nearest item is of the class",
                _percent(metrics["precision@1"]["expected"]),
                f"Queries whose nearest item is of their class; items at equal distance share the first rank. "
                f"By chance: {_percent(chance['precision@1'])}.",
                _baseline(evaluation, "precision@1", _percent),
            ),
            Fact(
                "mAP@all",
                f"{metrics['ap_min@all']['expected']:.3f}",
                f"Average precision over the whole ranking. By chance: {chance['ap_min@all']:.3f}.",
                _baseline(evaluation, "ap_min@all"),
            ),
            Fact(
                f"Lookup within {LOOKUP_RADIUS} bits",
                _percent(metrics[f"precision_radius@{LOOKUP_RADIUS}"]["expected"]),
                f"Precision of all items within that distance; {_percent(empty)} of the queries find none there and "
                "count as 0.",
                f"chance: {_percent(chance[f'precision_radius@{LOOKUP_RADIUS}'])}",
            ),
            Fact(
                "Distinct codes",
                f"{codes['distinct']:,}",
                f"Among {codes['count']:,} database items. Of {evaluation.metrics['bits']} bits, {num_dead or 'none'} "
                f"{'is' if num_dead == 1 else 'are'} the same in all codes; {num_correlated:,} pairs are correlated by "
                f"{CORRELATION_LIMIT:g} or more.",
                _baseline_codes(evaluation),
            ),
        ],
    )


def _headline(label: str, evaluation: Evaluation) -> Fact:
    values, chance = evaluation.metrics["metrics"][HEADLINE], evaluation.metrics["chance"][HEADLINE]
    main, verdict = evaluation.main_baseline, ""
    if main is not None:
        name, result = main
        is_better = result.metrics[HEADLINE] > evaluation.headline
        verdict = (
            f" The best simple method of at most as many bytes, {BASELINE_NAMES[name]} of the pretrained features "
            f"({result.bytes} bytes an item), is {'better' if is_better else 'not better'} than this model."
        )
    return Fact(
        label,
        f"{values['expected']:.3f}",
        f"Expectation over all orders of items at equal distance: the worst order gives {values['pessimistic']:.3f}, "
        f"the best {values['optimistic']:.3f}. By chance: {chance:.3f}." + verdict,
        _baseline(evaluation, HEADLINE),
    )


def _baseline(evaluation: Evaluation, metric: str, text_of: Callable[[float], str] = "{:.3f}".format) -> str:
    """Return the metric of the best baseline of no more bytes, or by chance if there is none."""
    if evaluation.main_baseline is None:
        return f"chance: {text_of(evaluation.metrics['chance'][metric])}"
    name, result = evaluation.main_baseline
    return f"{BASELINE_NAMES[name]}: {text_of(result.metrics[metric])}"


def _baseline_codes(evaluation: Evaluation) -> str:
    """Return the number of distinct codes of the best baseline with bits, "" if there is none."""
    codes = {name: result for name, result in evaluation.baselines.items() if result.codes is not None}
    if (main := main_baseline(codes, evaluation.codes.bytes_per_code)) is None or main[1].codes is None:
        return ""
    return f"{BASELINE_NAMES[main[0]]}: {main[1].codes.distinct:,}"


def _pair_fact(name: str, evaluation: Evaluation) -> Fact:
    recall = evaluation.metrics["pair_recall"]
    by_chance = min(1.0, 10 / evaluation.metrics["database"])
    return Fact(
        f"Own pair in the first 10, {arrow(name)}",
        _percent(recall["recall@10"]),
        f"Queries that find the other half of their own pair among the first 10 items; {_percent(recall['recall@5'])} "
        f"among the first 5, {_percent(recall['recall@1'])} at rank 1. Each image has one sentence.",
        f"chance: {_percent(by_chance)}",
    )


def baseline_table(evaluation: Evaluation, baselines: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the table of the model and the baselines; its caption says which are better."""
    metrics = evaluation.metrics
    own = {
        metric: metrics["metrics"][metric]["expected"] for metric in _BASELINE_METRICS if metric in metrics["metrics"]
    }
    results = {
        "this model": {"bytes": metrics["codes"]["bytes_per_code"], "metrics": own},
        **{BASELINE_NAMES[key]: result for key, result in baselines.items() if "metrics" in result},
    }
    rows = [
        [label, f"{result['bytes']:,}", *(f"{result['metrics'][metric]:.4f}" for metric in own)]
        for label, result in results.items()
    ]
    omitted = [
        f"{BASELINE_NAMES[key]} ({result['left_out']})" for key, result in baselines.items() if "left_out" in result
    ]
    return Table(
        "Comparison with simple methods",
        ["method", "bytes an item", *own],
        rows,
        f"{_verdict(metrics)} All simple methods use the features of the backbone before this training, and were "
        "fitted on the training part alone. Expected values, means over all queries."
        + (f" Omitted: {'; '.join(omitted)}." if omitted else ""),
    )


def _verdict(metrics: Mapping[str, Any]) -> str:
    no_larger, larger = ([BASELINE_NAMES[key] for key in metrics[group]] for group in ("beaten_by", "beaten_by_larger"))
    if no_larger:
        verdict = f"By {HEADLINE} this model is worse than {_and(no_larger)}, with no more bytes an item."
    else:
        verdict = f"By {HEADLINE} no simple method of at most as many bytes an item is better than this model."
    return verdict + (f" With more bytes an item, {_and(larger)} {_is(larger)} better." if larger else "")


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def metrics_table(evaluation: Evaluation) -> Table:
    """Return the table of all metrics under each order of ties."""
    metrics, chance = evaluation.metrics["metrics"], evaluation.metrics["chance"]
    policies = ("expected", "index", "pessimistic", "optimistic")
    return Table(
        "All metrics",
        ["metric", "expected", "database order", "relevant last", "relevant first", "by chance"],
        [
            [metric, *(f"{values[policy]:.4f}" for policy in policies), f"{chance[metric]:.4f}"]
            for metric, values in metrics.items()
        ],
        "Means over all queries. The columns differ only in the order of items at the same distance.",
    )


def rescored_table(evaluation: Evaluation) -> Table:
    """Return the table of the metrics with rescoring beside those without."""
    rescored = {key: value for key, value in evaluation.metrics["rescored"].items() if key != "oversampling"}
    plain = evaluation.metrics["metrics"]
    names = {"vector": "by stored vectors", "asymmetric": "by outputs"}
    factor = evaluation.metrics["rescored"]["oversampling"]
    return Table(
        "Rescored",
        ["metric", "by distance", *(names[way] for way in rescored)],
        [
            [metric, *(f"{values[metric]['expected']:.4f}" for values in (plain, *rescored.values()))]
            for metric in plain
            if metric in next(iter(rescored.values()))
        ],
        f"A search for k items ranks a shortlist again: the {factor:g} k nearest and all that tie with the last, "
        "by the cosine of stored vectors, or by the query's outputs on the bits that differ. Expected values over the "
        "ties that are left, means over all queries.",
    )


def explanations(evaluations: Evaluations) -> list[str]:
    """Return the paragraphs that define the metrics."""
    metrics = next(iter(evaluations.values())).metrics
    own_item = (
        "The query itself is excluded from its answer."
        if metrics["exclude_self"]
        else f"{metrics['queries_in_database']:,} of the queries are also in the database and may find themselves."
    )
    is_multi_label = any(name.startswith("ndcg@") for name in metrics["metrics"])
    relevant = "shares a class with the query" if is_multi_label else "has the query's class"
    paragraphs = [
        f"An item is relevant if it {relevant}. The average precision of a query is the mean precision at the ranks of "
        "the relevant items. The four definitions differ in the divisor. ap_min divides by the smaller of k and the "
        "number of relevant items; it is the headline. ap_hits divides by the number of relevant items among the first "
        "k and gives the highest values. ap_k divides by k. ap_first_k uses the first k relevant items at any rank. A "
        "query without relevant items counts as 0.",
        "Because codes have few bits, many items lie at exactly the same distance, in arbitrary order. “Expected” "
        "is the mean over all such orders, computed exactly. “Database order” is the result of a stable sort and "
        "depends on the order in which the database is stored.",
        f"{own_item} {metrics['queries_without_relevant']:,} queries have no relevant item in the database. “By "
        "chance” is the score of a random ranking.",
    ]
    if is_multi_label:
        paragraphs.append(
            "ndcg sums the number of classes that each item shares with the query, divided by log2(rank + 1), and "
            "divides the sum by that of the best possible order."
        )
    if metrics["queries_without_label"]:
        paragraphs.append(f"{metrics['queries_without_label']:,} queries without a label were excluded.")
    if len(evaluations) > 1:
        paragraphs.append(
            "Each image has one of its sentences, drawn once with the seed of the split. From image to text and back, "
            "the image's own sentence is one of the items to be found."
        )
    if "baselines_left_out" in metrics:
        paragraphs.append(f"There are no simple methods to compare with: {metrics['baselines_left_out']}.")
    return paragraphs


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
