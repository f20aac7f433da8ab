"""The container image, built and run for real: what is in it, and a server inside that answers a client outside.

Needs docker, or CONTAINER_TOOL naming a script with `build CONTEXT TAG` and `run TAG COMMAND...` on the host's network.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fullframe import Client
from tests.pictures import pixels

pytestmark = [pytest.mark.container, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parent.parent
TAG = "localhost/fullframe-test"
MEGABYTES = 450


def build_command() -> list[str]:
    if script := os.environ.get("CONTAINER_TOOL"):
        return ["bash", script, "build", str(ROOT), TAG]
    if shutil.which("docker") and subprocess.run(["docker", "info"], check=False, capture_output=True).returncode == 0:
        return ["docker", "build", "--tag", TAG, str(ROOT)]
    pytest.skip("no docker engine is running, and CONTAINER_TOOL is not set")


def run_command(*command: str) -> list[str]:
    if script := os.environ.get("CONTAINER_TOOL"):
        return ["bash", script, "run", TAG, *command]
    return [
        "docker",
        "run",
        "--rm",
        "--init",
        "--read-only",
        "--network=host",
        "--entrypoint",
        command[0],
        TAG,
        *command[1:],
    ]


def output(*command: str) -> str:
    return subprocess.run(run_command(*command), capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module", autouse=True)
def image() -> None:
    subprocess.run(build_command(), check=True)


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = run_command("fullframe", "serve", "--host", "127.0.0.1", "--port", str(port), "--metrics-port", "-1")
    process = subprocess.Popen(command)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        subprocess.run(["pkill", "--full", f"^/opt/fullframe/bin/python.* --port {port} "], check=False)
        process.wait(60)


def test_a_server_inside_answers_a_client_outside(target: str) -> None:
    with Client(target, timeout=60, wait_for_ready=True) as client:
        answer = client.predict(pixels(61, 97), poolings=["gem(3)"], class_map=True)
        assert client.health()
    assert (answer.height, answer.width, len(answer.classes)) == (61, 97, 5)


def test_its_health_check_is_true_only_while_it_serves(target: str) -> None:
    deadline = time.monotonic() + 60
    while subprocess.run(run_command("fullframe", "probe", target), check=False).returncode:
        assert time.monotonic() < deadline
    assert subprocess.run(run_command("fullframe", "probe", "127.0.0.1:1"), check=False).returncode == 1


def test_it_is_small_and_runs_as_nobody() -> None:
    assert output("id", "--user").strip() == "10001"
    # apt's caches are the base's: the official one has none.
    command = run_command("du", "-skx", "--exclude=/var/cache/apt", "--exclude=/var/lib/apt", "/")
    listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    kibibytes = int(listing.split()[0])
    assert kibibytes * 1.024e-3 <= MEGABYTES
    assert "torch" not in output("sh", "-c", "ls /opt/fullframe/lib/python3*/site-packages")
