import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fusion_core.errors import DataError, InputError, NonFiniteError, ShapeError
from fusion_core.images import list_images, read_image, save_png, to_tensor
from fusion_core.seeding import rng

RGB = rng(0, "images").integers(0, 256, (5, 7, 3), np.uint8)


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def test_every_source_gives_the_same_pixels(tmp_path):
    path = save_png(tmp_path / "a.png", RGB)
    planes = torch.from_numpy(np.moveaxis(RGB, -1, 0).copy())
    for source in (path, str(path), path.read_bytes(), Image.open(path), RGB, planes, planes.float() / 255):
        np.testing.assert_array_equal(read_image(source), RGB)
    assert read_image(RGB) is not RGB
    assert not np.shares_memory(read_image(RGB), RGB)


def test_gray_alpha_palette_and_deep_images():
    gray = RGB[..., 0]
    for source in (gray, gray[..., None], png(gray), Image.fromarray(gray), torch.from_numpy(gray)):
        np.testing.assert_array_equal(read_image(source), np.stack([gray] * 3, -1))
    alpha = np.concatenate([RGB, RGB[..., :1]], -1)
    np.testing.assert_array_equal(read_image(png(alpha)), RGB)
    np.testing.assert_array_equal(read_image(alpha), RGB)
    deep = gray.astype(np.uint16) * 257
    np.testing.assert_array_equal(read_image(png(deep))[..., 1], gray)
    np.testing.assert_array_equal(read_image(deep)[..., 2], gray)
    palette = Image.fromarray(RGB).convert("P")
    np.testing.assert_array_equal(read_image(palette), np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(read_image(gray > 100)[..., 0], (gray > 100) * 255)


def test_orientation_of_cameras_is_followed_unless_it_is_not_wanted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), np.rot90(RGB, -1))
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png", exif=False), RGB)


def bomb(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"0"))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("nowhere.png", InputError, "'nowhere.png' is not there"),
        ("x" * 300, InputError, "xxx' is not there"),
        (b"", InputError, "0 bytes"),
        (b"plain text", InputError, "no image"),
        (png(RGB)[:60], InputError, "cut off"),
        (bomb(100_000, 100_000), InputError, "max_pixels"),
        (bomb(2000, 1000), InputError, "1000 x 2000 pixels, more than max_pixels=1000000"),
        (3, InputError, "int"),
        (np.zeros((0, 4, 3), np.uint8), ShapeError, "empty"),
        (np.zeros((4, 4, 5), np.uint8), ShapeError, "(4, 4, 5)"),
        (np.zeros(4, np.uint8), ShapeError, "(4,)"),
        (np.full((2, 2), 3.0), DataError, "from 3 to 3"),
        (np.zeros((2, 2), np.int64), DataError, "int64"),
        (np.array([[0.0, np.nan]]), NonFiniteError, "NaN"),
        (torch.full((3, 2, 2), torch.inf), NonFiniteError, "infinity"),
    ],
)
def test_bad_images_are_named(source, error, words):
    with pytest.raises(error) as caught:
        read_image(source, max_pixels=1_000_000)
    assert words in str(caught.value)


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        read_image(tmp_path)


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=200),
    st.integers(0, 200),
    st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]),
)
def test_garbage_never_raises_anything_else(garbage, at, kind):
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, kind)
    whole = buffer.getvalue()
    for data in (garbage, whole[:at] + garbage + whole[at:], whole[:at]):
        try:
            image = read_image(data, max_pixels=10_000)
        except InputError:
            continue
        assert image.dtype == np.uint8
        assert image.shape[2] == 3


def test_listing(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("z.png", "b/a.JPG", "note.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert list_images(tmp_path) == [tmp_path / "b/a.JPG", tmp_path / "z.png"]
    assert list_images([tmp_path / "note.txt", tmp_path / "z.png", tmp_path / "z.png"]) == [
        tmp_path / "note.txt",
        tmp_path / "z.png",
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        list_images(tmp_path / "empty")
    with pytest.raises(InputError, match="'gone' is not there"):
        list_images(["gone"])


def test_png_round_trips_and_refuses(tmp_path):
    deep = rng(0, "deep").integers(0, 65536, (4, 6), np.uint16)
    save_png(tmp_path / "deep.png", deep)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "deep.png")), deep)
    save_png(tmp_path / "one.png", RGB[..., :1])
    assert Image.open(tmp_path / "one.png").mode == "L"
    for wrong in (RGB.astype(float), RGB[..., :2], RGB[:0], deep[..., None].repeat(3, -1)):
        with pytest.raises(ShapeError, match="wanted uint8"):
            save_png(tmp_path / "no.png", wrong)
    assert not (tmp_path / "no.png").exists()


def test_tensor():
    planes = to_tensor(RGB)
    assert planes.shape == (3, 5, 7)
    assert planes.is_contiguous()
    assert float(planes[1, 2, 3]) == pytest.approx(RGB[2, 3, 1] / 255)
    with pytest.raises(ShapeError, match="float64"):
        to_tensor(RGB / 255)
