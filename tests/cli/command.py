"""The command line as a user runs it, in a process of its own or, where that is all the same, in this one."""

import contextlib
import io
import os
import subprocess
import sys
from typing import Any
from unittest import mock

from fullframe.cli import main
from fullframe.settings import PREFIX

COMMAND = [sys.executable, "-m", "fullframe"]


def environment(**extra: str) -> dict[str, str]:
    """This process's, without settings of a server."""
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)} | extra


def run(*arguments: object, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `fullframe` to its end, which must be exit code `code`, and never a traceback."""
    options = {"capture_output": True, "text": True, "timeout": 120, "env": environment(), **options}
    done = subprocess.run([*COMMAND, *map(str, arguments)], check=False, **options)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def run_here(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """The same in this process: quicker, for what needs no fresh one."""
    stdout, stderr = io.StringIO(), io.StringIO()
    argv = ["fullframe", *map(str, arguments)]
    with (
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        mock.patch.object(sys, "argv", argv),
    ):
        try:
            main()
            ended: Any = None
        except SystemExit as end:
            ended = end.code
    done = subprocess.CompletedProcess(argv, ended or 0, stdout.getvalue(), stderr.getvalue())
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
