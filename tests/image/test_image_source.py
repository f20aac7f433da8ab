"""What a local caller may call an image, and raw pixels from anywhere."""

import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fullframe.errors import InvalidInput
from fullframe.image import ImageSource, Limits, Pixels, open_raw, open_source
from tests.pictures import encode, pixels

LIMITS = Limits()
PICTURE = pixels(21, 34)


def opened(source: ImageSource) -> Pixels:
    picture = open_source(source, LIMITS)
    result = picture.pixels()
    assert result.shape == (picture.height, picture.width, 3)
    assert result.dtype == np.uint8 and result.flags.c_contiguous
    return result


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "picture of mine.png"
    data = encode(PICTURE)
    path.write_bytes(data)
    sources: list[ImageSource] = [path, str(path), data, PICTURE, Image.fromarray(PICTURE), Image.open(path)]
    for source in sources:
        assert np.array_equal(opened(source), PICTURE)
    assert open_source(path, LIMITS).format == "png"
    assert open_source(PICTURE, LIMITS).format == "raw"


def test_an_array_need_not_be_contiguous() -> None:
    assert np.array_equal(opened(PICTURE[::-1, ::2]), PICTURE[::-1, ::2])
    assert opened(PICTURE) is PICTURE


@pytest.mark.parametrize("shape", [(21, 34), (21, 34, 4), (3, 21, 34), (1, 21, 34, 3)])
def test_arrays_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match=r"uint8 \[height, width, 3\].*" + "x".join(map(str, shape))):
        open_source(np.zeros(shape, np.uint8), LIMITS)


def test_arrays_of_another_type() -> None:
    with pytest.raises(InvalidInput, match="float32"):
        open_source(np.zeros((4, 4, 3), np.float32), LIMITS)


def test_other_objects() -> None:
    with pytest.raises(TypeError, match="list"):
        open_source([[1, 2, 3]], LIMITS)  # type: ignore[arg-type]  # the mistake under test


def test_paths_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.jpg", tmp_path):
        with pytest.raises(InvalidInput) as caught:
            open_source(path, LIMITS)
        assert str(path) in str(caught.value) and caught.value.field == "images"
    with pytest.raises(InvalidInput, match="cannot read"):
        open_source("a\0b.png", LIMITS)


def test_a_large_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(InvalidInput, match=f"{2**40} bytes are more than the limit of"):
        open_source(path, LIMITS)
    if not Path("/dev/zero").exists():
        pytest.skip("needs a file without end")
    with pytest.raises(InvalidInput, match="more than the limit of 1000 bytes"):
        open_source("/dev/zero", Limits(max_bytes=1000))


def test_a_limit_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(encode(PICTURE))
    assert np.array_equal(open_source(path, Limits(max_bytes=2**60)).pixels(), PICTURE)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_read_like_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with ThreadPoolExecutor(1) as writer:
        written = writer.submit(path.write_bytes, encode(PICTURE))
        assert np.array_equal(open_source(path, LIMITS).pixels(), PICTURE)
        assert written.result()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK"])
def test_pil_modes_are_as_their_files(mode: str) -> None:
    image = Image.fromarray(PICTURE).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    if mode == "CMYK":  # a file's would be read through a profile
        assert np.array_equal(opened(image), np.asarray(image.convert("RGB")))
        return
    file = io.BytesIO()
    image.save(file, "PNG")
    assert np.array_equal(opened(image), opened(file.getvalue()))


def test_pil_images_that_cannot_be_taken() -> None:
    for mode in ("I;16", "I", "F"):
        with pytest.raises(InvalidInput, match=mode):
            open_source(Image.new(mode, (3, 3)), LIMITS)
    data = encode(pixels(100, 100))
    with pytest.raises(InvalidInput, match="truncated"):
        open_source(Image.open(io.BytesIO(data[: len(data) // 2])), LIMITS)
    with pytest.raises(InvalidInput, match="megapixels"):
        open_source(Image.new("RGB", (9, 9)), Limits(max_pixels=80))


@given(st.integers(1, 40), st.integers(1, 40))
def test_raw_pixels_come_back_uncopied(height: int, width: int) -> None:
    data = pixels(height, width).tobytes()
    for given_as in (data, memoryview(data)):
        picture = open_raw(given_as, height, width, LIMITS)
        assert (picture.height, picture.width, picture.format) == (height, width, "raw")
        assert picture.pixels().tobytes() == data
        assert np.shares_memory(picture.pixels(), np.frombuffer(data, np.uint8))


@given(st.integers(-3, 2**32), st.integers(-3, 2**32), st.integers(0, 200))
def test_raw_pixels_of_any_claim(height: int, width: int, length: int) -> None:
    data = bytes(length)
    if min(height, width) > 0 and height * width * 3 == length:
        assert open_raw(data, height, width, LIMITS).pixels().shape == (height, width, 3)
    else:
        with pytest.raises(InvalidInput):
            open_raw(data, height, width, LIMITS)


def test_raw_messages_say_what_would_be_right() -> None:
    for height, width, says in [
        (4, 5, "raw 5x4 (width x height) RGB takes 60 bytes; 59 were given"),
        (0, 5, "5x0 (width x height) has no pixels; both must be at least 1"),
        (2**32 - 1, 2**32 - 1, "megapixels; the limit is 32"),
    ]:
        with pytest.raises(InvalidInput) as caught:
            open_raw(bytes(59), height, width, LIMITS)
        assert says in str(caught.value) and caught.value.field == "images"


def test_raw_limit_to_the_pixel() -> None:
    assert open_raw(bytes(60), 4, 5, Limits(max_pixels=20, max_bytes=1)).pixels().shape == (4, 5, 3)
    with pytest.raises(InvalidInput):
        open_raw(bytes(60), 4, 5, Limits(max_pixels=19))


def test_only_an_opened_pil_image_needs_pil() -> None:
    code = (
        "import sys, numpy; from fullframe.image import Limits, open_source;"
        "open_source(numpy.zeros((2, 2, 3), 'uint8'), Limits()); sys.exit('PIL' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
