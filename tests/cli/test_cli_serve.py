"""`fullframe serve`, `probe` and `demo`: servers started, asked and stopped from the command line."""

import json
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fullframe.client import Client
from fullframe.errors import Unavailable
from tests.cli.command import COMMAND, environment, run
from tests.pictures import encode, pixels
from tests.serving import Running


@contextmanager
def served(*options: object, **settings: str) -> Iterator[str]:
    """`fullframe serve` on a free port, interrupted in the end as by Ctrl-C."""
    arguments = ["serve", "--port", "0", "--metrics-port", "-1", "--log-format", "json", *map(str, options)]
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True, env=environment(**settings))
    try:
        assert process.stderr
        events = (json.loads(line) for line in process.stderr)
        ready = next(event for event in events if event["event"] == "ready")
        yield f"127.0.0.1:{ready['port']}"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_serve_and_probe(tiny_model: Path, slow_model: Path) -> None:
    with served("--model", f"small={tiny_model}", "--model", slow_model, "--max-megapixels", "0.01") as target:
        with Client(target) as client:
            assert [(model.name, model.default) for model in client.models()] == [("small", True), ("slow", False)]
        assert run("probe", target).stdout == "serving\n"
        assert run("probe", target, "--model", "small").stdout == "serving\n"
        assert "nothing of that name" in run("probe", target, "--model", "other", code=1).stderr
    assert "no server can be reached" in run("probe", target, code=1).stderr


def test_settings_come_from_the_environment_and_options_come_first(tiny_model: Path, slow_model: Path) -> None:
    environment_ = {"FULLFRAME_MODELS": f"one={tiny_model},two={slow_model}", "FULLFRAME_PORT": "1"}
    with served(**environment_) as target, Client(target) as client:
        assert [model.name for model in client.models()] == ["one", "two"]
    with served("--model", f"three={tiny_model}", **environment_) as target, Client(target) as client:
        assert [model.name for model in client.models()] == ["three"]


def test_probe_asks_where_serve_listens(server: Running) -> None:
    for host in ("127.0.0.1", "0.0.0.0"):
        asked = environment(FULLFRAME_PORT=str(server.port), FULLFRAME_HOST=host)
        assert run("probe", env=asked).stdout == "serving\n"
    assert "reached at 127.0.0.1:1:" in run("probe", env=environment(FULLFRAME_PORT="1"), code=1).stderr


def test_what_cannot_be_served(tiny_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = run("serve", "--model", tiny_model, "--port", port, "--metrics-port", "-1", code=1)
        assert f"cannot listen on 127.0.0.1:{port}" in refused.stderr
    assert "no model at 'missing'" in run("serve", "--model", "missing", "--port", 0, code=1).stderr
    assert "less than or equal to 65535" in run("serve", "--port", 99999, code=2).stderr
    assert (
        "'--engine': 'magic' is not one of 'auto', 'onnx', 'torch'" in run("serve", "--engine", "magic", code=2).stderr
    )
    refused = run("serve", "--engine", "onnx", "--compute", "float16", code=1)
    assert "the onnx engine computes in float32 alone" in refused.stderr


def test_demo_with_own_files(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "wide.png").write_bytes(encode(pixels(3, 200)))
    (tmp_path / "text.jpg").write_text("no picture")
    done = run("demo", tmp_path / "wide.png", tmp_path / "text.jpg", "--model", f"tiny={tiny_model}", code=1)
    target = re.search(r"127\.0\.0\.1:\d+", done.stdout)
    assert target
    assert f"{tmp_path}/wide.png" in done.stdout
    assert "200x3" in done.stdout
    assert f"{tmp_path}/text.jpg: this is text" in done.stderr
    with Client(target[0], retries=0) as client, pytest.raises(Unavailable):  # it has stopped
        client.models()
    assert "no model at 'missing'" in run("demo", tmp_path / "wide.png", "--model", "missing", code=1).stderr


def test_demo_of_many_sizes(tiny_model: Path) -> None:
    table = run("demo", "--model", tiny_model).stdout
    sizes = [tuple(map(int, size)) for size in re.findall(r" (\d+)x(\d+) ", table)]
    assert (1, 1) in sizes
    assert (451, 300) in sizes
    assert (1411, 1411) in sizes
    assert max(width * height for width, height in sizes) > 10_000_000
    assert len(sizes) == 9
