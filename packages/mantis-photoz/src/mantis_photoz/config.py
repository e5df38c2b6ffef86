"""Settings of a network and of its training, as plain values that a checkpoint carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fusion_core.config import Config
from fusion_core.errors import LARGEST, LARGEST_SEED, ConfigError, check_range

Fusion = Literal["report", "early", "late", "hybrid"]
Align = Literal["stretch", "wcs", "psf", "native"]
Scaling = Literal["official", "official-signed", "noise"]
Missing = Literal["zeros", "mask"]
StemScale = Literal["mean", "preserve"]
Head = Literal["bins", "mdn", "quantile"]
EARLY = "early"
LATE_ORDER = ("ps1", "unwise", "galex")
"""Features of late fusion are joined in this order; other surveys follow in their own."""


@dataclass(frozen=True)
class SurveyInput(Config):
    """What a network takes from one survey.

    Args:
        bands: planes.
        pixels: of a cutout's side.
        pixel_scale: arcsec.
        crop: side of the centre that is kept, pixels; None keeps all.
        noise: standard deviation of a pixel per band, for ``scaling="noise"``.
        fwhm: of the point-spread function per band, arcsec, for ``align="psf"``.
    """

    bands: int
    pixels: int
    pixel_scale: float
    crop: int | None = None
    noise: tuple[float, ...] | None = None
    fwhm: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if (self.crop or 1) > self.pixels:
            raise ConfigError(f"crop is {self.crop}, wanted no more than the pixels, {self.pixels}")
        self.check_fields("pixel_scale", open=True)
        self.check_fields("bands", "pixels", "crop", low=1, high=65_536)
        for name in ("noise", "fwhm"):
            values = getattr(self, name)
            if values is not None and len(values) != self.bands:
                raise ConfigError(f"{name} is {values}, wanted {self.bands} positive numbers, one per band")
        self.check_fields("noise", "fwhm", low=1e-20, high=1e20)  # float32 divides by them

    @property
    def side(self) -> int:
        """Pixels of a side after the crop."""
        return self.crop or self.pixels


@dataclass(frozen=True)
class FusionConfig(Config):
    """A network and what it is fed (sections 2.2 to 2.5, 2.9).

    Args:
        fusion: ``"early"`` (one encoder on stacked surveys), ``"late"`` (an encoder each, features joined),
            ``"hybrid"`` (an encoder each, attention between their feature maps), ``"report"`` (early, with
            the
            report's head).
        inputs: survey -> its input, in the order of the channels; the authors' of this fusion by default.
        encoders: survey, or ``"early"``, -> ``"small-WIDTH"`` (ours), ``"resnet50-report"``, or a timm model.
        bins: classes K of the density.
        z_max: nodes are k z_max / K; at least 1e-6.
        head: what the last layer gives: ``"bins"`` logits of the classes (the authors'), ``"mdn"`` a
            mixture of
            Gaussians, ``"quantile"`` quantiles; the last two are put into the bins.
        components: of the mixture, or number of quantiles.
        hidden: width of the head.
        dropout: in the head.
        align: how the surveys get on one grid: ``"stretch"`` and ``"wcs"``, ``"psf"`` for early fusion,
            ``"native"`` for an encoder each.
        size: pixels of the common grid's side, for early fusion.
        target_fwhm: that ``align="psf"`` brings every band to, arcsec; None takes the broadest.
        scaling: of the flux: ``"official"`` (floored at 0), ``"official-signed"``, ``"noise"`` (asinh of flux
            over twice the pixel noise, signed).
        deredden: multiply fluxes by 10^(0.4 R_b E(B-V)), of CSFD, before the scaling (section 2.11); the
            authors' network gets E(B-V) as an input alone.
        missing: ``"zeros"`` (official), or ``"mask"``: mask bits beside the dust for early fusion, learned
            features of an absent survey for the others.
        stem_scale: of a three-channel stem that is widened: ``"mean"`` (official) or ``"preserve"``.
        ebv_scale: factor on E(B-V) before the head.
        attention_layers: of hybrid fusion.
        attention_width: of hybrid fusion.
        data: what it was trained with, in a few words.
    """

    fusion: Fusion = "early"
    inputs: dict[str, SurveyInput] = field(default_factory=lambda: _OfficialInputs())
    encoders: dict[str, str] = field(default_factory=lambda: {EARLY: "convnext_large"})
    bins: int = 400
    z_max: float = 1.6
    head: Head = "bins"
    components: int = 19
    hidden: int = 2048
    dropout: float = 0.0
    align: Align = "stretch"
    size: int = 120
    target_fwhm: float | None = None
    scaling: Scaling = "official"
    deredden: bool = False
    missing: Missing = "zeros"
    stem_scale: StemScale = "mean"
    ebv_scale: float = 1.0
    attention_layers: int = 2
    attention_width: int = 64
    data: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.inputs, _OfficialInputs):
            object.__setattr__(self, "inputs", official_inputs(self.fusion))
        if not self.inputs:
            raise ConfigError("inputs is empty, wanted at least one survey")
        self.check_fields("bins", "hidden", "size", "attention_width", low=1, high=1_000_000)
        self.check_fields("attention_layers", low=1, high=1000)
        self.check_fields("target_fwhm", open=True)
        self.check_fields("z_max", low=1e-6)
        self.check_fields("ebv_scale", low=-LARGEST)
        check_range("dropout", self.dropout, 0.0, 0.95)
        check_range("components", self.components, 1, 1000)
        wanted = {EARLY} if self.stacked else set(self.inputs)
        if set(self.encoders) != wanted:
            raise ConfigError(
                f"encoders has {sorted(self.encoders)}, fusion {self.fusion!r} wants {sorted(wanted)}"
            )
        if self.stacked == (self.align == "native"):
            kinds = "'stretch', 'wcs' or 'psf'" if self.stacked else "'native'"
            raise ConfigError(f"align is {self.align!r}, fusion {self.fusion!r} wants {kinds}")
        needs = {"noise": self.scaling == "noise", "fwhm": self.align == "psf"}
        for name, needed in needs.items():
            lacking = [survey for survey, given in self.inputs.items() if getattr(given, name) is None]
            if needed and lacking:
                raise ConfigError(f"inputs.{lacking[0]} has no {name}, which scaling or align asks for")

    @property
    def stacked(self) -> bool:
        """Whether one encoder sees all surveys."""
        return self.fusion in ("early", "report")

    @property
    def surveys(self) -> tuple[str, ...]:
        """The surveys in the order of the channels and of the mask's columns."""
        return tuple(self.inputs)

    @property
    def channels(self) -> int:
        """Planes of all surveys together."""
        return sum(one.bands for one in self.inputs.values())

    @property
    def outputs(self) -> int:
        """Numbers that the last layer gives."""
        return {"bins": self.bins, "mdn": 3 * self.components, "quantile": self.components}[self.head]

    @property
    def feature_order(self) -> tuple[str, ...]:
        """The surveys in the order in which late fusion joins their features."""
        first = [name for name in LATE_ORDER if name in self.inputs]
        return (*first, *(name for name in self.inputs if name not in first))

    @classmethod
    def official(cls, fusion: Literal["report", "early", "late"] = "early", **changes: Any) -> FusionConfig:
        """The authors' networks: those of the paper, or the ResNet-50 of the report.

        Args:
            fusion: which of them.
            **changes: fields to set anew, such as ``encoders``.
        """
        made: dict[str, Any] = {"fusion": fusion, "inputs": official_inputs(fusion)}
        if fusion == "late":
            small, large = "convnext_small", "convnext_large"
            made |= {"encoders": {"galex": small, "ps1": large, "unwise": small}, "align": "native"}
        if fusion == "report":
            made |= {"encoders": {EARLY: "resnet50-report"}, "bins": 200, "z_max": 1.0, "hidden": 1024}
        return cls(**(made | changes))


class _OfficialInputs(dict[str, SurveyInput]):
    """Stands for the authors' inputs of whatever fusion the settings say."""


def official_inputs(fusion: Fusion) -> dict[str, SurveyInput]:
    """The authors' cutouts and crops (sections 2.1 and 2.3)."""
    crop = None if fusion in ("late", "hybrid") else 22
    return {
        "galex": SurveyInput(2, 32, 1.5, crop),
        "ps1": SurveyInput(5, 170, 0.25, 120),
        "unwise": SurveyInput(2, 32, 2.75, crop),
    }


@dataclass(frozen=True)
class TrainConfig(Config):
    """How a network is trained (section 2.6).

    Args:
        model: the network.
        optimizer: ``"nadam"`` (the authors') or ``"adamw"``.
        lr: highest learning rate.
        weight_decay: of the optimizer.
        schedule: ``"plateau"`` (halved after ``patience`` epochs without gain, the authors'), ``"cosine"``,
            ``"onecycle"``, ``"constant"``.
        warmup: share of the steps that the rate rises, for cosine and one cycle.
        min_lr: that the plateau and the cosine end at.
        patience: of the plateau, epochs.
        early_stop: end after so many epochs without gain; None goes on.
        epochs: passes; an epoch has at most ``max_steps`` steps.
        max_steps: of an epoch.
        batch_size: objects per step.
        loss: ``"ce"``, ``"crps"``, ``"cde"`` or ``"ordinal-soft"``.
        soft_width: of ``"ordinal-soft"``: width over (1 + z) of the target.
        sampler: ``"balanced"`` (the authors'), ``"natural"``, ``"sqrt"`` or ``"colour-z"``.
        augment: ``"d4"`` (a turn and flip each object), ``"d4-batch"`` (one a batch), ``"rotate"`` (any
            angle),
            ``"official"`` or ``"none"``.
        jitter: largest shift of the centre, arcsec.
        noise: standard deviation of noise added to scaled pixels.
        survey_dropout: survey -> chance that an object loses it; never all.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
        max_grad_norm: None does not clip.
        ema: decay of the weights' average; None takes the last weights.
        save_every: steps between checkpoints.
        seed: of weights, order and augmentation.
    """

    model: FusionConfig = field(default_factory=FusionConfig)
    optimizer: Literal["nadam", "adamw"] = "nadam"
    lr: float = 3e-4
    weight_decay: float = 1e-7
    schedule: Literal["plateau", "cosine", "onecycle", "constant"] = "plateau"
    warmup: float = 0.2
    min_lr: float = 1e-6
    patience: int = 5
    early_stop: int | None = None
    epochs: int = 150
    max_steps: int = 1001
    batch_size: int = 256
    loss: Literal["ce", "crps", "cde", "ordinal-soft"] = "ce"
    soft_width: float = 0.01
    sampler: Literal["balanced", "natural", "sqrt", "colour-z"] = "balanced"
    augment: Literal["d4", "d4-batch", "rotate", "official", "none"] = "d4"
    jitter: float = 0.0
    noise: float = 0.0
    survey_dropout: dict[str, float] = field(default_factory=dict[str, float])
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    max_grad_norm: float | None = None
    ema: float | None = None
    save_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        self.check_fields("epochs", "max_steps", "batch_size", "save_every", "early_stop", low=1)
        self.check_fields("lr", "soft_width", "max_grad_norm", open=True)
        self.check_fields("min_lr", "weight_decay", "patience", "jitter", "noise")
        self.check_fields("ema", high=1.0, open=True)
        self.check_fields("seed", high=LARGEST_SEED)
        check_range("warmup", self.warmup, 0.0, 1.0)
        unknown = set(self.survey_dropout) - set(self.model.inputs)
        if unknown:
            raise ConfigError(f"survey_dropout names {sorted(unknown)}, the model has {self.model.surveys}")
        if self.model.head != "bins" and self.loss != "ce":
            raise ConfigError(f"loss is {self.loss!r}, head {self.model.head!r} has its own: leave 'ce'")
        for survey, chance in self.survey_dropout.items():
            check_range(f"survey_dropout.{survey}", chance, 0.0, 0.99)

    @classmethod
    def official(cls, fusion: Literal["early", "late"] = "early", **changes: Any) -> TrainConfig:
        """The authors' recipe (section 2.6): their launch scripts, on 16 devices with 16 objects each.

        Args:
            fusion: which of the paper's networks.
            **changes: fields to set anew.
        """
        made: dict[str, Any] = {
            "model": FusionConfig.official(fusion),
            "augment": "official",
            "seed": 1,
            "mixed_precision": "fp16",
        }
        made |= {"lr": 1e-4, "epochs": 60} if fusion == "late" else {}
        return cls(**(made | changes))


def dropout_chances(config: TrainConfig) -> Mapping[str, float]:
    """The chance of each survey of the model to be dropped."""
    return {survey: config.survey_dropout.get(survey, 0.0) for survey in config.model.surveys}
