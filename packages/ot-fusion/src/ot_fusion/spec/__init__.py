"""Declarations of architectures: written by hand, read from a model, proved numerically."""

from ot_fusion.spec.builder import SpecBuilder
from ot_fusion.spec.files import load_spec, save_spec
from ot_fusion.spec.infer import infer_spec
from ot_fusion.spec.registry import spec_for
from ot_fusion.spec.types import AlignmentSpec, Axis, Concat, Op, Space, TensorSpec
from ot_fusion.spec.verify import verify_spec

__all__ = [
    "AlignmentSpec",
    "Axis",
    "Concat",
    "Op",
    "Space",
    "SpecBuilder",
    "TensorSpec",
    "infer_spec",
    "load_spec",
    "save_spec",
    "spec_for",
    "verify_spec",
]
