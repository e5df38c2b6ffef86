"""The doctor: whether the camera's pitch, roll and height are right (section 5.6).

Per frame a plane is fitted to the road in INVERSE depth, where a plane is exactly linear in the pixel:
``1/D = a u + b v + c`` with ``(a fx, b fy, a cx + b cy + c) = n / h``. The depth must not know the pitch:
give measured depth, or a model's focal depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion_core.errors import ConfigError, DataError, ShapeError
from fusion_core.report import Report
from fusion_core.results import plain
from fusion_core.stats import Interval
from gvdepth.calibration import as_array, paired_with_cameras
from gvdepth.camera import Camera
from gvdepth.errors import CalibrationError
from gvdepth.plane import attitude_of_normal
from gvdepth.resampling import bootstrap

__all__ = ["Diagnosis", "PlaneFit", "doctor", "fit_inverse_plane"]

_HUBER = 1.345  # 95 % efficient for normal errors
_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class PlaneFit:
    """What one frame says of its camera: metres and degrees, and how many pixels said it."""

    camera_height: float
    pitch_deg: float
    roll_deg: float
    pixels: int


@dataclass(frozen=True, kw_only=True)
class Diagnosis(Report):
    """The doctor's report.

    Attributes:
        pitch_bias_deg: median of (pitch seen - pitch given) with its 95 % interval, degrees.
        roll_bias_deg: the same for roll.
        height_ratio: median of (height seen / height given); for a model's depth, a check of its scale.
        frames: given.
        used: with enough road.
        healthy: True, False, or None where there are too few frames to tell.
        verdict: in words.
    """

    pitch_bias_deg: Interval = field(default_factory=lambda: Interval(math.nan, math.nan, math.nan))
    roll_bias_deg: Interval = field(default_factory=lambda: Interval(math.nan, math.nan, math.nan))
    height_ratio: Interval = field(default_factory=lambda: Interval(math.nan, math.nan, math.nan))
    frames: int = 0
    used: int = 0
    healthy: bool | None = None
    verdict: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The report's document with the doctor's numbers."""
        names = ("pitch_bias_deg", "roll_bias_deg", "height_ratio", "frames", "used", "healthy", "verdict")
        return super().to_dict() | {name: plain(getattr(self, name)) for name in names}


def fit_inverse_plane(
    depth: NDArray[Any],
    camera: Camera,
    *,
    uncertainty: NDArray[Any] | None = None,
    band: float = 0.3,
    depth_range: tuple[float, float] = (4.0, 25.0),
    minimum_pixels: int = 500,
    iterations: int = 5,
) -> PlaneFit | None:
    """Fit the road of one frame in inverse depth, by IRLS with Huber's weights.

    The candidates are the pixels within ``band`` of the prior plane; they are chosen again around the plane
    that was found, so that a prior that is wrong by degrees still leads to the road.

    Args:
        depth: (height, width) metres.
        camera: with the prior height and attitude.
        uncertainty: (height, width) metres; weights are 1/uncertainty^2.
        band: metres above or below the plane.
        depth_range: metres.
        minimum_pixels: candidates that it takes.
        iterations: of the reweighting.

    Returns:
        The fit, or None where there is too little road.
    """
    numbers = camera.normal / camera.require_height()
    with np.errstate(invalid="ignore", divide="ignore"):
        inside = np.isfinite(depth) & (depth > depth_range[0]) & (depth < depth_range[1])
        if uncertainty is not None:
            inside &= np.isfinite(uncertainty) & (uncertainty > 0)
    rows, columns = np.nonzero(inside)
    z = depth[rows, columns].astype(np.float64)
    rays = np.stack([(columns - camera.cx) / camera.fx, (rows - camera.cy) / camera.fy, np.ones(len(z))], 1)
    weights = np.ones(len(z))
    if uncertainty is not None:
        weights = 1.0 / uncertainty[rows, columns].astype(np.float64) ** 2
        weights /= weights.max(initial=1e-300)
    kept: NDArray[np.bool_] | None = None
    for _ in range(_ROUNDS):
        length = float(np.linalg.norm(numbers))
        down = rays @ numbers
        # (1/D - down) D / |n/h|: the distance of the point from the plane.
        near = (down > 0) & (np.abs(1.0 - down * z) / length < band)
        if np.count_nonzero(near) < minimum_pixels:
            return None
        if kept is not None and (near == kept).all():
            break
        kept = near
        found = _huber(rays[near], 1.0 / z[near], weights[near], iterations)
        if found is None:
            return None
        numbers = found
    length = float(np.linalg.norm(numbers))
    pixels = int(np.count_nonzero(kept)) if kept is not None else 0
    return PlaneFit(1.0 / length, *attitude_of_normal(numbers / length), pixels)


def _huber(
    rays: NDArray[Any], inverse: NDArray[Any], weights: NDArray[Any], iterations: int
) -> NDArray[Any] | None:
    robust = np.ones(len(inverse))
    numbers: NDArray[Any] | None = None
    for _ in range(iterations):
        weighted = rays * (weights * robust)[:, None]
        normal = rays.T @ weighted
        if np.linalg.cond(normal) > 1e13:
            return None
        numbers = np.linalg.solve(normal, weighted.T @ inverse)
        residual = np.abs(inverse - rays @ numbers)
        scale = float(np.median(residual)) / 0.6745
        if scale < 1e-12:
            break
        robust = np.minimum(1.0, _HUBER * scale / np.maximum(residual, 1e-300))
    return numbers


