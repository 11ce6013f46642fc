"""Prometheus metrics of a server."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from peftk.serve.http.served import Served
from peftk.serve.requests import Completion

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """Counts what a server does; what engine, embedder and store count themselves is read from them at each scrape."""

    def __init__(self, served: Served) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "peftk_http_requests", "Requests by endpoint and status.", ["endpoint", "status"], registry=registry
        )
        self._latency = Histogram(
            "peftk_http_request_seconds",
            "From a request's head to the end of its answer.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._queued = Histogram(
            "peftk_queue_seconds", "Until the model began with a prompt.", buckets=_SECONDS, registry=registry
        )
        self._first = Histogram(
            "peftk_time_to_first_token_seconds", "From a prompt's submission.", buckets=_SECONDS, registry=registry
        )
        self._each = Histogram(
            "peftk_time_per_output_token_seconds",
            "Mean time between the tokens of a prompt.",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        registry.register(_Served(served))

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        """Notes a request. endpoint: the path in the code, not what the client sent."""
        self._requests.labels(endpoint, str(status)).inc()
        self._latency.labels(endpoint).observe(seconds)

    def completed(self, completion: Completion) -> None:
        """Notes a completion's times."""
        self._queued.observe(completion.queued)
        first, count = completion.to_first_token, len(completion.tokens)
        if first is not None:
            self._first.observe(first)
            if count > 1:
                self._each.observe((completion.total - first) / (count - 1))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _Served(Collector):
    """Metrics that engine, embedder and store keep."""

    def __init__(self, served: Served) -> None:
        self.served = served

    def collect(self) -> Iterator[Metric]:
        yield from self._work()
        store = self.served.store.stats()
        for name, what, value in (
            ("peftk_adapters_registered", "Names of adapters.", store.registered),
            ("peftk_adapters_resident", "Adapters in the bank.", store.resident),
            ("peftk_adapters_pinned", "Adapters in the bank that requests use.", store.pinned),
            ("peftk_bank_bytes", "Size of the adapters in the bank.", store.bank_bytes),
            ("peftk_bank_slots", "Adapters for which the bank has room.", self.served.store.bank_slots),
            ("peftk_host_bytes", "Size of the checkpoints in host memory.", store.host_bytes),
        ):
            yield GaugeMetricFamily(name, what, value)
        for name, what, value in (
            ("peftk_adapter_hits", "Requests that found their adapter in the bank.", store.hits),
            ("peftk_adapter_loads", "Adapters put into the bank.", store.loads),
            ("peftk_adapter_reads", "Checkpoints read from disk.", store.reads),
            ("peftk_adapter_failures", "Reads of checkpoints that failed.", store.failures),
            ("peftk_adapter_evictions", "Adapters that left the bank for others.", store.evictions),
            ("peftk_adapter_host_evictions", "Checkpoints that left host memory.", store.host_evictions),
        ):
            yield CounterMetricFamily(name, what, value)
        times = GaugeMetricFamily("peftk_adapter_load_seconds", "Of the last 1024 loads.", labels=["from", "quantile"])
        for place, p50, p99 in (
            ("host", store.load_p50_ms, store.load_p99_ms),
            ("disk", store.read_p50_ms, store.read_p99_ms),
        ):
            times.add_metric([place, "0.5"], p50 / 1e3)
            times.add_metric([place, "0.99"], p99 / 1e3)
        yield times
        where = GaugeMetricFamily(
            "peftk_adapter_residency",
            "1 for an adapter in this tier; those on disk only have none.",
            labels=["adapter", "tier"],
        )
        for name, tier in self.served.store.residency().items():
            where.add_metric([name, tier], 1)
        yield where

    def _work(self) -> Iterator[Metric]:
        worker = self.served.engine or self.served.embedder
        assert worker is not None
        stats = worker.stats()
        yield GaugeMetricFamily("peftk_requests_waiting", "Prompts or texts in the queue.", stats.waiting)
        yield GaugeMetricFamily("peftk_requests_running", "Prompts or texts that the model works on.", stats.running)
        ended = CounterMetricFamily("peftk_requests", "Prompts or texts by how they ended.", labels=["outcome"])
        for outcome in ("finished", "cancelled", "timed_out", "failed"):
            ended.add_metric([outcome], getattr(stats, outcome))
        yield ended
        yield CounterMetricFamily("peftk_prompt_tokens", "Tokens of prompts or texts.", stats.prompt_tokens)
        if self.served.engine is not None:
            tokens = self.served.engine.stats().generated_tokens
            yield CounterMetricFamily("peftk_generated_tokens", "Tokens generated.", tokens)
        if self.served.embedder is not None:
            batches = self.served.embedder.stats().batches
            yield CounterMetricFamily("peftk_embedding_batches", "Batches of texts.", batches)
