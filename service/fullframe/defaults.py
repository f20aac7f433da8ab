"""What is allowed where nothing else is asked for: of images that come to a server, and of one's own files."""

from typing import Final

MAX_PIXELS: Final = 32_000_000
"""Of one image."""
MAX_HELD_PIXELS: Final = 32_000_000
"""Of an image that must be in memory at once."""
OWN_PIXELS: Final = 100_000_000_000
"""Of one's own image, which is worked on in pieces."""
OWN_HELD_PIXELS: Final = 256_000_000
MAX_BYTES: Final = 64 * 2**20
"""Of an encoded file."""
LEAST_LIMIT_BYTES: Final = 128 * 2**10
"""No server's limit on messages or encoded images is lower: what is smaller is sent without asking for the limits."""
MAX_FRAMES: Final = 1000
MAX_TEMPORARY_BYTES: Final = 2 * 2**30
"""Of disk, to turn a picture."""
MAX_PIXELS_IN_FLIGHT: Final = 256_000_000
TILE_PIXELS: Final = 4_000_000
"""An image of more is computed in pieces."""
