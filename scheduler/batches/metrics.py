"""The batch API in /metrics."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from xllm_compile.scheduler.batches.records import FINAL_STATUSES, OPEN_STATUSES
from xllm_compile.scheduler.batches.runner import BatchRunner
from xllm_compile.scheduler.batches.store import BatchStore

STATUSES = (*OPEN_STATUSES, "failed", *FINAL_STATUSES)
OUTCOMES = ("completed", "failed", "expired", "cancelled")


class BatchMetrics(Collector):
    """As of the scrape. Reads counters that the store keeps in memory, not the database."""

    def __init__(self, store: BatchStore, runner: BatchRunner) -> None:
        self._store = store
        self._runner = runner

    def collect(self) -> Iterator[Metric]:
        batches = GaugeMetricFamily("xllm_batches", "Batches by status", labels=["status"])
        for status in STATUSES:
            batches.add_metric([status], self._store.num_batches[status])
        yield batches
        lines = CounterMetricFamily("xllm_batch_lines", "Requests of batches by how they ended", labels=["outcome"])
        for outcome in OUTCOMES:
            lines.add_metric([outcome], self._runner.num_ended_lines[outcome])
        yield lines
        pending = self._store.num_pending_lines
        yield GaugeMetricFamily("xllm_batch_lines_pending", "Requests of open batches without a result", pending)
        limit = self._runner.limit
        yield GaugeMetricFamily("xllm_batch_lines_running", "Requests of batches under way", limit.num_running)
        yield GaugeMetricFamily("xllm_batch_lines_limit", "Most of them at once, as adapted", limit.limit)
