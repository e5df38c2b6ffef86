"""The network: encoder, decoder with the ground-plane embedding, small U-Nets, camera in closed form."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fusion_core.checkpoint import load_strict, load_tensors, save_tensors
from fusion_core.errors import CheckpointError, ConfigError, InputError, ShapeError, check_shape, reading
from fusion_core.hub import CONFIG, WEIGHTS, model_file, save_model
from fusion_core.shards import read_header
from gvdepth.config import CONTRACT, Fusion, GVDepthConfig
from gvdepth.fusion import Fused
from gvdepth.geometry import ground_embedding, ground_pyramid
from gvdepth.losses import LossOutput, depth_loss
from gvdepth.modeling_blocks import CueHeads, Decoder
from gvdepth.modeling_encoder import build_encoder, encoder_parameters
from gvdepth.modeling_head import CueDepths, cue_depths, fuse_cues, with_calibration_error


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """What :meth:`GVDepth.forward` returns; maps are (B, 1, H, W), float32 at least.

    Args:
        depth: fused, metres, in (0, max_depth] but for the focal cue, which has no bound.
        uncertainty: of the fused depth, metres; it grows where the cues contradict each other.
        depth_focal: of the focal cue (of a single-cue model: that cue's).
        depth_vertical: of the vertical cue (of a single-cue model: that cue's).
        log_uncertainty_focal: log of metres.
        log_uncertainty_vertical: log of metres.
        weight_focal: share of the focal cue, in [0, 1].
        losses: the loss and its parts, where labels were given.
    """

    depth: Tensor
    uncertainty: Tensor
    depth_focal: Tensor
    depth_vertical: Tensor
    log_uncertainty_focal: Tensor
    log_uncertainty_vertical: Tensor
    weight_focal: Tensor
    losses: LossOutput | None = None

    @property
    def loss(self) -> Tensor | None:
        """The total loss, a scalar."""
        return None if self.losses is None else self.losses.total


class GVDepth(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="gvdepth",
    license="apache-2.0",
    pipeline_tag="depth-estimation",
    tags=["depth-estimation", "metric-depth"],
    paper_url="https://arxiv.org/abs/2412.06080",
):
    """Metric depth of one image of any camera on a ground vehicle.

    Images go in as RGB in [0, 1]: normalization and padding are part of the network, so that they are part of
    an exported graph too.

    Args:
        config: see :class:`GVDepthConfig`.

    Raises:
        ConfigError: no such encoder, or widths that do not fit it.
        MissingExtraError: the encoder needs transformers, which is not installed.

    Example:
        >>> model = GVDepth(GVDepthConfig.tiny()).eval()
        >>> camera = torch.tensor([[75.0, 75.0, 59.5, 21.4, 1.65, -0.01, 0.0]])
        >>> with torch.no_grad():
        ...     model(torch.rand(1, 3, 48, 120), camera).depth.shape
        torch.Size([1, 1, 48, 120])
    """

    def __init__(self, config: GVDepthConfig | None = None) -> None:
        super().__init__()
        self.encoder, self.config = build_encoder(GVDepthConfig() if config is None else config)
        self._hub_mixin_config = self.config  # what the mixin's card and upload take
        channels: tuple[int, ...] = self.encoder.channels  # pyright: ignore[reportAssignmentType]
        widths, heads = self.config.decoder_widths, self.config.head_widths
        if not widths or not heads:  # one level only: the encoder's feature is the decoder's
            raise ConfigError(f"encoder_widths is {self.config.encoder_widths}, wanted at least two levels")
        self.decoder = Decoder(channels, widths, 2 * self.config.uses_embedding)
        self.heads = CueHeads(widths[-1], heads, self.config.cues)
        self.multiple = max(int(self.encoder.multiple), 2 ** (len(heads) + 1))  # pyright: ignore[reportArgumentType]
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(self.config.image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.config.image_std).view(1, 3, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.heads.project.weight.device

    @property
    def least_size(self) -> int:
        """Least height and width of an image, pixels."""
        return 2 * self.multiple

    def raw(
        self, pixel_values: Float[Tensor, "b 3 h w"], camera: Float[Tensor, "b 7"], *, roll: bool = True
    ) -> Float[Tensor, "b cues 2 i j"]:
        """The heads' numbers (z, s) of every cue on the padded image's half-resolution grid."""
        height, width = pixel_values.shape[-2:]
        pad = (0, -width % self.multiple, 0, -height % self.multiple)
        x = F.pad((pixel_values - self.mean) / self.std, pad, mode="replicate")
        features: list[Tensor] = self.encoder(x.to(self.heads.project.weight.dtype))
        embedding: list[Tensor] = []
        if self.config.uses_embedding:
            size = (x.shape[-2], x.shape[-1])
            half = ground_embedding(camera, size, stride=2, roll=roll).to(features[0].dtype)
            half = half.expand(-1, -1, size[0] // 2, size[1] // 2)
            embedding = ground_pyramid(half, [2**level for level in range(len(features))])
        return self.heads(self.decoder(features, embedding))

    def cues(
        self, pixel_values: Float[Tensor, "b 3 h w"], camera: Float[Tensor, "b 7"], *, roll: bool = True
    ) -> CueDepths:
        """Depth and uncertainty of every cue at half resolution, of the padded image."""
        raw = self.raw(pixel_values, camera, roll=roll)
        with torch.autocast(raw.device.type, enabled=False):
            return cue_depths(raw, camera, pixel_values.shape[-2], self.config, roll=roll)

    def forward(
        self,
        pixel_values: Float[Tensor, "b 3 h w"],
        camera: Float[Tensor, "b 7"],
        labels: Float[Tensor, "b h w"] | None = None,
        *,
        calib_std: Float[Tensor, "b 2"] | None = None,
        fusion: Fusion | None = None,
        roll: bool = True,
        across_ranks: bool = False,
    ) -> Output:
        """Depth and uncertainty of a batch.

        Args:
            pixel_values: (B, 3, H, W) RGB in [0, 1]; H and W at least :attr:`least_size`.
            camera: (B, 7): fx, fy, cx, cy in pixels, height in metres, pitch and roll in radians.
            labels: (B, H, W) metres, 0 = unknown; adds the loss, pooled over the batch.
            calib_std: (B, 2) standard deviations of the camera's height in metres and of the pitch in
                degrees;
                they widen the vertical cue's uncertainty before the fusion.
            fusion: another rule than the configuration's.
            roll: False promises that every roll is 0; a little faster.
            across_ranks: pool the loss over all processes, weighted by their pixels.

        Raises:
            ShapeError: shapes that do not fit, or an image that is too small.
        """
        if (
            not torch.compiler.is_compiling()
        ):  # a size that is looked at becomes a constant of an exported graph
            self._check(pixel_values, camera, labels)
        cues = self.cues(pixel_values, camera, roll=roll)
        with torch.autocast(pixel_values.device.type, enabled=False):
            if calib_std is not None and self.config.cue in ("fusion", "vertical"):
                cues = with_calibration_error(cues, camera, calib_std)
            output = self.assemble(cues, fuse_cues(cues, self.config, fusion), pixel_values.shape[-2:])
            if labels is None:
                return output
            losses = self.loss(output, labels, across_ranks=across_ranks)
            return dataclasses.replace(output, losses=losses)

    def loss(
        self,
        output: Output,
        labels: Float[Tensor, "b h w"],
        *,
        consistency: Tensor | None = None,
        consistency_weight: float = 0.0,
        across_ranks: bool = False,
    ) -> LossOutput:
        """The training loss of an output (section 2.5), with the settings of the configuration."""
        config = self.config
        pairs = {
            "focal": (output.depth_focal, output.log_uncertainty_focal),
            "vertical": (output.depth_vertical, output.log_uncertainty_vertical),
        }
        wanted = ("focal", "vertical") if config.cue == "fusion" else ("focal",)
        return depth_loss(
            output.depth,
            labels[:, None],
            cues=tuple(pairs[name] for name in wanted),
            consistency=consistency,
            uncertainty_weight=config.uncertainty_weight,
            consistency_weight=consistency_weight,
            alpha=config.silog_alpha,
            lam=config.silog_lambda,
            correction=config.correction,
            unc_weighting=config.unc_weighting,
            max_depth=config.max_depth,
            across_ranks=across_ranks,
        )

    def _check(self, pixel_values: Tensor, camera: Tensor, labels: Tensor | None) -> None:
        sizes = check_shape("pixel_values", pixel_values, "batch 3 height width")
        check_shape("camera", camera, "batch 7", batch=sizes["batch"])
        if labels is not None:
            check_shape("labels", labels, "batch height width", **sizes)
        if min(sizes["height"], sizes["width"]) < self.least_size:
            raise ShapeError(
                f"pixel_values has {sizes['height']}x{sizes['width']} pixels, wanted at least "
                f"{self.least_size}x{self.least_size}"
            )

    def assemble(self, cues: CueDepths, fused: Fused, size: Sequence[int]) -> Output:
        """Maps at the image's size ``(height, width)`` from those of the half-resolution grid."""
        height, width = size
        pairs = (fused.depth, fused.total), (cues.focal, cues.vertical), (cues.log_focal, cues.log_vertical)
        maps = torch.cat([*(one for pair in pairs for one in pair), fused.weight_focal], dim=1)
        full = F.interpolate(maps, scale_factor=2.0, mode="bilinear", align_corners=False)
        cut = full[..., :height, :width]
        a, b, c, d, e, f, g = cut.split(1, dim=1)
        return Output(a, b, c, d, e, f, g)

    # Checkpoints

    def parameter_groups(self, lr: float, encoder_scale: float = 1.0) -> list[dict[str, Any]]:
        """Groups for an optimizer; the encoder's learning rate is ``encoder_scale`` times ``lr``."""
        encoder = encoder_parameters(self.encoder)
        known = {id(parameter) for parameter in encoder}
        rest = [parameter for parameter in self.parameters() if id(parameter) not in known]
        return [{"params": rest, "lr": lr}, {"params": encoder, "lr": lr * encoder_scale}]

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> str | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write ``model.safetensors`` and ``config.json``, each whole or not at all, and a card.

        Args:
            save_directory: made if it is not there.
            **options: ``push_to_hub`` and what it takes, as in huggingface_hub.
        """
        return save_model(self, save_directory, options)

    def _save_pretrained(self, save_directory: Path) -> None:
        contract = {name: self.config.to_dict()[name] for name in CONTRACT}
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_tensors(save_directory / WEIGHTS, state, {"gvdepth": json.dumps(contract)})
        self.config.save(save_directory / CONFIG)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: GVDepthConfig | None = None,
        map_location: str | torch.device = "cpu",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> Self:
        """A trained model, in eval mode.

        Args:
            pretrained_model_name_or_path: a folder of :meth:`save_pretrained`, or a name on the hub.
            config: with another fusion rule or other losses; another architecture or parametrization is
                refused.
            map_location: where the weights go.
            revision: of the hub's repository.
            cache_dir: of the hub's files.
            force_download: as in huggingface_hub.
            local_files_only: as in huggingface_hub.
            token: as in huggingface_hub.

        Raises:
            CheckpointError: no such model, broken files, or a configuration that does not fit the weights.
        """
        name = os.fspath(pretrained_model_name_or_path)
        options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
        options |= {"force_download": force_download, "local_files_only": local_files_only}
        stored, weights = (model_file(name, file, **options) for file in (CONFIG, WEIGHTS))
        found = _stored_config(stored, weights)
        found = found if config is None else _agreed(config, found, name)
        with reading(stored, "describes no model", CheckpointError):
            model = cls(found.replace(pretrained=False))
        with reading(weights):
            load_strict(model, load_tensors(weights))
        return model.to(map_location).eval()

    def predict(self, images: Any, cameras: Any, **options: Any) -> Any:
        """Depth of one image or several, with one camera each; see :func:`gvdepth.predict.predict`."""
        from gvdepth.predict import predict

        return predict(self, images, cameras, **options)


def _stored_config(config: Path, weights: Path) -> GVDepthConfig:
    """The configuration in a folder, compared with what the weights say of themselves."""
    try:
        found = GVDepthConfig.load(config)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    _, metadata = read_header(weights)
    with reading(weights, "holds no settings of a gvdepth model", CheckpointError):
        contract = dict(json.loads(metadata["gvdepth"]))
    plain = found.to_dict()
    for name in CONTRACT:
        if contract.get(name) != plain[name]:
            raise CheckpointError(
                f"{weights} was trained with {name}={contract.get(name)!r}, {config.name} says "
                f"{plain[name]!r}"
            )
    return found


def _agreed(wanted: GVDepthConfig, stored: GVDepthConfig, name: str) -> GVDepthConfig:
    """The stored configuration with the changes that a checkpoint allows: the fusion rule and the losses.

    Raises:
        CheckpointError: another architecture or parametrization.
    """
    free = ("fusion", "silog_alpha", "silog_lambda", "correction", "uncertainty_weight", "unc_weighting")
    ours, theirs, plain = wanted.to_dict(), stored.to_dict(), GVDepthConfig().to_dict()
    for field in (f for f in theirs if f not in (*free, "pretrained")):
        if ours[field] not in (theirs[field], None) and not (
            field == "encoder_config" and ours[field] == plain[field]
        ):
            raise CheckpointError(
                f"{name} was made with {field}={theirs[field]!r}, the config given says {ours[field]!r}"
            )
    return stored.replace(**{field: ours[field] for field in free})


def load_model(name: str | os.PathLike[str], device: str | torch.device = "cpu") -> GVDepth:
    """A model by folder, by the name of one that ships (``"tiny"``), or by a name on the hub.

    Args:
        name: ``"tiny"`` or ``"tiny-CUE"`` are the shipped models, trained on simulated streets only.
        device: where it goes.

    Raises:
        CheckpointError: no such model.
    """
    shipped = Path(__file__).parent / "checkpoints"
    text = os.fspath(name)
    if text == "tiny":
        text = "tiny-fusion"
    if not Path(text).is_dir() and (shipped / text / CONFIG).is_file():
        text = str(shipped / text)
    if not text:
        raise InputError("model is '', wanted 'tiny', a folder or a name on the hub")
    return GVDepth.from_pretrained(text).to(device)
