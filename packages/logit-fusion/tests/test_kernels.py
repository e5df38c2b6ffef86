"""The implementations of the family's statistics agree: plain, tiled, Triton (interpreted without a GPU)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from logit_fusion.arrays import as_tensor
from logit_fusion.family import tilted
from logit_fusion.kernels import PlainFamily, make_family, prepared

PLACES = tuple(0.1 * j for j in range(21))
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def ready(rows=3, vocab=2500, dtype=torch.float64, seed=0):
    made = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(rows, vocab, generator=made, dtype=torch.float64)
    large = 3 * normal()
    base = 0.5 * large + normal()
    found, _ = prepared(
        [x.to(dtype) for x in (large, base, base + normal())], None, dtype, differentiable=False
    )
    return found


def assert_moments(family, members, tolerance):
    alpha = torch.tensor([0.0, 0.7, 1.9], dtype=torch.float64)
    wide = [x.double().cpu() for x in (members.log_p, members.shifts[0])]
    place = (
        alpha.to(members.p.device) if isinstance(family, PlainFamily) or members.p.is_cuda else alpha.numpy()
    )
    for a, b in zip(family.moments(place), tilted(*wide, alpha), strict=True):
        torch.testing.assert_close(as_tensor(a).cpu(), b, rtol=tolerance, atol=tolerance)
    log_norm, mean = (as_tensor(x).cpu() for x in family.nodes(PLACES))
    for j, value in enumerate(PLACES):
        stats = tilted(*wide, value)
        torch.testing.assert_close(log_norm[:, j], stats.log_norm, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(mean[:, j], stats.mean, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-6)])
def test_families_agree(dtype, tolerance, device):
    members = ready(dtype=dtype)
    members = type(members)(*(x.to(device) for x in members))
    assert_moments(make_family(members.log_p, members.p, members.shifts[0]), members, tolerance)
    assert_moments(PlainFamily(members.log_p, members.shifts[0]), members, 3 * tolerance)


INTERPRETED = """
import sys
sys.path.insert(0, {folder!r})
import torch
from test_kernels import ready
from logit_fusion.family import tilted
from logit_fusion.triton_kernels import TritonFamily

members = ready(2, 1500, torch.float32)
log_p, shift = members.log_p, members.shifts[0]
log_p[0, 7], shift[0, 7] = -torch.inf, 0.0
family = TritonFamily(log_p, shift)
alpha = torch.tensor([0.4, 1.7], dtype=torch.float64)
for a, b in zip(family.moments(alpha), tilted(log_p.double(), shift.double(), alpha), strict=True):
    torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-6)
places = (0.0, 0.5, 1.0)
log_norm, mean = family.nodes(places)
for j, place in enumerate(places):
    stats = tilted(log_p.double(), shift.double(), place)
    torch.testing.assert_close(log_norm[:, j], stats.log_norm, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(mean[:, j], stats.mean, rtol=3e-6, atol=3e-6)
huge = TritonFamily(log_p, shift * 300)
log_norm, mean = huge.nodes(places)
assert torch.isfinite(log_norm).all() and torch.isfinite(mean).all()
print("agree")
"""


@needs_triton
@pytest.mark.slow
def test_triton_kernels_interpreted():
    """The same source that a GPU compiles, run by Triton's interpreter."""
    code = INTERPRETED.format(folder=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "agree"
