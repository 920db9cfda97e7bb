"""Figures of a running service for Prometheus, and the page that they are read from."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric

from orbithash.encoders.errors import InputError
from orbithash.search.observer import Count, Observer, Stage
from orbithash.search.protocol.address import is_loopback, parse_address
from orbithash.search.service.service import Service
from orbithash.v1 import search_pb2

__all__ = ["Metrics", "exposed"]

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_COUNTS: dict[Count, str] = {
    "partial_answers": "Answers that speak for a part of the archive only.",
    "shed_queries": "Queries refused because too many waited.",
    "failed_shard_calls": "Shards that did not answer a batch, whichever copy was asked.",
    "hedged_shard_calls": "Searches sent to a second copy of a shard because the first was slow.",
    "retried_shard_calls": "Searches sent to a second copy of a shard because the first failed.",
    "rows_upserted": "Rows written into the archive.",
    "rows_deleted": "Rows removed from the archive.",
}


class Metrics(Observer):
    """Counts in a registry of its own, so that several services fit into one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"orbithash_{name}", text, labels, buckets=buckets, registry=self.registry)

        self._requests = Counter(
            "orbithash_requests", "Calls that ended, by gRPC status code.", ("rpc", "outcome"), registry=self.registry
        )
        self._request_seconds = histogram("request_seconds", "From a call's arrival to its end.", _SECONDS, "rpc")
        seconds = histogram("stage_seconds", "Work of a stage, once a batch where queries share it.", _SECONDS, "stage")
        self._stages: dict[Stage, Histogram] = {name: seconds.labels(name) for name in get_args(Stage)}
        self._batches = histogram("batch_queries", "Queries that went to the shards together.", _BATCHES)
        self._in_flight = Gauge("orbithash_calls_in_flight", "Calls that have not ended.", registry=self.registry)
        self._counts = {
            name: Counter(f"orbithash_{name}", text, registry=self.registry) for name, text in _COUNTS.items()
        }
        for service in search_pb2.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                # From zero, or the first call would not show as a rise.
                self._requests.labels(method.name, "OK")
                self._request_seconds.labels(method.name)

    def watch(self, service: Service) -> None:
        """Reads the state of `service` whenever the figures are asked for; once, for as long as it lives."""
        self.registry.register(_State(service))

    def stage(self, name: Stage) -> AbstractContextManager[Any]:
        """See `Observer`."""
        return self._stages[name].time()

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
        self._requests.labels(rpc, outcome).inc()
        self._request_seconds.labels(rpc).observe(seconds)


class _State:
    """What a service is at the moment of asking."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        now = self._service.describe()
        for name, text, value in (
            ("rows", "Rows of the version that is searched.", now.rows),
            ("archive_version", "Version of the archive that is searched.", now.archive_version),
            ("shards", "Parts of the archive.", len(now.shards)),
            ("queries_waiting", "Queries that wait for a batch.", self._service.num_queries_waiting),
            ("rows_waiting", "Changes of rows that wait to be written.", self._service.num_rows_waiting),
        ):
            yield GaugeMetricFamily(f"orbithash_{name}", text, value)
        copies = GaugeMetricFamily("orbithash_replicas", "Copies of a shard.", labels=("shard",))
        healthy = GaugeMetricFamily(
            "orbithash_healthy_replicas", "Copies of a shard that answered when last asked.", labels=("shard",)
        )
        for number, shard in enumerate(now.shards):
            copies.add_metric((str(number),), shard.replicas)
            healthy.add_metric((str(number),), shard.healthy_replicas)
        yield copies
        yield healthy


@contextmanager
def exposed(metrics: Metrics, address: str, allow_remote: bool = False) -> Iterator[str]:
    """The figures at http://ADDRESS/metrics for as long as the block lasts; yields the address with its port.

    Raises `InputError` when the address (HOST:PORT, port 0 takes a free one) is wrong or taken, or open to other
    machines without `allow_remote`.
    """
    host, port = parse_address(address)
    if not (allow_remote or is_loopback(host)):
        raise InputError(
            f"the metrics have no access control, so they are served at loopback addresses only (127.0.0.1, ::1, "
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
