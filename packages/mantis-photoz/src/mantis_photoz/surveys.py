"""Surveys as data: bands, pixel scale, scaling, dust and point-spread function; adding one takes no code.

The three of the paper stand in :data:`SURVEYS`; :func:`load_surveys` reads others from YAML, TOML or JSON.
The order of the bands is the order of the planes of a tensor: the Legacy viewer serves GALEX as NUV, FUV.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from fusion_core.errors import check_range, reading
from mantis_photoz.errors import SurveyError

__all__ = ["BANDS", "PLAYERS", "PS1_SOUTH", "SURVEYS", "Scaling", "Survey", "load_surveys", "select_surveys"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """How pixels become network inputs (section 2.2).

    Args:
        kind: ``"clip"`` = clip(a / scale, 0, 1); ``"asinh"`` = max(m, asinh(alpha q (a - m)) / q).
        scale: of ``"clip"``, > 0.
        alpha: of ``"asinh"``, > 0.
        q: of ``"asinh"``, > 0.
        m: zero point and floor of ``"asinh"``.
    """

    kind: Literal["clip", "asinh"] = "asinh"
    scale: float = 0.05
    alpha: float = 0.1
    q: float = 6.0
    m: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("clip", "asinh"):
            raise SurveyError(f"scaling kind is {self.kind!r}, wanted 'clip' or 'asinh'")
        for name in ("scale", "alpha", "q"):
            check_range(name, getattr(self, name), 0.0, float("inf"), open=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """One imaging survey.

    Args:
        name: short, lower case; the middle part of ``{id}.{name}.fits``.
        bands: in the order of the planes.
        pixel_scale: arc seconds per pixel, > 0.
        pixels: width and height of a cutout.
        crop: centre pixels that the paper's view takes; ``pixels`` by default.
        scaling: of the pixels.
        dust: R_b, extinction per E(B-V), one per band (section 2.11).
        psf_fwhm: full width at half maximum in arc seconds, one per band.
        zero_point: AB or Vega magnitude of one unit of flux.
        unit: of the pixels as they are served.
        url: template with ``{ra} {dec} {size} {pixscale}``, empty where a table has to be asked first.

    Raises:
        SurveyError: numbers of bands, R_b and widths differ, or a size is out of range.

    Example:
        >>> SURVEYS["ps1"].field_arcsec
        42.5
    """

    name: str
    bands: tuple[str, ...]
    pixel_scale: float
    pixels: int
    crop: int = 0
    scaling: Scaling = field(default_factory=Scaling)
    dust: tuple[float, ...] = ()
    psf_fwhm: tuple[float, ...] = ()
    zero_point: float = 22.5
    unit: str = ""
    url: str = ""

    def __post_init__(self) -> None:
        if not self.name or not self.bands:
            raise SurveyError(f"survey is {self.name!r} with bands {self.bands}, wanted a name and a band")
        if len(set(self.bands)) != len(self.bands):
            raise SurveyError(f"bands of {self.name} are {self.bands}, wanted each once")
        check_range(f"pixel_scale of {self.name}", self.pixel_scale, 0.0, float("inf"), open=True)
        check_range(f"pixels of {self.name}", self.pixels, 1, 100_000)
        if not self.crop:
            object.__setattr__(self, "crop", self.pixels)
        check_range(f"crop of {self.name}", self.crop, 1, self.pixels)
        for name in ("dust", "psf_fwhm"):
            values = getattr(self, name)
            if values and len(values) != len(self.bands):
                raise SurveyError(
                    f"{name} of {self.name} has {len(values)} numbers, wanted one for each of {self.bands}"
                )

    @property
    def field_arcsec(self) -> float:
        """Width of a cutout on the sky, arc seconds."""
        return self.pixels * self.pixel_scale

    def replace(self, **changes: Any) -> Survey:
        """A copy with other values, such as ``SURVEYS["unwise"].replace(pixel_scale=1.5)`` (bug B4)."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as :meth:`from_dict` takes them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Survey:
        """A survey of plain values.

        Raises:
            SurveyError: unknown or missing names, or values of the wrong type.
        """
        known = {entry.name for entry in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise SurveyError(f"survey has unknown entries {unknown}, wanted some of {sorted(known)}")
        plain = dict(values)
        try:
            for name in ("bands", "dust", "psf_fwhm"):
                if name in plain:
                    plain[name] = tuple(plain[name])
            if isinstance(plain.get("scaling"), Mapping):
                plain["scaling"] = Scaling(**plain["scaling"])
            return cls(**plain)
        except TypeError as error:
            raise SurveyError(f"survey {values.get('name', '?')!r} cannot be read: {error}") from error


_VIEWER = (
    "https://www.legacysurvey.org/viewer/fits-cutout?ra={ra}&dec={dec}&size={size}&pixscale={pixscale}&layer="
)

SURVEYS: Mapping[str, Survey] = MappingProxyType(
    {
        survey.name: survey
        for survey in (
            Survey(
                name="galex",
                bands=("nuv", "fuv"),
                pixel_scale=1.5,
                pixels=32,
                crop=22,
                scaling=Scaling(kind="clip", scale=0.05),
                dust=(7.95, 8.06),
                psf_fwhm=(5.3, 4.2),
                unit="count / s",
                zero_point=20.08,
                url=_VIEWER + "galex",
            ),
            Survey(
                name="ps1",
                bands=("g", "r", "i", "z", "y"),
                pixel_scale=0.25,
                pixels=170,
                crop=120,
                scaling=Scaling(alpha=0.01, q=8.0),
                dust=(3.172, 2.271, 1.682, 1.322, 1.087),
                psf_fwhm=(1.31, 1.19, 1.11, 1.07, 1.02),
                zero_point=25.0,
                unit="count",
            ),
            Survey(
                name="unwise",
                bands=("w1", "w2"),
                pixel_scale=2.75,
                pixels=32,
                crop=22,
                scaling=Scaling(alpha=0.1, q=6.0),
                dust=(0.184, 0.113),
                psf_fwhm=(6.1, 6.4),
                unit="nanomaggy (Vega)",
                url=_VIEWER + "unwise-neo7",
            ),
        )
    }
)
"""The paper's surveys by name, in the order of the channels of the early stack."""

PS1_SOUTH = -30.0
"""Declination in degrees where the Pan-STARRS1 3pi footprint ends."""

BANDS: tuple[str, ...] = tuple(band for survey in SURVEYS.values() for band in survey.bands)
"""The nine bands in tensor order: nuv, fuv, g, r, i, z, y, w1, w2."""

PLAYERS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {name: tuple(BANDS.index(band) for band in survey.bands) for name, survey in SURVEYS.items()}
)
"""The channels of each survey in the early stack."""


