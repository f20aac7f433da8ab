"""Starting, being watched, draining and stopping: as an orchestrator, a balancer and a scraper see it."""

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fullframe.server.lifecycle import CannotListen
from fullframe.v1 import vision_pb2 as pb
from fullframe.v1.vision_pb2_grpc import VisionServiceStub
from tests.pictures import encode, pixels
from tests.serving import Running, eventually, serving, serving_here, start, stub

SMALL = pb.Image(encoded=encode(pixels(16, 16)))
MEDIUM = pb.Image(encoded=encode(pixels(400, 400), "JPEG"))
LARGE = pb.Image(encoded=encode(pixels(1000, 1000), "JPEG"))
NAMES = ("", "fullframe.v1.VisionService", "tiny")
SERVING, NOT_SERVING, UNKNOWN = 1, 2, 3


@pytest.fixture
def health(server: Running) -> Iterator[health_pb2_grpc.HealthStub]:
    with grpc.insecure_channel(server.target) as channel:
        yield health_pb2_grpc.HealthStub(channel)


def check(client: health_pb2_grpc.HealthStub, name: str) -> int:
    return int(client.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status)


class Watcher:
    """One Watch, its statuses as they come."""

    def __init__(self, client: health_pb2_grpc.HealthStub, name: str) -> None:
        self.seen: list[int] = []
        self._call = client.Watch(health_pb2.HealthCheckRequest(service=name))
        self._thread = threading.Thread(target=self._read)
        self.seen.append(next(self._call).status)
        self._thread.start()

    def leave(self) -> None:
        self._call.cancel()
        self._thread.join(10)

    def join(self) -> list[int]:
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.seen

    def _read(self) -> None:
        with suppress(grpc.RpcError):  # that of leaving
            for response in self._call:
                self.seen.append(response.status)


@pytest.mark.parametrize("name", NAMES)
def test_health_of_the_server_and_of_each_model(health: health_pb2_grpc.HealthStub, name: str) -> None:
    assert check(health, name) == SERVING


