"""What Prometheus can scrape: calls, images, where their time went, and how full the server is."""

from collections.abc import Callable
from functools import cache
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from fullframe.engine.query import Answer
from fullframe.engine.schedule import Counters

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_PIXELS = tuple(10**exponent for exponent in range(2, 9))


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
        for name, text, read in (
            ("pixels_in_flight", "Pixels queued or computed now.", lambda: counters().pixels_in_flight),
            (
                "memory_in_flight",
                "Bytes that those may take at once, by estimate.",
                lambda: counters().memory_in_flight,
            ),
            ("images_queued", "Images waiting for a worker.", lambda: counters().queued),
            ("images_running", "Images on a worker.", lambda: counters().running),
        ):
            self.watch(name, text, read)
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
