"""Recalibration of densities on a calibration split (section 2.8): five maps, one interface, one file.

Each map is a frozen dataclass with ``fit(pdf, z_true)`` and ``__call__(pdf)``; the CDF stays monotone from 0
to 1. :func:`save` and :func:`load` keep one, or a chain of them, in a JSON file; the monotone network of
:mod:`mantis_photoz.calpit` keeps its weights in a safetensors file and is loaded by the same :func:`load`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor

from fusion_core.checkpoint import atomic_write
from fusion_core.errors import check_range, reading
from fusion_core.results import dump_json
from mantis_photoz import density
from mantis_photoz.arrays import Array, as_tensor, interpolate, quantile, to_numpy, wide
from mantis_photoz.errors import CheckpointError, ConfigError, DataError
from mantis_photoz.pchip import pchip
from mantis_photoz.pdf import BinnedPDF

__all__ = [
    "Beta",
    "Chain",
    "Conformal",
    "NearestPIT",
    "PITMap",
    "Recalibration",
    "Temperature",
    "fit",
    "load",
    "map_cdf",
    "save",
]

_SCHEMA = "mantis.recalibration/1"


class Recalibration(Protocol):
    """What all maps have in common."""

    kind: ClassVar[str]

    def __call__(self, pdf: BinnedPDF, features: Array | None = None) -> BinnedPDF:
        """The recalibrated densities on the same bins."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        ...


def map_cdf(pdf: BinnedPDF, function: Callable[[Tensor], Tensor]) -> BinnedPDF:
    """Apply a monotone map to the CDF at the edges; masses are its differences.

    Args:
        pdf: the densities.
        function: (batch, edges) CDF to (batch, edges), not decreasing; ends are set to 0 and 1.

    Returns:
        Densities of the same bins and kind.
    """
    steps = function(density.cdf_at_edges(as_tensor(pdf.pmf)))
    steps = (steps - steps[:, :1]) / (steps[:, -1:] - steps[:, :1])
    pmf = steps.diff(dim=-1).clamp(min=0.0)
    return BinnedPDF(pdf.edges, pmf if pdf.is_torch else to_numpy(pmf), pdf.nodes)


def _pits(pdf: BinnedPDF, z_true: Array, least: int = 2) -> Tensor:
    values = as_tensor(pdf.pit(z_true)).detach()
    if len(values) < least:
        raise DataError(f"the calibration split has {len(values)} objects, wanted at least {least}")
    return values


@dataclass(frozen=True, slots=True)
class Temperature:
    """``p_k ** (1 / T)``, normalised over bins as densities; T > 1 widens, T < 1 narrows.

    Example:
        >>> import numpy as np
        >>> pdf = BinnedPDF(np.arange(4.0), np.array([[0.2, 0.6, 0.2]]))
        >>> Temperature(0.5)(pdf).pmf.round(4)
        array([[0.0909, 0.8182, 0.0909]])
    """

    temperature: float
    kind: ClassVar[str] = "temperature"

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, 1e-9)  # far below, logarithms over it overflow

    @classmethod
    def fit(cls, pdf: BinnedPDF, z_true: Array) -> Temperature:
        """Least negative log-density of the truths; the problem is convex in 1 / T.

        Raises:
            DataError: no objects.
        """
        from scipy.optimize import minimize_scalar

        _pits(pdf, z_true, least=1)
        edges, pmf = wide(as_tensor(pdf.edges)), as_tensor(pdf.pmf).detach()
        z = wide(as_tensor(z_true)).to(pmf.device)
        widths = edges.diff()
        logs = (pmf / widths).clamp(min=1e-300).log()
        truth = density.log_density(edges, pmf.clamp(min=1e-300), z)

        def loss(log_inverse: float) -> float:
            inverse = math.exp(log_inverse)
            norm = torch.logsumexp(inverse * logs + widths.log(), -1)
            return float((norm - inverse * truth).mean())

        found: Any = minimize_scalar(loss, bounds=(-4.0, 4.0), method="bounded", options={"xatol": 1e-8})
        return cls(float(math.exp(-found.x)))

    def __call__(self, pdf: BinnedPDF, features: Array | None = None) -> BinnedPDF:  # noqa: ARG002
        """Densities to the power 1 / T; ``features`` are not used."""
        edges, pmf = wide(as_tensor(pdf.edges)), as_tensor(pdf.pmf)
        logs = torch.log(pmf / edges.diff()) / self.temperature + edges.diff().log()
        made = logs.softmax(-1)
        return BinnedPDF(pdf.edges, made if pdf.is_torch else to_numpy(made), pdf.nodes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"temperature": self.temperature}


