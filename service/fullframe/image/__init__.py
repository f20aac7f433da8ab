"""Bytes -> pixels: formats, limits, orientation and colour."""

from fullframe.image.colour import Pixels
from fullframe.image.decode import Picture, encode_png, open_encoded
from fullframe.image.encoded import OnDisk
from fullframe.image.formats import SUPPORTED
from fullframe.image.limits import Limits, own_limits
from fullframe.image.overlay import draw_class_map
from fullframe.image.reduce import reduced
from fullframe.image.regions import Checkpoint, Regions
from fullframe.image.sheet import Tile, draw_sheet, thumbnail
from fullframe.image.source import ImageSource, open_raw, open_source

__all__ = [
    "SUPPORTED",
    "Checkpoint",
    "ImageSource",
    "Limits",
    "OnDisk",
    "Picture",
    "Pixels",
    "Regions",
    "Tile",
    "draw_class_map",
    "draw_sheet",
    "encode_png",
    "open_encoded",
    "open_raw",
    "open_source",
    "own_limits",
    "reduced",
    "thumbnail",
]
