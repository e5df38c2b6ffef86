"""Data that a model cannot take is told of as such."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ot_fusion.errors import DataError, SpecError
from ot_fusion.forward import call_model
from ot_fusion.hooks import batches
from ot_fusion.loading import load_data, load_evaluation


def test_what_a_model_raises_is_the_cause():
    assert call_model(nn.Linear(2, 3), torch.zeros(1, 2)).shape == (1, 3)
    with pytest.raises(DataError, match=r"given inputs \(1, 5\): .*mat1 and mat2") as told:
        call_model(nn.Linear(2, 3), torch.zeros(1, 5))
    assert isinstance(told.value.__cause__, RuntimeError)
    with pytest.raises(DataError, match=r"which was given x \(2,\): .*unexpected keyword"):
        call_model(nn.Linear(2, 3), {"x": torch.zeros(2)})

    class Complains(nn.Module):
        def forward(self, x):
            raise SpecError("as it is")

    with pytest.raises(SpecError, match=r"^as it is$"):
        call_model(Complains(), torch.zeros(1))

    class Fills(nn.Module):
        def forward(self, x):
            return torch.empty(1 << 60)

    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        call_model(Fills(), torch.zeros(1))


def test_a_single_number_is_no_batch():
    with pytest.raises(DataError, match="a batch is a single number"):
        next(iter(batches(torch.tensor(1.0), 2, None)))


def test_complex_numbers_and_labels_of_another_kind(tmp_path):
    np.save(tmp_path / "c.npy", np.ones(3, np.complex64))
    with pytest.raises(DataError, match=r"c\.npy: it holds complex numbers"):
        load_data(str(tmp_path / "c.npy"))
    for kind in (torch.bool, torch.float32):
        with pytest.raises(DataError, match=f"labels are {kind}, wanted"):
            load_evaluation(None, {"inputs": torch.zeros(2, 2), "labels": torch.zeros(2, dtype=kind)})
    measure, _ = load_evaluation(
        None, {"inputs": torch.zeros(2, 2), "labels": torch.ones(2, dtype=torch.uint8)}
    )
    assert measure(nn.Linear(2, 3)) > 0
    for labels, words in (
        ([], "labels are 0 classes, wanted 2: one for each output"),
        ([0, 3], r"labels hold 3, wanted 0 to 2 \(-100: left out\)"),
        ([-1, 0], "labels hold -1, wanted 0 to 2"),
    ):
        wrong, _ = load_evaluation(None, {"inputs": torch.zeros(2, 2), "labels": torch.tensor(labels).long()})
        with pytest.raises(DataError, match=words):
            wrong(nn.Linear(2, 3))
    partly, _ = load_evaluation(None, {"inputs": torch.zeros(2, 2), "labels": torch.tensor([-100, 1])})
    assert partly(nn.Linear(2, 3)) > 0
