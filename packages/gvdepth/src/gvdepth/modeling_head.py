"""From the heads' numbers to metres: activations, camera, fusion (sections 2.2 to 2.4), always in float32."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from gvdepth.canonical import fct
from gvdepth.config import Fusion, GVDepthConfig
from gvdepth.fusion import Fused, fuse
from gvdepth.propagation import inflate, propagate
from gvdepth.vertical import focal_canonical, vertical_head


@dataclass(frozen=True, slots=True, eq=False)
class CueDepths:
    """Depth and log-uncertainty of each cue; of a single-cue model both are that cue's.

    Args:
        focal: (B, 1, h, w) metres.
        vertical: (B, 1, h, w) metres.
        log_focal: (B, 1, h, w), log of metres.
        log_vertical: (B, 1, h, w), log of metres.
    """

    focal: Tensor
    vertical: Tensor
    log_focal: Tensor
    log_vertical: Tensor


def cue_depths(
    raw: Float[Tensor, "b cues 2 h w"],
    camera: Float[Tensor, "b 7"],
    image_height: int,
    config: GVDepthConfig,
    *,
    roll: bool = True,
    stride: int = 2,
) -> CueDepths:
    """Depth of every cue from the heads' numbers.

    Args:
        raw: (z, s) of every cue; cue order focal, vertical.
        camera: of the current image, angles in radians.
        image_height: H of the current image, before padding, pixels.
        config: parametrization.
        roll: False promises that roll is 0.
        stride: full-resolution pixels per cell.
    """
    z, s = raw[:, :, 0], raw[:, :, 1]
    bound = config.max_log_uncertainty
    s = s.clamp(-bound, bound)
    last = config.cues - 1
    focal = vertical = None
    if config.cue in ("fusion", "focal"):
        focal = fct(focal_canonical(z[:, :1], config.focal_range), camera, f_c=config.f_c)
    if config.cue in ("fusion", "vertical"):
        settings = {"max_depth": config.max_depth}
        if config.vertical_param != "offset":
            settings["extend"] = config.extend
        if config.vertical_param != "bounded":
            settings["softness"] = config.softness
        head = vertical_head(config.vertical_param, **settings)
        vertical = head(z[:, last:], camera, image_height, stride=stride, roll=roll)
    if config.cue == "direct":
        focal = focal_canonical(z, config.focal_range)  # a depth without a camera
    focal = vertical if focal is None else focal
    vertical = focal if vertical is None else vertical
    assert focal is not None
    assert vertical is not None
    return CueDepths(focal, vertical, s[:, :1], s[:, last:])


def with_calibration_error(
    cues: CueDepths, camera: Float[Tensor, "b 7"], calib_std: Float[Tensor, "b 2"]
) -> CueDepths:
    """The cues with the errors of height and pitch added to the vertical one's uncertainty (section 2.4).

    Args:
        cues: of a model whose cue is ``"fusion"`` or ``"vertical"``.
        camera: angles in radians.
        calib_std: standard deviations of the camera's height in metres and of the pitch in degrees.
    """
    height, pitch = calib_std.view(-1, 2, 1, 1, 1).unbind(1)
    std = propagate(cues.vertical, camera, height_std=height, pitch_std_deg=pitch)
    return dataclasses.replace(cues, log_vertical=inflate(cues.log_vertical, std))


def fuse_cues(cues: CueDepths, config: GVDepthConfig, fusion: Fusion | None = None) -> Fused:
    """The fused depth, by the configuration's rule or another; of a single-cue model that cue's."""
    rule = config.fusion if fusion is None else fusion
    if config.cue in ("focal", "direct"):
        rule = "focal"
    elif config.cue == "vertical":
        rule = "vertical"
    return fuse(cues.focal, cues.vertical, cues.log_focal, cues.log_vertical, fusion=rule)
