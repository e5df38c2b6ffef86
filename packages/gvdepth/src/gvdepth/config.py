"""Settings: what a model is made of, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fusion_core.config import Config
from fusion_core.errors import LARGEST, LARGEST_SEED, ConfigError, check_range

Cue = Literal["fusion", "focal", "vertical", "direct"]
Fusion = Literal["scale", "variance", "mean", "select", "focal", "vertical"]
VerticalParam = Literal["offset", "row", "bounded"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CONTRACT = (
    "cue",
    "vertical_param",
    "extend",
    "f_c",
    "focal_range",
    "max_depth",
    "softness",
    "max_log_uncertainty",
    "image_mean",
    "image_std",
)
"""Settings without which a checkpoint's numbers mean something else: they are stored in the weights' file."""


@dataclass(frozen=True)
class GVDepthConfig(Config):
    """What a :class:`gvdepth.GVDepth` is made of.

    Args:
        encoder: ``"tiny"`` (needs no extra), the name of a backbone of transformers such as
            ``"facebook/convnext-tiny-224"``, or a folder that holds one (extra ``hf``).
        pretrained: start from the backbone's own weights; False never touches the network.
        encoder_config: settings of the backbone; filled in when the model is made, so that a saved model
            does not need the backbone's repository.
        encoder_widths: channels of the tiny encoder at 1/2, 1/4, ...
        cue: ``"fusion"`` of both, ``"focal"`` (the idea of Metric3D), ``"vertical"`` or ``"direct"``
            (baseline: depth without a camera).
        fusion: rule that joins the cues (section 2.4).
        vertical_param: form of the vertical head (section 2.3).
        extend: rho, the virtual extension below the image as a share of its height.
        f_c: canonical focal length, pixels.
        focal_range: metres, least and largest canonical depth.
        max_depth: d_MAX, metres.
        softness: k of the soft bound.
        max_log_uncertainty: the heads' log-uncertainties are clamped to +- this.
        embedding: give the decoder the ground-plane embedding; None = for every cue but ``"direct"``.
        decoder_widths: channels of the decoder's blocks, deepest first; the last is at 1/2. None = as wide as
            the encoder deserves; filled in when the model is made.
        head_widths: channels of the small U-Nets, at 1/2 first; None likewise.
        input_height: rows that images are resized to by ``predict``, camera included; None = as they are.
        image_mean: of the RGB channels in [0, 1].
        image_std: of the RGB channels in [0, 1].
        silog_alpha: scale of the scale-invariant loss.
        silog_lambda: weight of its squared mean.
        correction: 1 takes the n - 1 variance (AdaBins' code).
        uncertainty_weight: of L_unc.
        unc_weighting: False replaces L_unc by plain L1 per cue.

    Raises:
        ConfigError: a value is out of range.
    """

    encoder: str = "tiny"
    pretrained: bool = False
    encoder_config: dict[str, Any] | None = None
    encoder_widths: tuple[int, ...] = (16, 24, 32, 48)
    cue: Cue = "fusion"
    fusion: Fusion = "scale"
    vertical_param: VerticalParam = "offset"
    extend: float = 0.5
    f_c: float = 500.0
    focal_range: tuple[float, float] = (0.5, 300.0)
    max_depth: float = 80.0
    softness: float = 8.0
    max_log_uncertainty: float = 10.0
    embedding: bool | None = None
    decoder_widths: tuple[int, ...] | None = None
    head_widths: tuple[int, ...] | None = None
    input_height: int | None = None
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD
    silog_alpha: float = 10.0
    silog_lambda: float = 0.15
    correction: int = 0
    uncertainty_weight: float = 0.5
    unc_weighting: bool = True

    def __post_init__(self) -> None:
        self.check_fields("f_c", "max_depth", "softness", "silog_alpha", "max_log_uncertainty", open=True)
        self.check_fields("focal_range", "image_std", open=True)
        self.check_fields("image_mean", low=-LARGEST)
        self.check_fields("extend", "uncertainty_weight")
        self.check_fields("input_height", low=32)
        self.check_fields("encoder_widths", "decoder_widths", "head_widths", low=1, high=65_536)
        check_range("silog_lambda", self.silog_lambda, 0.0, 1.0)
        check_range("correction", self.correction, 0, 1)
        low, high = self.focal_range
        if not low < high:
            raise ConfigError(f"focal_range is {self.focal_range}, wanted two rising lengths in metres, > 0")
        for name in ("encoder_widths", "decoder_widths", "head_widths"):
            widths = getattr(self, name)
            if widths is not None and not widths:
                raise ConfigError(f"{name} is {widths}, wanted at least one width")

    @property
    def uses_embedding(self) -> bool:
        """Whether the decoder sees the ground-plane embedding."""
        return self.cue != "direct" if self.embedding is None else self.embedding

    @property
    def cues(self) -> int:
        """How many depths the heads give: 2 for ``"fusion"``, else 1."""
        return 2 if self.cue == "fusion" else 1

    @classmethod
    def tiny(cls, **changes: Any) -> GVDepthConfig:
        """The small network of the simulated experiments: some hundred thousand parameters, no extra."""
        plain: dict[str, Any] = {
            "f_c": 75.0,
            "focal_range": (0.8, 200.0),
            "max_log_uncertainty": 6.0,
        }
        return cls(**(plain | changes))


@dataclass(frozen=True)
class AugmentConfig(Config):
    """The geometric and photometric augmentation (section 2.7).

    Args:
        size: ``(height, width)`` of the views; None draws one size per step (``min_height`` ...).
        min_height: least height of a view, pixels.
        max_height: largest.
        crop_area: least and largest share of the image's area.
        aspect_jitter: the crop's aspect varies by up to this share.
        keep_aspect: the crop has the aspect of ``size`` instead (the simulated experiments).
        flip: probability of mirroring.
        color: strength of brightness, contrast and saturation jitter.
        pitch_deg: largest virtual pitch, degrees; 0 = off.
        roll_deg: largest virtual roll, degrees; 0 = off.
        noise_pitch_deg: standard deviation of the calibration noise, degrees.
        noise_height: standard deviation of the calibration noise, as a share of the height.
    """

    size: tuple[int, int] | None = None
    min_height: int = 200
    max_height: int = 500
    crop_area: tuple[float, float] = (0.4, 1.0)
    aspect_jitter: float = 0.2
    keep_aspect: bool = False
    flip: float = 0.5
    color: float = 0.3
    pitch_deg: float = 0.0
    roll_deg: float = 0.0
    noise_pitch_deg: float = 0.0
    noise_height: float = 0.0

    def __post_init__(self) -> None:
        self.check_fields("size", "min_height", "max_height", low=32, high=1_000_000)
        if not self.min_height <= self.max_height:
            raise ConfigError(
                f"min_height is {self.min_height} and max_height {self.max_height}, wanted min <= max"
            )
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise ConfigError(f"crop_area is {self.crop_area}, wanted rising shares in (0, 1]")
        check_range("aspect_jitter", self.aspect_jitter, 0.0, 0.5)
        check_range("flip", self.flip, 0.0, 1.0)
        check_range("color", self.color, 0.0, 1.0)
        for name in ("pitch_deg", "roll_deg"):
            check_range(name, getattr(self, name), 0.0, 20.0)
        check_range("noise_pitch_deg", self.noise_pitch_deg, 0.0, 5.0)
        check_range("noise_height", self.noise_height, 0.0, 0.3)


@dataclass(frozen=True)
class TrainConfig(Config):
    """The training recipe (section 2.7).

    Args:
        steps: optimizer steps.
        batch_size: images per process and batch; each is seen in two views where ``consistency_weight`` > 0,
            each view in a resolution of its own.
        accumulate: batches, each of its own resolutions, whose gradients are averaged for one step.
        lr: peak learning rate.
        final_lr: at the end of the cosine.
        warmup_steps: linear warm-up.
        schedule: ``"cosine"`` or ``"onecycle"``.
        weight_decay: of AdamW.
        betas: of AdamW.
        max_grad_norm: clip; None = off.
        encoder_lr_scale: multiplies the encoder's learning rate.
        consistency_weight: of L_con, 0 = one view only.
        global_mask_norm: means are over the valid pixels of all processes, not averaged per process.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``, of the trunk; geometry and losses stay float32.
        num_workers: loader processes.
        save_every: steps between checkpoints.
        seed: of the weights' draws, the order and the augmentation.
        augment: see :class:`AugmentConfig`.
        model: see :class:`GVDepthConfig`; the command line makes the model of it.
    """

    steps: int = 150_000
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 1e-4
    final_lr: float = 1e-5
    warmup_steps: int = 1000
    schedule: Literal["cosine", "onecycle"] = "cosine"
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = 1.0
    encoder_lr_scale: float = 1.0
    consistency_weight: float = 0.1
    global_mask_norm: bool = True
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    num_workers: int = 0
    save_every: int = 500
    seed: int = 0
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: GVDepthConfig = field(default_factory=GVDepthConfig)

    def __post_init__(self) -> None:
        self.check_fields("steps", "batch_size", "accumulate", "save_every", low=1)
        self.check_fields("warmup_steps", "num_workers", "weight_decay", "consistency_weight")
        self.check_fields("lr", "max_grad_norm", open=True)
        self.check_fields("seed", high=LARGEST_SEED)
        check_range("final_lr", self.final_lr, 0.0, self.lr)
        self.check_fields("betas", high=0.9999999)
        self.check_fields("encoder_lr_scale")
