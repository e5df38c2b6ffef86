"""Networks: shapes, missing surveys, order and padding of batches, D4, stems, checkpoints, bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusion_core.errors import CheckpointError, ConfigError, ShapeError
from mantis_photoz.config import EARLY, FusionConfig, SurveyInput, TrainConfig
from mantis_photoz.encoders import adapt_stem, build_encoder, widen_stem
from mantis_photoz.fusion import FusionModel, load_model, shipped
from mantis_photoz.predicting import predict
from mantis_photoz.samples import CutoutArrays
from mantis_photoz.training import new_model
from mantis_photoz.views import d4

INPUTS = {
    "galex": SurveyInput(2, 16, 1.5),
    "ps1": SurveyInput(5, 16, 1.0),
    "unwise": SurveyInput(2, 16, 2.75),
}
KINDS = ("early", "late", "hybrid")


def config(fusion: str, **changes: Any) -> FusionConfig:
    stacked = fusion == "early"
    base: dict[str, Any] = {
        "fusion": fusion,
        "inputs": INPUTS,
        "bins": 12,
        "z_max": 1.2,
        "hidden": 8,
        "size": 16,
    }
    base["encoders"] = {EARLY: "small-4"} if stacked else dict.fromkeys(INPUTS, "small-4")
    base |= {"align": "stretch" if stacked else "native", "scaling": "official-signed", "attention_width": 32}
    return FusionConfig(**(base | changes))


def images(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(count, one.bands, 16, 16, generator=draw).to(dtype) for name, one in INPUTS.items()
    }


@pytest.mark.parametrize("missing", ["zeros", "mask"])
@pytest.mark.parametrize("fusion", KINDS)
def test_batches_do_not_mix(fusion: str, missing: str, device: str) -> None:
    model = new_model(config(fusion, missing=missing), 0).eval().to(device)
    planes = {name: x.to(device) for name, x in images(6).items()}
    ebv = torch.rand(6, 2, device=device)
    present = torch.ones(6, 3, dtype=torch.bool, device=device)
    present[1, 0] = present[4, 2] = False
    whole = model(planes, ebv, present)
    assert whole.shape == (6, 12)
    order = torch.tensor([3, 1, 5, 0, 4, 2], device=device)
    turned = model({name: x[order] for name, x in planes.items()}, ebv[order], present[order])
    torch.testing.assert_close(turned, whole[order], atol=1e-5, rtol=1e-5)
    one = model({name: x[4:5] for name, x in planes.items()}, ebv[4:5], present[4:5])
    torch.testing.assert_close(one, whole[4:5], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("missing", ["zeros", "mask"])
@pytest.mark.parametrize("fusion", KINDS)
@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2), st.floats(-50, 50))
def test_what_a_missing_survey_holds_does_not_count(
    fusion: str, missing: str, survey: int, value: float
) -> None:
    model = new_model(config(fusion, missing=missing), 0).eval()
    planes, ebv = images(2), torch.rand(2, 2)
    present = torch.ones(2, 3, dtype=torch.bool)
    present[:, survey] = False
    before = model(planes, ebv, present)
    name = model.config.surveys[survey]
    after = model(planes | {name: torch.full_like(planes[name], value)}, ebv, present)
    torch.testing.assert_close(before, after, atol=0, rtol=0)
    empty = planes | {name: torch.zeros_like(planes[name])}
    torch.testing.assert_close(before, model(empty, ebv, present), atol=0, rtol=0)
    if missing == "zeros" and fusion == "early":
        torch.testing.assert_close(before, model(empty, ebv), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("fusion", KINDS)
def test_absence_is_told_apart_from_darkness(fusion: str) -> None:
    model = new_model(config(fusion, missing="mask"), 0).eval()
    if fusion == "late":
        with torch.no_grad():
            model.absent["galex"].fill_(1.0)
    planes = images(2) | {"galex": torch.zeros(2, 2, 16, 16)}
    ebv, present = torch.rand(2, 2), torch.tensor([[False, True, True]] * 2)
    assert (model(planes, ebv, present) - model(planes, ebv)).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fusion", KINDS)
def test_gradients_reach_every_parameter(fusion: str, dtype: torch.dtype) -> None:
    model = new_model(config(fusion, missing="mask"), 0).to(dtype).train()
    present = torch.tensor([[True, True, True], [False, True, False], [True, False, True]])
    model(images(3, dtype=dtype), torch.rand(3, 2, dtype=dtype), present).float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_head_gradcheck() -> None:
    model = new_model(config("early", missing="mask"), 0).double().eval()
    planes = {name: x.double() for name, x in images(1).items()}
    ebv = torch.rand(1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda e: model(planes, e), (ebv,))


@pytest.mark.parametrize("fusion", KINDS)
def test_d4_mean_does_not_depend_on_how_the_object_lies(fusion: str) -> None:
    model = new_model(config(fusion), 0).eval()
    planes = images(3)
    samples = CutoutArrays(planes, torch.rand(3, 2), torch.rand(3))
    first = predict(model, samples, tta="d4").pdf.pmf
    for element in (1, 2, 5):
        moved = {name: d4(x, element) for name, x in planes.items()}
        other = predict(model, CutoutArrays(moved, samples.ebv, samples.z), tta="d4").pdf.pmf
        torch.testing.assert_close(first, other, atol=1e-6, rtol=0)


def test_predicting_leaves_the_model_as_it_was_and_sizes_do_not_matter() -> None:
    model = new_model(config("early"), 0).train()
    samples = CutoutArrays(images(7), torch.rand(7, 2), torch.rand(7))
    few, all_at_once = predict(model, samples, batch_size=2), predict(model, samples)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(few.logits, all_at_once.logits, atol=1e-5, rtol=1e-5)
    assert few.features.shape == (7, 8)
    assert len(predict(model, samples.take([])).pdf) == 0


def test_stem_is_the_mean_repeated() -> None:
    weight = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(adapt_stem(weight, 9)[:, 7], weight.mean(1))
    grey = torch.randn(1, 1, 8, 8)
    three = torch.nn.functional.conv2d(grey.expand(-1, 3, -1, -1), weight)
    nine = torch.nn.functional.conv2d(grey.expand(-1, 9, -1, -1), adapt_stem(weight, 9, "preserve"))
    torch.testing.assert_close(three, nine, atol=1e-5, rtol=1e-5)


def test_timm_stems_are_widened_and_keep_their_bias() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("convnext_atto", pretrained=False, num_classes=0)
    bias, weight = model.stem[0].bias.detach().clone(), model.stem[0].weight.detach().clone()
    widen_stem(model, 5)
    assert model.stem[0].weight.shape == (40, 5, 4, 4)
    torch.testing.assert_close(model.stem[0].bias, bias)
    torch.testing.assert_close(model.stem[0].weight, adapt_stem(weight, 5))


@pytest.mark.parametrize("fusion", KINDS)
def test_checkpoints_come_back(fusion: str, tmp_path: Path) -> None:
    model = new_model(config(fusion, missing="mask"), 3)
    model.save_pretrained(tmp_path / "model")
    again = FusionModel.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    assert not again.training
    planes, ebv = images(2), torch.rand(2, 2)
    torch.testing.assert_close(again(planes, ebv), model.eval()(planes, ebv), atol=0, rtol=0)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_what_ships_is_small_and_says_simulation() -> None:
    found = shipped()
    assert {"sim-ps1", "sim-early", "sim-late", "sim-early-dropout"} <= set(found)
    size = sum(p.stat().st_size for folder in found.values() for p in folder.iterdir())
    assert size < 5 * 2**20
    for name in found:
        model = load_model(name)
        assert "simulation" in model.config.data
        assert next(model.parameters()).dtype == torch.float32


def test_broken_checkpoints_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        FusionModel.from_pretrained(tmp_path)
    model = new_model(config("early"), 0)
    model.save_pretrained(tmp_path)
    config("late").save(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"does not fit FusionModel.*missing.*encoder\.galex"):
        FusionModel.from_pretrained(tmp_path)
    model.config.save(tmp_path / "config.json")
    (tmp_path / "model.safetensors").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
    )
    with pytest.raises(CheckpointError, match="LFS pointer"):
        FusionModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoders": {"early": "small-4", "ps1": "small-4"}}, r"encoders has \['early', 'ps1'\]"),
        ({"align": "native"}, "align is 'native'"),
        ({"scaling": "noise"}, "inputs.galex has no noise"),
        ({"align": "psf"}, "inputs.galex has no fwhm"),
        ({"bins": 0}, r"bins is 0, wanted a number in \[1, 1e\+06\]"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"inputs": {}}, "inputs is empty"),
    ],
)
def test_bad_settings(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config("early", **change)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-320, float("inf"), float("nan")])
def test_a_noise_that_float32_cannot_divide_by_is_refused(value: float) -> None:
    for name in ("noise", "fwhm"):
        with pytest.raises(ConfigError, match=rf"{name} is .*, wanted a number in \[1e-20, 1e\+20\]"):
            SurveyInput(2, 16, 1.0, **{name: (1.0, value)})
        with pytest.raises(ConfigError, match="wanted 2 positive numbers"):
            SurveyInput(2, 16, 1.0, **{name: (1.0,)})


def test_unknown_names_are_told() -> None:
    with pytest.raises(ConfigError, match="did you mean fusion"):
        FusionConfig.from_dict({"fusio": "early"})
    with pytest.raises(ConfigError, match=r"survey_dropout names \['sdss'\]"):
        TrainConfig(model=config("early"), survey_dropout={"sdss": 0.1})
    with pytest.raises(ConfigError, match="encoder 'no_such' is unknown"):
        build_encoder("no_such", 3)
    with pytest.raises(ConfigError, match="encoder '/' is unknown"):
        build_encoder("/", 3)
    with pytest.raises(ConfigError, match="no pretrained weights"):
        build_encoder("small-8", 3, pretrained=True)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x, e: m({k: v for k, v in x.items() if k != "ps1"}, e), "images has"),
        (lambda m, x, e: m(x | {"ps1": x["ps1"][:, :3]}, e), r"images\['ps1'\] has shape"),
        (lambda m, x, e: m(x | {"ps1": x["ps1"][..., :8, :8]}, e), "one grid for all"),
        (lambda m, x, e: m(x, e[:, :1]), "ebv has shape"),
        (lambda m, x, e: m(x, e, torch.ones(2, 2, dtype=torch.bool)), "present has shape"),
    ],
)
def test_bad_shapes(call: Callable[..., Any], words: str) -> None:
    model = new_model(config("early"), 0)
    with pytest.raises(ShapeError, match=words):
        call(model, images(2), torch.zeros(2, 2))


def test_official_settings() -> None:
    early, late, report = (FusionConfig.official(kind) for kind in ("early", "late", "report"))
    assert (early.channels, early.bins, early.z_max, early.hidden) == (9, 400, 1.6, 2048)
    assert late.feature_order == ("ps1", "unwise", "galex")
    assert late.inputs["galex"].side == 32
    assert (report.bins, report.z_max, report.hidden) == (200, 1.0, 1024)
    for made in (early, late, report):
        assert FusionConfig.from_dict(made.to_dict()) == made


def test_the_inputs_are_those_of_the_fusion() -> None:
    """Section 5.1's example says nothing of inputs: late fusion keeps the pixels that early fusion crops."""
    encoders = {"ps1": "small-4", "galex": "small-4", "unwise": "small-4"}
    late = FusionConfig(fusion="late", encoders=encoders, align="native")
    assert late.inputs == FusionConfig.official("late").inputs
    assert FusionConfig().inputs["galex"].side == 22
    own = late.replace(inputs={name: one.to_dict() for name, one in FusionConfig().inputs.items()})
    assert own.inputs["galex"].side == 22
    assert FusionConfig.from_dict({"fusion": "late", "encoders": encoders, "align": "native"}) == late


def test_official_training() -> None:
    """Section 2.6: what the authors' launch scripts say."""
    early, late = TrainConfig.official(), TrainConfig.official("late", epochs=2)
    same = {"optimizer": "nadam", "weight_decay": 1e-7, "batch_size": 256, "max_steps": 1001, "seed": 1}
    same |= {"sampler": "balanced", "schedule": "plateau", "patience": 5, "min_lr": 1e-6, "loss": "ce"}
    same |= {"augment": "official", "mixed_precision": "fp16"}
    for made in (early, late):
        assert {name: getattr(made, name) for name in same} == same
    assert (early.lr, early.epochs, early.model.fusion) == (3e-4, 150, "early")
    assert (late.lr, late.epochs, late.model.fusion) == (1e-4, 2, "late")
