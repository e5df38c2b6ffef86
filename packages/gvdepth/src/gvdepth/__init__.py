"""GVDepth: metric depth from one camera on a ground vehicle, by probabilistic fusion of two cues.

Names load their module on first use, so ``import gvdepth`` costs little more than PyTorch; the geometry
needs no weights.
"""

from typing import TYPE_CHECKING

from fusion_core.lazy import lazy_exports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gvdepth import cameras, data, simulate
    from gvdepth.calibration import Calibration, calibrate
    from gvdepth.camera import Camera
    from gvdepth.canonical import fct, fct_inverse, vct, vct_inverse
    from gvdepth.config import GVDepthConfig
    from gvdepth.diagnosis import doctor
    from gvdepth.errors import CalibrationError, CameraError, GeometryError
    from gvdepth.evaluation import evaluate
    from gvdepth.fusion import fuse
    from gvdepth.geometry import ground_depth, horizon
    from gvdepth.losses import consistency_loss, silog_loss, uncertainty_loss
    from gvdepth.measures import metrics
    from gvdepth.modeling import GVDepth
    from gvdepth.predict import DepthOutput
    from gvdepth.propagation import propagate
    from gvdepth.train import TrainConfig, Trainer

__all__ = [
    "Calibration",
    "CalibrationError",
    "Camera",
    "CameraError",
    "DepthOutput",
    "GVDepth",
    "GVDepthConfig",
    "GeometryError",
    "TrainConfig",
    "Trainer",
    "__version__",
    "calibrate",
    "cameras",
    "consistency_loss",
    "data",
    "doctor",
    "evaluate",
    "fct",
    "fct_inverse",
    "fuse",
    "ground_depth",
    "horizon",
    "metrics",
    "propagate",
    "silog_loss",
    "simulate",
    "uncertainty_loss",
    "vct",
    "vct_inverse",
]

if not TYPE_CHECKING:  # which would let a type checker take any name
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "Calibration": "calibration",
            "CalibrationError": "errors",
            "Camera": "camera",
            "CameraError": "errors",
            "DepthOutput": "predict",
            "GVDepth": "modeling",
            "GVDepthConfig": "config",
            "GeometryError": "errors",
            "TrainConfig": "train",
            "Trainer": "train",
            "calibrate": "calibration",
            "cameras": "cameras",
            "consistency_loss": "losses",
            "data": "data",
            "doctor": "diagnosis",
            "evaluate": "evaluation",
            "fct": "canonical",
            "fct_inverse": "canonical",
            "fuse": "fusion",
            "ground_depth": "geometry",
            "horizon": "geometry",
            "metrics": "measures",
            "propagate": "propagation",
            "silog_loss": "losses",
            "simulate": "simulate",
            "uncertainty_loss": "losses",
            "vct": "canonical",
            "vct_inverse": "canonical",
        },
    )
