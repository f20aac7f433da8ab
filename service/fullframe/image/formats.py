"""Which file formats are read, how each is recognised by its first bytes, and libvips set up to read them.

libvips is never asked to guess: data is recognised here, then given to that one format's loader.
"""

import atexit

import pyvips

VIPS_ERRORS = (pyvips.Error, UnicodeDecodeError)
"""What a libvips call raises: pyvips decodes its message, which may quote the file, as UTF-8.

The message is never passed on: libvips keeps one for all threads, so it may be about another caller's image.
"""

# For the whole process. The cache would keep decoded images alive; callers decode side by side, so each gets one
# thread; loaders that libvips itself does not trust with hostile files are off, but for the one of ours.
pyvips.cache_set_max(0)
pyvips.concurrency_set(1)
pyvips.block_untrusted_set(True)
pyvips.operation_block_set("VipsForeignLoadPpm", False)


@pyvips.ffi.callback("GLogFunc")  # type: ignore[untyped-decorator]  # pyvips has no types
def _drop(domain: object, level: object, message: object, data: object) -> None:
    """Drop libvips' warnings: they quote the file, and pyvips prints a traceback for what is not UTF-8."""


_handler = pyvips.glib_lib.g_log_set_handler(b"VIPS", pyvips.GLogLevelFlags.LEVEL_WARNING, _drop, pyvips.ffi.NULL)
# libvips may warn once more while the interpreter goes down, when no Python can be called.
atexit.register(pyvips.glib_lib.g_log_remove_handler, b"VIPS", _handler)

# BMP is missing: libvips reads it only through ImageMagick, which guesses formats by itself.
LOADERS = {
    "gif": "gifload_source",
    "jpeg": "jpegload_source",
    "png": "pngload_source",
    "ppm": "ppmload_source",
    "tiff": "tiffload_source",
    "webp": "webpload_source",
}

# (offset, bytes there, format), first match wins. What has no loader is only named when it is refused.
_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", "jpeg"),
    (0, b"\x89PNG\r\n\x1a\n", "png"),
    (8, b"WEBPVP8", "webp"),
    (0, b"GIF87a", "gif"),
    (0, b"GIF89a", "gif"),
    *((0, magic, "tiff") for magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    *((0, b"P%d%c" % (kind, space), "ppm") for kind in range(1, 7) for space in b"\n\r\t "),
    (0, b"BM", "bmp"),
    (4, b"ftypavif", "avif"),
    *((4, b"ftyp" + brand, "heif") for brand in (b"hei", b"hev", b"mif1", b"msf1")),
    (4, b"ftyp", "mp4"),
    (0, b"\0\0\0\x0cJXL ", "jpeg xl"),
    (0, b"\xff\x0a", "jpeg xl"),
    (0, b"\0\0\0\x0cjP  ", "jpeg 2000"),
    (0, b"8BPS", "psd"),
    (0, b"%PDF", "pdf"),
)

SUPPORTED: frozenset[str] = frozenset(
    name for name, loader in LOADERS.items() if pyvips.type_find("VipsOperation", loader)
)
"""The formats that this machine's libvips can read."""


def sniff(data: bytes) -> str:
    """The lower-case name of the format that the first bytes announce; "" if they say nothing known."""
    for offset, signature, name in _SIGNATURES:
        if data.startswith(signature, offset):
            return name
    head = data[:1024]
    if b"<svg" in head:
        return "svg"
    return "text" if head and all(byte >= 32 or byte in b"\t\r\n" for byte in head) else ""
