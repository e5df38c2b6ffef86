"""Training: samplers, augmentation, schedules, exact resume, early stop, and that it learns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mantis_files import TINY
from torch import nn

from fusion_core.errors import ConfigError, DataError, InputError
from fusion_core.seeding import generator
from mantis_photoz import training
from mantis_photoz.config import TrainConfig
from mantis_photoz.fusion import FusionModel
from mantis_photoz.pdf import BinnedPDF
from mantis_photoz.predicting import predict
from mantis_photoz.samples import CutoutArrays, batch_of, redshifts
from mantis_photoz.simulate import simulate
from mantis_photoz.training import (
    Plateau,
    Trainer,
    augmented,
    fit_plain,
    make_loader,
    make_optimizer,
    make_sampler,
    make_scheduler,
    new_model,
    train_step,
    viewed,
)

MODEL = TINY.replace(missing="mask")


@pytest.fixture(scope="module")
def samples() -> CutoutArrays:
    return simulate(48, seed=1)


def config(**changes: Any) -> TrainConfig:
    base: dict[str, Any] = {"model": MODEL, "optimizer": "adamw", "lr": 3e-3, "epochs": 2, "batch_size": 12}
    base |= {"schedule": "constant", "sampler": "natural"}
    return TrainConfig(**(base | changes))


def test_it_learns(samples: CutoutArrays) -> None:
    losses = list[float]()
    fit_plain(config(epochs=6, lr=1e-2), samples, told=lambda *facts: losses.append(facts[2]))
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    ("head", "loss"), [("mdn", "ce"), ("quantile", "ce"), ("bins", "crps"), ("bins", "cde")]
)
def test_other_heads_and_losses_learn(samples: CutoutArrays, head: str, loss: str) -> None:
    model = MODEL.replace(head=head, components=7)
    losses = list[float]()
    settings = config(model=model, epochs=4, lr=1e-2, loss=loss)
    made = fit_plain(settings, samples, told=lambda *facts: losses.append(facts[2]))
    assert losses[-1] < losses[0]
    found = predict(made, samples.take(range(6)))
    assert found.logits.shape == (6, 24)
    torch.testing.assert_close(found.pdf.pmf.sum(1), torch.ones(6, dtype=torch.float64))


def test_a_mixture_far_inside_the_bins_keeps_its_mean() -> None:
    from mantis_photoz.fusion import bin_logits

    settings = MODEL.replace(head="mdn", components=1, bins=240)
    outputs = torch.tensor([[0.0, 0.6, -3.0]])
    pdf = BinnedPDF.from_logits(bin_logits(outputs, settings), z_max=1.2)
    assert float(pdf.mean()) == pytest.approx(0.6, abs=1e-3)
    assert float(pdf.std()) == pytest.approx(0.0487, abs=1e-3)
    with pytest.raises(ConfigError, match="head 'mdn' has its own"):
        TrainConfig(model=settings, loss="crps")


def test_made_views_and_later_ones_train_alike(samples: CutoutArrays) -> None:
    settings, model = config(augment="d4"), new_model(MODEL, 0)
    batch = batch_of(samples, range(12), MODEL)
    ready = viewed(samples, MODEL).batch(range(12))
    first = train_step(model, batch, settings, 5)["loss"]
    second = train_step(model, ready, settings, 5, ready=True)["loss"]
    torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("augment", ["d4", "d4-batch", "rotate", "official", "none"])
def test_augmentation_follows_the_seed(samples: CutoutArrays, augment: str) -> None:
    settings = config(augment=augment, noise=0.1, survey_dropout={"galex": 0.5, "ps1": 0.3})
    batch = batch_of(samples, range(12), MODEL)
    first, present = augmented(batch, settings, generator(0, "augment", 1))
    again, same = augmented(batch, settings, generator(0, "augment", 1))
    other, _ = augmented(batch, settings, generator(0, "augment", 2))
    for name, planes in first.items():
        torch.testing.assert_close(planes, again[name], atol=0, rtol=0)
        assert planes.shape[-1] == 32
        assert not torch.equal(planes, other[name])
    assert torch.equal(present, same)
    assert bool(present.any(1).all())
    assert not bool((present & ~batch.present).any())
    assert bool((present != batch.present).any())


def test_jitter_moves_all_surveys(samples: CutoutArrays) -> None:
    batch = batch_of(samples, range(6), MODEL)
    still, _ = augmented(batch, config(augment="none"), generator(0, "a"))
    moved, _ = augmented(batch, config(augment="none", jitter=1.0), generator(0, "a"))
    assert all(not torch.equal(still[name], moved[name]) for name in still if name != "galex")


def test_samplers(samples: CutoutArrays) -> None:
    natural = make_sampler(samples, config())
    natural.set_epoch(0)
    first = list(natural)
    assert sorted(first) == list(range(48))
    assert list(natural) == first
    natural.set_epoch(1)
    assert list(natural) != first
    for kind in ("balanced", "sqrt", "colour-z"):
        drawn = list(make_sampler(samples, config(sampler=kind)))
        assert len(drawn) == 48
    assert len(make_sampler(samples, config(max_steps=2))) == 24
    beyond = CutoutArrays(
        samples.images, samples.ebv, samples.z.clone(), samples.present, samples.ids, samples.wcs
    )
    beyond.z[:40] = 5.0
    assert set(make_sampler(beyond, config())) <= set(range(40, 48))


def test_loader_takes_whole_batches(samples: CutoutArrays) -> None:
    settings = config(batch_size=20)
    batches = list(make_loader(samples, settings, make_sampler(samples, settings)))
    assert [len(batch.z) for batch in batches] == [20, 20]
    small = list(
        make_loader(samples.take(range(5)), settings, make_sampler(samples.take(range(5)), settings))
    )
    assert [len(batch.z) for batch in small] == [5]


def test_schedules() -> None:
    def rates(schedule: str, steps: int = 20) -> list[float]:
        settings = config(schedule=schedule, lr=1.0, warmup=0.2, min_lr=1e-3)
        optimizer = make_optimizer(nn.Linear(1, 1), settings)
        scheduler, interval = make_scheduler(optimizer, settings, steps)
        assert interval == "step"
        found = list[float]()
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    for schedule in ("cosine", "onecycle"):
        found = rates(schedule)
        assert max(found) == pytest.approx(1.0, abs=0.02)
        assert int(np.argmax(found)) in (3, 4)
        assert found[-1] < 0.05


def test_plateau_halves_after_patience() -> None:
    settings = config(schedule="plateau", lr=1.0, patience=2)
    optimizer = make_optimizer(nn.Linear(1, 1), settings)
    scheduler, interval = make_scheduler(optimizer, settings, 10)
    assert interval == "epoch"
    assert isinstance(scheduler, Plateau)
    for loss in (1.0, 0.9, 0.95, 0.95, 0.95):
        scheduler.step()
        scheduler.observe(loss)
    assert optimizer.param_groups[0]["lr"] == 0.5
    constant, _ = make_scheduler(optimizer, settings.replace(schedule="constant"), 10)
    for _ in range(9):
        constant.observe(1.0)
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(samples: CutoutArrays, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    val = samples.take(range(12))
    settings = config(epochs=3, schedule="plateau", ema=0.9, survey_dropout={"galex": 0.3}, save_every=5)
    whole = Trainer(MODEL, settings, out=tmp_path / "whole", device="cpu", progress=False).fit(samples, val)
    calls = 0

    class Cut(CutoutArrays):
        __slots__ = ()

        def batch(self, rows: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 8:
                raise KeyboardInterrupt
            return super().batch(rows)

    names = ("images", "ebv", "z", "present", "ids", "wcs")
    cut = Cut(**{name: getattr(samples, name) for name in names})
    with pytest.raises(KeyboardInterrupt):
        Trainer(MODEL, settings, out=tmp_path / "cut", device="cpu", progress=False).fit(cut, val)
    trainer = Trainer(MODEL, settings, out=tmp_path / "cut", device="cpu", resume=True, progress=False)
    resumed = trainer.fit(samples, val)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, atol=0, rtol=0)
    for name in ("config.json", "training.json", "metrics.jsonl", "model.safetensors", "best.safetensors"):
        assert (tmp_path / "cut" / name).is_file()
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert sum("validation_nmad" in line for line in lines) == 3
    again = FusionModel.from_pretrained(tmp_path / "cut")
    torch.testing.assert_close(predict(again, val).logits, predict(resumed, val).logits)
    with pytest.raises(InputError, match="pass resume or overwrite"):
        Trainer(MODEL, settings, out=tmp_path / "cut", device="cpu").fit(samples, val)


def test_early_stop_and_report(samples: CutoutArrays, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    losses = iter([2.0, 1.0, 1.5, 1.2, 0.5])
    monkeypatch.setattr(training, "validation", lambda *_: {"loss": next(losses)})
    trainer = Trainer(MODEL, config(epochs=9, early_stop=2), device="cpu", progress=False)
    model = trainer.fit(samples.take(range(24)), samples.take(range(24, 48)))
    assert trainer.result.epochs == 4
    assert trainer.result.best["epoch"] == 2
    report = model.evaluate(samples.take(range(24, 48)), resamples=5)
    assert {"nmad", "eta_0.05", "crps"} <= set(report.metrics)
    use = model.band_use(samples.take(range(8)), baseline="absent", progress=False)
    assert use.phi.shape == (3, 8)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda s: Trainer(MODEL, epochs=2, early_stop=1).fit(s),
            ConfigError,
            "early_stop is set without val",
        ),
        (lambda s: Trainer(MODEL, epoch=2), ConfigError, "did you mean epochs"),
        (lambda s: Trainer(MODEL, sampler="flat"), ConfigError, "setting 'sampler' is 'flat'"),
        (lambda s: make_sampler(nan(s), config()), DataError, "redshift 3 is nan"),
        (lambda s: make_sampler(far(s), config()), InputError, "no object with 0 < z < z_max, which is 1.2"),
        (lambda s: predict(new_model(MODEL, 0), s, tta="d5"), ConfigError, "tta is 'd5'"),
        (lambda s: redshifts(object()), DataError, "have no redshifts"),
        (lambda s: batch_of(only_ps1(s), [0], MODEL), DataError, r"also wants \['galex', 'unwise'\]"),
        (lambda s: TrainConfig(model=MODEL, lr=0.0), ConfigError, "lr is 0.0"),
    ],
)
def test_bad_input(
    samples: CutoutArrays, call: Callable[[CutoutArrays], Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        call(samples)


def changed(samples: CutoutArrays, z: torch.Tensor) -> CutoutArrays:
    return CutoutArrays(samples.images, samples.ebv, z, samples.present)


def nan(samples: CutoutArrays) -> CutoutArrays:
    z = samples.z.clone()
    z[3] = torch.nan
    return changed(samples, z)


def far(samples: CutoutArrays) -> CutoutArrays:
    return changed(samples, samples.z + 5)


def only_ps1(samples: CutoutArrays) -> CutoutArrays:
    return CutoutArrays({"ps1": samples.images["ps1"]}, samples.ebv, samples.z)
