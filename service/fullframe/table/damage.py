"""Parquet files that turn out to be damaged, or to be something else, while they are read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from fullframe.errors import InvalidInput


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises InvalidInput for what Arrow says against the file; errors of the disk are OSError as ever."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise InvalidInput(f"{path} is no Parquet file, or is damaged", "table") from error
