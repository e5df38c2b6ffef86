"""The recorded numbers of tests/golden (or of ``--golden DIR``): every case, in float64 and float32."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fusion_core.testing import array
from gvdepth import (
    Camera,
    consistency_loss,
    fct,
    fct_inverse,
    fuse,
    ground_depth,
    horizon,
    metrics,
    propagate,
    silog_loss,
    uncertainty_loss,
    vct,
    vct_inverse,
)
from gvdepth.calib_io import attitude
from gvdepth.canonical import vct_derivative
from gvdepth.geometry import height_above_road
from gvdepth.losses import depth_loss
from gvdepth.plane import fit_plane
from gvdepth.vertical import Bounded, Offset, focal_canonical, row_offset, vertical_head, y_max
from gvdepth.warping import warp

DTYPES = [torch.float64, torch.float32]
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
BATCHED = {"fusion"}


def camera_of(row, roll_deg=None):
    names = ("image_height", "image_width", "fx", "fy", "cx", "cy", "camera_height", "pitch_deg", "roll_deg")
    numbers = dict(zip(names, map(float, row), strict=True))
    numbers["height"], numbers["width"] = numbers.pop("image_height"), numbers.pop("image_width")
    if roll_deg is not None:
        numbers["roll_deg"] = roll_deg
    return Camera.exact(**numbers)


class Case:
    """One entry of cases.json: its arrays, its settings, and comparisons at its tolerances."""

    def __init__(self, golden, entry, dtype):
        self.golden, self.entry, self.dtype = golden, entry, dtype
        self.record = golden.load(entry["file"])
        self.seen = set()
        if "key" in entry:
            self.record, self.prefix = self.record[entry["key"]], ""
        else:
            self.prefix = entry.get("prefix", "")

    def __getitem__(self, name):
        self.seen.add(name)
        return self.record[self.prefix + name]

    def tensor(self, name):
        return torch.as_tensor(self[name], dtype=self.dtype)

    def camera(self, name="camera"):
        named = self.entry.get("camera", name)
        row = self.record[named] if isinstance(named, str) and named in self.record else self[name]
        return camera_of(row, self.entry.get("roll_deg"))

    def assert_close(self, actual, name, rtol=None, atol=None):
        exact = self.dtype == torch.float64
        if rtol is None:
            rtol = self.entry.get("rtol", 0.0) if exact else self.entry["rtol_float32"]
        floor = 1e-12 if exact else 1e-6
        if atol is None:
            atol = self.entry.get("atol", floor)
        self.golden.assert_close(
            actual, self[name], rtol=rtol, atol=atol, what=f"{self.entry['name']} {name}"
        )

    def filled(self):
        """The inputs are what their names say."""
        for name, (key, scale, shift) in self.entry.get("detfill", {}).items():
            if name == "noise":
                continue
            stored = np.asarray(self[name.removeprefix("log_")])
            made = array(key, stored.shape, scale, shift)
            if name == "mask":
                made = (made > self.entry["mask_above"]) & (self["gt"] <= self.entry["d_max"])
            self.golden.assert_close(np.exp(made) if name.startswith("log_") else made, stored, what=name)


def cases(golden, dtype, *kinds):
    found = [Case(golden, entry, dtype) for entry in golden.settings["cases"] if entry["kind"] in kinds]
    if not found and golden.borrowed:
        pytest.skip(f"no case of kind {kinds} in {golden.directory}")
    assert found, kinds
    return found


@both_dtypes
def test_ground_depth(golden, dtype):
    for case in cases(golden, dtype, "ground_depth"):
        camera = case.camera()
        for depth in (
            ground_depth(camera, dtype=dtype),
            ground_depth(camera, roll=True, dtype=dtype),
            ground_depth(camera.tensor(torch.float64)[None], camera.size, dtype=dtype)[0, 0],
            ground_depth([camera, camera], dtype=dtype)[1, 0],
            ground_depth(camera, backend="numpy", dtype=str(dtype).removeprefix("torch.")),
        ):
            case.assert_close(depth, "depth")  # assert_close wants infinities in the same places
            assert np.array_equal(np.isinf(np.asarray(depth)), np.isinf(case["depth"]))
        golden.assert_close(camera.normal, case["normal"], rtol=case.entry["rtol"], atol=1e-12)


@both_dtypes
def test_vct(golden, dtype):
    for case in cases(golden, dtype, "vct"):
        case.filled()
        camera, entry = case.camera(), case.entry
        assert camera.height * (1 + entry["extend"]) == pytest.approx(float(case["h_ext"]), rel=1e-12)
        h_ext = float(case["h_ext"])
        settings = {"extend": entry["extend"], "max_depth": entry["d_max"]}
        highest = y_max(camera, camera.height, **settings)
        case.assert_close(highest, "y_max")
        case.assert_close(highest.to(dtype) * case.tensor("z").sigmoid(), "y")
        head = vertical_head("bounded", **settings)
        z = case.tensor("z")
        case.assert_close(
            head(z[None, None], camera.tensor(dtype)[None], camera.height, stride=1)[0, 0], "depth"
        )
        case.assert_close(
            head(z[None, None], camera.tensor(torch.float64)[None], camera.height)[0, 0], "depth"
        )
        case.assert_close(vct(case.tensor("y"), camera, h_ext), "depth")
        # A row near 0 is a difference of rows: in float32 it keeps the digits of the largest.
        digits = 1e-6 * (camera.height + np.abs(case["y_of_depths"]).max())
        rows = {"atol": 1e-12 if dtype == torch.float64 else digits}
        case.assert_close(vct_inverse(case.tensor("depth"), camera, h_ext), "y", **rows)
        for name, height in (("y_of_depths", h_ext), ("y_paper_h_image", camera.height)):
            case.assert_close(vct_inverse(case.tensor("depths"), camera, height), name, **rows)
        case.assert_close(h_ext - vct_inverse(case.tensor("depths"), camera, h_ext), "row_of_depths", **rows)
        case.assert_close(vct_derivative(case.tensor("depth"), camera), "ddepth_dy")
        y = case.tensor("y").requires_grad_()
        vct(y, camera, h_ext).sum().backward()
        case.assert_close(y.grad, "ddepth_dy", rtol=1e-9 if dtype.itemsize == 8 else 5e-4)
        case.assert_close(
            propagate(case.tensor("depth"), camera, row_std=case.tensor("sigma_y")), "sigma_depth"
        )
        case.assert_close(horizon(camera), "horizon_row")


@both_dtypes
def test_fct(golden, dtype):
    for case in cases(golden, dtype, "fct"):
        case.filled()
        camera, entry = case.camera(), case.entry
        f_c, span = entry["f_c"], tuple(entry["focal_range"])
        canonical = focal_canonical(case.tensor("z"), span)
        case.assert_close(canonical, "canonical")
        case.assert_close(fct(canonical, camera, f_c=f_c), "depth")
        case.assert_close(fct_inverse(case.tensor("depth"), camera, f_c=f_c), "canonical")
        sigma = torch.as_tensor(case.record[entry["sigma"]], dtype=dtype)
        spread = propagate(case.tensor("depth"), camera, canonical_std=sigma, f_c=f_c)
        case.assert_close(spread, "sigma_depth")


@both_dtypes
def test_offset(golden, dtype):
    for case in cases(golden, dtype, "offset"):
        case.filled()
        camera, entry = case.camera(), case.entry
        settings = {
            "max_depth": entry["d_max"],
            "softness": entry["softness"],
            "offset_scale": entry["offset_scale"],
        }
        head = vertical_head("offset", **settings)
        assert isinstance(head, Offset)
        z, numbers = case.tensor("z")[None, None], camera.tensor(torch.float64)[None]
        for roll in (False, True):
            depth = head(z, numbers, camera.height, stride=1, roll=roll)
            case.assert_close(depth[0, 0], "depth")
        case.assert_close(row_offset(z, camera.height, entry["offset_scale"])[0, 0], "delta")
        case.assert_close(head.gamma(z, numbers, camera.height)[0, 0], "gamma")
        # The height is a difference of numbers of the size of the camera's height.
        atol = {"atol": 1e-12 if dtype.itemsize == 8 else 1e-4 * camera.camera_height}
        case.assert_close(height_above_road(depth, numbers)[0, 0], "height_above_ground", **atol)


def heads_to_losses(case, dtype):
    """Heads -> depths -> fusion -> losses, through the public functions."""
    entry = case.entry
    names = ("zF", "zY", "sF", "sY")
    zf, zy, sf, sy = (case.tensor(name).requires_grad_() for name in names)
    fy, cy, h = (torch.as_tensor(case[name], dtype=torch.float64) for name in ("fy", "cy", "h"))
    pitch = torch.as_tensor(np.radians(case["pitch"]), dtype=torch.float64)
    camera = torch.stack([fy, fy, cy, cy, h, pitch, torch.zeros_like(fy)], -1)
    height = torch.tensor(entry["image_height"], dtype=torch.float64)
    head = vertical_head(entry["vertical_param"], extend=entry["extend"], max_depth=entry["d_max"])
    assert isinstance(head, Bounded)
    focal = fct(focal_canonical(zf, tuple(entry["focal_range"])), camera, f_c=entry["f_c"])
    vertical = head(zy[:, None], camera, height, roll=False)[:, 0]
    return focal, vertical, (zf, zy, sf, sy)


@both_dtypes
def test_fusion_and_losses(golden, dtype):
    for case in cases(golden, dtype, "fusion"):
        case.filled()
        entry = case.entry
        assert entry["pooling"] == "pixel"
        focal, vertical, inputs = heads_to_losses(case, dtype)
        _, _, sf, sy = inputs
        case.assert_close(focal, "depth_focal")
        case.assert_close(vertical, "depth_vertical")
        for rule in ("scale", "variance", "mean"):
            fused = fuse(focal, vertical, sf, sy, fusion=rule)
            case.assert_close(fused.depth, f"fused_{rule}")
            if rule == "scale":
                case.assert_close(fused.uncertainty, "sigma_fused_scale")
                case.assert_close(fused.weight_focal, "weight_focal")
        fused = fuse(focal, vertical, sf, sy)
        target, mask = case.tensor("gt"), torch.as_tensor(case["mask"])
        settings = {"alpha": entry["alpha"], "lam": entry["lam"]}
        case.assert_close(silog_loss(fused.depth, target, mask, **settings), "loss_silog")
        case.assert_close(
            silog_loss(fused.depth, target, mask, correction=1, **settings), "loss_silog_correction1"
        )
        parts = [uncertainty_loss(d, s, target, mask) for d, s in ((focal, sf), (vertical, sy))]
        case.assert_close(parts[0] + parts[1], "loss_uncertainty")
        found = depth_loss(
            fused.depth, target, mask, cues=((focal, sf), (vertical, sy)), max_depth=entry["d_max"],
            uncertainty_weight=entry["uncertainty_weight"], **settings,
        )  # fmt: skip
        case.assert_close(found.total, "loss_total_without_consistency")
        found.total.backward()
        tolerances = {"rtol": entry["rtol_grad"], "atol": entry["atol_grad"]}
        if dtype == torch.float32:
            tolerances = {"rtol": entry["rtol_float32"], "atol": 1e-6}
        for name, tensor in zip(("zF", "zY", "sF", "sY"), inputs, strict=True):
            case.assert_close(tensor.grad, f"grad_{name}", **tolerances)


@both_dtypes
def test_fusion_extremes(golden, dtype):
    for case in cases(golden, dtype, "fusion_extreme"):
        d_focal, s_focal, d_vertical, s_vertical = case.tensor("extreme_in").T
        fused = fuse(d_focal, d_vertical, s_focal, s_vertical, fusion=case.entry["fusion"])
        loose = case.entry["atol"] if dtype == torch.float64 else 1e-5 * float(case["extreme_depth"].max())
        case.assert_close(fused.depth, "extreme_depth", rtol=0.0, atol=loose)
        assert torch.isfinite(fused.depth).all()


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@both_dtypes
def test_metrics(golden, dtype, backend):
    names = ("abs_rel", "sq_rel", "rmse", "rmse_log", "silog", "log10", "irmse", "mae", "d1", "d2", "d3")
    for case in cases(golden, dtype, "metrics"):
        entry = case.entry
        prediction, target = (case.record[entry["inputs"] + name] for name in ("pred", "gt"))
        # The mask is taken from the recorded truth: rounding to float32 may move a pixel across an edge.
        cap, low = float(case.record[entry["inputs"] + "cap"]), entry["minimum"]
        valid = (target > low) & (target <= cap)
        if dtype == torch.float32:
            prediction, target = prediction.astype(np.float32), target.astype(np.float32)
            cap, low = float(np.nextafter(np.float32(cap), np.float32(np.inf))), low * (1 - 1e-6)
        options = {"max_depth": cap, "min_depth": low, "crop": entry["crop"], "mask": valid}
        found = metrics(prediction, target, backend=backend, **options)
        for name in names:
            share = dtype == torch.float32 and name in ("d1", "d2", "d3")
            case.assert_close(found[name], name, **({"atol": 2.0 / max(found["valid"], 1)} if share else {}))
        assert found["valid"] == case["valid"]
        assert set(found) == {*names, "valid"}


@both_dtypes
def test_named_crops_are_the_recorded_ones(golden, dtype):
    for case in cases(golden, dtype, "metrics"):
        named = case.entry["name"].rpartition("_")[2]
        if named not in ("none", "garg", "eigen") or dtype != torch.float64:
            continue
        prediction, target = (case.record[case.entry["inputs"] + name] for name in ("pred", "gt"))
        found = metrics(
            prediction, target, crop=named, max_depth=float(case.record[case.entry["inputs"] + "cap"])
        )
        case.assert_close(found["abs_rel"], "abs_rel")
        assert found["valid"] == case["valid"]


@both_dtypes
def test_consistency(golden, dtype):
    for case in cases(golden, dtype, "consistency"):
        one, two = case.tensor("depth1"), case.tensor("depth2")
        views = case["view1"], case["view2"]
        warped, valid = warp(one, *views, tuple(two.shape))
        case.assert_close(warped, "warped")
        assert np.array_equal(valid.numpy(), case["valid"])
        assert (warped.numpy()[~case["valid"]] == case.entry["warped_where_invalid"]).all()
        case.assert_close(consistency_loss(one, two, *views), "loss")
        batched = [x[None, None].expand(2, 1, -1, -1) for x in (one, two)]
        case.assert_close(consistency_loss(*batched, *views), "loss")
        assert tuple(case["image_hw"]) >= (1, 1)


@both_dtypes
def test_camera_operations(golden, dtype):
    for case in cases(golden, dtype, "camera_op"):
        x0, y0, width, height, new_width, new_height, flip = case["op"]
        start = camera_of(case.entry["camera"])
        camera = start.crop(x0, y0, width, height).resize(new_width, new_height)
        camera = camera.flip() if flip else camera
        wanted = camera_of(case["camera"])
        for name in ("fx", "fy", "cx", "cy", "camera_height", "pitch_deg", "roll_deg"):
            assert getattr(camera, name) == pytest.approx(getattr(wanted, name), rel=1e-12, abs=1e-12)
        assert camera.size == wanted.size
        depth = ground_depth(camera, dtype=dtype)
        column = depth[:, case.entry["column"]].numpy()
        rows = np.array([math.inf if x is None else x for x in case["ground_rows"]])
        rtol = case.entry["rtol"] if dtype == torch.float64 else case.entry["rtol_float32"]
        golden.assert_close(column, rows, rtol=rtol, atol=1e-12, what=case.entry["name"])
        total = float(depth[torch.isfinite(depth)].double().sum())
        case.assert_close(np.float64(total), "ground_sum_finite")


def test_plane_fits(golden):
    for case in cases(golden, torch.float64, "plane_fit"):
        clean = np.array(case["points_clean"])
        key, scale, shift = case.entry["detfill"]["noise"]
        noisy = clean + array(key, clean.shape, scale, shift)
        answers = {k: v for k, v in case.record.items() if k != "points_clean"}
        for kind, points in (("clean", clean), ("noisy", noisy)):
            found = fit_plane(points)
            name = next(k for k in answers if kind in k and np.shape(answers[k]) == (3,))
            golden.assert_close(
                np.array(found), answers[name], rtol=0, atol=case.entry[f"atol_{kind}"], what=name
            )


def test_extrinsics(golden):
    for case in cases(golden, torch.float64, "extrinsic"):
        transform = np.array(case["T_vehicle_from_camera"])
        found = attitude(transform)
        wanted = [case["height"], case["pitch_deg"], case["roll_deg"]]
        golden.assert_close(np.array(found), wanted, rtol=0, atol=case.entry["atol"], what=case.entry["name"])


def test_every_case_has_a_test(golden):
    known = {
        "ground_depth", "vct", "fct", "offset", "fusion", "fusion_extreme", "metrics", "consistency",
        "camera_op", "plane_fit", "extrinsic",
    }  # fmt: skip
    kinds = {entry["kind"] for entry in golden.settings["cases"]}
    assert kinds <= known
    assert golden.borrowed or kinds == known
    files = {entry["file"] for entry in golden.settings["cases"]}
    assert files == set(golden.cases("*"))
