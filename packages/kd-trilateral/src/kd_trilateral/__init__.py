"""TGeo-KD: per-sample distillation ratios from trilateral geometry; ``alpha`` is the weight of the TEACHER.

Names load their module on first use, so ``import kd_trilateral`` costs little.
"""

from typing import TYPE_CHECKING

from fusion_core.lazy import lazy_exports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kd_trilateral import ratios, report
    from kd_trilateral.bilevel import Bilevel
    from kd_trilateral.cache import TeacherCache
    from kd_trilateral.classmean import class_mean
    from kd_trilateral.config import Config
    from kd_trilateral.directional import per_sample_directional
    from kd_trilateral.errors import DivergedError, StateError
    from kd_trilateral.geometry import Geometry, features, register_geometry
    from kd_trilateral.hyper import hypergradient
    from kd_trilateral.losses import kd_terms, mix
    from kd_trilateral.module import Output, TrilateralKD
    from kd_trilateral.preconditioner import precondition
    from kd_trilateral.ratio import RatioNet
    from kd_trilateral.trace import AlphaTrace
    from kd_trilateral.training import FitResult, fit

__all__ = [
    "AlphaTrace",
    "Bilevel",
    "Config",
    "DivergedError",
    "FitResult",
    "Geometry",
    "Output",
    "RatioNet",
    "StateError",
    "TeacherCache",
    "TrilateralKD",
    "__version__",
    "class_mean",
    "features",
    "fit",
    "hypergradient",
    "kd_terms",
    "mix",
    "per_sample_directional",
    "precondition",
    "ratios",
    "register_geometry",
    "report",
]

if not TYPE_CHECKING:  # which would let a type checker take any name
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "AlphaTrace": "trace",
            "Bilevel": "bilevel",
            "Config": "config",
            "DivergedError": "errors",
            "FitResult": "training",
            "Geometry": "geometry",
            "Output": "module",
            "RatioNet": "ratio",
            "StateError": "errors",
            "TeacherCache": "cache",
            "TrilateralKD": "module",
            "class_mean": "classmean",
            "features": "geometry",
            "fit": "training",
            "hypergradient": "hyper",
            "kd_terms": "losses",
            "mix": "losses",
            "per_sample_directional": "directional",
            "precondition": "preconditioner",
            "ratios": "ratios",
            "register_geometry": "geometry",
            "report": "report",
        },
    )
