"""Which pixels a model looks at (section 2.10): gradient x input, integrated and expected gradients.

A model here is any function of one tensor of planes that gives one number per object, such as the mean
redshift; :func:`mantis_photoz.shapley.mm_shares` sums a map over the channels of each survey.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_core.errors import check_range
from mantis_photoz.errors import ShapeError

__all__ = [
    "BAND_EDGES",
    "FEATURES_AT_REST",
    "aperture_pixels",
    "expected_gradients",
    "gradient_times_input",
    "integrated_gradients",
    "observed_features",
    "scramble_pixels",
]

Model = Callable[[Tensor], Tensor]

FEATURES_AT_REST: Mapping[str, float] = {"Lyman break": 912.0, "4000 A break": 4000.0, "1.6 um bump": 16000.0}
"""Rest wavelengths in angstrom of what moves through the bands."""

BAND_EDGES: Mapping[str, tuple[float, float]] = {
    "fuv": (1344, 1786),
    "nuv": (1771, 2831),
    "g": (3940, 5593),
    "r": (5386, 7036),
    "i": (6780, 8304),
    "z": (8028, 9346),
    "y": (9100, 10838),
    "w1": (27540, 38724),
    "w2": (39633, 53413),
}


def observed_features(z: float) -> dict[str, str]:
    """The band that each rest-frame feature falls in at a redshift, empty where none.

    Example:
        >>> observed_features(0.2)["4000 A break"]
        'g'
    """
    check_range("z", z, 0.0, 20.0)
    found: dict[str, str] = {}
    for name, rest in FEATURES_AT_REST.items():
        seen = rest * (1 + z)
        bands = [band for band, (low, high) in BAND_EDGES.items() if low <= seen <= high]
        found[name] = bands[0] if bands else ""
    return found


def _gradient(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        value = model(x)
        if value.shape != x.shape[:1]:
            raise ShapeError(
                f"model gives {tuple(value.shape)}, wanted one number per object, {tuple(x.shape[:1])}"
            )
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return gradient, value.detach()


def gradient_times_input(
    model: Model, planes: Float[Tensor, "batch channels h w"]
) -> Float[Tensor, "batch channels h w"]:
    """``a = x df/dx``; equal to integrated gradients for a linear model.

    Raises:
        ShapeError: the model does not give one number per object.
    """
    return _gradient(model, planes)[0] * planes


def integrated_gradients(
    model: Model,
    planes: Float[Tensor, "batch channels h w"],
    *,
    baseline: Tensor | None = None,
    steps: int = 32,
) -> Float[Tensor, "batch channels h w"]:
    """Mean gradient on the straight way from a baseline, times the way (Sundararajan et al. 2017).

    Args:
        model: see the module.
        planes: (batch, channels, height, width).
        baseline: broadcast to the planes; zeros by default.
        steps: midpoints of the way.

    Returns:
        Maps whose sum is about ``model(planes) - model(baseline)``, the nearer the more steps.
    """
    check_range("steps", steps, 1, 100_000)
    start = torch.zeros_like(planes) if baseline is None else baseline.to(planes).expand_as(planes)
    way = planes - start
    total = torch.zeros_like(planes)
    for step in range(steps):  # one batch at a time: memory does not grow with the steps
        total += _gradient(model, start + (step + 0.5) / steps * way)[0]
    return total / steps * way


def expected_gradients(
    model: Model,
    planes: Float[Tensor, "batch channels h w"],
    background: Float[Tensor, "others channels h w"],
    *,
    samples: int = 32,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch channels h w"]:
    """Integrated gradients averaged over drawn baselines and places: an estimate of SHAP values.

    Args:
        model: see the module.
        planes: (batch, channels, height, width).
        background: other objects, from which the baselines are drawn.
        samples: draws per object.
        generator: of the draws, on the CPU.
    """
    check_range("samples", samples, 1, 1_000_000)
    if background.shape[1:] != planes.shape[1:] or not len(background):
        raise ShapeError(
            f"background has shape {tuple(background.shape)}, wanted (others, *{tuple(planes.shape[1:])})"
        )
    total = torch.zeros_like(planes)
    for _ in range(samples):
        rows = torch.randint(len(background), (len(planes),), generator=generator)
        share = torch.rand(len(planes), 1, 1, 1, generator=generator).to(planes)
        start = background[rows.to(background.device)].to(planes)
        way = planes - start
        total += _gradient(model, start + share * way)[0] * way
    return total / samples


def aperture_pixels(
    planes: Float[Tensor, "batch channels h w"], radius: float
) -> Float[Tensor, "batch channels h w"]:
    """Set the pixels outside of a circle to zero: colours of the source stay, its neighbours go.

    Args:
        planes: (batch, channels, height, width).
        radius: in pixels about the centre.
    """
    return torch.where(_inside(planes, radius), planes, torch.zeros_like(planes))


def _inside(planes: Tensor, radius: float) -> Tensor:
    check_range("radius", radius, 0.0, 1e6, open=True)
    height, width = planes.shape[-2:]
    y = torch.arange(height, device=planes.device)[:, None] - (height - 1) / 2
    x = torch.arange(width, device=planes.device) - (width - 1) / 2
    return y.square() + x.square() <= radius**2


def scramble_pixels(
    planes: Float[Tensor, "batch channels h w"], radius: float, *, generator: torch.Generator | None = None
) -> Float[Tensor, "batch channels h w"]:
    """Shuffle the pixels inside a circle, the same way in all channels: colours stay, morphology goes.

    Args:
        planes: (batch, channels, height, width).
        radius: in pixels about the centre.
        generator: of the shuffle, on the CPU.
    """
    inside = _inside(planes, radius).cpu().flatten().nonzero()[:, 0]
    order = inside[torch.randperm(len(inside), generator=generator)]
    flat = planes.flatten(-2).clone()
    flat[..., inside.to(planes.device)] = planes.flatten(-2)[..., order.to(planes.device)]
    return flat.reshape(planes.shape)
