"""Trainer: it learns, resumes exactly, and two processes give the gradients of one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from dbnet_asf import DBConfig, DBNet, TrainConfig, Trainer
from dbnet_asf.config import AugmentConfig
from dbnet_asf.losses import NAMES, DBLoss
from dbnet_asf.model.dbnet import DBOutput
from dbnet_asf.reduction import Reduction
from dbnet_asf.schedule import learning_rate, one_cycle, polynomial_lr
from dbnet_asf.targets import Targets
from dbnet_asf.train import make_optimizer, make_scheduler, training_layout
from fusion_core.errors import ConfigError, InputError
from fusion_core.seeding import rng
from fusion_core.testing import spawn

TINY = DBConfig(backbone="nano", channels=(8, 8, 16, 16), blocks=(1, 1, 1, 1), stem=8, inner=32)
QUICK = {"crop": 64, "batch_size": 2, "optimizer": "adamw", "lr": 3e-3, "schedule": "constant"}


class Bars:
    """Pictures with one dark bar each."""

    def __init__(self, count=4):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError(index)
        random = rng(0, "bars", index)
        image = np.full((64, 64, 3), 230, np.uint8)
        x, y = (int(v) for v in random.integers(4, 20, 2))
        image[y : y + 20, x : x + 36] = 30
        box = np.array([[x, y], [x + 36, y], [x + 36, y + 20], [x, y + 20]], np.float64)
        return Example(image, [box], np.array([False]), f"bar-{index}")

    def __iter__(self):
        return (self[i] for i in range(self.count))


def Example(*values):
    from dbnet_asf.data.dataset import Example as Made

    return Made(*values)


def fit(out, net=None, **settings):
    torch.manual_seed(0)
    net = net or DBNet(TINY)
    options = {key: settings.pop(key) for key in ("resume", "overwrite") if key in settings}
    augment = AugmentConfig.none().to_dict()
    trainer = Trainer(net, Bars(), device="cpu", **{**QUICK, "augment": augment, **settings})
    return net, trainer.fit(out, progress=False, **options)


def test_narrow_nets_train_in_a_layout_that_the_processor_can_learn_in(tmp_path):
    narrow = DBConfig.nano(inner=32).replace(channels=(8, 12, 16, 16), stem=8, short_side=64)
    assert training_layout(DBNet(narrow)) is torch.contiguous_format
    assert training_layout(DBNet(DBConfig.nano())) is torch.channels_last
    seen = []

    class Sees(DBNet):
        def forward(self, images):
            last = torch.channels_last
            seen.extend(t.is_contiguous(memory_format=last) for t in (images, self.backbone.stem[0].weight))
            return super().forward(images)

    fit(tmp_path / "run", Sees(narrow), steps=1)
    assert seen == [False, False]


@pytest.mark.slow
def test_it_learns_and_saves(tmp_path):
    _, first = fit(tmp_path / "a", steps=2)
    _, last = fit(tmp_path / "b", steps=40, ema=0.9)
    assert last.metrics["loss"] < 0.7 * first.metrics["loss"]
    assert set(last.metrics) == {"loss", "bce_loss", "thresh_loss", "l1_loss"}
    again = DBNet.from_pretrained(tmp_path / "b")
    assert again.config == TINY
    assert TrainConfig.load(tmp_path / "b" / "training.json").steps == 40
    lines = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 40


def test_resumes_exactly(tmp_path):
    whole, _ = fit(tmp_path / "whole", steps=6, save_every=3)
    fit(tmp_path / "part", steps=3, save_every=3)
    resumed, _ = fit(tmp_path / "part", steps=6, save_every=3, resume=True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(InputError, match="holds a run"):
        fit(tmp_path / "part", steps=6)


def test_validation(tmp_path):
    trainer = Trainer(DBNet(TINY), Bars(2), Bars(2), device="cpu", epochs=1, **QUICK)
    result = trainer.fit(tmp_path / "run", progress=False)
    assert result.best is not None
    assert 0 <= result.best["score"] <= 1
    assert {"precision", "recall"} <= set(result.best)


def test_schedules():
    net = nn.Linear(1, 1)
    config = TrainConfig(epochs=3, lr=0.01)
    optimizer = make_optimizer(net, config)
    assert isinstance(optimizer, torch.optim.SGD)
    scheduler, interval = make_scheduler(optimizer, config, per_epoch=5)
    assert interval == "epoch"
    found = []
    for _ in range(3):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(found, [polynomial_lr(e, lr=0.01, epochs=3) for e in range(3)], rtol=1e-12)
    iteration = config.replace(schedule="iteration")
    assert learning_rate(iteration, 0, 15, 5) == 0.01
    assert learning_rate(iteration, 7, 15, 5) == pytest.approx(0.01 * (1 - 7 / 15) ** 0.9)
    cycle = config.replace(schedule="one_cycle", steps=100)
    rates = [learning_rate(cycle, step, 100, 5) for step in range(100)]
    assert max(rates) == pytest.approx(0.01, rel=1e-2)
    assert rates[-1] < 1e-5
    assert int(np.argmax(rates)) in (9, 10, 11)
    assert one_cycle(0.0) == pytest.approx(1 / 25)
    assert learning_rate(config.replace(schedule="constant"), 9, 10, 1) == 0.01
    assert make_scheduler(optimizer, cycle, 5)[1] == "step"


def test_bad_input_gets_a_sentence():
    net = DBNet(TINY)
    with pytest.raises(InputError, match="train is empty"):
        Trainer(net, [])
    with pytest.raises(ConfigError, match="unknown setting 'epoch'; did you mean epochs"):
        Trainer(net, Bars(), epoch=3)
    with pytest.raises(ConfigError, match="crop is 100, wanted a multiple of 32"):
        Trainer(net, Bars(), crop=100)
    with pytest.raises(ConfigError, match="net has no threshold head and cannot train"):
        Trainer(net.fuse(), Bars())
    with pytest.raises(ConfigError, match="lr is 0"):
        TrainConfig(lr=0.0)


def test_presets():
    official, paper, modern = TrainConfig.official(), TrainConfig.paper(), TrainConfig.modern()
    assert (official.lr, official.schedule, official.augment.crop_regions) == (0.007, "epoch", "official")
    assert (paper.loss, paper.schedule, paper.labels.distance) == ("paper", "iteration", "exact")
    assert (modern.optimizer, modern.schedule, modern.ema) == ("adamw", "one_cycle", 0.999)


def case(count=4):
    generator = torch.Generator().manual_seed(3)
    p, t = torch.rand(2, count, 1, 8, 12, generator=generator, dtype=torch.float64).clamp(0.02, 0.98)
    shape = (count, 8, 12)
    gt, mask, thresh_mask = (torch.rand(shape, generator=generator) > level for level in (0.9, 0.1, 0.6))
    thresh_map = torch.rand(count, 8, 12, generator=generator, dtype=torch.float64)
    return p, t, (gt, mask, thresh_map, thresh_mask)


def share(rank, world):
    p, t, maps = case()
    part = slice(2 * rank, 2 * rank + 2)
    own_p, own_t = p[part].clone().requires_grad_(), t[part].clone().requires_grad_()
    targets = Targets(*(m[part] for m in maps))
    found = {}
    for name in NAMES:
        loss, _ = DBLoss(loss=name, global_ohem=True)(DBOutput.from_maps(own_p, own_t), targets)
        grads = torch.autograd.grad(loss, (own_p, own_t), allow_unused=True, materialize_grads=True)
        found[name] = (loss.item(), *(grad / world for grad in grads))  # DDP averages
    ties = torch.full((6,), 0.5, dtype=torch.float64)
    found["ties"] = Reduction(True).top_sum(ties, torch.tensor(5.0)).item()
    return found


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one():
    parts = spawn(share, 2, 2, timeout=240)
    p, t, maps = case()
    p, t = p.requires_grad_(), t.requires_grad_()
    for name in NAMES:
        loss, _ = DBLoss(loss=name)(DBOutput.from_maps(p, t), Targets(*maps))
        grads = torch.autograd.grad(loss, (p, t), allow_unused=True, materialize_grads=True)
        for part in parts:
            assert part[name][0] == pytest.approx(loss.item(), rel=1e-10), name
        for index, grad in enumerate(grads, 1):
            together = torch.cat([part[name][index] for part in parts])
            torch.testing.assert_close(together, grad, rtol=1e-8, atol=1e-10)
    assert parts[0]["ties"] == pytest.approx(2.5)