def doctor(
    depths: Sequence[Any],
    camera: Camera | Sequence[Camera],
    *,
    model: Any = None,
    uncertainties: Sequence[Any] | None = None,
    band: float = 0.3,
    depth_range: tuple[float, float] = (4.0, 25.0),
    minimum_pixels: int = 500,
    minimum_frames: int = 30,
    pitch_limit_deg: float = 0.3,
    height_limit: float = 0.05,
    resamples: int = 1000,
    seed: int = 0,
) -> Diagnosis:
    """Compare the road that depth maps show with the camera given ("your pitch looks 0.8 degrees wrong").

    Args:
        depths: depth maps (height, width), metres, that do not depend on the pitch; with ``model``, images.
        camera: one, or one per frame.
        model: with ``predict(image, camera)``, whose FOCAL depth and its uncertainty are used.
        uncertainties: (height, width) metres, one per map.
        band: see :func:`fit_inverse_plane`.
        depth_range: see :func:`fit_inverse_plane`.
        minimum_pixels: see :func:`fit_inverse_plane`.
        minimum_frames: with road; below it there is no verdict.
        pitch_limit_deg: a larger bias is a finding, degrees.
        height_limit: a larger deviation of the height's ratio from 1 is a finding.
        resamples: of the bootstrap intervals.
        seed: of the bootstrap.

    Returns:
        The report: biases with intervals, verdict, and one row per frame.

    Raises:
        CalibrationError: no frame shows enough road.
        ShapeError: maps, uncertainties and cameras do not fit each other.
        DataError: no maps, or a model without a focal depth.
    """
    if not 0 <= depth_range[0] < depth_range[1] or not band > 0:
        raise ConfigError(
            f"band is {band!r}, depth_range {depth_range!r}; wanted metres, the range increasing"
        )
    if model is not None:
        if uncertainties is not None:
            raise ConfigError("uncertainties come from the model; give one of the two")
        depths, uncertainties = _focal(model, list(depths), camera)
    if uncertainties is not None and len(uncertainties) != len(depths):
        raise ShapeError(f"{len(uncertainties)} uncertainties for {len(depths)} maps, wanted one per map")
    fits: list[tuple[int, Camera, PlaneFit]] = []
    pairs = paired_with_cameras(depths, camera)
    for i, (depth, one) in enumerate(pairs):
        given = None if uncertainties is None else as_array(uncertainties[i]).reshape(depth.shape)
        found = fit_inverse_plane(
            depth,
            one,
            uncertainty=given,
            band=band,
            depth_range=depth_range,
            minimum_pixels=minimum_pixels,
        )
        if found is not None:
            fits.append((i, one, found))
    if not fits:
        raise CalibrationError(
            f"none of {len(pairs)} frames has {minimum_pixels} road pixels within {band:g} m of the expected "
            f"road at {depth_range[0]:g} to {depth_range[1]:g} m; the camera's numbers may be far off: try "
            "calibrate"
        )
    rows = [
        {
            "frame": i,
            "pixels": fit.pixels,
            "camera_height": fit.camera_height,
            "pitch_deg": fit.pitch_deg,
            "roll_deg": fit.roll_deg,
            "pitch_bias_deg": fit.pitch_deg - one.pitch_deg,
            "roll_bias_deg": fit.roll_deg - one.roll_deg,
            "height_ratio": fit.camera_height / one.require_height(),
        }
        for i, one, fit in fits
    ]
    names = ("pitch_bias_deg", "roll_bias_deg", "height_ratio")
    pitch, roll, ratio = (
        bootstrap(np.array([row[name] for row in rows]), statistic="median", resamples=resamples, seed=seed)
        for name in names
    )
    healthy, verdict = _verdict(pitch, ratio, len(fits), minimum_frames, pitch_limit_deg, height_limit)
    return Diagnosis(
        title="Camera check",
        rows=rows,
        pitch_bias_deg=pitch,
        roll_bias_deg=roll,
        height_ratio=ratio,
        frames=len(pairs),
        used=len(fits),
        healthy=healthy,
        verdict=verdict,
    )


def _verdict(
    pitch: Interval, ratio: Interval, used: int, needed: int, pitch_limit: float, height_limit: float
) -> tuple[bool | None, str]:
    seen = (
        f"pitch {pitch.value:+.2f} degrees [{pitch.low:+.2f}, {pitch.high:+.2f}] from what is given, height "
        f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] of what is given, over {used} frames"
    )
    if used < needed:
        return None, f"No verdict: {used} frames show enough road, {needed} are needed. So far: {seen}."
    findings: list[str] = []
    if abs(pitch.value) > pitch_limit:
        way = "up" if pitch.value > 0 else "down"
        findings.append(
            f"the camera looks {abs(pitch.value):.2f} degrees further {way} than its pitch_deg says"
        )
    if abs(ratio.value - 1.0) > height_limit:
        findings.append(
            f"the camera stands at {ratio.value:.3f} times its camera_height (or the depth is off)"
        )
    if findings:
        return False, f"Your camera's numbers look wrong: {'; '.join(findings)}. Seen: {seen}."
    return True, f"Your camera's numbers look right: {seen}."


def _focal(
    model: Any, images: list[Any], camera: Camera | Sequence[Camera]
) -> tuple[list[Any], list[Any] | None]:
    predict: Callable[..., Any] = model.predict if hasattr(model, "predict") else model
    cameras = [camera] * len(images) if isinstance(camera, Camera) else list(camera)
    if len(cameras) != len(images):
        raise ShapeError(f"{len(cameras)} cameras for {len(images)} images, wanted one, or one per image")
    outputs = [predict(image, one) for image, one in zip(images, cameras, strict=True)]
    depths = [getattr(output, "depth_focal", None) for output in outputs]
    if any(depth is None for depth in depths):
        raise DataError(
            "the model gives no depth_focal; the doctor needs a depth that does not know the pitch"
        )
    spread = [getattr(output, "uncertainty_focal", None) for output in outputs]
    return depths, None if any(one is None for one in spread) else spread
