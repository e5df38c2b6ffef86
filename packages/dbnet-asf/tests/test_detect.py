"""The detector: inputs, batches, streams, resize rules, tiles, results; the image reader under fuzz."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import struct
import zlib

import cv2
import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from dbnet_asf import DBConfig, DBNet, Detection, Region, TextDetector
from dbnet_asf.detect import DetectConfig, network_size
from dbnet_asf.tiling import ramps, tile_starts, tiled_map
from fusion_core.errors import CheckpointError, ConfigError, FusionError, InputError, ShapeError

TINY = DBConfig.nano(inner=32).replace(channels=(8, 12, 16, 16), stem=8, short_side=96)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return DBNet(TINY).eval()


@pytest.fixture(scope="module")
def detector(net):
    return make(net)


def make(net, **settings_):
    """A detector whose random network finds something: its threshold is the median of its map."""
    options = {"device": "cpu", "dtype": "float32", "box_thresh": 0.0, "keep_map": True, **settings_}
    level = float(np.median(TextDetector(net, device="cpu", dtype="float32").maps([scene(0)])[0].prob))
    return TextDetector(net, thresh=level, **options)


def scene(seed, shape=(96, 160)):
    random = np.random.default_rng(seed)
    image = cv2.GaussianBlur(random.integers(0, 256, (*shape, 3), np.uint8), (0, 0), 4)
    return cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX)


def assert_same(first, second, atol=1e-5):
    assert len(first) == len(second)
    np.testing.assert_allclose(first.prob, second.prob, atol=atol)


def test_every_kind_of_image_gives_the_same(detector, tmp_path):
    image = scene(0)
    Image.fromarray(image).save(tmp_path / "a.png")
    kinds = [
        image,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        (tmp_path / "a.png").read_bytes(),
        Image.fromarray(image),
        torch.from_numpy(image).permute(2, 0, 1),
        torch.from_numpy(image).permute(2, 0, 1) / 255,
        np.concatenate([image, image[..., :1]], -1),
        image.astype(np.uint16) * 257,
    ]
    wanted = detector(image)
    assert isinstance(wanted, Detection)
    assert len(wanted) > 0
    for kind in kinds:
        assert_same(detector(kind), wanted)
    assert detector(tmp_path / "a.png").source == str(tmp_path / "a.png")
    assert detector(image[..., 0]).size == (96, 160)


def test_a_list_is_each_alone(detector):
    shapes = [(96, 160), (60, 60), (96, 160), (200, 130), (96, 160), (20, 9), (64, 64)]
    images = [scene(seed, shape) for seed, shape in enumerate(shapes)]
    together = detector(images)
    assert [found.size for found in together] == shapes
    for image, found in zip(images, together, strict=True):
        assert_same(found, detector(image))
    batch = torch.from_numpy(np.stack([images[0], images[2]])).permute(0, 3, 1, 2)
    assert_same(detector(batch)[1], together[2])
    assert detector([]) == []


def test_stream_keeps_order_and_bounds_its_reading(net):
    detector, read = make(net, batch_size=2), []

    def endless():
        for at in itertools.count():
            read.append(at)
            yield scene(at % 3)

    stream = detector.stream(endless())
    found = [next(stream) for _ in range(5)]
    assert len(read) <= 12
    for at, each in enumerate(found):
        assert_same(each, detector(scene(at % 3)))
    stream.close()


def test_unreadable_images(detector, tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(InputError, match=r"cut\.png"):
        detector([scene(0), tmp_path / "cut.png"])
    failed = []
    found = list(
        detector.stream([tmp_path / "cut.png", scene(0), "nowhere.png"], failed=lambda *a: failed.append(a))
    )
    assert len(found) == 1
    assert [source for source, _ in failed] == [tmp_path / "cut.png", "nowhere.png"]
    with pytest.raises(ConfigError, match="num_workers"):
        detector.stream([], num_workers=0)


def test_no_text(net):
    detector = TextDetector(net, device="cpu", box_thresh=1.0, thresh=1.0)
    found = detector(scene(1))
    assert len(found) == 0
    assert found.crops() == []
    assert found.draw().size == (160, 96)
    assert found.to_dict()["regions"] == []


def test_resize_rules():
    size = lambda shape, **settings_: network_size(shape, DetectConfig(**settings_))
    assert size((480, 640), short_side=736) == (736, 992)
    assert size((640, 480), short_side=736) == (992, 736)
    assert size((640, 480), short_side=736, resize="height") == (736, 576)
    assert size((640, 480), short_side=700) == (960, 704)  # a multiple of 32 is made first
    assert size((640, 480), resize="long", long_side=1280) == (1280, 960)
    assert size((33, 70), resize="native") == (64, 96)
    assert size((10, 4000), short_side=736) == (32, 4096)
    assert size((5000, 9000), resize="native") == (5024, 9024)


def test_native_pads_instead_of_bending(net):
    found = make(net, resize="native")(scene(0, (50, 70)))
    assert found.prob.shape == (50, 70)
    whole = make(net, resize="native")(scene(0, (64, 96)))
    assert whole.prob.shape == (64, 96)
    for shape in ((1, 1), (1, 500), (31, 31)):
        assert make(net, resize="native")(scene(0, shape)).size == shape


def test_polygons_and_quads(net):
    found = make(net, mode="polygon")(scene(0))
    assert found.settings["post"]["mode"] == "polygon"
    for region in found:
        assert isinstance(region, Region)
        assert region.quad.shape == (4, 2)
        assert region.polygon.shape[1] == 2
        assert 0 <= region.score <= 1
        assert 0 <= region.border_uncertainty <= 0.25
        x, y = region.polygon.astype(float).T
        assert (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() >= 0  # clockwise on the screen
        left, top, right, bottom = region.box
        assert 0 <= left <= right <= 160
        assert 0 <= top <= bottom <= 96
    x, y, w, h, angle = found[0].rect
    np.testing.assert_allclose(
        sorted(cv2.boxPoints(((x, y), (w, h), angle)).tolist()), sorted(found[0].quad.tolist()), atol=0.01
    )
    for quad, rect in ((region.quad, region.rect) for region in found):
        edge = quad[1] - quad[0]
        assert rect[2] == pytest.approx(float(np.hypot(*edge)), abs=1e-2)
        assert rect[4] == pytest.approx(float(np.rad2deg(np.arctan2(edge[1], edge[0]))), abs=0.1)
    assert len(found[:2]) == 2
    assert len(found.above(1.1)) == 0


def test_several_scales(net):
    one, two = make(net)(scene(0)), make(net, scales=(1.0, 2.0))(scene(0))
    assert one.prob.shape == two.prob.shape
    assert (two.prob >= one.prob - 1e-6).all()
    assert (two.prob > one.prob + 1e-6).any()


def test_color_order():
    config = TINY.replace(color="bgr", mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0))
    torch.manual_seed(0)
    net = DBNet(config).eval()
    image = scene(0)
    ours = TextDetector(net, device="cpu", dtype="float32", resize="native").maps([image])[0].prob
    with torch.no_grad():
        wanted = net(torch.from_numpy(image[None, ..., ::-1].copy()).permute(0, 3, 1, 2) / 255).prob[0, 0]
    np.testing.assert_allclose(ours, wanted.numpy(), atol=1e-4)


def test_saving(detector, tmp_path):
    Image.fromarray(scene(0)).save(tmp_path / "photo.png")
    found = detector(tmp_path / "photo.png")
    found.save(tmp_path / "out")
    document = json.loads((tmp_path / "out" / "photo.json").read_text())
    assert (document["width"], document["height"]) == (160, 96)
    assert len(document["regions"]) == len(found)
    assert set(document) == {"schema", "image", "width", "height", "model", "settings", "seconds", "regions"}
    assert set(document["regions"][0]) >= {"polygon", "quad", "score"}
    assert Image.open(tmp_path / "out" / "photo.annotated.png").size == (160, 96)
    found.save(tmp_path / "a.txt")
    lines = (tmp_path / "a.txt").read_text().splitlines()
    assert [len(line.split(",")) for line in lines] == [8] * len(found)
    found.save(tmp_path / "a.jpg")
    assert Image.open(tmp_path / "a.jpg").format == "JPEG"
    found.draw(scores=True).save(tmp_path / "b.png")
    with pytest.raises(InputError, match=r"\.json"):
        found.save(tmp_path / "a.gif")
    assert "uint8 (96, 160, 3)" in repr(found)


def test_crops(detector):
    found = detector(scene(0))
    strips = found.crops(height=32)
    assert len(strips) == len(found)
    assert all(strip.shape[0] == 32 and strip.shape[2] == 3 for strip in strips if strip.shape[1] < 8192)


def test_a_detector_is_a_picklable_factory(detector):
    again = pickle.loads(pickle.dumps(detector))
    assert_same(again(scene(2)), detector(scene(2)))


def test_from_pretrained(net, tmp_path):
    net.save_pretrained(tmp_path / "net")
    found = TextDetector.from_pretrained(tmp_path / "net", device="cpu", short_side=64, box_thresh=0.1)
    assert found.config.short_side == 64
    assert found.config.post.box_thresh == 0.1
    assert found.config.post.thresh == TINY.post.thresh
    with pytest.raises(CheckpointError, match="nothing-here"):
        TextDetector.from_pretrained("nothing-here")


BAD = [
    ({"short_size": 5}, "short_side"),
    ({"resize": "wide"}, "resize"),
    ({"short_side": 0}, "short_side"),
    ({"scales": ()}, "scales"),
    ({"tile": 100}, "tile"),
    ({"tile": 128, "overlap": 128}, "overlap"),
    ({"box_thresh": 2.0}, "box_thresh"),
    ({"std": (0.2, 1e-320, 0.2)}, "std"),
]


@pytest.mark.parametrize(("settings_", "words"), BAD)
def test_bad_settings(net, settings_, words):
    with pytest.raises(ConfigError, match=words):
        TextDetector(net, **settings_)


def test_bad_devices_and_maps(net, detector):
    with pytest.raises(InputError, match="device"):
        TextDetector(net, device="abacus")
    with pytest.raises(ShapeError, match=r"images\[0\]"):
        detector.maps([np.zeros((8, 8), np.uint8)])


@settings(max_examples=120, deadline=3000)
@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.uint16, np.float32, np.float64, np.int64, np.bool_]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    )
)
def test_any_array_is_read_or_refused(array):
    torch.manual_seed(0)
    for kind in (array, torch.from_numpy(array.copy()) if array.dtype != np.uint16 else array):
        try:
            found = FUZZED(kind)
        except FusionError as error:
            assert str(error)  # noqa: PT017
        else:
            assert isinstance(found, list | Detection)


def _png():
    buffer = io.BytesIO()
    Image.fromarray(scene(0, (24, 24))).save(buffer, "PNG")
    return buffer.getvalue()


FUZZED = TextDetector(DBNet(TINY), device="cpu", short_side=32, box_thresh=0.0)
PNG = _png()


@settings(max_examples=150, deadline=3000)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.tuples(st.integers(0, len(PNG)), st.integers(0, len(PNG) - 1), st.integers(0, 255)),
    )
)
def test_any_bytes_are_read_or_refused(data):
    if isinstance(data, tuple):  # a real file, cut and with one byte changed
        stop, at, value = data
        data = (PNG[:at] + bytes([value]) + PNG[at + 1 :])[:stop]
    try:
        found = FUZZED(data)
    except InputError as error:
        assert "image" in str(error)  # noqa: PT017
    else:
        assert found.image.dtype == np.uint8


def test_a_bomb_is_refused(detector):
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">I", zlib.crc32(header))
        + PNG[33:]
    )
    with pytest.raises(InputError, match="max_pixels"):
        detector(bomb)


# tiles


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 19))
def test_tiles_cover_a_side(length, tile, overlap):
    if overlap >= tile:
        with pytest.raises(ConfigError, match="overlap"):
            tile_starts(32 * length, 32 * tile, 32 * overlap)
        return
    starts = tile_starts(32 * length, 32 * tile, 32 * overlap)
    assert starts[0] == 0
    assert all(start % 32 == 0 for start in starts)
    assert all(b - a <= 32 * (tile - overlap) for a, b in itertools.pairwise(starts))
    total = np.zeros(32 * length)
    for start, weight in zip(starts, ramps(32 * length, starts, 32 * tile), strict=True):
        assert (weight >= 0).all()
        total[start : start + len(weight)] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)


def blur(tiles):
    return (cv2.GaussianBlur(tile[..., 0], (31, 31), 5) for tile in tiles)


def test_tiles_equal_the_whole_away_from_their_borders():
    image = np.random.default_rng(0).random((320, 448, 3), np.float32)
    whole = next(blur([image]))
    np.testing.assert_array_equal(tiled_map(image, blur, tile=448, overlap=64), whole)
    tiled = tiled_map(image, blur, tile=192, overlap=96)
    inner = np.ones((320, 448), bool)  # 15 pixels from an inner border a tile sees all that the blur sees
    for axis, length in ((0, 320), (1, 448)):
        for start in tile_starts(length, 192, 96):
            for border in (start, start + 192):
                if 0 < border < length:
                    near = np.abs(np.arange(length) - border) <= 16
                    inner &= ~(near[:, None] if axis == 0 else near[None])
    assert inner.mean() > 0.3
    np.testing.assert_allclose(tiled[inner], whole[inner], atol=1e-6)
    assert np.abs(tiled - whole).max() < 0.3
    assert tiled.dtype == np.float32


@pytest.mark.parametrize("attention", [None, "scale_spatial"])
def test_tiled_network(attention):
    torch.manual_seed(0)
    net = DBNet(TINY.replace(attention=attention)).eval()
    image = scene(0, (64, 1280))
    options = {"device": "cpu", "dtype": "float32", "resize": "native"}
    whole = TextDetector(net, **options).maps([image])[0].prob
    one = TextDetector(net, tile=1280, **options).maps([image])[0].prob
    np.testing.assert_array_equal(one, whole)
    tiled = TextDetector(net, tile=1024, overlap=768, **options).maps([image])[0].prob
    # tiles are 0-1024 and 256-1280; 300 pixels from both inner borders
    np.testing.assert_allclose(tiled[:, 556:724], whole[:, 556:724], atol=1e-5)
    np.testing.assert_allclose(tiled[:, :256], whole[:, :256], atol=1e-5)
    assert not np.allclose(tiled[:, 740:1020], whole[:, 740:1020], atol=1e-7) or np.ptp(whole) < 1e-6


@pytest.mark.slow
def test_a_tiled_page_gives_the_same_regions():
    from dbnet_asf.data.synth import render

    page = next(
        scene for scene in (render(at, 11, (768, 1024)) for at in range(40)) if len(scene.polygons) > 80
    )
    options = {"device": "cpu", "dtype": "float32", "resize": "native"}
    whole = TextDetector.from_pretrained(**options)(page.image)
    tiled = TextDetector.from_pretrained(tile=768, overlap=512, **options)(page.image)
    assert len(whole) == len(tiled) > 40
    first, second = _shapes(whole), _shapes(tiled)
    shared = shapely.area(shapely.intersection(first[:, None], second))
    either = shapely.area(first)[:, None] + shapely.area(second) - shared
    assert ((shared / either.clip(1e-9)).max(1) >= 0.9).all()


def _shapes(regions):
    return shapely.buffer([shapely.Polygon(region.quad) for region in regions], 0)
