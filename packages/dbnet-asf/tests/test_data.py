"""Readers on made files, augmentation, the training set, and the renderer."""

from __future__ import annotations

import contextlib
import json

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dbnet_asf import datasets
from dbnet_asf.config import AugmentConfig, DBConfig, LabelConfig
from dbnet_asf.data import augment as aug
from dbnet_asf.data import formats
from dbnet_asf.data.glyphs import Face, faces, typeset
from dbnet_asf.data.scenery import photographs
from dbnet_asf.data.synth import render
from dbnet_asf.errors import AnnotationError
from dbnet_asf.geometry import area
from fusion_core.errors import DataError, InputError
from fusion_core.seeding import rng


def save(path, shape=(60, 80)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    Image.fromarray(image).save(path)
    return image


@pytest.fixture
def icdar(tmp_path):
    save(tmp_path / "img_1.jpg")
    (tmp_path / "gt_img_1.txt").write_text(
        "\ufeff1,2,30,2,30,12,1,12,Hello, world\n5,20,40,20,40,30,5,30,###\n\n", encoding="utf-8"
    )
    return tmp_path


def test_icdar2015(icdar):
    data = datasets.icdar2015(icdar)
    image, polygons, ignore, name = data[0]
    assert image.shape == (60, 80, 3)
    assert polygons[0].tolist() == [[1, 2], [30, 2], [30, 12], [1, 12]]
    assert ignore.tolist() == [False, True]
    assert data.samples[0].texts == ("Hello, world", "###")
    assert name == "img_1.jpg"
    assert len(list(data)) == len(data) == 1


def test_the_official_layout(tmp_path):
    save(tmp_path / "train_images" / "img_7.jpg")
    (tmp_path / "train_gts").mkdir()
    (tmp_path / "train_gts" / "img_7.jpg.txt").write_text("1,2,30,2,30,12,1,12,word\n")
    assert len(datasets.icdar2015(tmp_path)[0].polygons) == 1
    assert datasets.load(str(tmp_path)).name == "icdar2015"
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(InputError, match=r"img_7\.jpg"):
        datasets.icdar2015(tmp_path, tmp_path / "elsewhere")


ORIGINAL = """x: [[115 503 494 115]], y: [[322 346 426 404]], ornt: [u'm'], transcriptions: [u'nauGHTY']
x: [[121 183 242
 303]], y: [[316 318 319 330]], ornt: [u'c'], transcriptions: [u'#']
x: [[1, 2, 3]], y: [[4, 5, 6]], ornt: [u'h'], transcriptions: [u"don't"]
"""


def test_totaltext_original(tmp_path):
    (tmp_path / "poly_gt_img1.txt").write_text(ORIGINAL)
    words = formats.totaltext(tmp_path / "poly_gt_img1.txt")
    assert words.polygons[0].tolist() == [[115, 322], [503, 346], [494, 426], [115, 404]]
    assert words.polygons[1].tolist()[3] == [303, 330]
    assert words.ignore == [False, True, False]
    assert words.texts == ["nauGHTY", "#", "don't"]


def test_totaltext_converted(tmp_path):
    (tmp_path / "a.txt").write_text(
        "1,2,30,2,30,12,15,14,1,12,a, b\n1,2,30,2,30,12,###\n0,0,5,0,5,5,0,5,12\n"
    )
    words = formats.totaltext(tmp_path / "a.txt")
    assert [len(points) for points in words.polygons] == [5, 3, 4]
    assert words.texts == ["a, b", "###", "12"]
    assert words.ignore == [False, True, False]


def test_totaltext_ignores_the_exif_rotation(tmp_path):
    image = np.zeros((40, 60, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image).save(tmp_path / "img651.jpg", exif=exif)
    (tmp_path / "poly_gt_img651.txt").write_text("1,2,30,2,30,12,1,12,word\n")
    assert datasets.totaltext(tmp_path)[0].image.shape == (40, 60, 3)
    assert datasets.totaltext(tmp_path, exif=True)[0].image.shape == (60, 40, 3)


def test_paddleocr(tmp_path):
    save(tmp_path / "images" / "a.jpg")
    words = [
        {"transcription": "one", "points": [[1, 2], [30, 2], [30, 12], [1, 12]]},
        {"transcription": "###", "points": [[1, 20], [30, 20], [35, 25], [30, 32], [1, 32]]},
    ]
    label = tmp_path / "Label.txt"
    label.write_text(f"images/a.jpg\t{json.dumps(words)}\n")
    data = datasets.paddleocr(label)
    assert [len(points) for points in data[0].polygons] == [4, 5]
    assert data[0].ignore.tolist() == [False, True]
    assert len(datasets.load(f"paddleocr:{label}")) == 1
    (tmp_path / "sub").mkdir()
    label.rename(tmp_path / "sub" / "Label.txt")  # paths from the folder above
    assert len(datasets.paddleocr(tmp_path / "sub" / "Label.txt")) == 1
    for name in ("gone.jpg", "x" * 300):
        (tmp_path / "Label.txt").write_text(f"{name}\t{json.dumps(words)}\n")
        with pytest.raises(InputError, match=f"picture '{name}' is not in '{tmp_path}' or "):
            datasets.paddleocr(tmp_path / "Label.txt")
    with pytest.raises(InputError, match=r"a\.jpg"):
        datasets.paddleocr(tmp_path / "sub" / "Label.txt", tmp_path / "sub")
    (tmp_path / "Label.txt").write_text("")
    with pytest.raises(InputError, match=r"Label\.txt: data set 'paddleocr' has no pictures"):
        datasets.load(f"paddleocr:{tmp_path / 'Label.txt'}")


def test_synthtext(tmp_path):
    from scipy.io import savemat

    for name in ("1/a.jpg", "2/b.jpg"):
        save(tmp_path / name)
    one = np.array([[1.0, 30, 30, 1], [2, 2, 12, 12]])
    several = np.stack([one, one + 20, one + 40], 2)
    cells = lambda *values: np.array([*values, None], dtype=object)[:-1][None]
    savemat(
        tmp_path / "gt.mat",
        {
            "imnames": cells("1/a.jpg", "2/b.jpg"),
            "wordBB": cells(one, several),
            "txt": cells(np.array(["Lone"]), np.array(["two words", "third"])),
        },
    )
    data = datasets.synthtext(tmp_path)
    assert [len(data[at].polygons) for at in (0, 1)] == [1, 3]
    assert data[0].polygons[0].tolist() == [[1, 2], [30, 2], [30, 12], [1, 12]]
    assert data[1].polygons[2].tolist()[0] == [41, 42]
    assert data.samples[1].texts == ("two", "words", "third")
    assert datasets.load(str(tmp_path)).name == "synthtext"
    whole = (tmp_path / "gt.mat").read_bytes()
    (tmp_path / "gt.mat").write_bytes(b"not a mat file")
    with pytest.raises(AnnotationError, match=r"gt\.mat' is no gt\.mat of SynthText: \w+Error"):
        datasets.synthtext(tmp_path)
    savemat(tmp_path / "gt.mat", {"imnames": cells("a", "b"), "wordBB": cells(one), "txt": cells("a", "b")})
    with pytest.raises(AnnotationError, match="it has 2 names and 1 boxes"):
        datasets.synthtext(tmp_path)
    for at in range(200, 240, 8):  # types of the parts of a cell, which scipy looks up beyond its table
        for value in (100, 203):
            (tmp_path / "gt.mat").write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            with contextlib.suppress(AnnotationError):  # the process lives
                formats.synthtext(tmp_path / "gt.mat")


BAD_LINES = [
    (formats.icdar2015, "1,2,3,4,5,6,7,8,a\n1,2,3\n", "line 2: 3 fields"),
    (formats.icdar2015, "1,2,3,4,5,6,7,x,a\n", "line 1"),
    (formats.icdar2015, "1,2,3,4,5,6,7,nan,a\n", "line 1"),
    (formats.totaltext, "1,2,3,4,word\n", "line 1: 4 coordinates"),
    (
        formats.totaltext,
        "x: [[1 2 3]], y: [[1 2]], ornt: [], transcriptions: [u'a']\n",
        "line 1: 3 x and 2 y",
    ),
    (formats.totaltext, "x: [[1 2 3]], ornt: [u'h']\n", "line 1"),
    (formats.paddleocr, "a.jpg\t[]\nb.jpg []\n", "line 2"),
    (formats.paddleocr, "a.jpg\t{nonsense\n", "line 1: no JSON"),
    (formats.paddleocr, 'a.jpg\t[{"transcription": "a"}]\n', "line 1"),
    (formats.paddleocr, 'a.jpg\t[{"points": [[1, 2], ["x", 4], [5, 6]]}]\n', "line 1"),
]


@pytest.mark.parametrize(("read", "text", "words"), BAD_LINES)
def test_bad_lines_are_named(read, text, words, tmp_path):
    path = tmp_path / "gt_a.txt"
    path.write_text(text)
    with pytest.raises(AnnotationError) as told:
        read(path)
    assert "gt_a.txt" in str(told.value)
    assert words in str(told.value)
    assert isinstance(told.value, DataError)


@pytest.fixture(scope="module")
def anything(tmp_path_factory):
    return tmp_path_factory.mktemp("any") / "a.txt"


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80))
def test_any_text_is_read_or_refused(anything, text):
    path = anything
    path.write_text(text, encoding="utf-8")
    for read in (formats.icdar2015, formats.totaltext, formats.paddleocr):
        try:
            read(path)
        except AnnotationError as error:
            assert "a.txt" in str(error)  # noqa: PT017


