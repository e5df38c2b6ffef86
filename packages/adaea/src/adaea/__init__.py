"""AdaEA: audit a classifier that you own or may test against adaptive ensemble transfer attacks.

Names load their module on first use, so ``import adaea`` costs little more than PyTorch.
"""

from typing import TYPE_CHECKING

from fusion_core.lazy import lazy_exports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from adaea import defences
    from adaea.advset import AdversarialSet
    from adaea.agm import agm_weights, loss_matrix
    from adaea.attack import AdaEA
    from adaea.auditing import audit
    from adaea.auditreport import AuditReport
    from adaea.baselines import Ens
    from adaea.drf import disparity_filter, disparity_map
    from adaea.evaluation import compare, evaluate, importance
    from adaea.models import load_model, load_official
    from adaea.trace import Trace
    from adaea.transforms import DI, SI, TI, Admix
    from adaea.updates import Momentum, Nesterov, Variance

__all__ = [
    "DI",
    "SI",
    "TI",
    "AdaEA",
    "Admix",
    "AdversarialSet",
    "AuditReport",
    "Ens",
    "Momentum",
    "Nesterov",
    "Trace",
    "Variance",
    "__version__",
    "agm_weights",
    "audit",
    "compare",
    "defences",
    "disparity_filter",
    "disparity_map",
    "evaluate",
    "importance",
    "load_model",
    "load_official",
    "loss_matrix",
]

if not TYPE_CHECKING:  # which would let a type checker take any name
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "DI": "transforms",
            "SI": "transforms",
            "TI": "transforms",
            "AdaEA": "attack",
            "Admix": "transforms",
            "AdversarialSet": "advset",
            "AuditReport": "auditreport",
            "Ens": "baselines",
            "Momentum": "updates",
            "Nesterov": "updates",
            "Trace": "trace",
            "Variance": "updates",
            "agm_weights": "agm",
            "audit": "auditing",
            "compare": "evaluation",
            "defences": "defences",
            "disparity_filter": "drf",
            "disparity_map": "drf",
            "evaluate": "evaluation",
            "importance": "evaluation",
            "load_model": "models",
            "load_official": "models",
            "loss_matrix": "agm",
        },
    )
