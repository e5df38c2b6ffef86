"""The recorded cases of tests/golden: inputs by name, tolerances by array, one loader for all of them."""

from __future__ import annotations

from fnmatch import fnmatchcase

import numpy as np
import pytest
import torch

from fusion_core.testing import array

DTYPES = [torch.float64, torch.float32]
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
LOOSE = {"atol": 2e-4, "rtol": 2e-3}  # float32 against float64 records

COMMON = {"inputs", "tolerance", "tolerances", "informative"}
SETTINGS = {
    "transforms": {"default", "extremes"},
    "views": {"crop", "size", "seeds", "step"},
    "models": {
        *(
            "head_classes",
            "hidden",
            "encoder",
            "classes",
            "z_max",
            "optimizer",
            "lr",
            "weight_decay",
            "steps",
        ),
        *("resnet_classes", "large"),
    },
    "training": {"classes", "z_max"},
    "photometry": {"amplitude", "sigma", "noise_band", "ebv"},
    "inpaint": {"threshold", "hole"},
    "recalibration": {"hidden", "steps", "nodes", "z_max", "floor", "cells"},
    "pdf_metrics": {
        *("half_first_bin", "z_max", "quantile_levels", "coverage_levels", "odds_width", "pit_map_points"),
    },
    "magnitudes_dust": {"softening", "error_shift", "zero_flux", "bands"},
    "shapley": {"groups"},
    "resample": {"bump", "images"},
}
"""What the tests know of: files, and the settings that each has beside :data:`COMMON`."""


class Case:
    """One file of a golden folder: its arrays, settings, inputs, and comparisons at its tolerances."""

    def __init__(self, golden, name, dtype=torch.float64):
        if name not in golden.settings["files"] and golden.borrowed:
            pytest.skip(f"no {name} in {golden.directory}")
        self.golden, self.name, self.dtype = golden, name, dtype
        self.settings = golden.settings["files"][name]
        self.record = golden.load(f"{name}.npz")
        self.prefix = golden.settings["prefix"]
        self.seen = set()

    def __getitem__(self, key):
        self.seen.add(key)
        return self.record[key]

    def __contains__(self, key):
        return key in self.record

    def input(self, key):
        """The named input as float64 array."""
        told = self.settings["inputs"][key]
        made = array(
            self.prefix + told["name"], told["shape"], told.get("scale", 1.0), told.get("shift", 0.0)
        )
        made = np.abs(made) if told.get("abs") else made
        low, high = told.get("clip", (None, None))
        return made if low is None and high is None else np.clip(made, low, high)

    def tensor(self, key):
        """The named input as a tensor of the case's dtype."""
        return torch.as_tensor(self.input(key), dtype=self.dtype)

    def stored(self, key):
        """A recorded array as a tensor of the case's dtype."""
        return torch.as_tensor(self[key], dtype=self.dtype)

    def tolerance(self, key):
        found = {"atol": 0.0, "rtol": 0.0, "changed_share": 0.0} | self.settings["tolerance"]
        for pattern, values in self.settings.get("tolerances", {}).items():
            if fnmatchcase(key, pattern):
                found = found | values
        return found

    def assert_close(self, actual, key, *, variant="", loose=None):
        """Compare with a recorded array; ``loose`` replaces the tolerance where it is wider (float32)."""
        tolerance = self.tolerance(key)
        if variant:
            exact = f"{key}:{variant}"
            for pattern, values in self.settings.get("tolerances", {}).items():
                if ":" in pattern and fnmatchcase(exact, pattern):
                    tolerance = tolerance | values
        if self.dtype != torch.float64:
            wider = LOOSE if loose is None else loose
            tolerance = tolerance | {name: max(tolerance[name], wider[name]) for name in ("atol", "rtol")}
        expected = np.asarray(self[key])
        what = f"{self.name} {key} {variant}"
        if not tolerance["changed_share"]:
            self.golden.assert_close(
                actual, expected, rtol=tolerance["rtol"], atol=tolerance["atol"], what=what
            )
            return
        got = (
            actual.detach().cpu().double().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual)
        )
        assert got.shape == expected.shape, what
        off = np.abs(got - expected) > tolerance["atol"] + tolerance["rtol"] * np.abs(expected)
        assert off.mean() <= tolerance["changed_share"], f"{what}: {off.mean():.2%} of the pixels differ"

    def assert_all_seen(self, elsewhere=()):
        """Every recorded array was compared, here or by the tests that compare those of ``elsewhere``."""
        left = set(self.record) - self.seen - set(elsewhere) - set(self.settings.get("informative", ()))
        assert not left, f"{self.name}: not compared: {sorted(left)}"


def unread(directory, settings):
    """What of a golden folder no test reads: files, settings of files, and files that are not there."""
    found = []
    there = {path.name for path in directory.iterdir() if not path.name.startswith(".")}
    told = settings["files"]
    found += [f"{name}: no test reads it" for name in sorted(there - {"README.md", "cases.json"})
              if name.removesuffix(".npz") not in SETTINGS or not name.endswith(".npz")]  # fmt: skip
    found += [f"{name}.npz: no settings in cases.json" for name in SETTINGS
              if f"{name}.npz" in there and name not in told]  # fmt: skip
    found += [f"{name}.npz: in cases.json, but not there" for name in told if f"{name}.npz" not in there]
    for name, entries in told.items():
        new = set(entries) - SETTINGS.get(name, set(entries)) - COMMON
        found += [f"{name}: setting {key!r} is read by no test" for key in sorted(new)]
    return found + [
        f"cases.json: {key!r} is read by no test" for key in sorted(set(settings) - {"prefix", "files"})
    ]