def test_bad_places(tmp_path):
    with pytest.raises(InputError, match="wanted a folder"):
        datasets.icdar2015(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no pictures"):
        datasets.icdar2015(tmp_path)
    with pytest.raises(InputError, match="not there"):
        datasets.load(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="format"):
        datasets.load(str(tmp_path), format="coco")
    with pytest.raises(InputError, match="rendered:COUNT"):
        datasets.load("rendered:many")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(AnnotationError, match="UTF-8"):
        formats.icdar2015(tmp_path / "a.txt")
    with pytest.raises(AnnotationError, match="cannot be read"):
        formats.icdar2015(tmp_path / "b.txt")


# augmentation


def marked(shape=(120, 200)):
    """An image with one white rectangle, and its outline."""
    image = np.zeros((*shape, 3), np.uint8)
    image[40:71, 60:121] = 255
    return image, [np.array([[60.0, 40], [120, 40], [120, 70], [60, 70]])], np.array([False])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_polygons_move_with_the_pixels(seed):
    image, polygons, ignore = marked()
    out, moved, flags = aug.augment(rng(seed), image, polygons, ignore, size=256)
    assert out.shape == (256, 256, 3)
    assert len(moved) == len(flags) == 1
    drawn = cv2.fillPoly(np.zeros((256, 256), np.uint8), [np.int32(np.rint(moved[0]))], 1).astype(bool)
    bright = out[..., 0] > 127
    assert (drawn & bright).sum() / max((drawn | bright).sum(), 1) > 0.8


def test_flip_and_rotation_matrices():
    assert aug.move(np.array([[0.0, 5.0]]), aug.flip_matrix(10)).tolist() == [[9, 5]]
    turned = aug.move(np.array([[9.0, 0.0]]), aug.rotation_matrix((10, 10), 90))
    np.testing.assert_allclose(turned, [[0, 0]], atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["all", "official"]))