def test_health_of_what_is_not_served(health: health_pb2_grpc.HealthStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        check(health, "nobody")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    watcher = Watcher(health, "nobody")
    watcher.leave()
    assert watcher.seen == [UNKNOWN]


def test_reflection_lists_the_services(server: Running) -> None:
    with grpc.insecure_channel(server.target) as channel:
        request = reflection_pb2.ServerReflectionRequest
        requests = [request(list_services=""), request(file_containing_symbol="fullframe.v1.VisionService")]
        client = reflection_pb2_grpc.ServerReflectionStub(channel)
        services, source = client.ServerReflectionInfo(iter(requests))
    assert {service.name for service in services.list_services_response.service} == {
        "fullframe.v1.VisionService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert b"PredictStream" in source.file_descriptor_response.file_descriptor_proto[0]


def test_watchers_hear_of_draining(tiny_model: Path) -> None:
    """All of them, also when one of several on the same name has left; and none of them holds up the end."""
    with (
        serving(models=f"tiny={tiny_model}", drain_delay=1, grace=60) as running,
        grpc.insecure_channel(running.target) as channel,
        stub(running.target) as client,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        leaver, *watchers = [Watcher(health, name) for name in ("", *NAMES, "", "nobody")]
        leaver.leave()
        running.stop()
        running.wait_for("draining", step="not serving")
        assert [check(health, name) for name in NAMES] == [NOT_SERVING] * 3
        # Until balancers have noticed, calls are answered.
        assert client.Classify(pb.ClassifyRequest(images=[SMALL])).results[0].info.status.code == 0
        started = time.monotonic()
        *known, unknown = [watcher.join() for watcher in watchers]
        assert known == [[SERVING, NOT_SERVING]] * 4
        assert unknown == [UNKNOWN]
        running.wait_for("stop", clean=True)
        assert time.monotonic() - started < 10


def test_health_follows_the_workers(tiny_model: Path) -> None:
    """When a worker is gone, health says so, to those who ask and to those who watch."""
    with serving_here(models=f"tiny={tiny_model}") as here, grpc.insecure_channel(here.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watcher = Watcher(health, "tiny")
        assert check(health, "tiny") == SERVING
        here.plane.close()
        assert check(health, "tiny") == check(health, "") == NOT_SERVING
        eventually(lambda: watcher.seen == [SERVING, NOT_SERVING])
        watcher.leave()


def test_sigterm_under_load_loses_no_answer(slow_model: Path) -> None:
    """Every call that the server had begun is answered; the others are told to go elsewhere.

    Those that had reached gRPC's core alone hear CANCELLED from it (https://github.com/grpc/grpc/issues/41785).
    """

    async def caller(client: Any, codes: list[str], stop: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                response = await client.Classify(pb.ClassifyRequest(images=[SMALL, MEDIUM]))
                codes += [str(result.info.status.code) for result in response.results]
            except grpc.aio.AioRpcError as error:
                codes.append(error.code().name)
                await asyncio.sleep(0.01)

    async def load(running: Running) -> tuple[list[str], list[str]]:
        codes: list[str] = []
        stop = asyncio.Event()
        options = [("grpc.enable_retries", 0)]
        async with grpc.aio.insecure_channel(running.target, options=options) as channel:
            client = VisionServiceStub(channel)
            callers = [asyncio.create_task(caller(client, codes, stop)) for _ in range(8)]
            requests = [pb.PredictStreamRequest(request_id=str(i), image=MEDIUM) for i in range(6)]
            stream = asyncio.create_task(_ids(client.PredictStream(iter(requests))))
            while len(codes) < 8:
                await asyncio.sleep(0.01)
            running.stop()
            await asyncio.to_thread(running.wait_for, "stop", clean=True)
            stop.set()
            await asyncio.gather(*callers)
            return codes, await stream

    with serving(models=str(slow_model), log_level="debug") as running:
        codes, streamed = asyncio.run(load(running))
    assert {"0", "UNAVAILABLE"} <= set(codes) <= {"0", "UNAVAILABLE", "CANCELLED"}
    begun = running.events("call", rpc="Classify")
    assert {call["code"] for call in begun} == {"OK"}
    assert codes.count("0") == 2 * len(begun) >= 16
    assert sorted(streamed) == list("012345")
    refusing, stopped = running.events("draining", step="refusing calls")[0], running.events("stop")[0]
    assert refusing["calls"] > 0 and stopped["clean"]


async def _ids(stream: Any) -> list[str]:
    return [response.request_id async for response in stream]


def test_an_idle_stream_does_not_hold_up_the_end(tiny_model: Path) -> None:
    with serving(models=str(tiny_model), grace=60) as running, stub(running.target) as client:
        done = threading.Event()

        def requests() -> Iterator[pb.PredictStreamRequest]:
            yield pb.PredictStreamRequest(request_id="only", image=SMALL)
            done.wait(30)

        stream = client.PredictStream(requests())
        assert next(stream).request_id == "only"
        started = time.monotonic()
        running.stop()
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        done.set()
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert caught.value.details() == "shutting down: send what has no answer yet to another server"
        running.wait_for("stop", clean=True)
        assert time.monotonic() - started < 10


def test_an_endless_stream_ends_within_the_grace(tiny_model: Path) -> None:
    """It is cut between two requests: whatever was read is answered."""
    with serving(models=str(tiny_model), grace=2) as running, stub(running.target) as client:
        count = 0

        def requests() -> Iterator[pb.PredictStreamRequest]:
            nonlocal count
            while True:
                yield pb.PredictStreamRequest(request_id=str(count), image=SMALL)
                count += 1
                time.sleep(0.01)

        ids = []
        with pytest.raises(grpc.RpcError) as caught:
            for response in client.PredictStream(requests()):
                ids.append(int(response.request_id))
                if len(ids) == 20:
                    running.stop()
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert sorted(ids) == list(range(len(ids)))
        assert len(ids) > 50  # it was served for half the grace
        running.wait_for("stop", clean=True)


def test_what_outlasts_the_grace_is_cut_off(slow_model: Path) -> None:
    with serving(exit_code=1, models=str(slow_model), workers=1, grace=0.2) as running, stub(running.target) as client:
        calls = [client.Classify.future(pb.ClassifyRequest(images=[LARGE] * 4)) for _ in range(2)]
        time.sleep(0.3)
        running.stop()
        assert {call.code() for call in calls} <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        assert running.process.wait(5) == 1


def test_a_second_signal_ends_it_at_once(slow_model: Path) -> None:
    with serving(exit_code=1, models=str(slow_model), workers=1, grace=60) as running, stub(running.target) as client:
        call = client.Classify.future(pb.ClassifyRequest(images=[LARGE] * 30))
        time.sleep(0.5)
        running.stop(signal.SIGINT)
        running.wait_for("draining", step="refusing calls")
        started = time.monotonic()
        running.stop(signal.SIGINT)
        assert running.process.wait(5) == 1
        assert time.monotonic() - started < 2
        assert call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def test_a_taken_port_is_named(server: Running, tiny_model: Path) -> None:
    for setting, port in (("port", server.port), ("metrics_port", server.metrics_port)):
        with pytest.raises(CannotListen) as caught, serving_here(models=str(tiny_model), **{setting: port}):
            pass
        option = "--" + setting.replace("_", "-")
        assert str(caught.value) == (
            f"cannot listen on 127.0.0.1:{port}: it is taken, not allowed or no address of this machine; "
            f"choose another {option} (0: any)"
        )


def test_a_port_can_be_had_again_at_once(tiny_model: Path) -> None:
    with serving_here(models=str(tiny_model)) as first:
        port = first.bound.port
    with serving_here(models=str(tiny_model), port=port) as second, stub(second.target) as client:
        assert client.ListModels(pb.ListModelsRequest()).models


def test_ipv6(tiny_model: Path) -> None:
    if not socket.has_ipv6 or not Path("/proc/net/if_inet6").read_text():
        pytest.skip("no IPv6 on this machine")
    with serving_here(models=str(tiny_model), host="::1") as here, stub(here.target) as client:
        assert here.target.startswith("[::1]:")
        assert client.ListModels(pb.ListModelsRequest()).models


def test_logs_are_one_json_object_a_line(tiny_model: Path) -> None:
    with serving(models=f"tiny={tiny_model}", log_level="debug") as running, stub(running.target) as client:
        client.Classify(pb.ClassifyRequest(images=[SMALL, pb.Image(encoded=b"?")]))
        with pytest.raises(grpc.RpcError):
            client.Classify(pb.ClassifyRequest(images=[SMALL], top_k=-1))
        running.wait_for("call", code="INVALID_ARGUMENT")
    assert not running.other
    names = [line["event"] for line in running.log]
    assert names == ["start", "ready", "call", "call", "draining", "draining", "draining", "stop"]
    assert running.log[1]["models"] == ["tiny/1"]
    good, bad = running.events("call")
    assert (good["level"], bad["level"]) == ("debug", "info")
    for name, value in {"rpc": "Classify", "code": "OK", "images": 2, "failed": 1, "pixels": 256}.items():
        assert good[name] == value
    assert bad["message"].startswith("top_k is -1")
    assert all({"time", "level", "event"} <= set(line) for line in running.log)


def test_logs_for_people(tiny_model: Path) -> None:
    running = start(models=f"tiny={tiny_model}", log_format="text")
    while not any("ready" in line for line in running.other):
        assert running.process.poll() is None
        time.sleep(0.05)
    running.stop(signal.SIGINT)
    assert running.process.wait(20) == 0
    [line] = [line for line in running.other if " ready " in line]
    with pytest.raises(ValueError):
        json.loads(line)
    assert "port=" in line and "info" in line
