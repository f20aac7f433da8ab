"""Real servers for tests: one in a process of its own, stopped as an orchestrator would, or one in this process."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from fullframe.engine.plane import Plane
from fullframe.server.lifecycle import Bound, Server, open_models
from fullframe.settings import PREFIX, Settings
from fullframe.v1.vision_pb2_grpc import VisionServiceStub

COMMAND = [sys.executable, "-m", "fullframe", "serve"]
STARTUP = 60.0  # seconds
MIB = 2**20
CHANNEL_OPTIONS = [("grpc.max_receive_message_length", 512 * MIB), ("grpc.max_send_message_length", 512 * MIB)]


@dataclass
class Running:
    """A server process and what it has logged."""

    process: subprocess.Popen[str]
    log: list[dict[str, Any]] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    stopping: bool = False
    _news: threading.Condition = field(default_factory=threading.Condition)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        return int(self.wait_for("ready")["port"])

    @property
    def metrics_port(self) -> int:
        return int(self.wait_for("ready")["metrics_port"])

    @property
    def pid(self) -> int:
        return self.process.pid

    def events(self, name: str, **fields: Any) -> list[dict[str, Any]]:
        """The log's lines of that event with those fields."""
        return [e for e in list(self.log) if e["event"] == name and fields.items() <= e.items()]

    def wait_for(self, name: str, timeout: float = STARTUP, **fields: Any) -> dict[str, Any]:
        """The first such line, once it is there."""
        with self._news:
            self._news.wait_for(lambda: self.events(name, **fields) or self.process.poll() is not None, timeout)
        found = self.events(name, **fields)
        assert found, f"no {name} {fields} from the server:\n{self.log}\n{''.join(self.other)}"
        return found[0]

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send a signal."""
        self.stopping = True
        self.process.send_signal(number)

    def read_log(self) -> None:
        """Take in stderr until the process ends it."""
        assert self.process.stderr
        for line in self.process.stderr:
            with self._news:
                try:
                    self.log.append(json.loads(line))
                except ValueError:
                    self.other.append(line)
                self._news.notify_all()
        self.process.wait()
        with self._news:
            self._news.notify_all()


def start(command: Sequence[str] = COMMAND, **settings: Any) -> Running:
    """Start a server process; each setting goes to it through its environment."""
    given = {"port": 0, "metrics_port": 0, "log_format": "json", **settings}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    environment |= {PREFIX + name.upper(): str(value) for name, value in given.items()}
    running = Running(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    threading.Thread(target=running.read_log, daemon=True).start()
    return running


@contextmanager
def serving(exit_code: int = 0, may_fail: bool = False, **settings: Any) -> Iterator[Running]:
    """A server process that is ready; at the end it gets SIGTERM, if it has not had it, and must end with `exit_code`.

    Args:
        may_fail: the log may hold errors.
    """
    running = start(**settings)
    try:
        running.wait_for("ready")
        yield running
        if not running.stopping:
            running.stop()
        code = running.process.wait(60)
        assert code == exit_code, f"exit code {code}:\n{running.log}\n{''.join(running.other)}"
        assert may_fail or not [e for e in running.log if e["level"] == "error"], running.log
    finally:
        running.process.kill()
        running.process.wait()


@dataclass
class InProcess:
    """A server on a thread of this process, with its engine at hand."""

    bound: Bound
    plane: Plane
    server: Server
    loop: asyncio.AbstractEventLoop

    @property
    def target(self) -> str:
        return self.bound.target


@contextmanager
def serving_here(**settings: Any) -> Iterator[InProcess]:
    """A server in this process; at the end all its work must finish."""
    given = Settings(**{"port": 0, "metrics_port": -1, **settings})
    plane = open_models(given)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def wait(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)

    async def make() -> tuple[Server, Bound]:
        server = Server(given, plane)
        return server, await server.start()

    async def stop(server: Server) -> bool:
        return await server.stop(asyncio.Event())

    try:
        server, bound = wait(make())
        yield InProcess(bound, plane, server, loop)
        assert wait(stop(server))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        plane.close()


@contextmanager
def stub(target: str) -> Iterator[VisionServiceStub]:
    """A plain generated stub on a channel of its own."""
    with grpc.insecure_channel(target, options=CHANNEL_OPTIONS) as channel:
        yield VisionServiceStub(channel)


def resident(pid: int) -> int:
    """Bytes of a process's own memory (no mapped files) that are in RAM."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def eventually(condition: Any, timeout: float = 20.0) -> None:
    """Wait until `condition()` holds."""
    last = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < last, "waited in vain"
        time.sleep(0.01)
