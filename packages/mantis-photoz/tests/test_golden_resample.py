"""Resampling against the recorded numbers of reproject; ``--golden DIR`` runs it on another folder."""

from __future__ import annotations

import fnmatch

import numpy as np
import pytest
import torch

from fusion_core.testing.detfill import array
from mantis_photoz.wcs import Tan, resample, resample_exact


def tolerance(case, name):
    found = case["tolerance"]
    for pattern, other in case.get("tolerances", {}).items():
        found = other if fnmatch.fnmatch(name, pattern) else found
    return found


def scene(golden, name):
    case = golden.settings["files"]["resample"]
    entry, meta = case["inputs"][name], case["images"][name]
    image = array(golden.settings["prefix"] + entry["name"], tuple(entry["shape"]))
    image = np.abs(image) if entry.get("abs") else image
    n = meta["pixels"]
    y, x = np.mgrid[:n, :n] - (n - 1) / 2
    image = image + case["bump"]["height"] * np.exp(-(x**2 + y**2) / case["bump"]["width"])
    ra, dec = meta["sky"]
    source = Tan.centered(ra, dec, pixels=n, scale=meta["scale"], rotation=meta["rotation"])
    target = Tan.centered(ra, dec, pixels=meta["pixels_out"], scale=meta["scale_out"])
    return case, meta, image, source, target


def names(golden):
    return list(golden.settings["files"]["resample"]["images"])


def close(golden, case, got, wanted, name):
    golden.assert_close(got, wanted, "float64", **tolerance(case, name), what=name)


def rows(tan):
    return torch.tensor([tan.row()], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bilinear(golden, dtype, device):
    recorded = golden.load("resample.npz")
    if device == "mps" and dtype == torch.float64:
        pytest.skip("no float64 there")
    for name in names(golden):
        case, meta, image, source, target = scene(golden, name)
        size = (meta["pixels_out"],) * 2
        got = resample(
            torch.as_tensor(image, dtype=dtype)[None, None], rows(source), rows(target), size
        )[0, 0]  # fmt: skip
        close(golden, case, got, recorded[f"{name}_bilinear"], f"{name}_bilinear")


def test_exact_conserves_flux(golden):
    recorded = golden.load("resample.npz")
    for name in names(golden):
        case, meta, image, source, target = scene(golden, name)
        size = (meta["pixels_out"],) * 2
        values, footprint = resample_exact(image, source, target, size)
        close(golden, case, footprint, recorded[f"{name}_footprint"], f"{name}_footprint")
        close(golden, case, values, recorded[f"{name}_exact"], f"{name}_exact")
        ratio = (meta["scale_out"] / meta["scale"]) ** 2
        flux = [image.sum(), np.nansum(values * footprint) * ratio]
        close(golden, case, flux, recorded[f"{name}_flux_in_out"], f"{name}_flux_in_out")
        wanted = recorded[f"{name}_meta"]
        assert wanted[0] == meta["pixels"]
        assert wanted[3] == meta["pixels_out"]
