"""Mantis Shrimp: calibrated redshift densities of galaxies from the images of several surveys.

Names load their module on first use, so ``import mantis_photoz`` costs little more than PyTorch; densities
and metrics need neither astropy nor weights.
"""

from typing import TYPE_CHECKING

from fusion_core.lazy import lazy_exports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mantis_photoz import calibrate, fetch, metrics, shapley, simulate
    from mantis_photoz.config import FusionConfig
    from mantis_photoz.convert import load_official
    from mantis_photoz.cutouts import Cutouts
    from mantis_photoz.errors import CutoutError
    from mantis_photoz.estimate import PhotoZ
    from mantis_photoz.output import PhotoZResult
    from mantis_photoz.pdf import BinnedPDF
    from mantis_photoz.references import citations
    from mantis_photoz.surveys import SURVEYS, Survey
    from mantis_photoz.training import Trainer

__all__ = [
    "SURVEYS",
    "BinnedPDF",
    "CutoutError",
    "Cutouts",
    "FusionConfig",
    "PhotoZ",
    "PhotoZResult",
    "Survey",
    "Trainer",
    "__version__",
    "calibrate",
    "citations",
    "fetch",
    "load_official",
    "metrics",
    "shapley",
    "simulate",
]

# ``citations`` is a function, so its module has another name: a name equal to its submodule is the module.
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "BinnedPDF": "pdf",
        "CutoutError": "errors",
        "Cutouts": "cutouts",
        "FusionConfig": "config",
        "PhotoZ": "estimate",
        "PhotoZResult": "output",
        "SURVEYS": "surveys",
        "Survey": "surveys",
        "Trainer": "training",
        "calibrate": "calibrate",
        "citations": "references",
        "fetch": "fetch",
        "load_official": "convert",
        "metrics": "metrics",
        "shapley": "shapley",
        "simulate": "simulate",
    },
)