@dataclass(frozen=True, slots=True)
class PITMap:
    """One map for all objects: the distribution function of the calibration split's PITs.

    Args:
        x: PIT quantiles at the levels ``y``, not decreasing, from 0 to 1.
        y: even levels from 0 to 1.
        smooth: a monotone cubic (PCHIP) through the knots instead of straight lines.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    smooth: bool = False
    kind: ClassVar[str] = "pit"

    def __post_init__(self) -> None:
        pairs = (self.x, self.y)
        if len(self.x) != len(self.y) or len(self.x) < 2:
            raise ConfigError(
                f"x and y have {len(self.x)} and {len(self.y)} knots, wanted equally many, >= 2"
            )
        for name, knots in zip("xy", pairs, strict=True):
            if list(knots) != sorted(knots) or knots[0] != 0 or knots[-1] != 1:
                raise ConfigError(f"{name} runs from {knots[0]:g} to {knots[-1]:g}, wanted 0 to 1, rising")

    @classmethod
    def fit(cls, pdf: BinnedPDF, z_true: Array, *, knots: int = 21, smooth: bool = False) -> PITMap:
        """Knots at even levels: the PIT's quantiles there, the ends set to 0 and 1."""
        check_range("knots", knots, 2, 100_000)
        pits = _pits(pdf, z_true)
        levels = torch.linspace(0, 1, knots, dtype=pits.dtype, device=pits.device)
        x = quantile(pits, levels)
        x[0], x[-1] = 0.0, 1.0
        return cls(tuple(x.tolist()), tuple(levels.tolist()), smooth)

    def __call__(self, pdf: BinnedPDF, features: Array | None = None) -> BinnedPDF:  # noqa: ARG002
        """Map the CDF at the edges; ``features`` are not used."""

        def mapped(steps: Tensor) -> Tensor:
            x, y = (torch.tensor(v, dtype=steps.dtype, device=steps.device) for v in (self.x, self.y))
            if not self.smooth:
                return interpolate(steps, x, y)
            keep = torch.cat([x.new_ones(1, dtype=torch.bool), x.diff() > 1e-9])
            return pchip(steps, x[keep], torch.cat([y[keep][:-1], y[-1:]])).clamp(0, 1)

        return map_cdf(pdf, mapped)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"x": list(self.x), "y": list(self.y), "smooth": self.smooth}


@dataclass(frozen=True, slots=True)
class Beta:
    """Beta calibration of the CDF: ``sigmoid(a ln c - b ln(1 - c) + shift)`` with a, b > 0."""

    a: float
    b: float
    shift: float
    kind: ClassVar[str] = "beta"

    def __post_init__(self) -> None:
        check_range("a", self.a, 0.0, math.inf, open=True)
        check_range("b", self.b, 0.0, math.inf, open=True)

    @classmethod
    def fit(cls, pdf: BinnedPDF, z_true: Array) -> Beta:
        """Most likely: the mapped PITs' density is as near to uniform as the family allows."""
        pits = _pits(pdf, z_true).clamp(1e-6, 1 - 1e-6).cpu()
        raw = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        log_c, log_d = pits.log(), torch.log1p(-pits)
        optimizer = torch.optim.LBFGS([raw], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

        def closure() -> Tensor:
            optimizer.zero_grad()
            a, b, shift = raw[0].exp(), raw[1].exp(), raw[2]
            t = a * log_c - b * log_d + shift
            slope = (a / pits + b / (1 - pits)).log()
            sigmoid = torch.nn.functional.logsigmoid
            loss = -(sigmoid(t) + sigmoid(-t) + slope).mean()
            loss.backward()
            return loss

        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
        a, b, shift = raw.detach().tolist()
        return cls(math.exp(a), math.exp(b), shift)

    def __call__(self, pdf: BinnedPDF, features: Array | None = None) -> BinnedPDF:  # noqa: ARG002
        """Map the CDF at the edges; ``features`` are not used."""

        def mapped(steps: Tensor) -> Tensor:
            inner = steps.clamp(1e-300, 1.0)
            rest = (1 - steps).clamp(1e-300, 1.0)
            found = torch.sigmoid(self.a * inner.log() - self.b * rest.log() + self.shift)
            found = torch.where(steps <= 0, torch.zeros_like(found), found)
            return torch.where(steps >= 1, torch.ones_like(found), found)

        return map_cdf(pdf, mapped)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"a": self.a, "b": self.b, "shift": self.shift}


