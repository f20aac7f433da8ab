"""What Prometheus can scrape: calls, images, where their time went, and how full the server is."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Final
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fullframe.engine.jobs import Counters
from fullframe.engine.query import Answer

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_PIXELS = tuple(10**exponent for exponent in range(2, 9))

_ENDS: Final = ("finished", "failed", "cancelled", "expired")


class Metrics:
    """One server's figures; labels take only RPC names, status codes and the names of served models.

    Args:
        counters: the engine's counts at this moment.
    """

    def __init__(self, counters: Callable[[], Counters]) -> None:
        self.registry = registry = CollectorRegistry()
        requests = Counter("fullframe_requests", "Calls by RPC and status code.", ["rpc", "code"], registry=registry)
        seconds = Histogram(
            "fullframe_request_seconds",
            "Time from a call's arrival to its status.",
            ["rpc"],
            buckets=_SECONDS,
            registry=registry,
        )
        images = Counter("fullframe_images", "Images by model and status code.", ["model", "code"], registry=registry)
        # Looking a label up takes longer than counting, and there are few.
        self._requests, self._seconds, self._images = (
            cache(requests.labels),
            cache(seconds.labels),
            cache(images.labels),
        )
        stages = Histogram(
            "fullframe_image_seconds",
            "Time of an answered image by stage.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._pixels = Histogram(
            "fullframe_image_pixels", "Pixels of an answered image.", buckets=_PIXELS, registry=registry
        )
        self._decode, self._queue, self._compute = (stages.labels(s) for s in ("decode", "queue", "compute"))
        registry.register(_Engine(counters))
        self._server: WSGIServer | None = None

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Tell a figure as `read` has it when it is asked for."""
        Gauge(f"fullframe_{name}", text, registry=self.registry).set_function(read)

    def request(self, rpc: str, code: str, seconds: float) -> None:
        """Count one call that ended."""
        self._requests(rpc, code).inc()
        self._seconds(rpc).observe(seconds)

    def answered(self, model: str, answer: Answer) -> None:
        """Count one image that was answered by a served model."""
        self._images(model, "OK").inc()
        self._pixels.observe(answer.height * answer.width)
        self._decode.observe(answer.timings.decode)
        self._queue.observe(answer.timings.queue)
        self._compute.observe(answer.timings.compute)

    def failed(self, model: str, code: str) -> None:
        """Count one image that was not."""
        self._images(model, code).inc()

    def listen(self, host: str, port: int) -> int:
        """Offer all of it over HTTP on a thread of its own; returns the port. Raises OSError."""
        self._server, _ = start_http_server(port, host, self.registry)
        return int(self._server.server_port)

    def close(self) -> None:
        """End that thread."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


class _Engine(Collector):
    """The engine's counts, all of one moment: in every scrape the images admitted are those queued, running, ready and
    ended.

    An image whose header can't be read is never admitted; neither are those of a request that is refused.
    """

    def __init__(self, counters: Callable[[], Counters]) -> None:
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        """As Prometheus' client asks."""
        counts = self._counters()
        for name, text, value in (
            ("images_opening", "Images whose headers are read, or wait for it; not admitted yet.", counts.opening),
            ("images_queued", "Images waiting for a worker.", counts.queued),
            ("images_running", "Images on a worker.", counts.running),
            ("images_ready", "Images decoded and waiting for a batch.", counts.ready),
            ("pixels_in_flight", "Pixels of images queued, running or ready.", counts.pixels_in_flight),
            ("memory_in_flight", "Bytes that those may take at once, by estimate.", counts.memory_in_flight),
        ):
            yield GaugeMetricFamily(f"fullframe_{name}", text, value)
        yield CounterMetricFamily("fullframe_images_admitted", "Images let into the queue.", counts.created)
        ended = CounterMetricFamily(
            "fullframe_images_ended", "Images that left the queue or a worker, by what became of them.", labels=["end"]
        )
        for end in _ENDS:
            ended.add_metric([end], getattr(counts, end))
        yield ended
        yield CounterMetricFamily("fullframe_requests_refused", "Requests that found no room.", counts.refused)
