"""The `fullframe` command: which subcommands there are, and how their failures end."""

import sys
from importlib import import_module
from typing import Annotated, Any, Final, NoReturn

import typer
from typer.core import TyperGroup

from fullframe import __version__
from fullframe.errors import FullframeError, plainly

# Name: where it is, and the line `fullframe --help` has for it. A subcommand is imported when it is run.
COMMANDS: Final = {
    "serve": ("fullframe.cli.serve:serve", "Serve models over gRPC until SIGTERM or Ctrl-C."),
    "classify": ("fullframe.cli.ask:classify", "Name the most probable classes of images."),
    "embed": ("fullframe.cli.ask:embed", "Compute pooled features of images."),
    "similar": ("fullframe.cli.similar:similar", "Find the images of a table that are most like another."),
    "models": ("fullframe.cli.models:models", "List a server's models, or those in files and folders."),
    "inspect": ("fullframe.cli.models:inspect", "Show a model's contract: labels, geometry, training record."),
    "probe": ("fullframe.cli.serve:probe", "Ask a server whether it can answer; exit code 0 if so, else 1."),
    "demo": ("fullframe.cli.demo:demo", "Start a server and ask it about pictures of many sizes."),
    "train": ("fullframe.learn.commands:train", "Train a network on a folder or tar of classes."),
    "export": ("fullframe.learn.commands:export", "Turn trained weights into a served model, checked at many sizes."),
    "convert": ("fullframe.cli.convert:convert", "Make any convolutional classifier a model that is served."),
    "quantize": ("fullframe.cli.quantize:quantize", "Make a model's int8 copy, faster on a CPU."),
    "evaluate": ("fullframe.learn.commands:evaluate", "Measure a model's accuracy at several sizes."),
}

_EXTRAS: Final = {
    **dict.fromkeys(("torch", "PIL", "onnxscript", "safetensors", "matplotlib"), "learn"),
    "pyarrow": "table",
}
"""The extra that a package belongs to."""


class _Commands(TyperGroup):
    """Runs a subcommand, imported only now, and ends on a failure with one line and exit code 1."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, listed, rest = super().resolve_command(ctx, args)
        return name, listed and _load(str(name)), rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = plainly(error.message)
            raise
        except FullframeError as error:
            fail(str(error))
        except OSError as error:
            fail(in_words(error))
        except ModuleNotFoundError as error:
            if (extra := _EXTRAS.get((error.name or "").partition(".")[0])) is None:
                raise
            fail(f"this needs {error.name}, of the {extra} extra: pip install 'fullframe[{extra}]'")


def in_words(error: Exception) -> str:
    """What went wrong, and with which file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


def fail(message: str) -> NoReturn:
    """End with a failure that is the user's to mend."""
    complain(message)
    raise typer.Exit(1)


def complain(message: str) -> None:
    """One line on stderr."""
    print(f"fullframe: {message}", file=sys.stderr)


def main() -> None:
    """Run the command line and exit."""
    typer.main.get_command(_app())(prog_name="fullframe")


# Plain help: boxes leave long options no room.
_STYLE: Final[dict[str, Any]] = {
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}


def _app() -> typer.Typer:
    app = typer.Typer(cls=_Commands, no_args_is_help=True, **_STYLE)

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
        ] = False,
    ) -> None:
        """Image features and classes computed on the full frame, whatever its size."""

    for name, (_, line) in COMMANDS.items():
        app.command(name, help=line)(lambda: None)
    return app


def _load(name: str) -> Any:
    module, _, function = COMMANDS[name][0].partition(":")
    one = typer.Typer(add_completion=False, **_STYLE)
    one.command(name)(getattr(import_module(module), function))
    return typer.main.get_command(one)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fullframe {__version__}")
        raise typer.Exit()
