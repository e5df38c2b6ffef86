"""Redshift distributions from files, as masses in bins."""

from __future__ import annotations

import json

import numpy as np
import pytest
from astropy.table import Table

from fusion_core.errors import InputError
from mantis_photoz.corrections import load_prior


def test_priors_from_files(tmp_path):
    edges = np.array([0.0, 0.5, 1.0, 2.0])
    (tmp_path / "p.json").write_text(json.dumps({"z": [0, 1, 2], "n": [0, 1, 0]}))
    np.testing.assert_allclose(load_prior(tmp_path / "p.json", edges), [0.125, 0.375, 0.5])
    (tmp_path / "p.json").write_text(json.dumps({"z": [0, 1, 2], "n": [0, 1e308, 0]}))
    np.testing.assert_allclose(load_prior(tmp_path / "p.json", edges), [0.125, 0.375, 0.5])
    Table({"z": [0.1, 0.2, 0.7]}).write(tmp_path / "p.ecsv")
    np.testing.assert_allclose(load_prior(tmp_path / "p.ecsv", edges), np.array([3, 2, 1]) / 6)
    Table({"redshift": [0.1]}).write(tmp_path / "q.ecsv")
    for name, text, words in (
        ("q.ecsv", None, "no column z among redshift"),
        ("bad.json", '{"z": [0, 1], "n": [1, -1]}', "holds no density"),
        ("inf.json", '{"z": [0, 1], "n": [1, Infinity]}', "holds no density"),
        ("far.json", '{"z": [5, 6], "n": [1, 1]}', "is 0 on the model's redshifts, 0 to 2"),
        ("none.json", None, "cannot be read"),
    ):
        if text:
            (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=words):
            load_prior(tmp_path / name, edges)
    for text in (
        "0",
        '{"z": 0, "n": [1]}',
        '{"z": [0, 1, 2], "n": [1, 1]}',
        '{"z": [0, 1], "n": [1, 1%s]}' % ("0" * 400),
    ):
        (tmp_path / "odd.json").write_text(text)
        with pytest.raises(InputError, match=r"odd\.json cannot be read"):
            load_prior(tmp_path / "odd.json", edges)
