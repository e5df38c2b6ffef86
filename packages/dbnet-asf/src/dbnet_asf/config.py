"""Settings of the network, of post-processing and of training: plain values with checks, TOML or JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Self

from fusion_core.config import Config
from fusion_core.errors import LARGEST, LARGEST_SEED, ConfigError, check_range

Attention = Literal["scale_channel_spatial", "scale_spatial", "scale_channel"]
Color = Literal["rgb", "bgr"]
Distance = Literal["official", "exact", "raster"]
LossName = Literal[
    "L1BalanceCELoss",
    "L1DiceLoss",
    "FullL1DiceLoss",
    "L1LeakyDiceLoss",
    "DiceLoss",
    "BalanceBCELoss",
    "AdaptiveDiceLoss",
    "L1BCEMiningLoss",
    "paper",
]
Mode = Literal["quad", "polygon"]
Triple = tuple[float, float, float]

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "mobilenetv3_large", "nano")
OFFICIAL_MEAN: Triple = (122.67891434, 116.66876762, 104.00698793)
IMAGENET_MEAN: Triple = (123.675, 116.28, 103.53)
IMAGENET_STD: Triple = (58.395, 57.12, 57.375)
_WIDEST = 65_536


@dataclass(frozen=True)
class PostConfig(Config):
    """How a probability map becomes boxes or polygons (sections 2.5 and 2.6).

    Attributes:
        thresh: a pixel is text where its probability is above this, in [0, 1].
        box_thresh: a region is kept where its score is at least this, in [0, 1].
        unclip_ratio: how far a region is grown, times area over perimeter; None takes 1.5 for quads and 2.0
            for polygons, as the authors' code does.
        mode: ``"quad"`` or ``"polygon"``.
        score: mean probability over the rectangle (``"fast"``; over the approximated outline in polygon
            mode), over the contour (``"slow"``), or over the connected pixels (``"component"``).
        max_candidates: how many regions at most; None for all.
        cap: which are kept: those of the highest score, or the first contours in scan order
            (``"official"``).
        contours: outer contours only, or those of holes too (``"official"``).
        min_size: shortest side of a region before it is grown, in pixels of the map; after it 2 more.
        epsilon: tolerance of a polygon's outline as a share of its length.
        several: what is done where growing gives more than one polygon.
        dilation: dilate the bitmap by 2x2 before its contours are taken.
        round: round coordinates to whole pixels of the image.
        compat: ``"official"`` sets everything as the authors' code has it (contours, cap, clipper on
            truncated corners, several polygons dropped, rounding).
    """

    thresh: float = 0.3
    box_thresh: float = 0.6
    unclip_ratio: float | None = None
    mode: Mode = "quad"
    score: Literal["fast", "slow", "component"] = "fast"
    max_candidates: int | None = None
    cap: Literal["score", "official"] = "score"
    contours: Literal["outer", "official"] = "outer"
    min_size: float = 3.0
    epsilon: float = 0.002
    several: Literal["largest", "drop"] = "largest"
    dilation: bool = False
    round: bool = False
    compat: Literal["ours", "official"] = "ours"

    def __post_init__(self) -> None:
        check_range("thresh", self.thresh, 0, 1)
        check_range("box_thresh", self.box_thresh, 0, 1)
        check_range("epsilon", self.epsilon, 0, 1)
        self.check_fields("min_size", "unclip_ratio")
        self.check_fields("max_candidates", low=1)
        _member("mode", self.mode, ("quad", "polygon"))
        _member("score", self.score, ("fast", "slow", "component"))
        _member("cap", self.cap, ("score", "official"))
        _member("contours", self.contours, ("outer", "official"))
        _member("several", self.several, ("largest", "drop"))
        _member("compat", self.compat, ("ours", "official"))

    @classmethod
    def official(cls, mode: Mode = "quad") -> Self:
        """What the authors' code does: its first 1000 contours, holes too, truncated corners, rounding."""
        return cls(
            mode=mode,
            max_candidates=1000,
            cap="official",
            contours="official",
            several="drop",
            round=True,
            compat="official",
        )

    @property
    def ratio(self) -> float:
        """The unclip ratio, by mode where none is set."""
        if self.unclip_ratio is not None:
            return self.unclip_ratio
        return 1.5 if self.mode == "quad" else 2.0


