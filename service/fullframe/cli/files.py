"""Files, folders and globs on the command line -> the image files meant."""

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import typer

from fullframe.cli import complain

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
            found = [file_at(argument, path) for path in paths_inside(argument, partial(complain_of, argument))]
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


def complain_of(folder: str, path: str, error: OSError) -> None:
    """Name a folder below another that can't be read."""
    complain(f"{Path(folder, path)}: cannot read the folder: {error.strerror}")


def paths_inside(folder: str, unreadable: Callable[[str, OSError], object]) -> Iterator[str]:
    """The images in a folder and those below it: their paths relative to it as `text_of` has them, in order.

    Nothing whose name begins with a dot counts, and links to folders are not followed. The names in one folder and in
    those above it are held at a time.

    Args:
        unreadable: told of each folder below it that can't be read, and why.

    Raises:
        OSError: the folder itself can't be read.
    """
    above = [("", iter(_names_in(folder)))]
    while above:
        prefix, names = above[-1]
        if (name := next(names, None)) is None:
            above.pop()
        elif not name.endswith("/"):
            yield prefix + name
        else:
            try:
                above.append((prefix + name, iter(_names_in(file_at(folder, prefix + name)))))
            except OSError as error:
                unreadable(prefix + name, error)


def _names_in(folder: str) -> list[str]:
    """The images and folders in a folder, as `text_of` has them, folders with a slash at the end; in order."""
    with os.scandir(folder) as entries:
        names = [_name_of(entry) for entry in entries if not entry.name.startswith(".")]
    return sorted(name for name in names if name)


def _name_of(entry: "os.DirEntry[str]") -> str:
    if entry.is_dir(follow_symlinks=False):
        return text_of(entry.name) + "/"
    if Path(entry.name).suffix.lower() not in SUFFIXES:
        return ""
    try:
        return "" if entry.is_symlink() and entry.is_dir() else text_of(entry.name)
    except OSError:  # a link to itself: asking about it will say so
        return text_of(entry.name)


_ESCAPE: Final = re.compile(r"\\x([0-9a-f]{2})")
_ESCAPE_BYTES: Final = re.compile(_ESCAPE.pattern.encode())


def text_of(name: str) -> str:
    r"""A file's name as Unicode text: each byte that is not UTF-8 as \xNN, and a backslash before xNN as \x5c."""
    text = _ESCAPE.sub(r"\\x5cx\1", name)
    return text if text.isascii() else os.fsencode(text).decode(errors="backslashreplace")


def file_at(folder: str, text: str) -> str:
    """The file whose path below a folder is that text."""
    name = _ESCAPE_BYTES.sub(lambda escape: bytes.fromhex(escape[1].decode()), text.encode())
    return str(Path(folder, os.fsdecode(name)))


def check_output(path: Path | None, suffixes: str | tuple[str, ...], option: str) -> None:
    """Raise typer.BadParameter, before any work is done, for an output file that could not be written."""
    if path is None:
        return
    if not path.name.lower().endswith(suffixes):
        ends = suffixes if isinstance(suffixes, str) else " or ".join(suffixes)
        raise typer.BadParameter(f"{str(path)!r} must end in {ends}", param_hint=option)
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {str(path.parent)!r}", param_hint=option)
    if path.is_dir():
        raise typer.BadParameter(f"{str(path)!r} is a folder; name a file", param_hint=option)
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"the folder {str(path.absolute().parent)!r} can't be written to", param_hint=option)
