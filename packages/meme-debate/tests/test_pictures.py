"""How pictures are read, hashed and encoded."""

import base64
import contextlib
import hashlib
import io

import numpy as np
import pytest
from debate_stub import jpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fusion_core.errors import ConfigError, InputError
from meme_debate.pictures import _head, as_it_is, picture, read_small


def encode(kind, size=(50, 40), mode="RGB", **options):
    out = io.BytesIO()
    Image.new(mode, size, 120).save(out, kind, **options)
    return out.getvalue()


FILES = {
    "jpeg": encode("JPEG"),
    "progressive": encode("JPEG", progressive=True),
    "gray jpeg": encode("JPEG", mode="L"),
    "cmyk jpeg": encode("JPEG", mode="CMYK"),
    "exif jpeg": encode("JPEG", exif=Image.Exif().tobytes(), comment=b"x" * 300),
    "png": encode("PNG"),
    "palette png": encode("PNG", mode="P"),
    "webp": encode("WEBP"),
    "lossless webp": encode("WEBP", lossless=True),
}


@pytest.mark.parametrize("name", FILES)
def test_common_files_are_sent_as_they_are(name):
    data = FILES[name]
    assert _head(data, name)[1:] == (50, 40)
    found = picture(data)
    assert found.content == data
    assert found.digest == hashlib.sha256(data).hexdigest()
    assert found.url == f"data:{found.media};base64,{base64.b64encode(data).decode()}"
    assert as_it_is(data, 49, name) is None, "one pixel too wide"


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_others_become_jpeg(kind):
    found = picture(encode(kind))
    assert found.media == "image/jpeg"
    assert Image.open(io.BytesIO(found.content)).size == (50, 40)


def test_what_stands_behind_the_end_stays():
    data = FILES["jpeg"] + b"\0\0trailer"
    assert picture(data).content == data


@pytest.mark.parametrize("name", ["jpeg", "png", "webp", "progressive"])
def test_cut_files(name):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8))
    out = io.BytesIO()
    if name == "progressive":
        noise.save(out, "JPEG", progressive=True)
    else:
        noise.save(out, name.upper())
    data = out.getvalue()
    for share in (0.3, 0.9):
        with pytest.raises(InputError, match=r"image of \d+ bytes is (broken|no image|no picture)"):
            picture(data[: int(len(data) * share)])


def test_larger_is_made_smaller_and_hashed_with_its_size():
    data = encode("PNG", (400, 100))
    small, smaller = picture(data, 200), picture(data, 100)
    assert Image.open(io.BytesIO(small.content)).size == (200, 50)
    assert Image.open(io.BytesIO(smaller.content)).size == (100, 25)
    assert len({small.digest, smaller.digest, picture(data).digest}) == 3
    assert picture(data, 200) == small


def test_pil_images():
    image = Image.new("RGBA", (30, 20), (9, 9, 9, 100))
    assert picture(image) == picture(image.copy())
    assert picture(image).media == "image/jpeg"
    with pytest.raises(ConfigError, match="max_side is 3"):
        picture(image, 3)


@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: jpeg()[:40] + tail))
def test_any_bytes(data):
    with contextlib.suppress(InputError):  # and nothing else
        assert picture(data).data


def test_read_small(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "empty").write_bytes(b"")
    assert read_small(tmp_path / "a") == b"12345"
    assert read_small(tmp_path / "a", 4) is None
    assert read_small(tmp_path / "empty") is None
    assert read_small(tmp_path) is None
    assert read_small(tmp_path / "nowhere") is None
