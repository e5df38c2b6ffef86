"""The fast tangent of batch normalisation against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from kd_trilateral.normtangent import FastNormTangent


def tangent(module: nn.Module, x: Tensor, held: dict[str, Tensor], fast: bool) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    values: dict[str, Any] = {n: b.clone() for n, b in held.items()}
    with torch.no_grad(), forward_ad.dual_level():
        for n in names:
            p = module.get_parameter(n).detach()
            values[n] = forward_ad.make_dual(p, torch.randn(p.shape, dtype=p.dtype, generator=draw))
        if fast:
            with FastNormTangent():
                out = functional_call(module, values, (x,))
        else:
            out = functional_call(module, values, (x,))
        primal, dual = forward_ad.unpack_dual(out)
        assert dual is not None
        return primal, dual


@pytest.mark.parametrize("affine", ["all", "none", "weight", "bias"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
def test_equals_torch(affine: str, training: bool, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, affine=affine != "none")
    if affine == "weight":
        norm.bias.requires_grad_(False)
    if affine == "bias":
        norm.weight.requires_grad_(False)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 2, 3)).to(dtype).train(training)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(5, 3, 6, 6, dtype=dtype)
    held = {n: b.detach().clone() for n, b in module.named_buffers()}
    for ours, theirs in zip(tangent(module, x, held, True), tangent(module, x, held, False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_updates_the_running_statistics_it_is_given() -> None:
    norm = nn.BatchNorm1d(3)
    x = torch.randn(6, 3)
    with torch.no_grad(), forward_ad.dual_level(), FastNormTangent():
        norm(forward_ad.make_dual(x, torch.ones_like(x)))
    other = nn.BatchNorm1d(3)
    other(x)
    torch.testing.assert_close(norm.running_mean, other.running_mean)
    torch.testing.assert_close(norm.running_var, other.running_var)
