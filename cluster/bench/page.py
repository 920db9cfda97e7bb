"""The page of a benchmark: each measurement beside its baseline, and all numbers of the run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orbithash.trainers.reports import plots
from orbithash.trainers.reports.page import Fact, Facts, Figure, Figures, Section, Table, write_report
from orbithash.trainers.reports.provenance import Provenance

__all__ = ["Comparison", "write_bench_page"]

Result = Mapping[str, Any]

# Names of contestants of `bench rank`.
_READING, _RANKING = "read memory", "orbithash"
# Entries of a result that the head of the page has.
_IN_HEAD = ("bench", "date", "machine", "versions")


@dataclass(frozen=True)
class Comparison:
    """One quantity of orbithash and its baselines.

    Attributes:
        title: what is measured, such as "Images per second".
        unit: unit of the values; "" for shares.
        values: value by name; the first one is that of orbithash, the second one its main baseline.
        caption: what the baselines are.
    """

    title: str
    unit: str
    values: Mapping[str, float]
    caption: str = ""

    @property
    def fact(self) -> Fact:
        """The value of orbithash with its main baseline."""
        (name, value), *baselines = self.values.items()
        beside = ""
        if baselines:
            other, baseline = baselines[0]
            ratio = f" (ratio {value / baseline:.2f})" if baseline else ""
            beside = f"{other}: {_number(baseline)} {self.unit}".rstrip() + ratio
        return Fact(self.title, f"{_number(value)} {self.unit}".rstrip(), name, beside)

    @property
    def figure(self) -> Figure:
        """The bars of all values."""
        (name, _), *_ = self.values.items()
        return Figure(self.title, plots.bars(self.values, self.unit or "share", highlighted=name), self.caption)


@dataclass(frozen=True)
class _Page:
    """Title, introduction and comparisons of the page of one benchmark."""

    title: str
    lead: str
    comparisons: Callable[[Result], list[Comparison]]


def write_bench_page(path: Path, result: Result) -> None:
    """Write the page of a result, whose "bench" is the name of the benchmark."""
    page = _PAGES.get(result["bench"], _Page(f"Benchmark {result['bench']}", "", lambda _: []))
    comparisons = [comparison for comparison in page.comparisons(result) if comparison.values]
    sections: list[Section] = []
    facts = [comparison.fact for comparison in comparisons] + _targets(result)
    if facts:
        sections.append(Facts("In short", facts))
    figures = [comparison.figure for comparison in comparisons if len(comparison.values) > 1]
    if result["bench"] == "rescore":
        figures.append(_recall_curves(result))
    if figures:
        sections.append(Figures("Beside the baselines", figures))
    nested = {name: value for name, value in result.items() if isinstance(value, Mapping | list) and value}
    sections += [table for name, value in nested.items() if (table := _table(_words(name), value))]
    rows = [[_words(name), _text(value)] for name, value in result.items() if name not in _IN_HEAD + tuple(nested)]
    rows += [[_words(name), _text(value)] for name, value in nested.items() if not _table("", value)]
    sections.append(Table("Settings and measurements", ["name", "value"], rows))
    data = [f"{result['rows']:,} rows"] if isinstance(result.get("rows"), int) else []
    data += [str(result[name]) for name in ("codes", "vectors", "network") if name in result]
    write_report(path, page.title, page.lead, sections, Provenance("Benchmark", ", ".join(data)))


def _keys(result: Result, names: Mapping[str, str]) -> dict[str, float]:
    """Return the values of the keys that the result has, by their names on the page."""
    return {name: float(result[key]) for key, name in names.items() if key in result}


def _encode(result: Result) -> list[Comparison]:
    names = {
        "pipeline_images_per_s": "pipeline of Ray Data",
        "whole_loop_images_per_s": "plain loop that does the same work",
        "encode_loop_images_per_s": "plain loop of the network alone",
    }
    return [Comparison("Encoding", "images/s", _keys(result, names), "Loops in one process with as many threads.")]


def _embeddings(result: Result) -> list[Comparison]:
    rates = {"pipeline_rows_per_s": "pipeline of Ray Data", "loop_rows_per_s": "plain loop that writes nothing"}
    memory = {"driver_mib_max": "maximum", "driver_mib_begin": "at the start"}
    return [
        Comparison("Encoding of vectors", "rows/s", _keys(result, rates), "The loop reads and encodes only."),
        Comparison("Memory of the driver", "MiB", _keys(result, memory), "Resident memory during the pipeline."),
    ]


def _export(result: Result) -> list[Comparison]:
    rates = {"export_rows_per_s": "orbithash export", "pyarrow_rows_per_s": "plain write of pyarrow"}
    memory = {"export_peak_mib": "orbithash export", "pyarrow_peak_mib": "plain write of pyarrow"}
    return [
        Comparison("Export", "rows/s", _keys(result, rates), "The same table, in the same run."),
        Comparison("Peak memory", "MiB", _keys(result, memory), "Resident memory above that at the start."),
    ]


def _train(result: Result) -> list[Comparison]:
    names = {
        "worker_images_per_s": "worker of Ray Train",
        "bare_loops_images_per_s": "plain loop, as many at once",
        "bare_loop_images_per_s": "plain loop, alone",
        "kept_loops_images_per_s": "plain loop, workers' allocator",
    }
    caption = "Images per second of one worker and of one loop with the same threads and batch."
    return [Comparison("Training", "images/s", _keys(result, names), caption)]


def _features(result: Result) -> list[Comparison]:
    names = {"workers_images_per_s": "workers of Ray Data", "bare_loops_images_per_s": "bare loops, as many at once"}
    caption = "Images per second of all together; only the workers keep their features."
    return [Comparison("Features", "images/s", _keys(result, names), caption)]


def _validation(result: Result) -> list[Comparison]:
    names = {"compiled_s": "compiled passes", "numpy_s": "plain NumPy", "compiled_one_thread_s": "one thread"}
    caption = "The same metric to the last digit; NumPy uses one thread."
    return [Comparison("Metric of a validation", "s", _keys(result, names), caption)]


def _loading(result: Result) -> list[Comparison]:
    names = {
        "packed_images_per_s": "packed rows",
        "bare_loop_images_per_s": "bare loop over the files",
        "folder_images_per_s": "training from the files",
        "packed_in_order_images_per_s": "packed rows in order",
    }
    caption = "Views per second with equal threads; all others are shuffled."
    return [Comparison("Views", "images/s", _keys(result, names), caption)]


def _manifest(result: Result) -> list[Comparison]:
    seconds = {"rank_start_s": "start of a rank", "bare_read_s": "bare read of pyarrow"}
    memory = {"rank_start_mib": "start of a rank", "bare_read_mib": "bare read of pyarrow"}
    rates = {
        "all_threads_files_per_s": "all threads",
        "one_thread_files_per_s": "one thread",
        "remembered_files_per_s": "remembered",
    }
    return [
        Comparison("Manifest", "s", _keys(result, seconds), "Each in a process of its own."),
        Comparison("Memory of the manifest", "MiB", _keys(result, memory), "Growth of the peak of the process."),
        Comparison("Hashing", "files/s", _keys(result, rates), "The same files, in turns."),
    ]


def _search(result: Result) -> list[Comparison]:
    engines = dict(sorted(result["engines"].items(), key=lambda item: item[0] != "exact"))

    def of(metric: str) -> dict[str, float]:
        return {name: float(each[metric]) for name, each in engines.items()}

    caption = "On one core, over the same codes and queries."
    return [
        Comparison("Median latency of a query", "ms", of("p50_ms"), caption),
        Comparison("Queries per second in batches", "queries/s", of("batched_queries_per_s"), caption),
        Comparison("Recall by distance", "", of("recall"), "Share of hits at most as far as the last exact hit."),
    ]


def _rank(result: Result) -> list[Comparison]:
    comparisons = []
    for threads, contestants in result["threads"].items():
        rates = {name: float(each["gb_per_s"]) for name, each in contestants.items()}
        # The best product is the main baseline; reading of memory is the limit.
        others = sorted((name for name in rates if name not in (_RANKING, _READING)), key=rates.__getitem__)
        values = {name: rates[name] for name in (_RANKING, *reversed(others), _READING)}
        caption = "Bytes of vectors per second: a ranking, bare products of the same vectors, and reading of memory."
        comparisons.append(Comparison(f"Ranking, threads: {threads}", "GB/s", values, caption))
    return comparisons


def _rescore(result: Result) -> list[Comparison]:
    recalls = {name: float(each["recall"]["8"]) for name, each in result["methods"].items()}
    # ITQ is measured first. RaBitQ with rescored shortlists is the main baseline.
    itq, *_ = recalls
    values = {name: recalls[name] for name in dict.fromkeys((itq, "RaBitQ", *recalls))}
    values["stored vectors rank all rows"] = float(result["limit"])
    caption = "Share of the 10 nearest rows by the exact float cosine that an answer of 10 rows has."
    return [Comparison("Recall@10 at oversampling 8", "", values, caption)]


def _recall_curves(result: Result) -> Figure:
    curves = {name: each["recall"] for name, each in result["methods"].items()}
    cutoffs = [int(key) for key in next(iter(curves.values()))]
    plot = plots.cutoff_curve(
        cutoffs,
        {name: np.array(list(recall.values())) for name, recall in curves.items()},
        xlabel="oversampling",
        ylabel="recall@10",
        chance=None,
    )
    return Figure("Recall by oversampling", plot, "Recall@10 against the exact float cosine.")


def _serve(result: Result) -> list[Comparison]:
    services = {"gateway": "gateway", "floor": "empty gRPC service", "milvus": "Milvus"}
    rates = {f"{key}_requests_per_s": name for key, name in services.items()}
    rates["raw_faiss_queries_per_s"] = "FAISS without a service"
    return [
        Comparison("Rate of requests", "requests/s", _keys(result, rates), "All services are measured in turns."),
        *(
            Comparison(
                title,
                "ms",
                _keys(result, {f"{key}_{share}_ms": name for key, name in services.items()}),
                "Latency of one request at a time.",
            )
            for title, share in (("Median latency", "p50"), ("99th percentile of the latency", "p99"))
        ),
    ]


def _soak(result: Result) -> list[Comparison]:
    memory = {"memory_mb_end": "at the end", "memory_mb_half": "at half time", "memory_mb_begin": "at the start"}
    return [
        Comparison("Searches", "/s", {"under load and changes": result["searches_per_s"]}),
        Comparison(
            "Memory of all processes", "MiB", _keys(result, memory), "Resident memory of the gateway's processes."
        ),
    ]


def _fanout(result: Result) -> list[Comparison]:
    p99 = {name: float(each["p99_ms"]) for name, each in result["scenarios"].items()}
    calm, *_ = p99
    worst = max(p99, key=p99.__getitem__)
    return [
        Comparison(
            "Merging of the answers",
            "ms",
            _keys(result, {"merge_ms": "merge", "sort_alone_ms": "sorting of all hits alone"}),
            "The answers of all shards to one query.",
        ),
        Comparison(
            "99th percentile of the latency",
            "ms",
            {name: p99[name] for name in dict.fromkeys((worst, calm, *p99))},
            "Simulated delays only, by scenario.",
        ),
    ]


def _gpu(result: Result) -> list[Comparison]:
    comparisons = []
    for name, rates in result["networks"].items():
        for title, key in (
            (f"Training, {result['training_precision']}", "training"),
            *((f"Encoding, {precision}", f"encoding_{precision}") for precision in ("float32", "bfloat16")),
        ):
            names = {
                f"{key}_images_per_s": "orbithash",
                f"torch_{key}_images_per_s": "loop of torch",
                "decoding_images_per_s": "decoding",
            }
            comparisons.append(
                Comparison(f"{title}: {name}", "images/s", _keys(rates, names), f"On {result['device']}.")
            )
    return comparisons


_PAGES = {
    "encode": _Page(
        "Encoding", "Images per second of `orbithash encode` beside plain loops on the same machine.", _encode
    ),
    "embeddings": _Page(
        "Encoding of vectors", "Rows per second of `orbithash encode` beside a plain loop.", _embeddings
    ),
    "export": _Page("Export", "Rows per second of `orbithash export` beside a plain write of pyarrow.", _export),
    "gpu": _Page("One device", "Training and encoding beside loops of torch alone and decoding.", _gpu),
    "train": _Page("Training", "Images per second of each training worker beside plain loops.", _train),
    "features": _Page("Features", "Images per second of workers that keep features beside bare loops.", _features),
    "validation": _Page("Validation", "The metric of validation beside plain NumPy.", _validation),
    "loading": _Page("Loading", "Views for training from a folder and from packed rows, beside a bare loop.", _loading),
    "manifest": _Page("Manifest", "The start of a rank with a large manifest, and hashes of files.", _manifest),
    "search": _Page("Search", "The exact index of orbithash beside other engines, on one core.", _search),
    "rank": _Page("Ranking", "Linear rankings of stored vectors beside bare products and reading of memory.", _rank),
    "rescore": _Page("Rescoring", "Recall of rescored shortlists beside RaBitQ of FAISS.", _rescore),
    "serve": _Page("Serving", "A gateway beside an empty gRPC service on the same machine.", _serve),
    "soak": _Page("Load over time", "Errors and memory of a gateway under searches, changes and failures.", _soak),
    "changes": _Page("Changes", "Commits, starts and new filters of a shard, each with its target.", lambda _: []),
    "fanout": _Page("Fan-out", "Searches over simulated shards, with slow and failed ones.", _fanout),
}


def _targets(result: Result) -> list[Fact]:
    """Return the number of targets that were missed, if the measurements have targets."""
    measurements = [each for each in result.get("measurements", ()) if each["target"] is not None]
    if not measurements:
        return []
    missed = [each["name"] for each in measurements if _verdict(each) == "missed"]
    explanation = f"Missed: {', '.join(missed)}." if missed else "All measurements are at most their targets."
    return [Fact("Targets met", f"{len(measurements) - len(missed)} of {len(measurements)}", explanation)]


def _verdict(measurement: Result) -> str:
    """Return whether a measurement met its target, a maximum; "" without one. NaN does not meet it."""
    target = measurement["target"]
    return "" if target is None else "met" if measurement["value"] <= target else "missed"


def _table(title: str, value: Any) -> Table | None:
    """Return a table of objects, a list of them or an object by name; None for other values."""
    if isinstance(value, Mapping) and all(isinstance(each, Mapping) and each for each in value.values()):
        inner = [part for each in value.values() for part in each.values()]
        if all(isinstance(part, Mapping) for part in inner):
            value = {f"{name}, {key}": part for name, each in value.items() for key, part in each.items()}
        rows = [{"name": name, **each} for name, each in value.items()]
    elif isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        rows = [each | {"result": _verdict(each)} if "target" in each else each for each in value]
    else:
        return None
    rows = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_text(row.get(key)) for key in columns] for row in rows]
    return Table(title.capitalize(), [_words(key) for key in columns], cells)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row whose objects, such as recall by oversampling, have become entries of their own."""
    entries: dict[str, Any] = {}
    for name, value in row.items():
        entries |= (
            {f"{name} {key}": part for key, part in value.items()} if isinstance(value, Mapping) else {name: value}
        )
    return entries


def _words(key: str) -> str:
    return key.replace("_per_s", "/s").replace("_", " ")


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _number(value)
    if isinstance(value, Mapping | list | tuple) and not value:
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_text(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return str(value)


def _number(value: float) -> str:
    if isinstance(value, int) or value >= 1000:
        return f"{value:,.0f}"
    return f"{value:,.1f}" if value >= 100 else f"{value:.3g}"
