"""The failures of a model, as the content of `failures.json`: worst queries, confused classes, wasted bits.

Items are named by their ids and never by paths of files, because model cards publish this content.
"""

from collections.abc import Mapping
from typing import Any

from orbithash.trainers.evaluation.evaluation import HEADLINE, Evaluation
from orbithash.trainers.evaluation.gallery import GalleryQuery
from orbithash.trainers.metrics.code_statistics import CORRELATION_LIMIT

__all__ = ["FORMAT_VERSION", "failures_of"]

FORMAT_VERSION = 1


def failures_of(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Return the content of `failures.json`.

    Args:
        evaluations: one evaluation named "", or one for each direction, such as "image->text".

    Returns:
        "format_version", "model_id", "metric" (that of all "ap") and "directions", an object with an entry for each
        evaluation:

        - "worst": the queries with the lowest "ap", lowest first: "key", "label", "sentence", "ap", and "hits", the
          nearest items with "key", "label", "sentence", "distance" and "relevant"; "baseline", the "name" of the best
          baseline of at most as many bytes and its "ap" for this query, or null;
        - "confused": pairs of different classes, most frequent first: of "of" queries of class "label", "queries" have
          a nearest item of class "nearest" and no class of the query. Queries whose nearest items tie count in parts,
          and so do those with several classes. "baseline": its "name" and "queries", or null;
        - "bits": "count"; "dead", bits with the same value in all codes of the database; "unbalanced", other bits and
          their share of "ones"; "correlated", the pairs with an absolute "correlation" of at least "limit", strongest
          first; "num_correlated", the number of all such pairs. Bits are numbered from 0.
    """
    first = next(iter(evaluations.values())).metrics
    return {
        "format_version": FORMAT_VERSION,
        "model_id": first["model_id"],
        "metric": HEADLINE,
        "directions": {name: _failures(evaluation) for name, evaluation in evaluations.items()},
    }


def _failures(evaluation: Evaluation) -> dict[str, Any]:
    codes = evaluation.metrics["codes"]
    name, baseline = evaluation.main_baseline or ("", None)
    return {
        "worst": [
            {
                **_query(query),
                "baseline": None if baseline is None else {"name": name, "ap": float(baseline.scores[query.position])},
            }
            for query in evaluation.gallery
            if query.reason == "worst"
        ],
        "confused": [
            {
                "label": evaluation.classes[pair.label],
                "nearest": evaluation.classes[pair.nearest],
                "queries": pair.queries,
                "of": pair.of,
                "baseline": None
                if baseline is None
                else {"name": name, "queries": float(baseline.nearest[pair.label, pair.nearest])},
            }
            for pair in evaluation.confused
        ],
        "bits": {
            "count": evaluation.metrics["bits"],
            "dead": codes["dead_bits"],
            "unbalanced": codes["unbalanced_bits"],
            "limit": CORRELATION_LIMIT,
            "correlated": codes["correlated_bits"],
            "num_correlated": codes["num_correlated"],
        },
    }


def _query(query: GalleryQuery) -> dict[str, Any]:
    return {
        "key": query.id,
        "label": query.label,
        "sentence": query.sentence,
        "ap": query.average_precision,
        "hits": [
            {
                "key": hit.id,
                "label": hit.label,
                "sentence": hit.sentence,
                "distance": hit.distance,
                "relevant": hit.relevant,
            }
            for hit in query.hits
        ],
    }
