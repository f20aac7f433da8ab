"""A server from its first port to its last answer: start in order, drain on a signal, stop in order."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fullframe import __version__
from fullframe.engine.plane import Plane, open_plane
from fullframe.errors import FullframeError
from fullframe.image import Limits
from fullframe.server import health, logs, vision
from fullframe.server.calls import Calls
from fullframe.server.health import HealthServicer
from fullframe.server.logs import event
from fullframe.server.metrics import Metrics
from fullframe.server.rpcs import handlers
from fullframe.server.spool import open_spool
from fullframe.server.streams import Intake
from fullframe.settings import Settings, address

# Health checks, Watches and reflection come on top of max_concurrent_rpcs, which is for images.
_SPARE_RPCS: Final = 64
_FOREVER: Final = 1e6  # seconds
_KEEPALIVE_MS: Final = 60_000  # a caller whose machine vanished is noticed within about two of these


class CannotListen(FullframeError):
    """A port is taken, or may not be had."""


@dataclass(frozen=True)
class Bound:
    """Where a server listens; metrics_port is None where there are no metrics."""

    host: str
    port: int
    metrics_port: int | None

    @property
    def target(self) -> str:
        """For a gRPC channel."""
        return address(self.host, self.port)


def run(settings: Settings, ready: Callable[[Bound], None] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns 0, or ends the process with 1 if work had to be cut off.

    Args:
        ready: called once calls can come in.

    Raises:
        FullframeError: a model cannot be loaded, or a port cannot be had.
    """
    logs.set_up(settings.log_level, settings.log_format)
    clean = asyncio.run(serve(settings, ready))
    if not clean:
        # What was cut off still runs on a worker's thread, which only the end of the process ends.
        logging.shutdown()
        os._exit(1)
    return 0


async def serve(settings: Settings, ready: Callable[[Bound], None] | None = None) -> bool:
    """Load the models and serve until a signal; a second one cuts the draining short.

    Returns:
        Whether all work in flight was finished.
    """
    with _signals() as (first, second):
        event("start", version=__version__, pid=os.getpid())
        plane = await asyncio.to_thread(open_models, settings)
        server = Server(settings, plane)
        try:
            bound = await server.start()
        except CannotListen:
            plane.close()
            raise
        if ready:
            ready(bound)
        await first.wait()
        return await server.stop(second)


def open_models(settings: Settings) -> Plane:
    """The engine that `settings` describe; raises FullframeError for a model that cannot be loaded."""
    limits = Limits(
        max_pixels=int(settings.max_megapixels * 1e6),
        max_bytes=int(settings.max_image_bytes),
        max_frames=settings.max_frames,
        max_held_pixels=int(settings.max_held_megapixels * 1e6),
        max_temporary_bytes=int(settings.max_turning_bytes),
    )
    plane = open_plane(
        settings.models,
        limits=limits,
        workers=settings.workers,
        max_pixels_in_flight=int(settings.max_megapixels_in_flight * 1e6),
        memory_budget=int(settings.memory_budget),
        tile_pixels=settings.tile_pixels,
        precision=settings.precision,
        batching=settings.batching,
        engine=settings.engine,
        compute=settings.compute,
    )
    plane.warm_up()
    return plane


class Server:
    """All that listens, in front of one engine; to be made and used inside a running event loop.

    Attributes:
        calls: those being answered.
        spool: where uploads are kept.
    """

    def __init__(self, settings: Settings, plane: Plane) -> None:
        self._settings, self._plane = settings, plane
        self._metrics = Metrics(plane.counters)
        self.calls = Calls(self._metrics, settings.max_concurrent_rpcs, int(settings.max_bytes_in_flight))
        self._intake = Intake()
        self.spool = open_spool(settings)
        self._metrics.watch("upload_bytes", "Bytes of uploads being worked on.", self.spool.reserved)
        self._health = HealthServicer(
            {vision.SERVICE.full_name, *(model.name for model in plane.models())}, plane.healthy
        )
        self._grpc = grpc.aio.server(
            options=_channel_options(int(settings.max_message_bytes)),
            maximum_concurrent_rpcs=settings.max_concurrent_rpcs + _SPARE_RPCS,
        )
        servicer = vision.VisionServicer(plane, self._intake, self.spool, settings)
        self._grpc.add_generic_rpc_handlers([handlers(vision.SERVICE, servicer, self.calls)])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        services = (vision.SERVICE.full_name, health.SERVICE, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(services, self._grpc)

    async def start(self) -> Bound:
        """Take the ports and begin to answer; raises CannotListen naming the port."""
        host, settings = self._settings.host, self._settings
        metrics_port = None
        if settings.metrics_port >= 0:
            with _binding("metrics-port", host, settings.metrics_port):
                metrics_port = self._metrics.listen(host, settings.metrics_port)
        try:
            with _binding("port", host, settings.port):
                port = self._grpc.add_insecure_port(address(host, settings.port))
        except CannotListen:
            self._metrics.close()
            raise
        await self._grpc.start()
        self._following = asyncio.create_task(self._health.follow())
        models = [f"{model.name}/{model.version}" for model in self._plane.models()]
        engines = sorted({model.engine.title for model in self._plane.models()})
        event("ready", host=host, port=port, metrics_port=metrics_port, models=models, engines=engines)
        return Bound(host, port, metrics_port)

    async def stop(self, hurry: asyncio.Event) -> bool:
        """Say NOT_SERVING, wait for balancers, refuse new calls, let those in flight end, then end the workers.

        What has reached gRPC's core alone by then, it ends as CANCELLED before any of this code hears of it.

        Args:
            hurry: once set, nothing is waited for.

        Returns:
            Whether all work in flight was finished; if not, some may still run on the workers' threads.
        """
        delay, grace = self._settings.drain_delay, self._settings.grace
        event("draining", step="not serving", seconds=delay, calls=self.calls.calls)
        self._health.drain()
        hurried = asyncio.create_task(hurry.wait())
        await asyncio.wait({hurried}, timeout=delay)

        event("draining", step="refusing calls", seconds=grace, calls=self.calls.calls)
        last = time.monotonic() + grace
        self._health.end_watches()
        self._intake.close(grace / 2)
        ending = asyncio.create_task(self._grpc.stop(None if hurry.is_set() else _FOREVER))
        await asyncio.wait({ending, hurried}, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        cut_off = self.calls.calls
        await self._grpc.stop(None)
        await ending

        event("draining", step="ending workers", cut_off=cut_off)
        rest = 0.0 if cut_off or hurry.is_set() else max(0.0, last - time.monotonic())
        clean = await asyncio.to_thread(self._plane.drain, rest) and not cut_off
        if clean:
            await asyncio.to_thread(self._plane.close)
        hurried.cancel()
        self._following.cancel()
        await asyncio.to_thread(self._metrics.close)
        event("stop", clean=clean)
        return clean


def _channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # otherwise a second server on the port starts without a word and takes half
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # none: gRPC inflates a message before it looks at its size
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_MS),
    ]


@contextmanager
def _binding(setting: str, host: str, port: int) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError is grpc's
        raise CannotListen(
            f"cannot listen on {address(host, port)}: it is taken, not allowed or no address of this machine; "
            f"choose another --{setting} (0: any)"
        ) from error


@contextmanager
def _signals() -> Iterator[tuple[asyncio.Event, asyncio.Event]]:
    """Events for the first SIGTERM or SIGINT and for the next."""
    first, second = asyncio.Event(), asyncio.Event()

    def heard() -> None:
        (second if first.is_set() else first).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, heard)
    try:
        yield first, second
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)  # the process is about to end, with an exit code of its own
