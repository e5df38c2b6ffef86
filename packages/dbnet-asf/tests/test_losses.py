"""Losses: invariants 5 and 6, edge cases, precision, and processes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbnet_asf.losses import NAMES, DBLoss, balanced_bce, dice, masked_l1
from dbnet_asf.model.dbnet import DBOutput
from dbnet_asf.reduction import Reduction
from dbnet_asf.targets import Targets
from fusion_core.errors import ConfigError, ShapeError

SIZE = (3, 12, 16)


def make(seed=0, dtype=torch.float64, device="cpu", size=SIZE):
    generator = torch.Generator().manual_seed(seed)
    p, t = (torch.rand(size, generator=generator, dtype=torch.float64)[:, None] for _ in range(2))
    gt, mask, thresh_mask = (torch.rand(size, generator=generator) > level for level in (0.8, 0.1, 0.6))
    thresh_map = 0.3 + 0.4 * torch.rand(size, generator=generator, dtype=torch.float64)
    targets = Targets(gt, mask, thresh_map.to(dtype), thresh_mask).to(device)
    return p.to(device, dtype), t.to(device, dtype), targets


@pytest.mark.parametrize("name", NAMES)
def test_never_negative_and_batch_order_does_not_count(name, device):
    p, t, targets = make(device=device)
    total, parts = DBLoss(loss=name)(DBOutput.from_maps(p, t), targets)
    assert total >= 0
    assert all(value >= 0 for value in parts.values())
    order = torch.tensor([2, 0, 1], device=device)
    maps = [getattr(targets, f)[order] for f in ("gt", "mask", "thresh_map", "thresh_mask")]
    again, _ = DBLoss(loss=name)(DBOutput.from_maps(p[order], t[order]), Targets(*maps))
    torch.testing.assert_close(total, again)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    p, t, targets = make(size=(1, 4, 5))
    p, t = (p * 0.8 + 0.1).requires_grad_(), (t * 0.8 + 0.1).requires_grad_()
    loss = DBLoss(loss=name)
    assert torch.autograd.gradcheck(lambda a, b: loss(DBOutput.from_maps(a, b, 5.0), targets)[0], (p, t))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "L1BCEMiningLoss"])
def test_masked_pixels_do_not_count(name):
    p, t, targets = make()
    targets = dataclasses.replace(targets, mask=targets.mask & (torch.rand(SIZE) > 0.3))
    hidden = (~targets.mask)[:, None]
    loss = DBLoss(beta=0.0, loss=name)
    before, _ = loss(DBOutput.from_maps(p, t), targets)
    after, _ = loss(DBOutput.from_maps(p.where(~hidden, torch.rand(())), t), targets)
    torch.testing.assert_close(before, after)


@given(st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_dice_is_a_share(seed):
    p, _, targets = make(seed)
    value = dice(p[:, 0], targets.gt.double(), targets.mask.double())
    assert 0 <= value <= 1
    truth = targets.gt.double()
    assert dice(truth, truth, torch.ones_like(truth)) < 1e-6


def test_threshold_outside_its_mask_has_no_gradient():
    _p, t, targets = make()
    t = t.requires_grad_()
    masked_l1(t[:, 0], targets.thresh_map, targets.thresh_mask.double()).backward()
    assert (t.grad[:, 0][~targets.thresh_mask] == 0).all()
    assert (t.grad[:, 0][targets.thresh_mask] != 0).any()


def test_empty_masks_keep_the_graph():
    p, t, targets = make()
    p, t = p.requires_grad_(), t.requires_grad_()
    empty = torch.zeros(SIZE, dtype=torch.bool)
    nothing = Targets(empty, empty, targets.thresh_map, empty)
    for name in NAMES:
        total, _parts = DBLoss(loss=name)(DBOutput.from_maps(p, t), nothing)
        for grad in torch.autograd.grad(total, (p, t), allow_unused=True, materialize_grads=True):
            assert torch.isfinite(grad).all(), name
    assert masked_l1(t[:, 0], targets.thresh_map, empty.double()).requires_grad
    value = dice(p[:, 0], empty.double(), empty.double())
    assert value == 1
    assert balanced_bce(p[:, 0], empty.double(), (~empty).double()) == 0


def test_mining_keeps_the_hardest_of_the_whole_batch():
    logits = torch.tensor([[[4.0, -4.0, 3.0, 0.0, -9.0]], [[5.0, -9.0, -9.0, -9.0, -9.0]]])
    gt = torch.tensor([[[0.0, 0.0, 0.0, 1.0, 0.0]], [[0.0, 0.0, 0.0, 0.0, 0.0]]])
    every = torch.nn.functional.binary_cross_entropy_with_logits(logits, gt, reduction="none")
    wanted = (every[0, 0, 3] + every[1, 0, 0] + every[0, 0, 0] + every[0, 0, 2]) / (4 + 1e-6)
    torch.testing.assert_close(balanced_bce(logits, gt, torch.ones_like(gt)), wanted)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name, dtype, device):
    p, t, targets = make(dtype=torch.float32, device=device)
    p, t = p.to(dtype).clamp(0.01, 0.99), t.to(dtype)
    wide, _ = DBLoss(loss=name)(DBOutput.from_maps(p.float(), t.float()), targets)
    half = DBOutput(p, t, DBOutput.from_maps(p.float(), t.float()).binary, torch.logit(p.float()), 50.0)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        total, _ = DBLoss(loss=name)(half, targets)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, wide, rtol=1e-4, atol=1e-4)


def test_paper_and_code_differ_as_they_say():
    p, t, targets = make()
    output = DBOutput.from_maps(p, t)
    total, parts = DBLoss(loss="paper")(output, targets)
    torch.testing.assert_close(total, parts["bce_loss"] + parts["thresh_loss"] + 10 * parts["l1_loss"])
    code, own = DBLoss()(output, targets)
    torch.testing.assert_close(code, 5 * own["bce_loss"] + own["thresh_loss"] + 10 * own["l1_loss"])
    assert parts["thresh_loss"] != own["thresh_loss"]


def test_without_threshold_map():
    p, _t, targets = make()
    total, parts = DBLoss()(DBOutput.from_maps(p), targets)
    torch.testing.assert_close(
        total, balanced_bce(torch.logit(p[:, 0]), targets.gt.double(), targets.mask.double())
    )
    assert list(parts) == ["bce_loss"]
    with pytest.raises(ConfigError, match="no threshold map"):
        DBLoss(loss="L1DiceLoss")(DBOutput.from_maps(p), targets)


def test_bad_input_gets_a_sentence():
    p, t, targets = make()
    with pytest.raises(ConfigError, match=r"loss is 'Dice', wanted one of .*DiceLoss"):
        DBLoss(loss="Dice")
    with pytest.raises(ConfigError, match=r"alpha is -1"):
        DBLoss(alpha=-1)
    with pytest.raises(ShapeError, match=r"targets have shape \(3, 12, 16\), wanted .*\(3, 8, 16\)"):
        DBLoss()(DBOutput.from_maps(p[:, :, :8], t[:, :, :8]), targets)


def test_top_sum_on_a_device_equals_the_plain_one(device):
    values = torch.rand(1000, dtype=torch.float64, device=device)
    values[:20] = 0.5
    for count in (0, 1, 10, 999, 1000):
        number = torch.tensor(float(count), device=device)
        wanted = values.sort(descending=True).values[:count].sum()
        torch.testing.assert_close(Reduction().top_sum(values, number), wanted)
