"""What a file shows is what comes out: beside Pillow, in every layout, orientation and colour space."""

import io
from pathlib import Path

import numpy as np
import pytest
import skimage
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from fullframe.errors import InvalidInput
from fullframe.image import SUPPORTED, Limits, Pixels, encode_png, open_encoded
from tests.image.forged import png, tiff
from tests.pictures import encode, pixels

PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
LIMITS = Limits()
LOSSLESS: dict[str, dict[str, object]] = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}


def photograph(name: str) -> Image.Image:
    return Image.open(PHOTOGRAPHS / name).convert("RGB")


def save(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def decoded(data: bytes) -> Pixels:
    picture = open_encoded(data, LIMITS)
    result = picture.pixels()
    assert result.shape == (picture.height, picture.width, 3)
    assert result.dtype == np.uint8 and result.flags.c_contiguous
    return result


def pillow(data: bytes) -> Pixels:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def difference(one: NDArray[np.generic], other: NDArray[np.generic]) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize(
    "name", ["chelsea.png", "coffee.png", "astronaut.png", "retina.jpg", "hubble_deep_field.jpg", "camera.png"]
)
def test_photographs_are_what_pillow_decodes(name: str) -> None:
    data = (PHOTOGRAPHS / name).read_bytes()
    assert np.array_equal(decoded(data), pillow(data))


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}, {"restart_marker_rows": 1}]
)
def test_jpegs_are_what_pillow_decodes(options: dict[str, object]) -> None:
    data = save(photograph("chelsea.png"), "JPEG", **options)
    assert np.array_equal(decoded(data), pillow(data))


def test_another_picture_is_not_equal() -> None:
    assert difference(decoded(encode(pixels(40, 50, seed=1))), pixels(40, 50, seed=2)) > 0


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from(sorted(LOSSLESS)))
def test_lossless_files_of_any_size_come_back(height: int, width: int, format: str) -> None:
    picture = pixels(height, width)
    assert np.array_equal(decoded(encode(picture, format, **LOSSLESS[format])), picture)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (5000, 1), (257, 1025)])
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "JPEG", "GIF"])
def test_extreme_shapes(height: int, width: int, format: str) -> None:
    data = encode(pixels(height, width), format, **LOSSLESS.get(format, {}))
    assert np.array_equal(decoded(data), pillow(data))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "GIF", "WEBP"])
def test_opaque_modes(mode: str, format: str) -> None:
    if format == "JPEG" and mode == "P":
        mode = "L"  # JPEG has no palettes
    data = save(photograph("coffee.png").convert(mode), format, **LOSSLESS.get(format, {}))
    assert np.array_equal(decoded(data), pillow(data))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_flattened_on_white(mode: str, format: str) -> None:
    image = photograph("chelsea.png").convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    data = save(image, format, **({"lossless": True, "exact": True} if format == "WEBP" else {}))
    rgba = np.asarray(image.convert("RGBA")).astype(float)
    share = rgba[..., 3:] / 255
    assert difference(decoded(data), np.rint(rgba[..., :3] * share + 255 * (1 - share))) <= 1


def test_a_transparent_palette_entry_is_white() -> None:
    image = Image.new("P", (4, 3), 7)
    image.putpalette([level for level in range(256) for _ in range(3)])
    for format in ("PNG", "GIF"):
        assert (decoded(save(image, format, transparency=7)) == 255).all(), format
        assert (decoded(save(image, format)) == 7).all(), format


def test_premultiplied_alpha_is_not_multiplied_again() -> None:
    colour, alpha = pixels(20, 30), pixels(20, 30, seed=1)[..., :1]
    premultiplied = np.rint(colour * (alpha / 255)).astype(np.uint8)
    data = tiff(np.dstack([premultiplied, alpha]), photometric="rgb", extrasamples=["assocalpha"])
    assert difference(decoded(data), np.rint(premultiplied + 255.0 - alpha)) <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_keep_the_upper_eight(channels: int) -> None:
    samples = np.random.default_rng(0).integers(0, 65536, (20, 30, channels), dtype=np.uint16)
    photometric = "rgb" if channels == 3 else "minisblack"
    files = [tiff(samples.squeeze(), photometric=photometric)]
    if channels == 3:
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
        files.append(png(30, 20, rows=rows, depth=16))
    else:
        files.append(save(Image.fromarray(samples[..., 0]), "PNG"))
    for data in files:
        assert np.array_equal(decoded(data), np.broadcast_to(samples >> 8, (20, 30, 3)))


def test_one_bit_and_inverted_gray() -> None:
    gray = pixels(20, 30)[..., 0]
    assert np.array_equal(decoded(tiff(gray, photometric="miniswhite"))[..., 1], 255 - gray)
    bits = gray > 127
    data = tiff(bits, photometric="minisblack")
    assert np.array_equal(decoded(data)[..., 1], bits * np.uint8(255))


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
def test_compressed_tiffs(compression: str) -> None:
    data = save(photograph("chelsea.png"), "TIFF", compression=compression)
    assert np.array_equal(decoded(data), pillow(data))


