"""Resampling against the recorded numbers of reproject."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_cases import Case, both_dtypes

from mantis_photoz.wcs import Tan, resample, resample_exact

KINDS = ("bilinear", "exact", "footprint", "flux_in_out", "meta")


def scenes(case):
    """Name, settings, image, source and target of each image."""
    for name, told in case.settings["images"].items():
        image, n, bump = case.input(name), told["pixels"], case.settings["bump"]
        y, x = np.mgrid[:n, :n] - (n - 1) / 2
        image = image + bump["height"] * np.exp(-(x**2 + y**2) / bump["width"])
        ra, dec = told["sky"]
        source = Tan.centered(ra, dec, pixels=n, scale=told["scale"], rotation=told["rotation"])
        target = Tan.centered(ra, dec, pixels=told["pixels_out"], scale=told["scale_out"])
        yield name, told, image, source, target


def rows(tan):
    return torch.tensor([tan.row()], dtype=torch.float64)


@both_dtypes
def test_bilinear(golden, dtype, device):
    case = Case(golden, "resample", dtype)
    if device == "mps" and dtype == torch.float64:
        pytest.skip("no float64 there")
    for name, told, image, source, target in scenes(case):
        planes = torch.as_tensor(image, dtype=dtype, device=device)[None, None]
        found = resample(planes, rows(source).to(device), rows(target).to(device), (told["pixels_out"],) * 2)
        case.assert_close(found[0, 0], f"{name}_bilinear", loose={"atol": 1e-4, "rtol": 1e-4})


def test_exact_conserves_flux(golden):
    case = Case(golden, "resample")
    for name, told, image, source, target in scenes(case):
        values, footprint = resample_exact(image, source, target, (told["pixels_out"],) * 2)
        case.assert_close(footprint, f"{name}_footprint")
        case.assert_close(values, f"{name}_exact")
        ratio = (told["scale_out"] / told["scale"]) ** 2
        flux = np.array([image.sum(), np.nansum(values * footprint) * ratio])
        case.assert_close(flux, f"{name}_flux_in_out")
        meta = [told[key] for key in ("pixels", "scale", "rotation", "pixels_out", "scale_out")]
        np.testing.assert_allclose(case[f"{name}_meta"], [*meta, *told["sky"]], rtol=1e-12)
    case.assert_all_seen(elsewhere=[f"{name}_bilinear" for name in case.settings["images"]])
