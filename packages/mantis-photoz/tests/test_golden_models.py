"""The recorded logits, losses and parameters of models.npz; needs timm (but for the heads and the ResNet)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fusion_core.testing import detfill
from mantis_photoz.config import EARLY, FusionConfig, TrainConfig
from mantis_photoz.convert import OFFICIAL, from_official, to_official
from mantis_photoz.fusion import FusionModel
from mantis_photoz.training import make_optimizer, training_loss

FILE = "models.npz"


def timm() -> None:
    pytest.importorskip("timm", reason="timm is not installed: pip install 'mantis-photoz[timm]'")


class Case:
    def __init__(self, golden: Any) -> None:
        self.recorded = golden.load(FILE)  # skips where another folder lacks it
        self.golden, self.prefix = golden, golden.settings["prefix"]
        self.case = golden.settings["files"]["models"]

    def input(self, name: str, dtype: torch.dtype = torch.float64) -> Tensor:
        how = self.case["inputs"][name]
        found = detfill.array(
            self.prefix + how["name"], how["shape"], how.get("scale", 1.0), how.get("shift", 0.0)
        )
        found = np.abs(found) if how.get("abs") else found
        if "clip" in how:
            found = np.clip(found, *how["clip"])
        return torch.from_numpy(np.asarray(found)).to(dtype)

    def tolerance(self, name: str, dtype: torch.dtype) -> dict[str, float]:
        if dtype == torch.float32:
            return {"atol": 2e-4, "rtol": 2e-3}
        from fnmatch import fnmatch

        found = dict(self.case["tolerance"])
        for pattern, values in self.case.get("tolerances", {}).items():
            if fnmatch(name, pattern):
                found |= values
        return {"atol": found["atol"], "rtol": found["rtol"]}

    def check(self, name: str, actual: Tensor) -> None:
        self.golden.assert_close(actual, self.recorded[name], what=name, **self.tolerance(name, actual.dtype))

    def surveys(self, dtype: torch.dtype) -> dict[str, Tensor]:
        x, at, found = self.input("early", dtype), 0, dict[str, Tensor]()
        for name, one in FusionConfig.official("early").inputs.items():
            found[name] = x[:, at : at + one.bands]
            at += one.bands
        return found


@pytest.fixture(scope="module")
def case(golden: Any) -> Case:
    return Case(golden)


def filled(config: FusionConfig, dtype: torch.dtype = torch.float64) -> FusionModel:
    """A network with the weights that its official names give, loaded through the key map."""
    empty = FusionModel(config)
    official = to_official(empty.state_dict(), config)
    state = {
        name: torch.from_numpy(detfill.parameter(name, value.shape)).to(
            dtype if value.is_floating_point() else value.dtype
        )
        for name, value in official.items()
    }
    return from_official(state, z_max=config.z_max)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("fusion", ["early", "late"])
def test_heads_alone(case: Case, fusion: str, dtype: torch.dtype) -> None:
    classes, hidden = case.case["head_classes"], case.case["hidden"]
    names = ("ps", "unwise", "galex") if fusion == "late" else ("features",)
    if fusion == "early":
        features = case.input("features", dtype)
    else:
        features = torch.cat([case.input(f"head_{name}", dtype) for name in names], dim=1)
    width = features.shape[1]
    config = FusionConfig.official(fusion, bins=classes, hidden=hidden)  # type: ignore[arg-type]
    if fusion == "late":
        small = {name: one.to_dict() | {"pixels": 16, "crop": None} for name, one in config.inputs.items()}
        config = config.replace(inputs=small, encoders=dict.fromkeys(config.encoders, "small-1"))
    else:
        config = config.replace(encoders={EARLY: "small-1"})
    model = FusionModel(config)
    model.head[0] = nn.Linear(width + 2, hidden)
    state = {
        name: torch.from_numpy(detfill.parameter(name, shape)).to(dtype)
        for name, shape in (
            ("fc0.weight", (hidden, width + 2)),
            ("fc0.bias", (hidden,)),
            ("fc1.weight", (classes, hidden)),
            ("fc1.bias", (classes,)),
        )
    }
    mapped = {key.removeprefix("head."): value for key, value in OFFICIAL.apply(state).items()}
    model.head.to(dtype).load_state_dict(mapped)
    features = torch.relu(features) if fusion == "late" else features
    vector = torch.cat([features, case.input("head_ebv", dtype)], dim=1)
    with torch.no_grad():
        case.check(f"{fusion}_logits", model.head(vector))


def small_early(case: Case, dtype: torch.dtype = torch.float64) -> FusionModel:
    settings = case.case
    config = FusionConfig.official(
        "early",
        encoders={EARLY: settings["encoder"]},
        bins=settings["classes"],
        hidden=settings["hidden"],
        z_max=settings["z_max"],
    )
    return filled(config, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_small_early(case: Case, dtype: torch.dtype) -> None:
    timm()
    with torch.no_grad():
        case.check(
            "small_early_logits", small_early(case, dtype)(case.surveys(dtype), case.input("ebv", dtype))
        )


@pytest.fixture
def double() -> Iterator[None]:
    """NAdam keeps its running product in the default dtype; the record was made with float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("double")
def test_three_steps_of_nadam(case: Case) -> None:
    timm()
    settings = case.case
    model = small_early(case).train()
    config = TrainConfig(
        model=model.config,
        optimizer=settings["optimizer"].lower(),
        lr=settings["lr"],
        weight_decay=settings["weight_decay"],
    )
    optimizer = make_optimizer(model, config)
    images, ebv, z = case.surveys(torch.float64), case.input("ebv"), case.input("z")
    losses = list[Tensor]()
    for _ in range(settings["steps"]):
        loss = training_loss(model(images, ebv), z, config)
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    case.check("small_early_losses", torch.stack(losses))
    case.check("small_early_fc1_bias_after3", model.head[2].bias.detach())
    case.check("small_early_stem_bias_after3", model.get_parameter("encoder.early.stem.0.bias").detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_small_late(case: Case, dtype: torch.dtype) -> None:
    timm()
    settings = case.case
    config = FusionConfig.official(
        "late",
        encoders=dict.fromkeys(("galex", "ps1", "unwise"), settings["encoder"]),
        bins=settings["classes"],
        hidden=settings["hidden"],
    )
    images = {name: case.input(key, dtype) for name, key in (("galex",) * 2, ("ps1", "ps"), ("unwise",) * 2)}
    with torch.no_grad():
        case.check("small_late_logits", filled(config, dtype)(images, case.input("ebv", dtype)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_resnet_of_the_report(case: Case, dtype: torch.dtype) -> None:
    config = FusionConfig.official("report", bins=case.case["resnet_classes"])
    with torch.no_grad():
        case.check("resnet50_logits", filled(config, dtype)(case.surveys(dtype), case.input("ebv", dtype)))


@pytest.mark.slow
def test_full_early_network(case: Case) -> None:
    timm()
    large = case.case["large"]
    if large is None:
        pytest.skip("this folder records no large network")
    config = FusionConfig.official("early", encoders={EARLY: large["encoder"]}, bins=large["classes"])
    model = filled(config)
    case.golden.assert_close(
        sum(p.numel() for p in model.parameters()), case.recorded["large_early_params"], what="parameters"
    )
    one = slice(None, large["objects"])
    images = {name: planes[one] for name, planes in case.surveys(torch.float64).items()}
    with torch.no_grad():
        case.check("large_early_logits", model(images, case.input("ebv")[one]))