def test_a_crop_cuts_no_word(seed, regions):
    random = rng(seed)
    polygons = []
    for _ in range(int(random.integers(1, 6))):
        x, y = random.uniform(0, 200), random.uniform(0, 120)
        polygons.append(np.array([[x, y], [x + 40, y + 5], [x + 40, y + 20], [x, y + 15]]))
    left, top, width, height = aug.choose_crop(
        random, (160, 260), polygons, np.zeros(len(polygons), bool), AugmentConfig(crop_regions=regions)
    )
    if (left, top, width, height) == (0, 0, 260, 160):
        return
    assert width >= 26
    assert height >= 16
    seen = 0
    for polygon in polygons:
        low, high = np.rint(polygon.min(0)), np.rint(polygon.max(0))
        inside = [(low[0] >= left and high[0] <= left + width), (low[1] >= top and high[1] <= top + height)]
        outside = [(high[0] <= left or low[0] >= left + width), (high[1] <= top or low[1] >= top + height)]
        assert inside[0] or outside[0]
        assert inside[1] or outside[1]
        seen += all(inside)
    assert seen or any(
        (p.max(0) >= (left, top)).all() and (p.min(0) <= (left + width, top + height)).all() for p in polygons
    )


def test_the_official_runs_lose_the_last():
    axis = np.array([0, 1, 2, 5, 6, 9, 10])
    assert [run.tolist() for run in aug.free_runs(axis, official=True)] == [[0, 1, 2], [5, 6]]
    assert len(aug.free_runs(axis)) == 3
    polygons = [np.array([[40.0, 0], [60, 0], [60, 99], [40, 99]])]
    crops = {aug.choose_crop(rng(seed), (100, 100), polygons, np.array([False])) for seed in range(5)}
    assert crops == {(0, 0, 100, 100)}  # no row is free


