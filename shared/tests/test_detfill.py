import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fusion_core.testing import array, fill_state_dict, parameter

# Recorded once: if one of these moves, every golden file of every package is worthless.
PARAMETERS = [
    ("conv.weight", (4, 3, 2, 2), "0x1.3c65460d204cfp+1", [0.404218502548797, 0.21049985344477476]),
    ("conv.bias", (4,), "0x1.8c6cdb0dba587p-3", [0.031731309978245935, -0.11184520247634944]),
    ("bn.weight", (4,), "0x1.183272a62608ap+2", [1.032457222062849, 1.0821027745632632]),
    ("bn.running_mean", (4,), "-0x1.31ac814e8e668p-2", [-0.14306138179565112, 0.009282942788945214]),
    ("bn.running_var", (4,), "0x1.19ddaa88da3c0p+2", [1.1251270037582948, 1.161486515788702]),
    ("bn.num_batches_tracked", (), "0x0.0p+0", [0.0]),
    ("scale", (), "0x1.0901a7ea876c0p+0", [1.035181517370276]),
    ("empty.weight", (2, 0), "0x0.0p+0", []),
    ("fc.weight", (3, 5), "0x1.2bb375d0c9930p+0", [-0.2982463411370259, 0.8029302965113168]),
]


@pytest.mark.parametrize(("name", "shape", "total", "first"), PARAMETERS)
def test_parameter_gives_the_recorded_numbers(name, shape, total, first):
    value = parameter(name, shape)
    assert value.shape == shape
    assert value.dtype == np.float64
    assert value.ravel()[:2].tolist() == first
    assert value.sum() == pytest.approx(float.fromhex(total), rel=1e-14)


def test_array_gives_the_recorded_numbers():
    drawn = array("kdtri.feat.K3.zs", (9, 3), 2.0).ravel()[[0, 13, -1]]
    assert drawn.tolist() == [-0.6698462574419815, 3.0068472645287327, -4.29298035884264]
    assert array("größe", (2,), 0.5, -1.0).tolist() == [-1.0076885412610406, -0.22083714647496233]


@given(st.text(max_size=20), st.floats(0.1, 10), st.floats(-5, 5))
def test_scale_and_shift_act_on_one_stream(name, scale, shift):
    assert np.array_equal(array(name, (3, 2), scale, shift), array(name, (3, 2)) * scale + shift)
    assert np.array_equal(array(name, (6,)), array(name, (3, 2)).ravel())


def test_fill_state_dict_sets_every_entry_and_keeps_dtypes():
    module = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)).to(torch.bfloat16)
    fill_state_dict(module)
    state = module.state_dict()
    assert len(state) == 7
    for name, tensor in state.items():
        wanted = torch.from_numpy(parameter(name, tensor.shape)).to(tensor.dtype)
        assert torch.equal(tensor, wanted), name
    assert state["1.num_batches_tracked"].dtype == torch.int64
    assert all(p.requires_grad for p in module.parameters())
