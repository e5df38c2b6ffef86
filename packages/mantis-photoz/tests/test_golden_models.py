"""The recorded logits, losses and parameters of models.npz; needs timm (but for the heads and the ResNet)."""

from __future__ import annotations

import contextlib

import pytest
import torch
from golden_cases import Case, both_dtypes
from torch import nn

from fusion_core.checkpoint import load_strict
from fusion_core.testing import detfill
from mantis_photoz.config import EARLY, FusionConfig, TrainConfig
from mantis_photoz.convert import CONVNEXTS, OFFICIAL, infer_config, to_official
from mantis_photoz.encoders import REPORT
from mantis_photoz.fusion import FusionModel
from mantis_photoz.grid import grid_nodes, nearest_node
from mantis_photoz.training import make_optimizer, training_loss


def timm():
    pytest.importorskip("timm", reason="timm is not installed: pip install 'mantis-photoz[timm]'")


def filled(config, dtype):
    """A network with the weights that its official names give, loaded through the key map."""
    with torch.device("meta"):  # random weights would be overwritten
        empty = FusionModel(config)
    state = {
        name: torch.from_numpy(detfill.parameter(name, value.shape)).to(
            dtype if value.is_floating_point() else value.dtype
        )
        for name, value in to_official(empty.state_dict(), config).items()
    }
    mapped = OFFICIAL.apply(state)
    if set(config.encoders.values()) <= {*CONVNEXTS.values(), REPORT}:  # what names and shapes tell
        inferred = infer_config(mapped, z_max=config.z_max)
        assert (inferred.encoders, inferred.bins, inferred.hidden) == (
            config.encoders,
            config.bins,
            config.hidden,
        )
    load_strict(empty.to_empty(device="cpu").to(dtype), mapped)
    return empty.eval()


def stack(case):
    """The early input as the surveys that it is made of."""
    x, at, found = case.tensor("early"), 0, {}
    for name, one in FusionConfig.official("early").inputs.items():
        found[name] = x[:, at : at + one.bands]
        at += one.bands
    return found


def head(case, fusion):
    """The two layers of a head on features; an encoder is not called."""
    classes, hidden = case.settings["head_classes"], case.settings["hidden"]
    config = FusionConfig.official(fusion, bins=classes, hidden=hidden)
    if fusion == "late":
        features = torch.cat(
            [case.tensor(f"head_{name}") for name in ("ps", "unwise", "galex")], dim=1
        ).relu()
        small = {name: one.to_dict() | {"pixels": 16, "crop": None} for name, one in config.inputs.items()}
        config = config.replace(inputs=small, encoders=dict.fromkeys(config.encoders, "small-1"))
    else:
        features = case.tensor("features")
        config = config.replace(encoders={EARLY: "small-1"})
    width = features.shape[1]
    model = FusionModel(config)
    model.head[0] = nn.Linear(width + 2, hidden)
    shapes = {"fc0.weight": (hidden, width + 2), "fc0.bias": (hidden,), "fc1.weight": (classes, hidden),
              "fc1.bias": (classes,)}  # fmt: skip
    state = {name: torch.from_numpy(detfill.parameter(name, shape)) for name, shape in shapes.items()}
    mapped = {key.removeprefix("head."): value for key, value in OFFICIAL.apply(state).items()}
    model.head.to(case.dtype).load_state_dict(mapped)
    return model.head(torch.cat([features, case.tensor("head_ebv")], dim=1))


def early_settings(case):
    told = case.settings
    named = {"encoders": {EARLY: told["encoder"]}, "bins": told["classes"], "hidden": told["hidden"]}
    return FusionConfig.official("early", z_max=told["z_max"], **named)


def small_early(case):
    timm()
    return filled(early_settings(case), case.dtype)(stack(case), case.tensor("ebv"))


def small_late(case):
    timm()
    told = case.settings
    config = FusionConfig.official(
        "late",
        encoders=dict.fromkeys(("galex", "ps1", "unwise"), told["encoder"]),
        bins=told["classes"],
        hidden=told["hidden"],
    )
    images = {"galex": case.tensor("galex"), "ps1": case.tensor("ps"), "unwise": case.tensor("unwise")}
    return filled(config, case.dtype)(images, case.tensor("ebv"))


def resnet_of_the_report(case):
    config = FusionConfig.official("report", bins=case.settings["resnet_classes"])
    return filled(config, case.dtype)(stack(case), case.tensor("ebv"))


LOGITS = {
    "early_logits": lambda case: head(case, "early"),
    "late_logits": lambda case: head(case, "late"),
    "small_early_logits": small_early,
    "small_late_logits": small_late,
    "resnet50_logits": resnet_of_the_report,
}
STEPS = ("target", "losses", "fc1_bias_after3", "stem_bias_after3")
LARGE = ("large_early_params", "large_early_logits")


@both_dtypes
@pytest.mark.parametrize("name", LOGITS)
def test_logits(golden, name, dtype):
    case = Case(golden, "models", dtype)
    with torch.no_grad():
        case.assert_close(LOGITS[name](case), name)


@contextlib.contextmanager
def default_float64():
    """NAdam keeps its running product in the default dtype; the record was made with float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def test_steps_of_nadam(golden):
    case = Case(golden, "models")
    timm()
    told, z = case.settings, case.tensor("z")
    case.assert_close(nearest_node(z, grid_nodes(told["classes"], told["z_max"])), "small_early_target")
    losses = []
    with default_float64():
        model = filled(early_settings(case), case.dtype).train()
        config = TrainConfig(
            model=model.config,
            optimizer=told["optimizer"].lower(),
            lr=told["lr"],
            weight_decay=told["weight_decay"],
        )
        optimizer = make_optimizer(model, config)
        images, ebv = stack(case), case.tensor("ebv")
        for _ in range(told["steps"]):
            loss = training_loss(model(images, ebv), z, config)
            losses.append(loss.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    case.assert_close(torch.stack(losses), "small_early_losses")
    case.assert_close(model.head[2].bias.detach(), "small_early_fc1_bias_after3")
    case.assert_close(
        model.get_parameter("encoder.early.stem.0.bias").detach(), "small_early_stem_bias_after3"
    )
    case.assert_all_seen(elsewhere=[*LOGITS, *LARGE])


@pytest.mark.slow
def test_full_early_network(golden):
    case = Case(golden, "models")
    timm()
    large = case.settings["large"]
    if large is None:
        assert not set(LARGE) & set(case.record)
        pytest.skip("this folder records no large network")
    config = FusionConfig.official("early", encoders={EARLY: large["encoder"]}, bins=large["classes"])
    model = filled(config, case.dtype)
    case.assert_close(sum(p.numel() for p in model.parameters()), "large_early_params")
    one = slice(None, large["objects"])
    images = {name: planes[one] for name, planes in stack(case).items()}
    with torch.no_grad():
        case.assert_close(model(images, case.tensor("ebv")[one]), "large_early_logits")