def test_tiles_planes_and_pages_of_tiff() -> None:
    picture = pixels(75, 133)
    assert np.array_equal(decoded(tiff(picture, photometric="rgb", tile=(32, 32), compression="zlib")), picture)
    planes = picture.transpose(2, 0, 1)
    assert np.array_equal(decoded(tiff(planes, photometric="rgb", planarconfig="separate")), picture)
    pages = np.stack([picture, picture // 2])
    assert np.array_equal(decoded(tiff(pages, photometric="rgb")), picture)


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_an_animation_is_its_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "blue", "green")]
    data = save(frames[0], format, save_all=True, append_images=frames[1:], **LOSSLESS.get(format, {}))
    assert (decoded(data) == (255, 0, 0)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(Image.fromarray(pixels(12, 31)), format, exif=exif, **LOSSLESS.get(format, {}))
    picture = open_encoded(data, LIMITS)
    assert (picture.height, picture.width) == ((12, 31) if orientation < 5 else (31, 12))
    assert np.array_equal(picture.pixels(), pillow(data))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_absurd_orientation_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(photograph("chelsea.png"), "JPEG", exif=exif)
    assert np.array_equal(decoded(data), np.asarray(Image.open(io.BytesIO(data))))


def test_pixels_may_be_asked_again() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = open_encoded(save(photograph("chelsea.png"), "JPEG", exif=exif), LIMITS)
    assert np.array_equal(picture.pixels(), picture.pixels())


def profile(name: str) -> bytes:
    return bytes(Image.open(PHOTOGRAPHS / name).info["icc_profile"])


def test_an_srgb_profile_leaves_the_pixels_alone() -> None:
    image = photograph("chelsea.png")
    for icc in (profile("astronaut.png"), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        data = save(image, "JPEG", icc_profile=icc)
        assert np.array_equal(decoded(data), pillow(data))


def test_another_profile_is_converted_to_srgb() -> None:
    data = (PHOTOGRAPHS / "rocket.jpg").read_bytes()  # Adobe RGB
    source = Image.open(io.BytesIO(data))
    adobe = ImageCms.ImageCmsProfile(io.BytesIO(source.info["icc_profile"]))
    srgb = ImageCms.createProfile("sRGB")
    expected = ImageCms.profileToProfile(source, adobe, srgb, ImageCms.Intent.RELATIVE_COLORIMETRIC)
    assert expected is not None
    assert difference(decoded(data), np.asarray(expected)) <= 2
    assert difference(np.asarray(source), np.asarray(expected)) > 20


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("damage", ["junk", "cut short", "of another colour space"])
def test_a_profile_that_cannot_apply_is_ignored(mode: str, damage: str) -> None:
    foreign = profile("color.png" if mode == "L" else "page.png")
    icc = {"junk": b"junk" * 50, "cut short": profile("color.png")[:200], "of another colour space": foreign}[damage]
    image = photograph("chelsea.png").convert(mode)
    with_profile, without = save(image, "JPEG", icc_profile=icc), save(image, "JPEG")
    assert difference(decoded(with_profile), decoded(without)) <= (1 if mode == "CMYK" else 0)


def test_a_gray_profile_is_applied() -> None:
    image = photograph("chelsea.png").convert("L")
    result = decoded(save(image, "TIFF", icc_profile=profile("page.png")))
    assert (result == result[..., :1]).all()
    assert 5 < difference(result[..., 0], np.asarray(image)) < 64  # dot gain 20 % beside sRGB's curve


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_shows_the_same_picture(format: str) -> None:
    image = photograph("chelsea.png")
    result = decoded(save(image.convert("CMYK"), format))
    mean = np.abs(result.astype(int) - np.asarray(image)).mean()
    inverted = np.abs(255 - result.astype(int) - np.asarray(image)).mean()
    assert mean < 20 < inverted


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint32, np.int16, np.complex64])
def test_samples_without_a_known_white_are_refused(dtype: type[np.generic]) -> None:
    with pytest.raises(InvalidInput, match=r"cannot be read") as caught:
        decoded(tiff(pixels(8, 8)[..., 0].astype(dtype)))
    assert caught.value.field == "images"


def test_too_many_channels_are_refused() -> None:
    samples = np.dstack([pixels(8, 8), pixels(8, 8)])
    with pytest.raises(InvalidInput, match="6 channels"):
        decoded(tiff(samples, photometric="rgb", planarconfig="contig"))
    with pytest.raises(InvalidInput, match="channels"):
        decoded(tiff(samples, photometric="minisblack", planarconfig="contig"))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (33, 17), (1, 600)])
def test_encoded_png_comes_back(height: int, width: int) -> None:
    picture = pixels(height, width)
    data = encode_png(picture)
    assert np.array_equal(pillow(data), picture) and np.array_equal(decoded(data), picture)
    assert np.array_equal(decoded(encode_png(picture[:, ::-1])), picture[:, ::-1])


def test_what_is_supported_here() -> None:
    assert {"jpeg", "png", "webp", "tiff", "gif"} <= SUPPORTED
    assert LIMITS.formats == SUPPORTED


@pytest.mark.skipif("ppm" not in SUPPORTED, reason="this libvips has no PPM loader")
def test_ppm() -> None:
    picture = pixels(8, 9)
    assert np.array_equal(decoded(encode(picture, "PPM")), picture)
