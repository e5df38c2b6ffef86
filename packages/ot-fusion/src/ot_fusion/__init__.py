"""Fuse networks that were trained apart into one, by optimal transport of their neurons.

Names load their module on first use, so ``import ot_fusion`` costs little more than PyTorch.
"""

from typing import TYPE_CHECKING

from fusion_core.lazy import lazy_exports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ot_fusion import spec
    from ot_fusion.apply import align_conv, align_embedding, align_linear, align_vector
    from ot_fusion.config import FusionConfig
    from ot_fusion.cost import ground_cost
    from ot_fusion.diagnosing import diagnose
    from ot_fusion.errors import IllegalMapError, SolverError, SpecError
    from ot_fusion.fusing import Aligned, Fused, align, fuse
    from ot_fusion.layers import fuse_encoder_block, fuse_linear
    from ot_fusion.metrics import check_equivalence, interpolate
    from ot_fusion.moments import Moments
    from ot_fusion.plan import Plan
    from ot_fusion.policies import merge_maps
    from ot_fusion.solvers import solve

__all__ = [
    "Aligned",
    "Fused",
    "FusionConfig",
    "IllegalMapError",
    "Moments",
    "Plan",
    "SolverError",
    "SpecError",
    "__version__",
    "align",
    "align_conv",
    "align_embedding",
    "align_linear",
    "align_vector",
    "check_equivalence",
    "diagnose",
    "fuse",
    "fuse_encoder_block",
    "fuse_linear",
    "ground_cost",
    "interpolate",
    "merge_maps",
    "solve",
    "spec",
]

if not TYPE_CHECKING:  # which would let a type checker take any name
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "interpolate": "metrics",
            "diagnose": "diagnosing",
            "check_equivalence": "metrics",
            "fuse": "fusing",
            "align": "fusing",
            "Moments": "moments",
            "Fused": "fusing",
            "Aligned": "fusing",
            "FusionConfig": "config",
            "IllegalMapError": "errors",
            "Plan": "plan",
            "SolverError": "errors",
            "SpecError": "errors",
            "align_conv": "apply",
            "align_embedding": "apply",
            "align_linear": "apply",
            "align_vector": "apply",
            "fuse_encoder_block": "layers",
            "fuse_linear": "layers",
            "ground_cost": "cost",
            "merge_maps": "policies",
            "solve": "solvers",
            "spec": "spec",
        },
    )