def test_two_runs_give_a_crop_round_the_word():
    polygons = [np.array([[40.0, 40], [60, 40], [60, 60], [40, 60]])]
    for seed in range(30):
        left, top, width, height = aug.choose_crop(rng(seed), (100, 100), polygons, np.array([False]))
        assert left < 40 <= 60 <= left + width
        assert top < 40 <= 60 <= top + height


def test_training_set():
    image, polygons, ignore = marked()
    examples = [datasets.Example(image, polygons, ignore, "a")] * 3
    how = datasets.Preparation(crop=128, labels=LabelConfig(distance="exact"), seed=5)
    data = datasets.TrainingSet(examples, how)
    pixels, targets = data[0]
    assert pixels.shape == (3, 128, 128)
    assert targets.gt.any()
    again, _ = datasets.TrainingSet(examples, how)[0]
    assert torch.equal(pixels, again)
    assert not torch.equal(pixels, data[1][0])
    data.set_epoch(1)
    assert not torch.equal(pixels, data[0][0])
    batch, labels = data.collate([data[0], data[1]])
    assert batch.shape == (2, 3, 128, 128)
    assert labels.gt.shape == (2, 128, 128)
    loader = torch.utils.data.DataLoader(data, batch_size=3, collate_fn=data.collate)
    assert next(iter(loader))[0].shape == (3, 3, 128, 128)


def test_normalization():
    pixel = np.array([[[10, 20, 30]]], np.uint8)
    config = DBConfig(mean=(1.0, 2.0, 3.0), std=(2.0, 2.0, 2.0))
    found = datasets.TrainingSet
    assert found is not None
    from dbnet_asf.data.dataset import normalize

    assert normalize(pixel, config).flatten().tolist() == [4.5, 9, 13.5]
    assert normalize(pixel, config.replace(color="bgr")).flatten().tolist() == [14.5, 9, 3.5]


def test_color_jitter_stays_in_range():
    image = rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8)
    found = aug.jitter(rng(1), image, 0.5)
    assert found.dtype == np.uint8
    assert not np.array_equal(found, image)


# the renderer


