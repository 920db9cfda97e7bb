"""Metrics of a running service, and the HTTP page from which Prometheus reads them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from orbithash.encoders.errors import InputError
from orbithash.search.observer import Count, Observer, Stage
from orbithash.search.protocol.address import is_loopback, parse_address
from orbithash.search.service.service import Service
from orbithash.v1 import search_pb2

__all__ = ["Metrics", "exposed"]

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_COUNTS: dict[Count, str] = {
    "partial_answers": "Answers that cover only a part of the archive.",
    "shed_queries": "Queries refused because too many were waiting.",
    "failed_shard_calls": "Shards of which no replica answered a batch.",
    "hedged_shard_calls": "Searches sent to a second replica of a shard because the first was slow.",
    "retried_shard_calls": "Searches sent to a second replica of a shard because the first failed.",
    "replicas_taken_out": "Replicas that no query is sent to any more because they did not answer.",
    "failed_showings": "Attempts to show a committed version that failed; they are repeated.",
    "rows_upserted": "Rows written to the archive.",
    "rows_deleted": "Rows removed from the archive.",
}


class Metrics(Observer):
    """An observer that counts in its own registry, so that one process can have several services."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"orbithash_{name}", text, labels, buckets=buckets, registry=self.registry)

        self._requests = Counter(
            "orbithash_requests", "Finished calls, by gRPC status code.", ("rpc", "outcome"), registry=self.registry
        )
        self._request_seconds = histogram("request_seconds", "Time of a call, from arrival to end.", _SECONDS, "rpc")
        seconds = histogram("stage_seconds", "Time of a stage, counted once per batch of queries.", _SECONDS, "stage")
        self._stages: dict[Stage, Histogram] = {name: seconds.labels(name) for name in get_args(Stage)}
        self._batches = histogram("batch_queries", "Queries of a batch that is sent to the shards.", _BATCHES)
        self._in_flight = Gauge("orbithash_calls_in_flight", "Calls in progress.", registry=self.registry)
        self._counts = {
            name: Counter(f"orbithash_{name}", text, registry=self.registry) for name, text in _COUNTS.items()
        }
        self._ended: dict[tuple[str, str], tuple[Counter, Histogram]] = {}
        for service in search_pb2.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                # Start at zero; otherwise the first call would not show as an increase.
                self._requests.labels(method.name, "OK")
                self._request_seconds.labels(method.name)

    def watch(self, service: Service) -> None:
        """Add the state of `service` to each reading. Call it once per registry."""
        self.registry.register(_State(service))

    def stage(self, name: Stage) -> AbstractContextManager[Any]:
        """See `Observer`."""
        return self._stages[name].time()

    def took(self, name: Stage, seconds: float) -> None:
        """See `Observer`."""
        self._stages[name].observe(seconds)

    def count(self, name: Count, number: int = 1) -> None:
        """See `Observer`."""
        self._counts[name].inc(number)

    def batch(self, num_queries: int, waited_s: float) -> None:
        """See `Observer`."""
        self._batches.observe(num_queries)
        self._stages["queue"].observe(waited_s)

    def call_began(self, rpc: str) -> None:
        """See `Observer`."""
        self._in_flight.inc()

    def call_ended(self, rpc: str, outcome: str, seconds: float) -> None:
        """See `Observer`."""
        self._in_flight.dec()
        ended = self._ended.get((rpc, outcome))
        if ended is None:
            # `labels` costs more than counting.
            ended = self._requests.labels(rpc, outcome), self._request_seconds.labels(rpc)
            self._ended[rpc, outcome] = ended
        requests, request_seconds = ended
        requests.inc()
        request_seconds.observe(seconds)


# Metrics of each shard, and the fields of `ShardStatus` that they show.
_OF_SHARDS = (
    (GaugeMetricFamily, "replicas", "Replicas of a shard.", "replicas"),
    (GaugeMetricFamily, "healthy_replicas", "Replicas that answered their last health check.", "healthy_replicas"),
    (GaugeMetricFamily, "segments", "Segments of a shard in the version that is searched.", "segments"),
    (
        GaugeMetricFamily,
        "shard_bytes",
        "Codes, ids, indexes and sets of rows of one replica, in bytes.",
        "memory_bytes",
    ),
    (CounterMetricFamily, "merges", "Merges of segments of a shard that ended.", "merges"),
    (CounterMetricFamily, "filter_evaluations", "Filters evaluated over a segment of a shard.", "evaluations"),
)


class _State:
    """A collector that reads the state of a service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        now = self._service.describe()
        for name, text, value in (
            ("rows", "Rows of the version that is searched.", now.rows),
            ("archive_version", "Version of the archive that is searched.", now.archive_version),
            ("shards", "Shards of the archive.", len(now.shards)),
            ("queries_waiting", "Queries that wait for a batch.", self._service.num_queries_waiting),
            ("rows_waiting", "Changes of rows that wait for a commit.", self._service.num_rows_waiting),
            ("gateways", "Gateways that share the shards.", now.gateways),
            (
                "follow_lag_seconds",
                "Time since a newer version than the searched one was first seen; 0 if there is none.",
                self._service.follow_lag_s,
            ),
        ):
            yield GaugeMetricFamily(f"orbithash_{name}", text, value)
        for kind, name, text, field in _OF_SHARDS:
            metric = kind(f"orbithash_{name}", text, labels=("shard",))
            for number, shard in enumerate(now.shards):
                metric.add_metric((str(number),), getattr(shard, field))
            yield metric


@contextmanager
def exposed(metrics: Metrics, address: str, allow_remote: bool = False) -> Iterator[str]:
    """Serve the metrics at http://ADDRESS/metrics during the block; yield the address with its port.

    Raises `InputError` if the address (HOST:PORT; port 0 takes a free one) is invalid or in use, or if other machines
    can reach it without `allow_remote`.
    """
    host, port = parse_address(address)
    if not (allow_remote or is_loopback(host)):
        raise InputError(
            f"the metrics have no access control, so they are served on loopback addresses only (127.0.0.1, ::1, "
            f"localhost) without --open-metrics; got {host!r}"
        )
    try:
        server, thread = start_http_server(port, host, metrics.registry)
    except OSError as err:
        raise InputError(
            f"cannot serve metrics at {address} ({err.strerror or err}); give another port, or 0 for a free one"
        ) from err
    try:
        yield f"{'[' + host + ']' if ':' in host else host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