def select_surveys(names: str | Sequence[str], surveys: Mapping[str, Survey] = SURVEYS) -> dict[str, Survey]:
    """The surveys of these names, in the registry's order.

    Args:
        names: a sequence, or one string with commas.
        surveys: the registry.

    Raises:
        SurveyError: a name is unknown, or there is none.

    Example:
        >>> list(select_surveys("unwise,ps1"))
        ['ps1', 'unwise']
    """
    wanted = [part.strip() for part in names.split(",")] if isinstance(names, str) else list(names)
    unknown = [name for name in wanted if name not in surveys]
    if unknown or not wanted:
        raise SurveyError(f"surveys are {wanted}, wanted some of {', '.join(surveys)}")
    return {name: survey for name, survey in surveys.items() if name in wanted}


def load_surveys(path: str | os.PathLike[str]) -> dict[str, Survey]:
    """Read surveys from a ``.yaml``, ``.toml`` or ``.json`` file and put them after the paper's.

    The file maps each name to the survey's entries; a name of the paper's replaces that survey.

    Raises:
        SurveyError: the file cannot be read or describes no survey.
    """
    file = Path(path)
    with reading(f"surveys file {file}", error=SurveyError):
        parsed = _parse(file.read_text(encoding="utf-8"), file.suffix.lower())
    if not isinstance(parsed, Mapping) or not all(isinstance(entry, Mapping) for entry in parsed.values()):
        raise SurveyError(f"surveys file {file} holds no mapping of names to surveys")
    return {**SURVEYS, **{str(n): Survey.from_dict({"name": str(n), **entry}) for n, entry in parsed.items()}}


def _parse(text: str, suffix: str) -> Any:
    if suffix in (".yaml", ".yml"):
        import yaml

        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error
    if suffix == ".toml":
        import tomllib

        return tomllib.loads(text)
    if suffix == ".json":
        import json

        return json.loads(text)
    raise ValueError(f"suffix is {suffix!r}, wanted .yaml, .toml or .json")