def test_a_scene_depends_on_its_arguments_only():
    first, again = render(3, 1, 128), render(3, 1, 128)
    np.testing.assert_array_equal(first.image, again.image)
    assert all(np.array_equal(a, b) for a, b in zip(first.polygons, again.polygons, strict=True))
    assert not np.array_equal(first.image, render(4, 1, 128).image)
    assert not np.array_equal(first.image, render(3, 2, 128).image)
    assert render(3, 1, (96, 160)).image.shape == (96, 160, 3)


def test_what_scenes_hold():
    scenes = [render(index, 0, 192) for index in range(80)]
    empty = np.mean([not len(scene.polygons) for scene in scenes])
    assert 0.1 < empty < 0.45
    words = [polygon for scene in scenes for polygon in scene.polygons]
    assert {len(polygon) for polygon in words} == {4, 14}
    assert all((area(polygon.astype(float)) > 1) and np.isfinite(polygon).all() for polygon in words)
    ignored = np.concatenate([scene.ignore for scene in scenes])
    assert 0 < ignored.mean() < 0.5
    for scene in scenes:
        assert scene.image.dtype == np.uint8
        for polygon, skip in zip(scene.polygons, scene.ignore, strict=True):
            if not skip:  # at least in part inside
                assert (polygon.max(0) > 0).all()
                assert (polygon.min(0) < 192).all()


def test_words_are_clockwise_from_their_top_left():
    scenes = [render(index, 0, 192) for index in range(20)]
    for polygon in (polygon for scene in scenes for polygon in scene.polygons):
        x, y = polygon.astype(float).T
        assert (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() > 0


def test_outlines_hold_the_ink():
    for face in faces():
        block = typeset([["Typeset", "(words)", "by"], ["Qjy1"]], face, 30)
        outside = np.ones(block.ink.shape, np.uint8)
        for outline in block.outlines:
            low, high = np.floor(outline[0]).astype(int), np.ceil(outline[2]).astype(int)
            outside[low[1] : high[1] + 1, low[0] : high[0] + 1] = 0
        total = float(block.ink.sum())
        assert total > 0
        assert (block.ink * outside).sum() <= 0.01 * total, face.name
    spaced = typeset([["EXIT"]], Face("builtin"), 20, tracking=0.3)
    assert np.ptp(spaced.outlines[0, :, 0]) > np.ptp(
        typeset([["EXIT"]], Face("builtin"), 20).outlines[0, :, 0]
    )


def test_held_out_photographs_are_others():
    train, test = photographs("train"), photographs("test")
    assert len(test) == 8
    assert not {path.name for path in train} & {path.name for path in test}
    forbidden = {
        "astronaut.png",
        "rocket.jpg",
        "page.png",
        "text.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
    }
    assert not {path.name for path in [*train, *test]} & forbidden


def test_own_photographs(tmp_path):
    Image.new("RGB", (300, 300), (250, 10, 10)).save(tmp_path / "red.png")
    assert render(0, 0, 96, photos=tmp_path).image.shape == (96, 96, 3)
    with pytest.raises(InputError, match="size"):
        render(0, 0, 32)
    with pytest.raises(InputError, match="backgrounds"):
        render(0, 0, 96, backgrounds="validation")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        render(0, 0, 96, photos=tmp_path / "empty")


@pytest.mark.parametrize("size", [(9000, 1), (1, 9000), (9000, 4)])
def test_a_thin_photograph_is_a_background_too(tmp_path, size):
    Image.new("RGB", size, (250, 10, 10)).save(tmp_path / "thin.png")
    images = [render(0, index, 96, photos=tmp_path).image for index in range(12)]  # most have a photograph
    assert all(image.shape == (96, 96, 3) for image in images)


def test_rendered_data_sets():
    data = datasets.rendered(3, seed=4, size=96)
    assert len(list(data)) == len(data) == 3
    with pytest.raises(IndexError):
        data[3]
    with pytest.raises(InputError, match="count"):
        datasets.rendered(0)
    held_out = datasets.load("rendered:2:9")
    assert (len(held_out), held_out.seed, held_out.options) == (2, 9, {"backgrounds": "test"})
