"""Differentiable binarization: invariants 1 and 2."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbnet_asf.binarization import db, db_log

unit = st.floats(0, 1, allow_nan=False, width=32)
steepness = st.sampled_from([1.0, 10.0, 50.0, 500.0])


def scalar(value):
    return torch.tensor([[value]], dtype=torch.float64)


@given(unit, unit, unit, steepness)
@settings(max_examples=200, deadline=None)
def test_bounds_order_and_symmetry(p, t, q, k):
    b = db(scalar(p), scalar(t), k)
    assert 0 <= b <= 1
    torch.testing.assert_close(b + db(scalar(t), scalar(p), k), torch.ones_like(b))
    assert db(scalar(p), scalar(p), k) == 0.5
    assert (db(scalar(max(p, q)), scalar(t), k) >= db(scalar(min(p, q)), scalar(t), k)).all()
    assert (db(scalar(p), scalar(max(t, q)), k) <= db(scalar(p), scalar(min(t, q)), k)).all()


@pytest.mark.parametrize("k", [10.0, 50.0])
def test_gradients_are_the_closed_forms(k, device):
    p = torch.rand(4, 5, dtype=torch.float64, device=device, requires_grad=True)
    t = torch.rand(4, 5, dtype=torch.float64, device=device, requires_grad=True)
    b = db(p, t, k)
    dp, dt = torch.autograd.grad(b.sum(), (p, t))
    closed = k * b * (1 - b)
    torch.testing.assert_close(dp, closed, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dt, -closed, rtol=1e-12, atol=1e-12)
    (positive,) = torch.autograd.grad(-db_log(p, t, k).sum(), p)
    (negative,) = torch.autograd.grad(-db_log(t, p, k).sum(), p)
    torch.testing.assert_close(positive, -k * torch.sigmoid(-k * (p - t)).detach())
    torch.testing.assert_close(negative, k * torch.sigmoid(k * (p - t)).detach())
    assert torch.autograd.gradcheck(lambda a, c: db(a, c, 10.0), (p, t))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_stays_finite(dtype, device):
    p = torch.tensor([[0.0, 0.9, 1.0]], dtype=dtype, device=device, requires_grad=True)
    t = torch.tensor([[0.1, 0.7, 0.0]], dtype=dtype, device=device, requires_grad=True)
    b = db(p, t)
    assert b.dtype == dtype
    for grad in torch.autograd.grad(b.sum(), (p, t)):
        assert torch.isfinite(grad).all()
    # The reciprocal of an exponential, as the authors write it, does not survive this.
    reciprocal = 1 / (1 + torch.exp(-50 * (p - t)))
    (grad,) = torch.autograd.grad(reciprocal.sum(), p)
    wide = torch.sigmoid(50 * (p.float() - t.float()))
    torch.testing.assert_close(b.float(), wide, atol=0.05, rtol=0.05)
    if dtype == torch.float16:
        steep = torch.tensor([[0.0, 0.9]], dtype=dtype, requires_grad=True)
        high = torch.tensor([[0.3, 0.7]], dtype=dtype)
        (bad,) = torch.autograd.grad((1 / (1 + torch.exp(-50 * (steep - high)))).sum(), steep)
        assert torch.isnan(bad).any()
        (good,) = torch.autograd.grad(db(steep, high).sum(), steep)
        assert torch.isfinite(good).all()
