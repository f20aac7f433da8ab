"""What is allowed where nothing else is asked for: the same in this process and on a server."""

from typing import Final

MAX_PIXELS: Final = 32_000_000
"""Of one image."""
MAX_HELD_PIXELS: Final = 32_000_000
"""Of an image that must be in memory at once."""
MAX_BYTES: Final = 64 * 2**20
"""Of an encoded file."""
MAX_FRAMES: Final = 1000
MAX_TEMPORARY_BYTES: Final = 2 * 2**30
"""Of disk, to turn a picture."""
MAX_PIXELS_IN_FLIGHT: Final = 256_000_000
TILE_PIXELS: Final = 4_000_000
"""An image of more is computed in pieces."""
