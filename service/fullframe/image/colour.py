"""Any colours that libvips loads -> 8-bit sRGB."""

from functools import lru_cache

import numpy as np
import pyvips
from numpy.typing import NDArray

from fullframe.image.formats import VIPS_ERRORS
from fullframe.image.limits import refused

Pixels = NDArray[np.uint8]
"""uint8 [H, W, 3], RGB, C-contiguous."""

# libvips' name of a colour space: channels, value of white.
_SPACES = {
    "b-w": (1, [255]),
    "grey16": (1, [65535]),
    "srgb": (3, [255] * 3),
    "rgb16": (3, [65535] * 3),
    "cmyk": (4, [0] * 4),
}
# image.flatten(...) would first fail to find a property of that name, at a cost.
_call = pyvips.Operation.call
_PROFILE = "icc-profile-data"
# Matrix profiles, as sRGB's, take a few KB; what is larger is worth neither a probe nor a place in its cache.
_MAX_PROBED_BYTES = 64 * 2**10


def check_colour(image: pyvips.Image) -> None:
    """Raise InvalidInput unless to_srgb takes images with this header."""
    channels, _ = _SPACES.get(image.interpretation, (0, []))
    if image.format not in ("uchar", "ushort") or not channels or image.bands - channels not in (0, 1):
        raise refused(
            f"{image.bands} channels of {image.format} samples ({image.interpretation}) cannot be read; "
            "8 or 16 bit gray, RGB or CMYK, each with or without alpha, can"
        )


def to_srgb(image: pyvips.Image) -> pyvips.Image:
    """Convert to 3 bands of 8-bit sRGB: alpha flattened on white, the embedded ICC profile applied.

    A profile that is broken or meant for another colour space is ignored; CMYK without one is read as libvips'
    own CMYK. 16-bit samples keep their upper 8 bits. 8-bit sRGB comes out untouched.
    """
    space = image.interpretation
    channels, white = _SPACES[space]
    if image.bands > channels:
        max_alpha = 65535 if image.format == "ushort" else 255
        image = _call("flatten", image, background=white, max_alpha=max_alpha)
    if image.get_typeof(_PROFILE):
        profile = image.get(_PROFILE)
        if space != "srgb" or not is_srgb(profile):
            try:
                return _apply_profile(image)
            except VIPS_ERRORS:
                pass
    return image if space == "srgb" else _call("colourspace", image, "srgb")


def flatten_rgba(pixels: NDArray[np.uint8]) -> Pixels:
    """uint8 [H, W, 4] with straight alpha, laid on white."""
    height, width, _ = pixels.shape
    image = pyvips.Image.new_from_memory(np.ascontiguousarray(pixels), width, height, 4, "uchar")
    return to_pixels(to_srgb(image.copy(interpretation="srgb")))


def to_pixels(image: pyvips.Image) -> Pixels:
    """Decode an image of 3 bands of 8 bits; raises pyvips.Error for damage."""
    return np.ndarray((image.height, image.width, 3), np.uint8, image.write_to_memory())


def is_srgb(profile: bytes) -> bool:
    """Whether an RGB image's ICC profile says no more than sRGB, so that its pixels stay as they are."""
    return len(profile) <= _MAX_PROBED_BYTES and _moves_nothing(profile)


def _apply_profile(image: pyvips.Image) -> pyvips.Image:
    return _call("icc_transform", image, "srgb", embedded=True, intent="relative", depth=8)


@lru_cache(maxsize=64)
def _moves_nothing(profile: bytes) -> bool:
    """Whether an RGB profile moves no colour of a 9x9x9 lattice by more than 1 of 255.

    Many photographs carry some sRGB profile: so they keep their exact values, and cost no transform.
    """
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    lattice = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
    probe = pyvips.Image.new_from_memory(lattice, 27, 27, 3, "uchar").copy(interpretation="srgb")
    probe.set_type(pyvips.GValue.blob_type, _PROFILE, profile)
    try:
        moved = to_pixels(_apply_profile(probe))
    except VIPS_ERRORS:
        return False
    return bool(np.abs(moved.astype(int) - lattice).max() <= 1)
