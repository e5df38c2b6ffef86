"""DBNet++: find text in photographs and scans by differentiable binarization and adaptive scale fusion.

``TextDetector.from_pretrained()`` is a detector that works; ``DBNet``, ``DBLoss``, ``make_targets`` and
``Trainer`` make others; ``db``, ``shrink_map``, ``quads_from_map``, ``iou_protocol`` and the rest are the
equations of the method on arrays. Names are loaded on first use.
"""

from typing import TYPE_CHECKING

from fusion_core.lazy import lazy_exports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dbnet_asf import datasets, losses
    from dbnet_asf.binarization import db
    from dbnet_asf.checkpoint import load_official
    from dbnet_asf.config import DBConfig, PostConfig, TrainConfig
    from dbnet_asf.detect import TextDetector
    from dbnet_asf.detection import Detection, Region
    from dbnet_asf.diagnosing import diagnose
    from dbnet_asf.errors import AnnotationError
    from dbnet_asf.evaluation import evaluate
    from dbnet_asf.export import export_onnx
    from dbnet_asf.geometry import unclip
    from dbnet_asf.losses import DBLoss
    from dbnet_asf.model.dbnet import DBNet, DBOutput
    from dbnet_asf.postprocess import PostProcess, polygons_from_map, quads_from_map
    from dbnet_asf.protocols import deteval_protocol, iou_protocol
    from dbnet_asf.targets import make_targets, shrink_map, threshold_map
    from dbnet_asf.train import Trainer

__all__ = [
    "AnnotationError",
    "DBConfig",
    "DBLoss",
    "DBNet",
    "DBOutput",
    "Detection",
    "PostConfig",
    "PostProcess",
    "Region",
    "TextDetector",
    "TrainConfig",
    "Trainer",
    "__version__",
    "datasets",
    "db",
    "deteval_protocol",
    "diagnose",
    "evaluate",
    "export_onnx",
    "iou_protocol",
    "load_official",
    "losses",
    "make_targets",
    "polygons_from_map",
    "quads_from_map",
    "shrink_map",
    "threshold_map",
    "unclip",
]

if not TYPE_CHECKING:  # which would let a type checker take any name
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "AnnotationError": "errors",
            "DBConfig": "config",
            "DBLoss": "losses",
            "DBNet": "model.dbnet",
            "DBOutput": "model.dbnet",
            "Detection": "detection",
            "PostConfig": "config",
            "PostProcess": "postprocess",
            "Region": "detection",
            "TextDetector": "detect",
            "TrainConfig": "config",
            "Trainer": "train",
            "datasets": "datasets",
            "db": "binarization",
            "deteval_protocol": "protocols",
            "diagnose": "diagnosing",
            "evaluate": "evaluation",
            "export_onnx": "export",
            "iou_protocol": "protocols",
            "load_official": "checkpoint",
            "losses": "losses",
            "make_targets": "targets",
            "polygons_from_map": "postprocess",
            "quads_from_map": "postprocess",
            "shrink_map": "targets",
            "threshold_map": "targets",
            "unclip": "geometry",
        },
    )
