"""grpc.health.v1: whether this server, its service and each of its models can answer, asked once or watched.

Not grpcio-health-checking's own servicer, of which only the messages are used: when one of several watchers of a name
leaves, that one no longer tells the others, and its watchers keep a server from stopping before its grace is over.
"""

import asyncio
from collections.abc import Callable, Iterable

import grpc
from grpc_health.v1.health_pb2 import DESCRIPTOR, HealthCheckRequest, HealthCheckResponse

SERVICE = DESCRIPTOR.services_by_name["Health"].full_name

_Context = grpc.aio.ServicerContext[HealthCheckRequest, HealthCheckResponse]


class HealthServicer:
    """Every name has the same health, since all are answered by the same workers.

    Args:
        names: what can be asked about, besides the empty name of the whole server.
        healthy: whether images can be worked on.
    """

    def __init__(self, names: Iterable[str], healthy: Callable[[], bool]) -> None:
        self._names = {"", *names}
        self._healthy = healthy
        self._draining = False
        self._ended = False
        self._changed = asyncio.Event()

    async def Check(self, request: HealthCheckRequest, context: _Context) -> HealthCheckResponse:
        """The health of `request.service` now; NOT_FOUND for a name that is not served."""
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "nothing of that name is served here")
        return HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: HealthCheckRequest, context: _Context) -> None:
        """The health of `request.service` now and whenever it changes."""
        last = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status != last:
                await context.write(HealthCheckResponse(status=status))
                last = status
            if self._ended:
                return
            await changed.wait()

    async def follow(self, interval: float = 1.0) -> None:
        """Tell watchers, until cancelled, when the workers' health changes."""
        last = self._healthy()
        while True:
            await asyncio.sleep(interval)
            if (now := self._healthy()) != last:
                last = now
                self._announce()

    def drain(self) -> None:
        """NOT_SERVING from here on."""
        self._draining = True
        self._announce()

    def end_watches(self) -> None:
        """Let every Watch return once its caller knows the latest, so that none holds up the server's stop."""
        self._ended = True
        self._announce()

    def _status(self, name: str) -> HealthCheckResponse.ServingStatus:
        if name not in self._names:
            return HealthCheckResponse.SERVICE_UNKNOWN
        serving = self._healthy() and not self._draining
        return HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING

    def _announce(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