@dataclass(frozen=True, slots=True, eq=False)
class NearestPIT:
    """Local recalibration: the PITs of the k nearest calibration objects in feature space.

    Args:
        features: (n, features) of the calibration split, standardised.
        pits: (n,) of it.
        center: (features,) subtracted from features.
        scale: (features,) they are divided by.
        neighbours: k.
        source: where ``estimate`` takes the features from: ``"photometric"``, ``"hidden"``, or None, which
            decides by their number.
    """

    features: Tensor
    pits: Tensor
    center: Tensor
    scale: Tensor
    neighbours: int = 200
    source: str | None = None
    kind: ClassVar[str] = "nearest"

    @classmethod
    def fit(
        cls,
        pdf: BinnedPDF,
        z_true: Array,
        features: Array,
        *,
        neighbours: int = 200,
        source: str | None = None,
    ) -> NearestPIT:
        """Remember the split.

        Raises:
            DataError: fewer objects than neighbours, or other features.
        """
        check_range("neighbours", neighbours, 2, 10**7)
        pits = _pits(pdf, z_true, least=neighbours)
        x = wide(as_tensor(features, "features"))
        if x.ndim != 2 or len(x) != len(pits) or not bool(torch.isfinite(x).all()):
            raise DataError(f"features have shape {tuple(x.shape)}, wanted finite ({len(pits)}, features)")
        center, scale = x.mean(0), x.std(0, correction=0).clamp(min=1e-12)
        return cls((x - center) / scale, pits, center, scale, neighbours, source)

    def __call__(self, pdf: BinnedPDF, features: Array | None = None) -> BinnedPDF:
        """Each object's CDF through the distribution of its neighbours' PITs.

        Raises:
            DataError: no features, or not one row per object.
        """
        x = None if features is None else wide(as_tensor(features, "features"))
        if x is None or x.shape != (len(pdf), self.features.shape[1]):
            got = None if x is None else tuple(x.shape)
            raise DataError(f"features are {got}, wanted ({len(pdf)}, {self.features.shape[1]})")

        def mapped(steps: Tensor) -> Tensor:
            away = torch.cdist((x - self.center) / self.scale, self.features)
            near = away.topk(self.neighbours, largest=False).indices
            local = self.pits[near].sort(-1).values
            ends = torch.zeros_like(local[:, :1])
            knots = torch.cat([ends, local, ends + 1], -1)
            levels = torch.arange(self.neighbours + 2, dtype=knots.dtype) / (self.neighbours + 1)
            return interpolate(steps, knots, levels.to(knots.device).expand_as(knots))

        return map_cdf(pdf, mapped)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        parts = {name: getattr(self, name).tolist() for name in ("features", "pits", "center", "scale")}
        return parts | {"neighbours": self.neighbours, "source": self.source}