@dataclass(frozen=True)
class DBConfig(Config):
    """The network, what its input looks like, and the post-processing that goes with it.

    Attributes:
        backbone: one of ``BACKBONES``, or ``"timm:NAME"`` for a feature extractor of timm (extra ``timm``).
        channels: of the stages of ``"nano"``, strides 4, 8, 16, 32; other backbones know theirs.
        blocks: per stage of ``"nano"``.
        stem: channels of the two convolutions before the stages of ``"nano"``.
        dcn: modulated deformable convolutions in stages 2 to 4 of a ResNet.
        dcn_offset: the offset convolution has the block's stride, or stride 1 with the authors' misread
            buffer (``"official"``; set by :func:`dbnet_asf.load_official` where the file needs it).
        attention: adaptive scale fusion, or None for the plain DBNet.
        inner: channels of the fused features, a multiple of 16.
        serial: the threshold head sees the probability map too.
        smooth: nearest upsampling and 3x3 convolutions in the heads instead of transposed ones.
        k: steepness of differentiable binarization.
        mean: subtracted from pixels in [0, 255], in the order of the channels.
        std: divides them afterwards.
        color: order of the network's input channels.
        short_side: to which images are resized, in pixels; a multiple of 32 is made of it.
        resize: what ``short_side`` is about: the shorter side, the height, or nothing (``"native"``).
        post: post-processing.
    """

    backbone: str = "resnet18"
    channels: tuple[int, int, int, int] = (24, 48, 96, 160)
    blocks: tuple[int, int, int, int] = (1, 1, 2, 1)
    stem: int = 16
    dcn: bool = False
    dcn_offset: Literal["strided", "official"] = "strided"
    attention: Attention | None = "scale_channel_spatial"
    inner: int = 256
    serial: bool = False
    smooth: bool = False
    k: float = 50.0
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    color: Color = "rgb"
    short_side: int = 736
    resize: Literal["short", "height", "native"] = "short"
    post: PostConfig = field(default_factory=PostConfig)

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES and not self.backbone.startswith("timm:"):
            raise ConfigError(
                f"backbone is {self.backbone!r}, wanted one of {list(BACKBONES)} or 'timm:NAME'"
            )
        if self.dcn and not self.backbone.startswith("resnet"):
            raise ConfigError(
                f"dcn is True with backbone {self.backbone!r}; deformable convolutions need a ResNet"
            )
        if not 16 <= self.inner <= _WIDEST or self.inner % 16:
            raise ConfigError(f"inner is {self.inner!r}, wanted a multiple of 16 from 16 to {_WIDEST}")
        if self.attention is not None:
            _member("attention", self.attention, ("scale_channel_spatial", "scale_spatial", "scale_channel"))
        _member("dcn_offset", self.dcn_offset, ("strided", "official"))
        _member("color", self.color, ("rgb", "bgr"))
        _member("resize", self.resize, ("short", "height", "native"))
        self.check_fields("k", "short_side", "stem", open=True)
        self.check_fields("std", low=1e-9)  # divided by smaller ones, pictures leave float32
        self.check_fields("mean", low=-LARGEST)
        for name, most in (("channels", _WIDEST), ("blocks", 100)):
            values = getattr(self, name)
            if len(values) != 4 or min(values) < 1 or max(values) > most:
                raise ConfigError(f"{name} is {values!r}, wanted four integers from 1 to {most}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3:
                raise ConfigError(f"{name} is {values!r}, wanted three numbers")

    @classmethod
    def official(
        cls,
        backbone: str = "resnet18",
        *,
        dcn: bool = True,
        attention: Attention | None = "scale_channel_spatial",
        mode: Mode = "quad",
    ) -> Self:
        """The authors' released networks: BGR input less the RGB means, over 255, offsets as they ran."""
        bottleneck = backbone in ("resnet50", "resnet101")
        return cls(
            backbone=backbone,
            dcn=dcn,
            dcn_offset="official" if dcn and bottleneck else "strided",
            attention=attention,
            mean=OFFICIAL_MEAN,
            std=(255.0, 255.0, 255.0),
            color="bgr",
            post=PostConfig.official(mode),
        )

    @classmethod
    def paper(cls, backbone: str = "resnet50", *, dcn: bool = True) -> Self:
        """What the paper's text describes: spatial attention, offsets at the block's stride."""
        return cls(backbone=backbone, dcn=dcn, attention="scale_spatial")

    @classmethod
    def nano(cls, *, attention: Attention | None = "scale_channel_spatial", inner: int = 96) -> Self:
        """The small network for the CPU (0.9 million parameters)."""
        return cls(backbone="nano", attention=attention, inner=inner)

    @classmethod
    def preset(cls, name: str) -> Self:
        """A configuration by name.

        Raises:
            ConfigError: no such name; the message lists them.

        Example:
            >>> DBConfig.preset("nano").inner
            96
        """
        if name not in PRESETS:
            raise ConfigError(f"preset is {name!r}, wanted one of {sorted(PRESETS)}")
        return cls.from_dict(PRESETS[name].to_dict())


@dataclass(frozen=True)
class LabelConfig(Config):
    """How polygons become the four label maps (section 2.2).

    Attributes:
        shrink_ratio: r in D = area (1 - r^2) / perimeter, inside (0, 1).
        thresh_min: of the threshold map, away from text.
        thresh_max: of the threshold map, on the text's outline.
        min_text_size: shorter sides (pixels) are ignored.
        distance: the authors' distance to an edge, the exact one, or that of a drawn outline.
        precise: offset at 1/1024 pixel instead of whole pixels.
        pieces: of a shrunk polygon that falls apart, the first piece or all.
    """

    shrink_ratio: float = 0.4
    thresh_min: float = 0.3
    thresh_max: float = 0.7
    min_text_size: float = 8.0
    distance: Distance = "official"
    precise: bool = False
    pieces: Literal["first", "all"] = "first"

    def __post_init__(self) -> None:
        check_range("shrink_ratio", self.shrink_ratio, 0, 1, open=True)
        check_range("thresh_min", self.thresh_min, 0, 1)
        check_range("thresh_max", self.thresh_max, 0, 1)
        self.check_fields("min_text_size")
        if self.thresh_min >= self.thresh_max:
            raise ConfigError(
                f"thresh_min is {self.thresh_min!r} and thresh_max {self.thresh_max!r}, wanted min < max"
            )
        _member("distance", self.distance, ("official", "exact", "raster"))
        _member("pieces", self.pieces, ("first", "all"))


@dataclass(frozen=True)
class AugmentConfig(Config):
    """The authors' augmentation (section 2.4); the identity with ``AugmentConfig.none()``.

    Attributes:
        flip: probability of a horizontal flip.
        rotate_deg: rotation is uniform in [-rotate_deg, rotate_deg].
        scale: range of the isotropic resize.
        max_tries: how often a crop is drawn before the whole image is taken.
        min_crop_side: smallest side of a crop as a share of the image's.
        crop_regions: free columns and rows as they are, or without their last run (``"official"``).
        color_jitter: largest change of brightness, contrast and saturation; 0 for none.
    """

    flip: float = 0.5
    rotate_deg: float = 10.0
    scale: tuple[float, float] = (0.5, 3.0)
    max_tries: int = 10
    min_crop_side: float = 0.1
    crop_regions: Literal["all", "official"] = "all"
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        check_range("flip", self.flip, 0, 1)
        check_range("rotate_deg", self.rotate_deg, 0, 180)
        check_range("min_crop_side", self.min_crop_side, 0, 1)
        check_range("color_jitter", self.color_jitter, 0, 1)
        self.check_fields("max_tries")
        self.check_fields("scale", open=True)
        if not self.scale[0] <= self.scale[1]:
            raise ConfigError(f"scale is {self.scale!r}, wanted 0 < low <= high")
        _member("crop_regions", self.crop_regions, ("all", "official"))

    @classmethod
    def none(cls) -> Self:
        """No augmentation but the crop."""
        return cls(flip=0.0, rotate_deg=0.0, scale=(1.0, 1.0))


@dataclass(frozen=True)
class TrainConfig(Config):
    """How a network is trained (sections 2.3 and 2.4).

    Attributes:
        epochs: passes over the training set; ignored where ``steps`` is set.
        steps: optimizer steps, or None.
        batch_size: images per step and process.
        crop: side of the square training crops, a multiple of 32.
        optimizer: ``"sgd"`` (the authors') or ``"adamw"``.
        lr: the largest learning rate.
        momentum: of SGD.
        weight_decay: of either.
        schedule: polynomial decay per epoch (the authors' code) or per iteration (the paper), one cycle, or
            none.
        power: of the polynomial decay.
        loss: by name.
        alpha: weight of the probability map's term; None takes 5, and 1 for ``"paper"``.
        beta: weight of the threshold map's L1 term.
        global_ohem: hard negatives are chosen over all processes instead of within each.
        sync_bn: batch statistics over all processes.
        ema: decay of the averaged weights that are saved and evaluated, or None.
        mixed_precision: of accelerate.
        accumulate: batches per optimizer step.
        max_grad_norm: gradients are clipped to this norm, or None.
        num_workers: loader processes.
        save_every: steps between checkpoints.
        seed: of weights, order and augmentation.
        labels: of the label maps.
        augment: of the augmentation.
    """

    epochs: int = 1200
    steps: int | None = None
    batch_size: int = 16
    crop: int = 640
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.007
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Literal["epoch", "iteration", "one_cycle", "constant"] = "epoch"
    power: float = 0.9
    loss: LossName = "L1BalanceCELoss"
    alpha: float | None = None
    beta: float = 10.0
    global_ohem: bool = False
    sync_bn: bool = False
    ema: float | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    accumulate: int = 1
    max_grad_norm: float | None = None
    num_workers: int = 0
    save_every: int = 500
    seed: int = 0
    labels: LabelConfig = field(default_factory=LabelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        self.check_fields("epochs", "steps", "batch_size", "crop", "accumulate", "save_every", low=1)
        self.check_fields("lr", "power", "max_grad_norm", open=True)
        self.check_fields("weight_decay", "beta", "num_workers", "alpha")
        self.check_fields("seed", high=LARGEST_SEED)
        check_range("momentum", self.momentum, 0, 1)
        if self.crop % 32:
            raise ConfigError(f"crop is {self.crop!r}, wanted a multiple of 32")
        if self.ema is not None:
            check_range("ema", self.ema, 0, 1, open=True)
        _member("optimizer", self.optimizer, ("sgd", "adamw"))
        _member("schedule", self.schedule, ("epoch", "iteration", "one_cycle", "constant"))

    @classmethod
    def official(cls, epochs: int = 1200) -> Self:
        """The authors' code: their crop's defect, their distance, decay per epoch."""
        return cls(epochs=epochs, augment=AugmentConfig(crop_regions="official"))

    @classmethod
    def paper(cls, epochs: int = 1200) -> Self:
        """The paper's text: both maps by cross-entropy, decay per iteration, the exact distance."""
        return cls(
            epochs=epochs,
            loss="paper",
            schedule="iteration",
            labels=LabelConfig(distance="exact", precise=True),
        )

    @classmethod
    def modern(cls, steps: int = 12_000) -> Self:
        """AdamW in one cycle with averaged weights, precise labels: the recipe of the shipped checkpoint."""
        return cls(
            steps=steps,
            batch_size=32,
            optimizer="adamw",
            lr=2e-3,
            schedule="one_cycle",
            ema=0.999,
            labels=LabelConfig(distance="exact", precise=True, pieces="all"),
            augment=AugmentConfig(scale=(0.5, 2.0), color_jitter=0.2),
        )


def _member(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}, wanted one of {list(allowed)}")


PRESETS: dict[str, DBConfig] = {
    "nano": DBConfig.nano(),
    "resnet18": DBConfig(),
    "resnet50": DBConfig(backbone="resnet50"),
    "mobilenetv3": DBConfig(backbone="mobilenetv3_large", inner=96),
    "official-r18": DBConfig.official("resnet18"),
    "official-r50": DBConfig.official("resnet50"),
    "official-r18-plain": DBConfig.official("resnet18", attention=None),
    "official-r50-plain": DBConfig.official("resnet50", attention=None),
    "paper": DBConfig.paper(),
}
