"""Reading a stream's requests until the caller, or a server that is shutting down, ends it."""

import asyncio
from typing import Any, Final

from fullframe.errors import FullframeError, Unavailable
from fullframe.server.calls import Call

_LULL: Final = 0.25  # seconds


class Intake:
    """Where streams take their requests from; open until `close`."""

    def __init__(self) -> None:
        self._closes: float | None = None
        self._reading: set[asyncio.Timeout] = set()

    async def read(self, call: Call) -> Any:
        """The stream's next request, grpc.aio.EOF once the caller has sent the last, or the error that ends it."""
        try:
            async with asyncio.timeout(self._patience()) as limit:
                self._reading.add(limit)
                try:
                    return await call.read()
                finally:
                    self._reading.discard(limit)
        except TimeoutError:
            return Unavailable("shutting down: send what has no answer yet to another server")
        except FullframeError as error:
            return error

    def close(self, seconds: float) -> None:
        """End each stream at its first lull, so that what is on its way is answered; end all after `seconds`."""
        now = asyncio.get_running_loop().time()
        self._closes = now + seconds
        for limit in self._reading:
            limit.reschedule(now + min(_LULL, seconds))

    def _patience(self) -> float | None:
        if self._closes is None:
            return None
        return min(_LULL, self._closes - asyncio.get_running_loop().time())
