"""How a table's features were made, as its metadata tells it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Final, Self

from fullframe.errors import InvalidInput

PREFIX: Final = "fullframe."
_VERSION: Final = "1"


@dataclass(frozen=True)
class Recipe:
    """What must stay the same from a table's first row to its last.

    Attributes:
        root: the folder that the paths are relative to.
        model, version: as they were asked for or served.
        digest: SHA-256 of the model's file.
        pooling: as engine.pooling spells it.
        normalize: whether features have unit length.
        length: values in a feature.
        compute: what the maps are computed in; "" where only the server knows.
    """

    root: str
    model: str
    version: str
    digest: str
    pooling: str
    normalize: bool
    length: int
    compute: str

    @property
    def title(self) -> str:
        """The model, for people."""
        return f"{self.model} version {self.version} ({self.digest[:12]})"

    def differences(self, there: Self) -> list[str]:
        """What would not be as it is in `there`, in words."""
        found = []
        if self.digest != there.digest:
            found.append(f"model {there.title}, not {self.title}")
        for name in ("pooling", "normalize", "root"):
            old, new = getattr(there, name), getattr(self, name)
            if old != new:
                found.append(f"{name} {old}, not {new}")
        if self.compute and there.compute and self.compute != there.compute:
            found.append(f"compute {there.compute}, not {self.compute}")
        return found

    def to_metadata(self) -> dict[str, str]:
        """What from_metadata reads back; all but texts as JSON."""
        given = {"table": _VERSION, **asdict(self)}
        return {PREFIX + key: value if isinstance(value, str) else json.dumps(value) for key, value in given.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Self:
        """Raises InvalidInput for the metadata of something else."""
        version = metadata.get(PREFIX + "table")
        if version is None:
            raise InvalidInput("it is no table that `fullframe embed` made", "table")
        if version != _VERSION:
            raise InvalidInput(f"it is a table of version {version!r}; this release reads {_VERSION!r}", "table")
        try:
            texts = {field.name: metadata[PREFIX + field.name] for field in fields(cls)}
            return cls(**{**texts, **{key: json.loads(texts[key]) for key in ("normalize", "length")}})
        except (KeyError, ValueError) as error:
            raise InvalidInput(f"its metadata is incomplete: {error}", "table") from error
