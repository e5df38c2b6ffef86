"""Dynamic logits fusion: small experts steer a large language model while it decodes.

Names load their module on first use: ``import logit_fusion`` and ``fuse_logits`` need PyTorch, no
transformers.
"""

from typing import TYPE_CHECKING

from fusion_core.lazy import lazy_exports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from logit_fusion.cache import FusedCache
    from logit_fusion.config import FusionConfig
    from logit_fusion.errors import (
        ContextLengthError,
        EmptySupportError,
        NonFiniteLogitsError,
        UnpairedExpertWarning,
        VocabularyMismatchError,
    )
    from logit_fusion.fuse import FusionStep, fuse_logits
    from logit_fusion.member import Expert
    from logit_fusion.model import FusedModel
    from logit_fusion.processor import FusionLogitsProcessor
    from logit_fusion.score import Scores
    from logit_fusion.task_vectors import merge_task_vectors
    from logit_fusion.trace import FusionTrace
    from logit_fusion.vocab import check_vocabulary

__all__ = [
    "ContextLengthError",
    "EmptySupportError",
    "Expert",
    "FusedCache",
    "FusedModel",
    "FusionConfig",
    "FusionLogitsProcessor",
    "FusionStep",
    "FusionTrace",
    "NonFiniteLogitsError",
    "Scores",
    "UnpairedExpertWarning",
    "VocabularyMismatchError",
    "__version__",
    "check_vocabulary",
    "fuse_logits",
    "merge_task_vectors",
]

if not TYPE_CHECKING:  # which would let a type checker take any name
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "ContextLengthError": "errors",
            "EmptySupportError": "errors",
            "Expert": "member",
            "FusedCache": "cache",
            "FusedModel": "model",
            "FusionConfig": "config",
            "FusionLogitsProcessor": "processor",
            "FusionStep": "fuse",
            "FusionTrace": "trace",
            "NonFiniteLogitsError": "errors",
            "Scores": "score",
            "UnpairedExpertWarning": "errors",
            "VocabularyMismatchError": "errors",
            "check_vocabulary": "vocab",
            "fuse_logits": "fuse",
            "merge_task_vectors": "task_vectors",
        },
    )
