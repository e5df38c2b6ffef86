"""Galactic dust (section 2.11): what E(B-V) does to fluxes and magnitudes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mantis_photoz.arrays import Array, either_kind
from mantis_photoz.errors import SurveyError
from mantis_photoz.surveys import BANDS, SURVEYS, Survey

__all__ = ["deredden", "dust_coefficients", "extinction"]


def dust_coefficients(
    bands: tuple[str, ...] | list[str] = BANDS, surveys: Any = SURVEYS
) -> tuple[float, ...]:
    """R_b = A_b / E(B-V) of bands, from the survey registry.

    Raises:
        SurveyError: a band is in no survey, or its survey states no R_b.

    Example:
        >>> dust_coefficients(["fuv", "w2"])
        (8.06, 0.113)
    """
    known: dict[str, float] = {}
    entries: list[Survey] = list(surveys.values())
    for survey in entries:
        known |= dict(zip(survey.bands, survey.dust, strict=False))
    missing = [band for band in bands if band not in known]
    if missing:
        raise SurveyError(f"bands {missing} have no R_b, wanted some of {', '.join(known)}")
    return tuple(known[band] for band in bands)


def extinction(ebv: Array, *, coefficients: Any = None) -> Any:
    """A_b in magnitudes: R_b E(B-V).

    Args:
        ebv: (...) E(B-V) in magnitudes.
        coefficients: (bands,) R_b; those of the nine bands in tensor order by default.

    Returns:
        (..., bands).
    """
    chosen = dust_coefficients() if coefficients is None else coefficients

    def found(e: Tensor) -> Tensor:
        return e[..., None] * torch.as_tensor(chosen, dtype=e.dtype, device=e.device)

    return either_kind(found)(ebv)


def deredden(flux: Array, ebv: Array, *, coefficients: Any = None, plane: bool = False) -> Any:
    """Fluxes as they would be without dust: ``f_b 10^(0.4 R_b E)``.

    Args:
        flux: (..., bands), or (..., bands, height, width) with ``plane=True``.
        ebv: (...) E(B-V).
        coefficients: (bands,) R_b; the nine bands in tensor order by default.
        plane: the fluxes are images.

    Returns:
        The same shape and kind. Twice, with E1 and E2, equals once with E1 + E2.

    Example:
        >>> round(deredden(torch.ones(1), torch.tensor(1.0), coefficients=[2.5]).item(), 4)
        10.0
    """
    chosen = dust_coefficients() if coefficients is None else coefficients

    def found(f: Tensor, e: Tensor) -> Tensor:
        factor = torch.pow(10.0, 0.4 * extinction(e.to(f), coefficients=chosen))
        return f * (factor[..., None, None] if plane else factor)

    return either_kind(found)(flux, ebv)
