"""The pages of benchmarks: every comparison beside its baseline, every number of the run, and `--report`."""

import math

import pytest

from orbithash.cluster.bench import page
from orbithash.cluster.bench.page import Comparison, write_bench_page
from orbithash.cluster.bench.report import environment, write_results
from orbithash.cluster.bench.rescore import RescoreBench, bench_rescore

ENGINE = {"build_s": 1.0, "p50_ms": 0.5, "batched_queries_per_s": 1e5, "recall": 1.0, "bytes_are": "<b>", "version": ""}
SCENARIO = {"p99_ms": 9.5, "coverage_mean": 1.0}
SOME = {
    "encode": {"pipeline_images_per_s": 90.0, "whole_loop_images_per_s": 100.0, "encode_loop_images_per_s": 200.0},
    "embeddings": {"pipeline_rows_per_s": 9.0, "loop_rows_per_s": 10.0, "driver_mib_max": 9, "driver_mib_begin": 5.5},
    "train": {"worker_images_per_s": 9.0, "bare_loop_images_per_s": 10.0, "bare_loops_images_per_s": 9.5},
    "features": {"workers_images_per_s": 95.0, "bare_loops_images_per_s": 100.0},
    "search": {"engines": {"faiss-flat": ENGINE, "exact": ENGINE | {"p50_ms": 0.1}}, "absent": {"usearch": "absent"}},
    "rank": {
        "threads": {
            str(threads): {name: {"gb_per_s": rate, "ms": 1.0, "ratio": 1.0} for name, rate in rates.items()}
            for threads, rates in ((1, {"read memory": 9.0, "numpy int8": 1.0, "torch int8": 4.0, "orbithash": 3.0}),)
        }
    },
    "serve": {f"{name}_{key}": 2.0 for name in ("gateway", "floor") for key in ("requests_per_s", "p50_ms", "p99_ms")},
    "soak": {"searches_per_s": 9.0, "memory_mb_end": 12.0, "memory_mb_begin": 10.0, "errors": {"search: X": 3}},
    "changes": {
        "measurements": [
            {"name": "first query", "value": 9.0, "unit": "ms", "target": None},
            {"name": "start", "value": 2.0, "unit": "s", "target": 6.0},
            {"name": "commit", "value": math.nan, "unit": "ms", "target": 20},
        ]
    },
    "fanout": {
        "merge_ms": 2.0,
        "sort_alone_ms": 1.0,
        "scenarios": {"calm": SCENARIO, "slow": SCENARIO | {"p99_ms": 70}},
    },
    "loading": {
        f"{name}_images_per_s": rate
        for name, rate in {"packed": 99.0, "folder": 98.0, "packed_in_order": 97.0, "bare_loop": 100.0}.items()
    },
    "validation": {"compiled_s": 0.2, "numpy_s": 3.0, "compiled_one_thread_s": 0.3},
    "export": {"export_rows_per_s": 9.0, "pyarrow_rows_per_s": 12.0, "export_peak_mib": 90.0, "pyarrow_peak_mib": 99.0},
    "manifest": {
        **{f"{name}_{unit}": 2.0 for name in ("rank_start", "bare_read") for unit in ("s", "mib")},
        **{f"{name}_files_per_s": 9.0 for name in ("one_thread", "all_threads", "remembered")},
    },
    "another": {"rows_per_s": 7.0},
}


def written(tmp_path, result) -> str:
    write_bench_page(tmp_path / "report.html", result)
    return (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("name", SOME)
def test_every_benchmark_has_a_page(tmp_path, name):
    html = written(tmp_path, {**environment(name, "numpy"), "rows": 1234, **SOME[name]})
    assert "1,234" in html
    assert "Settings and measurements" in html
    assert "<b>" not in html.replace("<b>Benchmark</b>", "")
    comparisons = page._PAGES[name].comparisons(SOME[name]) if name in page._PAGES else []
    assert all(each.fact.baseline for each in comparisons if each.title != "Searches")
    assert html.count('<dd class="baseline">') == sum(bool(each.fact.baseline) for each in comparisons)


def test_every_benchmark_of_the_command_line_has_a_page():
    from orbithash.cluster.cli.bench import bench

    assert {command.name for command in bench.registered_commands} <= page._PAGES.keys()


def test_a_measurement_is_compared_with_its_main_baseline():
    fact = Comparison("Encoding", "images/s", {"pipeline": 1234.5, "loop": 2469.0, "other": 1.0}).fact
    assert (fact.value, fact.baseline) == ("1,234 images/s", "loop: 2,469 images/s (ratio 0.50)")
    assert Comparison("x", "s", {"ours": 1.0, "none": 0.0}).fact.baseline == "none: 0 s"
    (ranking,) = page._rank(SOME["rank"])
    assert list(ranking.values) == ["orbithash", "torch int8", "numpy int8", "read memory"]
    _, latency = page._fanout(SOME["fanout"])
    assert list(latency.values) == ["slow", "calm"]


def test_missed_targets_are_named(tmp_path):
    html = written(tmp_path, {**environment("changes", "numpy"), **SOME["changes"]})
    assert "1 of 2" in html
    assert "Missed: commit." in html
    assert (html.count("<td>met</td>"), html.count("<td>missed</td>")) == (1, 1)


def test_the_result_of_a_benchmark_has_a_page_beside_it(tmp_path):
    result = bench_rescore(RescoreBench(rows=1000, dims=32, intrinsic=8, bits=16, vector_dims=8, queries=4))
    write_results(result, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert (tmp_path / "results.json").exists()
    assert "RaBitQ" in html
    assert "Recall by oversampling" in html
    assert "recall 64" in html


@pytest.mark.parametrize("name", ["report.txt", "report", "folder.html", "file/report.html"])
def test_a_page_that_cannot_be_written_is_refused_before_the_work(refused, tmp_path, name):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").touch()
    refused(
        "bench",
        "encode",
        "--report",
        tmp_path / name,
        words=["--report is", tmp_path / "file" if "/" in name else name],
    )
