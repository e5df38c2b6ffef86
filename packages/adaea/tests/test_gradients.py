"""Derivatives in float64: of the equations by ``gradcheck``, of the attack against its own objective."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from adaea import DI, AdaEA, Ens, agm_weights, disparity_map, loss_matrix
from adaea.agm import linear_losses
from adaea.budget import project, step
from adaea.fusion import fuse_logits, fused_loss
from adaea.losses import LOSSES
from adaea.transforms import mixed, scaled, smooth, smoothing_kernel
from adaea.updates import accumulate
from fusion_core.seeding import generator


def numbers(*shape, seed=0):
    made = torch.randn(shape, generator=generator(seed, "gradients"), dtype=torch.float64)
    return made.requires_grad_()


LABELS = torch.tensor([1, 3, 0])


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("classes", [2, 5])
def test_losses(loss, classes):
    assert gradcheck(lambda z: LOSSES[loss](z, LABELS % classes), numbers(2, 3, classes))


@pytest.mark.parametrize("fusion", ["logits", "probs", "loss"])
@pytest.mark.parametrize("per_image", [False, True])
def test_fusion(fusion, per_image):
    weights = numbers(*((2, 3) if per_image else (2,)))
    mixing = lambda z, w: fused_loss(z, w.softmax(0), LABELS, fusion)
    assert gradcheck(mixing, (numbers(2, 3, 4), weights))
    assert gradcheck(mixing, (numbers(2, 2, 3, 4), weights)), "with copies"
    if fusion != "loss":
        assert gradcheck(lambda z, w: fuse_logits(z, w.softmax(0), fusion), (numbers(2, 3, 4), weights))


@pytest.mark.parametrize("ratio", ["given", "received"])
@pytest.mark.parametrize("targeted", [False, True])
def test_agm(ratio, targeted):
    weigh = lambda matrix: agm_weights(matrix.exp(), 0.7, ratio=ratio, targeted=targeted)
    assert gradcheck(weigh, numbers(3, 3))
    assert gradcheck(weigh, numbers(3, 3, 2))
    assert gradcheck(lambda z: loss_matrix(z, LABELS), numbers(2, 2, 3, 4))
    inputs = (numbers(2, 3), numbers(2, 3, 1, 2, 2), numbers(2, 3, 1, 2, 2, seed=1))
    assert gradcheck(linear_losses, inputs)


@pytest.mark.parametrize("form", ["symmetric", "official"])
def test_drf(form):
    assert gradcheck(lambda g: disparity_map(g, form), numbers(3, 1, 2, 2, 2))
    still = numbers(3, 1, 2, 2, 2).detach()
    still[1, :, :, 0] = 0.0
    still.requires_grad_()
    (found,) = torch.autograd.grad(disparity_map(still, form).sum(), still)
    assert torch.isfinite(found).all(), "a gradient of 0 has a derivative, too"


def test_transforms():
    kernel = smoothing_kernel(3, "gaussian")
    assert gradcheck(lambda x: smooth(x, kernel), numbers(1, 2, 4, 5))
    assert gradcheck(lambda x: scaled(x, 3), numbers(1, 2, 2, 2))
    assert gradcheck(lambda x: DI(0.5, 1.0).apply(x, (3, 0, 1, 0.2)), numbers(1, 2, 4, 6))
    x, partners = numbers(2, 1, 2, 2), torch.tensor([[1, 0]])
    (found,) = torch.autograd.grad(mixed(x, partners, 0.2).sum(), x)
    assert torch.equal(found, torch.ones_like(x)), "the partner is a constant"


def test_updates_and_budget():
    assert gradcheck(lambda g, m: accumulate(g, m, 0.9), (numbers(2, 1, 2, 2), numbers(2, 1, 2, 2, seed=1)))
    assert gradcheck(lambda g: step(g, 0.3, "l2"), numbers(2, 1, 2, 2))
    middle = torch.full((2, 1, 2, 2), 0.5, dtype=torch.float64)
    for norm in ("linf", "l2"):
        assert gradcheck(
            lambda x, norm=norm: project(middle + 0.3 * x, middle, 0.2, norm), numbers(2, 1, 2, 2)
        )


@pytest.mark.parametrize("fusion", ["logits", "probs", "loss"])
@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("agm", ["off", "exact", "per_sample"])
def test_the_fused_gradient_is_that_of_the_fused_loss(nets, batch, fusion, loss, agm):
    x, y = batch(3, size=4)
    models = {name: net.eval() for name, net in nets(3).items()}
    steps = []
    attack = AdaEA(models, fusion=fusion, loss=loss, agm=agm, steps=1, noise=0)
    attack(x, y, on_step=steps.append)
    (record,) = steps
    leaf = x.clone().requires_grad_()
    logits = torch.stack([net(leaf) for net in models.values()])
    total = fused_loss(logits, record.weights, y, fusion, loss).sum()
    (found,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(record.fused, found, rtol=0, atol=1e-12)
    for k, net in enumerate(models.values()):
        (own,) = torch.autograd.grad(LOSSES[loss](net(leaf), y).sum(), leaf)
        torch.testing.assert_close(record.gradients[k], own, rtol=0, atol=1e-12)


def test_a_targeted_gradient_points_the_other_way(nets, batch):
    x, y = batch(2)
    up, down = [], []
    attack = Ens(nets(2), steps=1, noise=0)
    attack(x, y, on_step=up.append)
    attack.with_(targeted=True)(x, y, on_step=down.append)
    torch.testing.assert_close(down[0].fused, -up[0].fused)
    torch.testing.assert_close(down[0].losses, up[0].losses)