@dataclass(frozen=True, slots=True)
class Conformal:
    """Central intervals with finite-sample coverage: levels are raised by the split's scores ``|2 PIT - 1|``.

    Args:
        scores: sorted scores of the calibration split.
    """

    scores: tuple[float, ...]
    kind: ClassVar[str] = "conformal"

    @classmethod
    def fit(cls, pdf: BinnedPDF, z_true: Array) -> Conformal:
        """Scores of the calibration split."""
        scores = (2 * _pits(pdf, z_true, least=1) - 1).abs().sort().values
        return cls(tuple(scores.tolist()))

    def level(self, level: float) -> float:
        """The nominal level whose central interval covers ``level`` of new objects, at least."""
        check_range("level", level, 0.0, 1.0, open=True)
        count = len(self.scores)
        rank = math.ceil((count + 1) * level)
        return 1.0 if rank > count else self.scores[rank - 1]

    def intervals(self, pdf: BinnedPDF, level: float = 0.68) -> Any:
        """(batch, 2) ends; the whole support where the split is too small for the level."""
        found = self.level(level)
        return pdf.ppf([(1 - found) / 2, (1 + found) / 2])

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"scores": list(self.scores)}


@dataclass(frozen=True, slots=True)
class Chain:
    """Maps one after the other, each fitted on what the one before left."""

    maps: tuple[Any, ...]
    kind: ClassVar[str] = "chain"

    def __call__(self, pdf: BinnedPDF, features: Array | None = None) -> BinnedPDF:
        """Apply all."""
        for entry in self.maps:
            pdf = entry(pdf, features)
        return pdf

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"maps": [{"kind": entry.kind, **entry.to_dict()} for entry in self.maps]}


_KINDS: Mapping[str, Any] = {
    entry.kind: entry for entry in (Temperature, PITMap, Beta, NearestPIT, Conformal, Chain)
}


def fit(
    pdf: BinnedPDF, z_true: Array, kinds: Sequence[str] = ("temperature", "pit"), **settings: Any
) -> Chain:
    """Fit maps in turn.

    Args:
        pdf: densities of the calibration split.
        z_true: its redshifts.
        kinds: of ``temperature``, ``pit``, ``beta``, ``nearest``.
        **settings: by kind, such as ``pit={"knots": 41}`` or ``nearest={"features": x}``.

    Raises:
        ConfigError: an unknown kind.
    """
    maps: list[Any] = []
    for kind in kinds:
        if kind not in ("temperature", "pit", "beta", "nearest"):
            raise ConfigError(f"kind is {kind!r}, wanted temperature, pit, beta or nearest")
        options = cast("dict[str, Any]", settings.get(kind, {}))
        made = _KINDS[kind].fit(pdf, z_true, **options)
        maps.append(made)
        pdf = made(pdf, options.get("features"))
    return Chain(tuple(maps))


def save(recalibration: Any, path: str | os.PathLike[str], **facts: Any) -> None:
    """Write a map to a JSON file, with facts about the split it was fitted on."""
    entry = {"schema": _SCHEMA, "kind": recalibration.kind, **recalibration.to_dict(), "facts": facts}
    with atomic_write(path, "w") as file:
        file.write(dump_json(entry))


def load(path: str | os.PathLike[str]) -> Any:
    """Read what :func:`save`, or :meth:`mantis_photoz.calpit.CalPIT.save`, wrote.

    Raises:
        CheckpointError: missing, cut off, or no recalibration.
    """
    place = Path(path)
    if place.suffix == ".safetensors":
        from mantis_photoz.calpit import CalPIT

        return CalPIT.load(place)
    with reading(f"recalibration {place}", error=CheckpointError):
        entry = json.loads(place.read_text(encoding="utf-8"))
        if entry.get("schema") != _SCHEMA:
            raise CheckpointError(f"schema is {entry.get('schema')!r}, wanted {_SCHEMA!r}")
        entry.pop("facts", None)
        entry.pop("schema")
        return _from_dict(entry)


def _from_dict(entry: dict[str, Any]) -> Any:
    kind = entry.pop("kind")
    if kind not in _KINDS:
        raise ValueError(f"kind is {kind!r}, wanted {', '.join(_KINDS)}")
    if kind == "chain":
        return Chain(tuple(_from_dict(part) for part in entry["maps"]))
    if kind == "nearest":
        names = ("features", "pits", "center", "scale")
        parts = {name: torch.tensor(entry.pop(name), dtype=torch.float64) for name in names}
        return NearestPIT(**parts, **entry)
    return _KINDS[kind](**{name: tuple(v) if isinstance(v, list) else v for name, v in entry.items()})
