"""The command as a whole: its help, what it imports for that, and what it says where an extra is missing."""

import subprocess
import sys

import pytest

from fullframe import __version__
from fullframe.cli import COMMANDS
from tests.cli.command import environment, run, run_here

HEAVY = {"numpy", "onnxruntime", "torch", "onnx", "grpc", "google.protobuf", "pydantic", "pyvips", "rich", "skimage"}

# Runs `fullframe` in an interpreter that lacks a package.
WITHOUT = """
import sys
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] == {missing!r} else self.finder.find_spec(name, *rest)
sys.meta_path[:] = map(Hiding, sys.meta_path)
sys.argv = ["fullframe", *{arguments}]
from fullframe.cli import main
main()
"""


def modules_after(program: str) -> set[str]:
    program = f"import sys\ntry:\n    {program}\nexcept SystemExit:\n    pass\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_help_names_every_command() -> None:
    text = run("--help").stdout
    for name, (_, line) in COMMANDS.items():
        assert f"  {name} " in text
        assert line in text
    assert run("--version").stdout == f"fullframe {__version__}\n"
    assert text == run(code=2).stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_says_of_itself_what_the_list_says(name: str) -> None:
    text = " ".join(run_here(name, "--help").stdout.split())
    assert COMMANDS[name][1] in text


def test_help_imports_nothing_heavy() -> None:
    help_ = "sys.argv = ['fullframe', '--help']; from fullframe.cli import main; main()"
    assert not modules_after(help_) & HEAVY
    assert not modules_after("import fullframe") & HEAVY
    # The control: a command's own module may need what it needs.
    assert "pydantic" in modules_after("import fullframe.cli.serve")


def test_a_client_needs_no_engine_and_an_engine_no_transport() -> None:
    asked = modules_after("from fullframe import Client")
    assert "grpc" in asked
    assert not asked & {"onnxruntime", "torch", "pyvips", "onnx"}
    loaded = modules_after("from fullframe import load; load(engine='onnx').close()")
    assert "onnxruntime" in loaded
    assert not loaded & {"grpc", "torch", "onnx"}


@pytest.mark.parametrize(
    "missing, arguments, complaint",
    [
        ("skimage", ["demo"], "pip install 'fullframe[demo]'; or name your own"),
        ("torch", ["train", "x", "-o", "run"], "this needs torch, of the learn extra: pip install 'fullframe[learn]'"),
    ],
)
def test_a_missing_extra_is_named(missing: str, arguments: list[str], complaint: str) -> None:
    program = WITHOUT.format(missing=missing, arguments=arguments)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment())
    assert done.returncode == 1
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1
