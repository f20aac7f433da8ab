"""Files, folders and globs on the command line -> the image files meant."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import typer

SUFFIXES: Final = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm")
)
"""What counts as an image inside a folder."""


def find_images(arguments: Sequence[str]) -> list[str]:
    """Every file meant, in the arguments' order, folders and globs in the order of names.

    A file that is named counts whatever it is, even if it does not exist: asking about it will say so.

    Raises:
        typer.BadParameter: a folder or glob without a single image.
    """
    files: list[str] = []
    for argument in arguments:
        if Path(argument).is_dir():
            found = list(_inside(argument))
            if not found:
                raise typer.BadParameter(f"no images in the folder {argument!r} ({', '.join(sorted(SUFFIXES))})")
        elif not Path(argument).exists() and glob.has_magic(argument):
            names = glob.iglob(argument, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
            found = sorted(name for name in names if Path(name).is_file())
            if not found:
                raise typer.BadParameter(f"no file matches {argument!r}")
        else:
            found = [argument]
        files += found
    return files


def _inside(folder: str) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield str(Path(parent, name))


def check_output(path: Path | None, suffix: str, option: str) -> None:
    """Raise typer.BadParameter, before any work is done, for an output file that could not be written."""
    if path is None:
        return
    if path.suffix.lower() != suffix:
        raise typer.BadParameter(f"{str(path)!r} must end in {suffix}", param_hint=option)
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {str(path.parent)!r}", param_hint=option)
    if path.is_dir():
        raise typer.BadParameter(f"{str(path)!r} is a folder; name a file", param_hint=option)
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"the folder {str(path.absolute().parent)!r} can't be written to", param_hint=option)
