"""What Prometheus scrapes of a real server: calls and images by what became of them, every image accounted for."""

import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from fullframe.v1 import vision_pb2 as pb
from tests.pictures import encode, pixels
from tests.serving import InProcess, eventually, serving, serving_here, stub

SMALL = pb.Image(encoded=encode(pixels(16, 16)))
LARGE = pb.Image(encoded=encode(pixels(1000, 1000), "JPEG"))  # the slow model takes about half a second


def scrape(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_metrics(tiny_model: Path) -> None:
    with serving(models=f"tiny={tiny_model}") as running, stub(running.target) as client:
        client.Classify(pb.ClassifyRequest(images=[SMALL, pb.Image(encoded=b"?"), SMALL]))
        list(client.PredictStream(iter([pb.PredictStreamRequest(image=SMALL, model=pb.ModelRef(name="evil"))])))
        for name in ("a", "b", "c"):
            with pytest.raises(grpc.RpcError):
                client.Classify(pb.ClassifyRequest(model=pb.ModelRef(name=name), images=[SMALL]))
        found = scrape(running.metrics_port)
    assert found['fullframe_requests_total{code="OK",rpc="Classify"}'] == 1
    assert found['fullframe_requests_total{code="NOT_FOUND",rpc="Classify"}'] == 3
    assert found['fullframe_images_total{code="OK",model="tiny"}'] == 2
    assert found['fullframe_images_total{code="INVALID_ARGUMENT",model="tiny"}'] == 1
    assert found['fullframe_images_total{code="NOT_FOUND",model=""}'] == 1
    assert found['fullframe_request_seconds_count{rpc="Classify"}'] == 4
    for stage in ("decode", "queue", "compute"):
        assert found[f'fullframe_image_seconds_count{{stage="{stage}"}}'] == 2
    assert found["fullframe_image_pixels_sum"] == 2 * 16 * 16
    assert found["fullframe_pixels_in_flight"] == found["fullframe_images_queued"] == 0
    assert not [name for name in found if "evil" in name], "a label from a caller's text"


@pytest.fixture
def here(slow_model: Path) -> Iterator[InProcess]:
    with serving_here(models=str(slow_model), workers=1, max_megapixels_in_flight=4, metrics_port=0) as it:
        yield it


def ends(found: dict[str, float]) -> dict[str, float]:
    """The images that came to each end."""
    prefix = 'fullframe_images_ended_total{end="'
    return {name.removeprefix(prefix)[:-2]: value for name, value in found.items() if name.startswith(prefix)}


def test_every_image_is_accounted_for_in_every_scrape(here: InProcess) -> None:
    """While images are answered, found damaged and given up, and a request finds no room."""
    port = here.bound.metrics_port
    assert port
    scrapes: list[dict[str, float]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            scrapes.append(scrape(port))

    def running() -> bool:
        return here.plane.counters().running == 1

    watcher = threading.Thread(target=watch)
    watcher.start()
    damaged = pb.Image(encoded=LARGE.encoded[: len(LARGE.encoded) // 2])
    with stub(here.target) as client:
        held = client.Classify.future(pb.ClassifyRequest(images=[LARGE, LARGE]))
        eventually(running)
        scrapes.append(scrape(port))
        given_up = client.Classify.future(pb.ClassifyRequest(images=[SMALL]))
        eventually(lambda: here.plane.counters().queued == 2)
        given_up.cancel()
        eventually(lambda: here.plane.counters().cancelled == 1)
        scrapes.append(scrape(port))
        with pytest.raises(grpc.RpcError) as refusal:
            client.Classify(pb.ClassifyRequest(images=[LARGE] * 4))
        assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert held.result()
        client.Classify(pb.ClassifyRequest(images=[SMALL, damaged, SMALL]))
        client.Classify(pb.ClassifyRequest(images=[pb.Image(encoded=b"?")]))  # never admitted
    eventually(lambda: here.plane.counters().running == 0)
    scrapes.append(scrape(port))
    done.set()
    watcher.join()
    for found in scrapes:
        here_now = sum(found[f"fullframe_images_{state}"] for state in ("queued", "running", "ready"))
        assert found["fullframe_images_admitted_total"] == here_now + sum(ends(found).values())
    assert len({found["fullframe_images_admitted_total"] for found in scrapes}) > 2, "the scrapes saw it happen"
    last = max(scrapes, key=lambda found: sum(ends(found).values()))
    assert ends(last) == {"finished": 4, "failed": 1, "cancelled": 1, "expired": 0}
    assert last["fullframe_requests_refused_total"] == 1


def test_who_gives_up_at_the_deadline_is_late_and_who_does_before_is_gone(here: InProcess) -> None:
    assert here.bound.metrics_port
    with stub(here.target) as client:
        held = client.Classify.future(pb.ClassifyRequest(images=[LARGE] * 3))
        eventually(lambda: here.plane.counters().running == 1)
        late = [client.Classify.future(pb.ClassifyRequest(images=[SMALL]), timeout=0.02 * n) for n in range(1, 8)]
        gone = client.Classify.future(pb.ClassifyRequest(images=[SMALL]), timeout=60)
        for call in late:
            with pytest.raises(grpc.RpcError):
                call.result()
        eventually(lambda: here.server.calls.calls == 2)
        counters = here.plane.counters()
        assert counters.created - counters.expired == 4, "held and gone: all the others were late"
        gone.cancel()
        assert held.result()
    eventually(lambda: here.server.calls.calls == 0)
    found = scrape(here.bound.metrics_port)
    assert found['fullframe_requests_total{code="CANCELLED",rpc="Classify"}'] == 1
    assert ends(found)["cancelled"] == 1
    # The first may be over before they are admitted, or even begun.
    assert 0 < ends(found)["expired"] <= len(late)
    assert 0 < found['fullframe_requests_total{code="DEADLINE_EXCEEDED",rpc="Classify"}'] <= len(late)
