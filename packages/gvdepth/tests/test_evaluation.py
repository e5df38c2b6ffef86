"""Evaluation: pooling, distance bins, paired intervals, shards, and what it refuses."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fusion_core.errors import ConfigError, DataError, ShapeError
from gvdepth import Camera, evaluate, metrics
from gvdepth.evaluation import Evaluation, merge_evaluations
from gvdepth.measures import METRICS
from gvdepth.resampling import resample_counts

CAMERA = Camera(fx=20.0, fy=20.0, cx=7.5, cy=4.0, width=16, height=12, camera_height=1.5)


def samples(count=12, seed=0):
    draw = np.random.default_rng(seed)
    made = []
    for i in range(count):
        depth = draw.uniform(1, 75, (12, 16))
        valid = draw.random((12, 16)) < 0.8
        image = (depth[..., None] * 3 * np.ones(3)).astype(np.uint8)
        made.append(SimpleNamespace(image=image, depth=depth, valid=valid, camera=CAMERA, id=f"frame {i}"))
    for sample in made[3:4]:
        sample.valid[:] = False
    return made


def noisy(scale, seed=1):
    """A model that knows the truth up to noise; it looks the sample up by its picture."""
    data = samples()

    def model(image, camera):
        assert camera is CAMERA
        index = next(i for i, s in enumerate(data) if (s.image == image).all())
        draw = np.random.default_rng([seed, index])
        return data[index].depth * np.exp(draw.normal(0, scale, (12, 16)))

    return model


def test_an_evaluation_is_the_metrics_of_its_images():
    data, model = samples(), noisy(0.2)
    found = evaluate(model, data, crop="garg", resamples=50)
    each = [
        metrics(model(s.image, s.camera).astype(np.float32), s.depth, mask=s.valid, crop="garg") for s in data
    ]
    seen = [x for x in each if x["valid"]]
    row = found.rows[0]
    assert (row["method"], row["distance"]) == ("model", "all")
    for name in METRICS:
        assert row[name] == pytest.approx(np.mean([x[name] for x in seen]), rel=1e-6)
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    assert row["valid"] == sum(x["valid"] for x in each)
    assert [r["distance"] for r in found.rows] == ["all", "0-10 m", "10-20 m", "20-40 m", "40-80 m"]
    assert sum(r["valid"] for r in found.rows[1:]) == row["valid"]
    near = [np.where((s.depth > 10) & (s.depth <= 20), s.depth, 0.0) for s in data]
    picked = [
        metrics(model(s.image, s.camera).astype(np.float32), d, mask=s.valid, crop="garg")
        for s, d in zip(data, near, strict=True)
    ]
    expected = np.mean([x["rmse"] for x in picked if x["valid"]])
    assert found.rows[2]["rmse"] == pytest.approx(expected, rel=1e-6)
    assert math.isnan(found.per_image()[3]["rmse"])
    assert found.per_image()[4]["id"] == "frame 4"
    assert found.metrics["model"]["abs_rel"] == row["abs_rel"]


def test_pixel_pooling():
    data, model = samples(), noisy(0.2)
    found = evaluate(model, data, pooling="pixel", bins=None, resamples=20)
    assert len(found.rows) == 1
    stacked = [
        np.stack(x) for x in zip(*((model(s.image, s.camera), s.depth, s.valid) for s in data), strict=True)
    ]
    expected = metrics(*stacked[:2], mask=stacked[2], pooling="pixel")
    for name in METRICS:
        assert found.rows[0][name] == pytest.approx(expected[name], rel=1e-5)


def test_models_are_compared_as_pairs():
    models = {"good": noisy(0.1), "bad": noisy(0.3), "same": noisy(0.1)}
    found = evaluate(models, samples(), bins=None, resamples=400, baseline="good")
    rows = {row["method"]: row for row in found.rows}
    assert "abs_rel_p" not in rows["good"]
    bad = rows["bad"]
    assert bad["abs_rel_difference"] == pytest.approx(bad["abs_rel"] - rows["good"]["abs_rel"])
    assert 0 < bad["abs_rel_difference_low"] <= bad["abs_rel_difference"] <= bad["abs_rel_difference_high"]
    assert bad["abs_rel_p"] < 0.05
    assert rows["same"]["abs_rel_difference"] == 0
    assert rows["same"]["abs_rel_p"] == 1.0
    again = evaluate(models, samples(), bins=None, resamples=400, baseline="good")
    assert again.rows == found.rows
    assert evaluate(models, samples(), bins=None, resamples=9).settings["baseline"] == "good"


@pytest.mark.parametrize("pooling", ["image", "pixel"])
def test_shards_add_up_bit_by_bit(pooling):
    options = {"pooling": pooling, "resamples": 30, "batch_size": 3}
    whole = evaluate(noisy(0.2), samples(), **options)
    parts = [evaluate(noisy(0.2), samples(), shard=f"{i}/3", **options) for i in range(3)]
    merged = merge_evaluations(parts[::-1])
    assert merged.rows == whole.rows
    assert list(merged.ids) == list(whole.ids)
    np.testing.assert_array_equal(merged.sums["model"], whole.sums["model"])
    with pytest.raises(DataError, match="an image is in two parts"):
        merge_evaluations([parts[0], parts[0]])
    with pytest.raises(DataError, match="other settings"):
        merge_evaluations([parts[0], evaluate(noisy(0.2), samples(), shard="1/3", resamples=31)])
    with pytest.raises(DataError, match="parts is empty"):
        merge_evaluations([])


def test_predictions_of_every_kind(tmp_path):
    data = samples(4)
    plain = evaluate(lambda image, camera: data_of(data, image), data, resamples=5).rows
    calls = []

    def predict(images, cameras):
        calls.append(len(images))
        return [SimpleNamespace(depth=torch.from_numpy(data_of(data, image))) for image in images]

    batched = evaluate(SimpleNamespace(predict=predict), data, batch_size=3, resamples=5)
    assert calls == [3, 1]
    assert json.dumps(batched.rows) == json.dumps(plain)
    for sample in data:
        np.save(
            tmp_path / f"{sample.id.replace(' ', '_')}.depth.npy",
            data_of(data, sample.image).astype(np.float32),
        )
    stored = evaluate(tmp_path, data, resamples=5)
    assert stored.rows[0]["method"] == tmp_path.name
    assert stored.rows[0]["abs_rel"] == pytest.approx(plain[0]["abs_rel"], rel=1e-9)
    coarse = evaluate(lambda image, camera: data_of(data, image)[::2, ::2], data, resamples=5)  # upsampled
    assert coarse.rows[0]["valid"] == plain[0]["valid"]
    assert evaluate(lambda image, camera: data_of(data, image), data, limit=2, resamples=5).ids == [
        "frame 0",
        "frame 1",
    ]


def data_of(data, image):
    return next(s for s in data if (s.image == image).all()).depth * 1.05


def test_the_report_is_written(tmp_path, capsys):
    found = evaluate({"a": noisy(0.1), "b": noisy(0.2)}, samples(), resamples=20)
    found.save(tmp_path / "report")
    document = json.loads((tmp_path / "report" / "report.json").read_text())
    assert document["settings"]["pooling"] == "image"
    assert document["per_image"]["a"][3]["rmse"] is None
    assert len((tmp_path / "report" / "table.csv").read_text().splitlines()) == 11
    found.print()
    assert "abs_rel %" in capsys.readouterr().out
    assert isinstance(found, Evaluation)


def test_resampling_counts_are_multinomial():
    counts = resample_counts(6, 2000, seed=3)
    assert (counts.sum(1) == 6).all()
    assert counts.mean(0) == pytest.approx(np.ones(6), abs=0.1)
    assert counts.var() == pytest.approx(5 / 6, abs=0.05)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"data": []}, DataError, "data is empty, wanted at least one sample"),
        ({"model": {}}, ConfigError, "model is an empty mapping"),
        ({"model": 3}, ConfigError, "model is int, wanted predict"),
        ({"model": "nowhere"}, DataError, "nowhere is no directory of depth maps"),
        ({"baseline": "best"}, ConfigError, "baseline is 'best', wanted one of model"),
        ({"model": lambda image, camera: np.ones(3)}, ShapeError, r"frame 0 has shape \(3,\), wanted"),
        (
            {"model": lambda image, camera: np.ones((2, 3, 4))},
            ShapeError,
            r"frame 0 has shape \(2, 3, 4\), wanted",
        ),
        ({"batch_size": 0}, ConfigError, "batch_size is 0"),
        ({"pooling": "mean"}, ConfigError, "pooling is 'mean'"),
        ({"crop": "garq"}, ConfigError, "crop is 'garq'"),
        ({"bins": [1.0]}, ConfigError, "increasing edges"),
    ],
)
def test_bad_input(options, error, words):
    settings = {
        "model": lambda image, camera: np.ones((12, 16)),
        "data": samples(2),
        "resamples": 3,
    } | options
    with pytest.raises(error, match=words):
        evaluate(settings.pop("model"), settings.pop("data"), **settings)


def test_a_missing_stored_map_is_named(tmp_path):
    with pytest.raises(DataError, match=r"has no frame_0\.depth\.npy"):
        evaluate(tmp_path, samples(2))
