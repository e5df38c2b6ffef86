"""FuseChat: fuse chat models of any tokenizer into one by aligned distributions, then merge.

Names load their module on first use, so ``import fusechat`` costs little more than PyTorch.
"""

from typing import TYPE_CHECKING

from fusion_core.lazy import lazy_exports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fusechat import align, merge
    from fusechat.collate import FusionCollator
    from fusechat.collecting import collect
    from fusechat.errors import AlignmentError, IncompatibleCheckpoints, UnsupportedTokenizer
    from fusechat.objective import FusionLoss, LossOutput
    from fusechat.store import TopKStore
    from fusechat.targets import FusionBatch, Targets
    from fusechat.trainer import FusionTrainer

__all__ = [
    "AlignmentError",
    "FusionBatch",
    "FusionCollator",
    "FusionLoss",
    "FusionTrainer",
    "IncompatibleCheckpoints",
    "LossOutput",
    "Targets",
    "TopKStore",
    "UnsupportedTokenizer",
    "__version__",
    "align",
    "collect",
    "merge",
]

if not TYPE_CHECKING:  # which would let a type checker take any name
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "AlignmentError": "errors",
            "FusionBatch": "targets",
            "FusionCollator": "collate",
            "FusionLoss": "objective",
            "FusionTrainer": "trainer",
            "IncompatibleCheckpoints": "errors",
            "LossOutput": "objective",
            "Targets": "targets",
            "TopKStore": "store",
            "UnsupportedTokenizer": "errors",
            "align": "align",
            "collect": "collecting",
            "merge": "merge",
        },
    )
